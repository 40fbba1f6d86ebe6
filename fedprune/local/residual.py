"""What a client has not yet told of its training: kept from one message to the next.

One float32 for each weight, and the mask that they are under: the message that changes the mask
does not bring the old one again. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.exchange.uplink import weights
from sparsemodel.codec import decode_mask, decode_state, encode_mask, encode_state
from sparsemodel.errors import MaskMismatch
from sparsemodel.runtime.adjust import carry
from sparsemodel.runtime.state import SparseState

RESIDUAL = "residual"
_MASK = "residual under "  # and the mask's digest


def recall(kept: Mapping[str, bytes], state: SparseState) -> SparseState | None:
    """The residual under the patterns of `state`; None where nothing is kept.

    A weight that was pruned since has none any more, one that was grown none yet.
    """
    if RESIDUAL not in kept:
        return None
    shapes = weights(state).shapes()
    try:
        return decode_state(kept[RESIDUAL], shapes=shapes, patterns=state.patterns)
    except MaskMismatch:
        masks = [decode_mask(data) for name, data in kept.items() if name.startswith(_MASK)]
        patterns = masks[0] if masks else None  # none: the model was dense
        before = decode_state(kept[RESIDUAL], shapes=shapes, patterns=patterns)
    assert state.patterns is not None, "a model stays pruned"
    return carry(before, state.patterns)


def keep(kept: dict[str, bytes], residual: SparseState) -> None:
    """Leave the residual in `kept` in place of the one before."""
    kept[RESIDUAL] = encode_state(residual)
    if residual.patterns is None:
        return
    named = f"{_MASK}{residual.patterns.digest()}"
    if named not in kept:
        for old in [name for name in kept if name.startswith(_MASK)]:
            del kept[old]
        kept[named] = encode_mask(residual.patterns)
