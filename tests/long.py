"""How long property tests of hostile input search."""

from __future__ import annotations

from hypothesis import settings

FACTOR = 100 if settings.get_current_profile_name() == "long" else 1
"""1, or with `pytest --hypothesis-profile=long` 100."""
