"""Objects that a user names as "module:name"."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

IMPORTED = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")  # what such a name looks like


def imported(name: str) -> Any:
    """What "module:name" names, looked for in the working folder and among what is installed.

    Raises:
        ImportError: there is no such module, or nothing of that name in it.

    >>> imported("math:pi")
    3.141592653589793
    """
    module, _, path = name.partition(":")
    with _from_here() as here:
        try:
            return attrgetter(path)(import_module(module))
        except AttributeError:
            raise ImportError(f"{module!r} has no {path!r}") from None
        except (ImportError, ValueError) as error:
            raise ImportError(
                f"cannot import {module!r} ({error}); it is looked for in {here} and among what "
                "is installed"
            ) from error


def source_digest(name: str) -> str:
    """16 hexadecimal digits of the code that "module:name" lies in: its whole top-level package.

    Nothing is imported. Empty for what is no Python file, or not there.
    """
    module = name.partition(":")[0].partition(".")[0]
    with _from_here():
        try:
            spec = find_spec(module)
        except ValueError:  # of __main__
            spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.py"))]
    if spec and not folders and str(spec.origin).endswith(".py"):
        files = [Path(str(spec.origin))]
    sha = sha256()
    for file in files:
        sha.update(f"{file.name}\n".encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()[:16] if files else ""


@contextmanager
def _from_here() -> Iterator[str]:
    """Modules are looked for in the working folder first, as long as this lasts."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield here
    finally:
        sys.path.remove(here)
