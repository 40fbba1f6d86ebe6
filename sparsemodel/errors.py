"""Errors that this package raises for its users; each is also a ValueError."""

from __future__ import annotations


class SparseModelError(ValueError):
    """Base class: something that the caller passed in cannot be used as it is."""


class MaskError(SparseModelError):
    """A mask does not fit its model, its shapes or another mask."""


class DensityError(SparseModelError):
    """A density outside (0, 1], or too low to leave one weight in every layer."""


class CalibrationError(SparseModelError):
    """Statistics that are missing, do not fit, or cannot be collected as asked."""


class ProtocolError(SparseModelError):
    """A judgement of a pruning that cannot be made of what was given."""


class CodecError(SparseModelError):
    """Bytes that are not a valid frame: damaged, truncated, too large or of another version."""


class CheckpointError(SparseModelError):
    """A checkpoint file that is missing, damaged or made for something else."""


class ExportError(SparseModelError):
    """A model that another format cannot hold, or that computes something else there."""


class MaskMismatch(CodecError):  # noqa: N818 - the event's name; a receiver catches it to re-sync
    """A frame was made for another mask than the receiver holds: the two must re-synchronise."""


class PlanError(SparseModelError):
    """A model that no training plan can be made of: train it through its modules instead."""


class ProgramError(SparseModelError):
    """A text that describes no program, or a program that cannot be run."""


class NotInstalledError(ImportError, SparseModelError):
    """A package that is not installed; says which extra brings it."""


class NativeLibraryWarning(UserWarning):
    """The native kernels cannot be used, so that the slower reference computes instead."""
