"""The installed version of this distribution."""

from datapruning.version import __version__

__all__ = ["__version__"]
