"""Objects that a user names as "module:name"."""

from __future__ import annotations

import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any


def imported(name: str) -> Any:
    """What "module:name" names, looked for in the working folder and among what is installed.

    Raises:
        ImportError: there is no such module, or nothing of that name in it.

    >>> imported("math:pi")
    3.141592653589793
    """
    module, _, path = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return attrgetter(path)(import_module(module))
    except AttributeError:
        raise ImportError(f"{module!r} has no {path!r}") from None
    except (ImportError, ValueError) as error:
        raise ImportError(
            f"cannot import {module!r} ({error}); it is looked for in {here} and among what is "
            "installed"
        ) from error
    finally:
        sys.path.remove(here)
