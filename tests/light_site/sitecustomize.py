"""In a process that finds this file first, and in its children, what a device lacks is missing."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

MISSING = {
    "torch", "torchvision", "datasets", "pyarrow", "pandas", "sklearn", "scipy", "matplotlib",
    "jinja2", "ray", "flwr_datasets",
}  # fmt: skip


class Missing(MetaPathFinder):
    """Finds nothing under these names, and says so as Python does."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


sys.meta_path.insert(0, Missing())
