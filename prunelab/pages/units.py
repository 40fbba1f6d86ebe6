"""Numbers as people read them: bytes, durations, shares; a dash for what is not known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

NOTHING = "–"


def format_bytes(num_bytes: float | None) -> str:
    """Bytes in decimal units, three digits; an en dash for None or what is not finite.

    >>> format_bytes(999), format_bytes(12_345), format_bytes(999_999)
    ('999 B', '12.3 kB', '1.00 MB')
    """
    value = known_number(num_bytes)
    if value is None:
        return NOTHING
    units = ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    decimals = 0 if units[0] == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f} {units[0]}"


def format_seconds(seconds: float | None) -> str:
    """A duration in the two largest units; an en dash for None or what is not finite.

    >>> format_seconds(4.2), format_seconds(125), format_seconds(7500)
    ('4.2 s', '2 min 05 s', '2 h 05 min')
    """
    value = known_number(seconds)
    if value is None:
        return NOTHING
    if value < 59.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    if value < 3599.5:
        return f"{round(value) // 60} min {round(value) % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(value / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def known_number(value: Any) -> float | None:
    """The value as a float, or None if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def rounded(value: Any, form: str = ".4g") -> str:
    """A number in the given format, a dash where there is none."""
    number = known_number(value)
    return NOTHING if number is None else format(number, form)


def percent(value: Any) -> str:
    """A share of 1 in per cent, a dash where there is none."""
    number = known_number(value)
    return NOTHING if number is None else f"{100 * number:.2f} %"


def mean_and_spread(values: Iterable[Any], form: str = ".2f", *, scale: float = 1) -> str:
    """Mean ± sample standard deviation of values times `scale`; a dash where one is not known.

    A plus in `form` gives the mean its sign; a single value has no spread.

    >>> mean_and_spread([0.5, 0.52], scale=100), mean_and_spread([0.5, None])
    ('51.00 ± 1.41', '–')
    >>> mean_and_spread([2.0], "+.1f")
    '+2.0'
    """
    known = [known_number(value) for value in values]
    scaled = [scale * value for value in known if value is not None]
    if not scaled or len(scaled) < len(known):
        return NOTHING
    spread = f" ± {statistics.stdev(scaled):{form.lstrip('+')}}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):{form}}{spread}"
