"""Which extra of the distribution brings a package that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from sparsemodel.errors import NotInstalledError

EXTRAS = {
    "torch": "torch",
    "torchvision": "torch",
    "datasets": "torch",
    "pyarrow": "torch",
    "sklearn": "torch",
    "scipy": "torch",
    "matplotlib": "torch",
    "jinja2": "torch",
    "PIL": "device",
    "ray": "sim",
    "kronfluence": "influence",
}
"""Package -> the extra; a device has none of them but Pillow."""


@contextmanager
def extras_named(what: str) -> Iterator[None]:
    """Where a package is missing inside, say which extra brings it.

    Args:
        what: needs the package: a name or a command, with which the error begins.

    Raises:
        NotInstalledError: instead of ModuleNotFoundError of a package in EXTRAS.

    >>> with extras_named("this"):
    ...     raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    Traceback (most recent call last):
    ...
    sparsemodel.errors.NotInstalledError: this needs torch: pip install 'fedprune[torch]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise _missing(what, package) from error


def need(package: str, what: str) -> None:
    """Raise NotInstalledError unless a package of EXTRAS is installed; it is not imported."""
    try:
        found = find_spec(package) is not None
    except ImportError:
        found = False
    if not found:
        raise _missing(what, package)


def _missing(what: str, package: str) -> NotInstalledError:
    return NotInstalledError(
        f"{what} needs {package}: pip install 'fedprune[{EXTRAS[package]}]'", name=package
    )
