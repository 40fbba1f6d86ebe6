"""The installed version of this distribution."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedprune")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"
