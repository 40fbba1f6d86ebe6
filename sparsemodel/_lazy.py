"""Packages whose names are imported when first used, so that importing a package stays cheap."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sparsemodel.extras import extras_named


def lazy(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        homes: module -> the names, separated by spaces, that the package offers of it.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def __getattr__(name: str) -> Any:  # noqa: N807 - what Python calls for a module
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with extras_named(f"{package}.{name}"):
            value = getattr(importlib.import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted(vars(sys.modules[package]).keys() | home_of.keys())

    return __getattr__, __dir__
