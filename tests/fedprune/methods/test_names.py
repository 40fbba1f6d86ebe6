"""A method is known by its name in its own file and in the registry, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import fedprune
from fedprune.methods import METHODS

ROOT = Path(fedprune.__file__).parent.parent
PACKAGES = ("fedprune", "prunelab", "sparsemodel", "datapruning")
# The front door offers the classes, by names that type checkers can see.
FRONT_DOOR = ROOT / "fedprune" / "__init__.py"
REGISTRY = ROOT / "fedprune" / "methods" / "__init__.py"
# English, or the name of a criterion or a recovery too: no method is meant where it is not the
# whole text, where files speak of criteria.
WORDS = {"magnitude", "random", "snip", "grasp", "synflow", "wanda", "perp"}
CLASSES = {method.__name__: method for method in METHODS.values() if method.name != "fedavg"}


def homes(name: str) -> set[Path]:
    """The files that may speak of a method: its own, and the registry."""
    module = METHODS[name].__module__.removeprefix("fedprune.").split(".")
    own = ROOT.joinpath("fedprune", *module)
    return {own.with_suffix(".py"), own / "__init__.py", REGISTRY}


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every text of a file but its docstrings, with its line."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.ImportFrom(module=module, names=names):
                yield from ((node.lineno, alias.name) for alias in names)
                yield node.lineno, str(module)
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)


def sources() -> list[tuple[Path, ast.Module]]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in files]


def of_criteria(path: Path) -> bool:
    """Whether a file speaks of criteria, not of methods: those of models pruned in one place."""
    inside = path.relative_to(ROOT).parts
    return inside[0] != "fedprune" or inside[1] == "language"


def means(text: str, name: str) -> bool:
    """Whether a text names a method."""
    if name in WORDS:
        return text == name or re.search(rf"method\W+{name}\b", text) is not None
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text) is not None


def test_texts_that_name_a_method_are_told_from_others() -> None:
    for text in ("fedtiny", "unlike fedtiny, this", "method 'fedtiny'", "use method 'magnitude'"):
        assert any(means(text, name) for name in METHODS)
    for text in ("fedtiny_cifar10", "fedprune.methods.fedtiny", "a value of magnitude 3"):
        assert not any(means(text, name) for name in METHODS)
    assert not means("fedtiny-fixed", "fedtiny")


def test_a_method_s_name_stands_in_its_file_and_the_registry_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r:.80} names {name}"
        for path, tree in sources()
        for line, text in texts(tree)
        for name in METHODS
        if means(text, name) and path not in homes(name)
        if not (name in WORDS and of_criteria(path))
    ]
    assert found == []


def test_nothing_but_the_registry_and_the_front_door_knows_a_method_s_class() -> None:
    inside = ROOT / "fedprune" / "methods"
    template = ROOT / "fedprune" / "flower" / "template"  # as if a user had written it
    found = []
    for path, tree in sources():
        if path == FRONT_DOOR or path.is_relative_to(inside) or path.is_relative_to(template):
            continue
        for line, name in identifiers(tree):
            own_file = name.startswith("fedprune.methods.") and name != "fedprune.methods.base"
            if name in CLASSES or own_file:
                found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert found == []


def test_names_and_classes_are_told_apart() -> None:
    assert [method.name for method in METHODS.values()] == list(METHODS)
    assert len(set(METHODS.values())) == len(METHODS)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in METHODS)
