"""Errors that both products raise for their users; each is also a ValueError."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


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


class DataWarning(PrunelabWarning):
    """Data that were converted, or taken in one way where the user may have meant another."""


def check_settings(
    what: str, checks: Mapping[str, bool], *, error: type[PrunelabError] = RunError
) -> None:
    """Refuse settings that are out of range, all of them at once.

    Args:
        checks: what is wrong where a condition does not hold -> the condition.

    Raises:
        error: of the class given.

    >>> check_settings("training", {"lr must be positive, got 0.1": True})
    """
    problems = [problem for problem, holds in checks.items() if not holds]
    if problems:
        raise error(f"{what}: {'; '.join(problems)}")


def close_names(name: str, known: Iterable[str]) -> str:
    """A question for the end of a message about an unknown name; "" where none is like it.

    >>> close_names("digitz", ["digits", "cifar10"])
    "; did you mean 'digits'?"
    """
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
