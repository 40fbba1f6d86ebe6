"""Parts of pages that are made of the code: commands, settings, names, tables, scripts.

A page asks for one by a comment of its own line, `<!-- site: commands fedprune -->`. Where the
repository is read without the site the comment shows nothing, and the page says where to look.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_MARKER = re.compile(r"^<!-- site: (\w+)(?: (\S+))? -->$", re.MULTILINE)


def fill(markdown: str, root: Path) -> str:
    """The text with each marker replaced by what it asks for."""
    makers: dict[str, Callable[[str], str]] = {
        "api": _names,
        "commands": _commands,
        "settings": lambda _: _settings(),
        "methods": lambda _: _methods(),
        "simulations": lambda _: _simulations(root),
        "script": lambda path: f"```python\n{(root / path).read_text(encoding='utf-8')}```",
    }
    return _MARKER.sub(lambda match: makers[match[1]](match[2]), markdown)


def _names(package: str) -> str:
    """A directive of mkdocstrings for each public name of a package: functions, classes, others."""
    module = importlib.import_module(package)
    kinds = {name: getattr(module, name) for name in module.__all__}
    names = sorted(kinds, key=lambda name: (not inspect.isroutine(kinds[name]),
                                            not inspect.isclass(kinds[name]), name))  # fmt: skip
    return "\n\n".join(f"::: {package}.{name}" for name in names if not name.startswith("__"))


def _commands(program: str) -> str:
    """Every command of a program with its arguments and options, from the program itself."""
    import typer  # noqa: PLC0415

    app = importlib.import_module(f"{program}.cli").cli
    return "\n\n".join(_command(typer.main.get_command(app), program))


def _command(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if name.count(" "):
        yield f"### {name}\n\n{inspect.cleandoc(command.help or '')}"
    options = [one for one in command.params if one.name not in {"help", "version", "debug"}]
    if options and not inner:
        rows = [(_spelled(one), _default(one), getattr(one, "help", "") or "") for one in options]
        yield _table(("argument or option", "default", "what it is"), rows)
    for part, child in inner.items():
        yield from _command(child, f"{name} {part}")


def _spelled(option: Any) -> str:
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`"
    return ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    return "" if value in {None, "", False} or callable(value) else f"`{value}`"


def _settings() -> str:
    """Every key of a run's configuration with its default, from the dataclasses."""
    from fedprune import settings  # noqa: PLC0415
    from fedprune.methods import METHODS  # noqa: PLC0415

    sections = {
        "data": settings.DataConfig,
        "model": settings.ModelConfig,
        "training": settings.TrainingConfig,
        "server": settings.ServerConfig,
        "federation": settings.FederationConfig,
        "privacy": settings.PrivacyConfig,
    }
    parts = [f"### {name}\n\n{_section(kind, name)}" for name, kind in sections.items()]
    parts.append("## Settings of methods")
    for name, method in METHODS.items():
        if dataclasses.fields(method):
            parts.append(f"### {name}\n\n{_section(method, 'method')}")
    return "\n\n".join(parts)


def _section(kind: type[Any], section: str) -> str:
    words = inspect.cleandoc(kind.__doc__ or "")
    rows = [
        (f"`{section}.{field.name}`", f"`{field.default!r}`" if field.default != "" else "empty")
        for field in dataclasses.fields(kind)
    ]
    return f"{_as_markdown(words)}\n\n{_table(('key', 'default'), rows)}"


def _as_markdown(docstring: str) -> str:
    """A docstring's sections of the form "Attributes:" as lists."""
    text = re.sub(r"^([A-Z]\w+):$\n", r"**\1:**\n\n", docstring, flags=re.MULTILINE)
    return re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)


def _methods() -> str:
    """The federated methods as ways of pruning."""
    from fedprune.methods import TRAITS  # noqa: PLC0415

    rows = [
        (
            f"`{name}`", one.when, ", ".join(one.units) or "–", one.criterion,
            ", ".join(one.data) or "–", one.source,
        )
        for name, one in TRAITS.items()
    ]  # fmt: skip
    return _table(("method", "when", "units", "goes by", "looks at", "source"), rows)


def _simulations(root: Path) -> str:
    """The saved pages with the command and the commits that each names."""
    rows = []
    for path in sorted((root / "simulations").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        command = re.search(r"`(python -m simulations\.[^`]+)`", text)
        commits = re.search(r"^- commit ((?:[0-9a-f]{7}(?:-dirty)?(?:, )?)+)", text, re.MULTILINE)
        if command and commits:
            title = text.splitlines()[0].removeprefix("# ")
            commit = commits[1].rstrip(", ")
            rows.append((f"[{title}](../simulations/{path.name})", commit, f"`{command[1]}`"))
    return _table(("page", "commits", "command"), rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |"
        for line in lines
    )
