"""Each method says what kind of pruning it is, and its class bears it out."""

from __future__ import annotations

import pytest

from fedprune.methods import METHODS, TRAITS
from fedprune.methods.adjusting import Adjusting
from fedprune.methods.fixed_mask import FixedMask
from fedprune.methods.widths import WidthTiers
from sparsemodel.taxonomy import BEFORE, CHANNELS, DURING, NEVER, WEIGHTS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_of_its_kind(name: str) -> None:
    kind, traits = METHODS[name], TRAITS[name]
    assert traits.when in {BEFORE, DURING, NEVER}
    assert traits.criterion
    assert traits.source
    assert (traits.when == NEVER) == (not traits.units)
    if issubclass(kind, Adjusting):
        assert traits.when == DURING
    elif issubclass(kind, FixedMask):
        assert traits.when == BEFORE
    if issubclass(kind, WidthTiers):
        assert traits.units == (CHANNELS,)
    if issubclass(kind, FixedMask):
        assert WEIGHTS in traits.units
    if set(kind.actions) != {"train"} and WEIGHTS in traits.units:  # it asks clients for more
        assert traits.data == ("clients' samples",)
