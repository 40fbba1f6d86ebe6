"""Errors that both products raise for their users; each is also a ValueError."""

from __future__ import annotations


class PrunelabError(ValueError):
    """Base class: something that the user asked for cannot be done as it is."""


class DataError(PrunelabError):
    """A data set that is unknown or damaged, or that cannot be split as asked."""


class ModelError(PrunelabError):
    """A model that is unknown, or that does not fit its input or its state."""


class RunError(PrunelabError):
    """A run that cannot start, continue or finish."""


class PrunelabWarning(UserWarning):
    """Base class: something that works, but not as well as the user may expect."""
