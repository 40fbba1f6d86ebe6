"""A new app of Flower's, copied from the template beside this file."""

from __future__ import annotations

import json
import keyword
import re
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from fedprune.errors import ConfigError
from fedprune.flower import template

SOURCE = Path(template.__file__).parent
NAME, PACKAGE = "my-app", "my_app"  # of the template
REQUIREMENT = "fedprune[sim]>=0.1"
MAX_LETTERS = 32  # Flower's own bound


def new_app(path: Path) -> Path:
    """Copy the template to a new folder, under the folder's name.

    Args:
        path: of the folder; underscores, dots and spaces in its name become hyphens.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists or cannot be made, or its name is none for an app.
    """
    name = re.sub(r"[\s_.]+", "-", path.name).strip("-")
    package = name.lower().replace("-", "_")
    _check(name, package)
    folder = path.with_name(name)
    if folder.exists():
        raise ConfigError(f"{folder} exists already; give another name, or move it away")
    try:
        shutil.copytree(SOURCE, folder, ignore=_ignored)
        (folder / "gitignore").rename(folder / ".gitignore")
        if package != PACKAGE:
            (folder / PACKAGE).rename(folder / package)
        for file in (*folder.glob("*.*"), *folder.glob("*/*.py")):
            text = file.read_text(encoding="utf-8").replace(PACKAGE, package).replace(NAME, name)
            file.write_text(text.replace(REQUIREMENT, requirement()), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder} ({error.strerror})") from None
    return folder


def requirement() -> str:
    """What a bundle declares so that this fedprune is installed: by name, or from its origin.

    An installation from a folder, a file or a repository says where it came from.
    """
    try:
        origin = distribution("fedprune").read_text("direct_url.json")
    except PackageNotFoundError:
        origin = None
    if not origin:
        return REQUIREMENT
    found = json.loads(origin)
    vcs = found.get("vcs_info")
    url = f"{vcs['vcs']}+{found['url']}@{vcs['commit_id']}" if vcs else found["url"]
    return f"fedprune[sim] @ {url}"


def _check(name: str, package: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name) or len(name) > MAX_LETTERS:
        raise ConfigError(
            f"{name!r} is no name for an app: it begins with a letter and holds letters, digits "
            f"and hyphens, at most {MAX_LETTERS}"
        )
    if keyword.iskeyword(package) or (package != PACKAGE and find_spec(package) is not None):
        raise ConfigError(f"{name!r}: Python has a module {package!r} already; give another name")


def _ignored(folder: str, names: list[str]) -> set[str]:
    """The template's own __init__.py, which makes it a room of this package, and caches."""
    own = {"__init__.py"} if Path(folder) == SOURCE else set()
    return {name for name in names if name == "__pycache__" or name in own}
