"""Errors that this package raises for its users; each is also a ValueError."""

from __future__ import annotations


class FedpruneError(ValueError):
    """Base class: something that the user asked for cannot be done as it is."""


class ConfigError(FedpruneError):
    """A setting that is unknown, of the wrong type or out of range."""


class DataError(FedpruneError):
    """A data set that is unknown or damaged, or that cannot be split as asked."""


class ModelError(FedpruneError):
    """A model that is unknown, or that does not fit its input or its state."""


class RunError(FedpruneError):
    """A run that cannot start, continue or finish."""


class ClientError(FedpruneError):
    """A client that cannot take part, or an answer of one that cannot be used."""
