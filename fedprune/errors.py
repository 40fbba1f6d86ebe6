"""Errors that this package raises for its users; each is also a ValueError."""

from __future__ import annotations

from prunelab.errors import PrunelabError, PrunelabWarning
from sparsemodel.errors import SparseModelError


class FedpruneError(PrunelabError):
    """Base class: something that the user asked for cannot be done as it is."""


class ConfigError(FedpruneError):
    """A setting that is unknown, of the wrong type or out of range."""


class ClientError(FedpruneError):
    """A client that cannot take part, or an answer of one that cannot be used."""


class TrackerWarning(PrunelabWarning):
    """A tracker that failed; the run goes on without it."""


DIVERGED = "training has diverged, is training.lr too high?"
"""What messages say where weights or losses are not finite or too large."""

USER_ERRORS = (PrunelabError, SparseModelError)
"""All that a user can mend, of the three packages."""
