"""Nested settings under flat names, and how two sets of them differ."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

OR_ELSEWHERE = "leave them as they were, or begin a new run in another folder (--out)"
"""What to do where a run is to go on with settings that differ."""


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots; an empty table keeps its name.

    >>> flattened({"seed": 1, "training": {"lr": 0.1, "more": {}}})
    {'seed': 1, 'training.lr': 0.1, 'training.more': {}}
    """
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            result |= flattened(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def differences(
    now: Mapping[str, Any], before: Mapping[str, Any], *, free: Container[str] = ()
) -> list[str]:
    """Settings that differ, one phrase each; those in `free` may.

    >>> differences({"seed": 1, "training": {"lr": 0.1}}, {"seed": 2, "training": {"lr": 0.1}})
    ['seed was 2, now 1']
    """
    a, b = flattened(now), flattened(before)
    return [
        f"{key} was {b.get(key)!r}, now {a.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key not in free
    ]
