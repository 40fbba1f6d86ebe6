"""Errors that this package raises for its users; each is also a ValueError."""

from __future__ import annotations

from datapruning.errors import DatapruningError, RunError
from sparsemodel.errors import SparseModelError

__all__ = ["USER_ERRORS", "ClientError", "ConfigError", "FedpruneError", "RunError"]


class FedpruneError(ValueError):
    """Base class: something that the user asked for cannot be done as it is."""


class ConfigError(FedpruneError):
    """A setting that is unknown, of the wrong type or out of range."""


class ClientError(FedpruneError):
    """A client that cannot take part, or an answer of one that cannot be used."""


USER_ERRORS = (FedpruneError, DatapruningError, SparseModelError)
"""All that a user can mend, of the three packages."""
