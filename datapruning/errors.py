"""Errors that this package raises for its users; each is also a ValueError."""

from __future__ import annotations

from prunelab.errors import PrunelabError, PrunelabWarning


class ScoreError(PrunelabError):
    """Scores that cannot be computed, read, or used with these data."""


class SelectionError(PrunelabError):
    """A subset that cannot be chosen as asked."""


class ScoreWarning(PrunelabWarning):
    """Scores that were computed but cannot be selected by: not finite, or all equal."""


class SubsetWarning(PrunelabWarning):
    """A subset that can be trained on, but not without loss: a class has no sample in it."""
