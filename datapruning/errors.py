"""Errors that this package raises for its users; each is also a ValueError."""

from __future__ import annotations


class DatapruningError(ValueError):
    """Base class: something that the user asked for cannot be done as it is."""


class DataError(DatapruningError):
    """A data set that is unknown or damaged, or that cannot be split as asked."""


class ModelError(DatapruningError):
    """A model that is unknown, or that does not fit its input or its state."""


class ScoreError(DatapruningError):
    """Scores that cannot be computed, read, or used with these data."""


class SelectionError(DatapruningError):
    """A subset that cannot be chosen as asked."""


class RunError(DatapruningError):
    """A training or scoring run that cannot start, continue or finish."""


class ScoreWarning(UserWarning):
    """Scores that were computed but cannot be selected by: not finite, or all equal."""


class SubsetWarning(UserWarning):
    """A subset that can be trained on, but not without loss: a class has no sample in it."""
