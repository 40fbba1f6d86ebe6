"""The change from one mask to another as bytes."""

from __future__ import annotations

import numpy as np

from sparsemodel.codec.bits import decode_subset, encode_subset
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, Limits, Part, open_frame, seal_frame
from sparsemodel.codec.reader import Reader, encode_varint
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import absent_at, complement, find

# Four bytes each of the old and the new mask's digest. A receiver goes wrong only where both
# collide, which is one chance in 2**64.
DELTA_DIGEST_BYTES = 4


def encode_mask_delta(base: Patterns, new: Patterns) -> bytes:
    """A frame that turns `base` into `new`, two masks of the same names and shapes.

    Pruned positions are ranks among the active weights of `base`, grown positions ranks among
    its pruned weights; only the layers that change travel. See FORMAT.md.

    Raises:
        CodecError: the masks differ in names, order or shapes.

    >>> base = Patterns({"fc.weight": Pattern.from_positions((4,), np.array([0, 1]))})
    >>> new = Patterns({"fc.weight": Pattern.from_positions((4,), np.array([0, 3]))})
    >>> decode_mask_delta(encode_mask_delta(base, new), base=base) == new
    True
    """
    check_same_layers(base, new)
    parts: list[Part] = [_short_digest(base), _short_digest(new)]
    previous = -1
    for index, (name, old) in enumerate(base.items()):
        if old == new[name]:
            continue
        num_active = old.num_active
        pruned, grown = _changes(old, new[name])
        parts.append(encode_varint(index - previous - 1))
        # An adjustment mostly grows as many weights as it prunes: that case takes one number.
        parts.append(encode_varint(len(pruned) << 1 | (len(grown) != len(pruned))))
        if len(grown) != len(pruned):
            parts.append(encode_varint(len(grown)))
        parts.append(encode_subset(pruned, num_total=num_active))
        parts.append(encode_subset(grown, num_total=old.num_weights - num_active))
        previous = index
    return seal_frame(parts, kind=Kind.MASK_DELTA)


def decode_mask_delta(data: bytes, *, base: Patterns, limits: Limits = DEFAULT_LIMITS) -> Patterns:
    """Apply a frame that `encode_mask_delta` wrote to the mask it was made from.

    Raises:
        MaskMismatch: the frame was made from another mask than `base`.
        CodecError: not such a frame, damaged, above `limits`, or its result is not the mask
            that the sender announced.
    """
    reader = open_frame(data, kind=Kind.MASK_DELTA, limits=limits)
    expected = reader.take(DELTA_DIGEST_BYTES, what="the digest of the base mask")
    if expected != _short_digest(base):
        raise MaskMismatch(
            f"this delta starts from mask {expected.hex()}, but the base given is "
            f"{_short_digest(base).hex()}: ask for the whole mask"
        )
    announced = reader.take(DELTA_DIGEST_BYTES, what="the digest of the new mask")
    names = list(base)
    patterns: dict[str, Pattern] = {}
    index = -1
    while reader.remaining:
        index += 1 + reader.varint(what="the index of a layer")
        if index >= len(names):
            raise CodecError(f"layer {index} of a mask of {len(names)} layers")
        patterns[names[index]] = _read_layer(reader, base[names[index]])
    new = base.replace(patterns)
    if announced != _short_digest(new):
        raise CodecError(
            f"the delta leads to mask {_short_digest(new).hex()}, not to {announced.hex()} as "
            "announced: ask for the whole mask"
        )
    return new


def check_same_layers(base: Patterns, new: Patterns) -> None:
    """Refuse two masks that differ in more than their patterns, with CodecError."""
    if list(base.shapes().items()) != list(new.shapes().items()):
        raise CodecError(
            "the two masks differ in names, order or shapes; a delta needs them equal: send the "
            "whole mask instead"
        )


def _read_layer(reader: Reader, old: Pattern) -> Pattern:
    num_active, num_absent = old.num_active, old.num_weights - old.num_active
    head = reader.varint(what="the number of pruned weights")
    num_pruned = num_grown = head >> 1
    if head & 1:
        num_grown = reader.varint(what="the number of grown weights")
    if num_pruned > num_active or num_grown > num_absent:
        raise CodecError(
            f"{num_pruned} weights pruned of {num_active} active and {num_grown} grown of "
            f"{num_absent} pruned: there are not so many"
        )
    if bool(head & 1) != (num_grown != num_pruned) or num_pruned + num_grown == 0:
        raise CodecError("the numbers of changed weights are not in their shortest form")
    pruned = decode_subset(reader, num_total=num_active, count=num_pruned)
    grown = decode_subset(reader, num_total=num_absent, count=num_grown)
    if _is_dense(old):
        absent = complement(old.positions(), num_total=old.num_weights)
        absent = _exchange(absent, leaving=grown, joining=pruned)
        active = complement(absent, num_total=old.num_weights)
    else:
        active = _exchange(old.positions(), leaving=pruned, joining=grown)
    return Pattern.from_positions(old.shape, active)


def _changes(old: Pattern, new: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the pruned weights among the active ones of `old`, of the grown among the rest.

    Whichever are fewer in `old`, its active or its pruned weights, are compared.
    """
    members, others = old.positions(), new.positions()
    if _is_dense(old):
        members = complement(members, num_total=old.num_weights)
        others = complement(others, num_total=old.num_weights)
    below, stays = find(members, others)
    leaving = complement(below[stays], num_total=len(members))
    joining = (others - below)[~stays]
    return (joining, leaving) if _is_dense(old) else (leaving, joining)


def _exchange(members: np.ndarray, *, leaving: np.ndarray, joining: np.ndarray) -> np.ndarray:
    """The members but those of the ranks `leaving`, and the absent ones of the ranks `joining`."""
    joined = absent_at(members, joining)
    remaining = np.delete(members, leaving)
    return np.insert(remaining, np.searchsorted(remaining, joined), joined)


def _is_dense(pattern: Pattern) -> bool:
    return 2 * pattern.num_active > pattern.num_weights


def _short_digest(patterns: Patterns) -> bytes:
    return bytes.fromhex(patterns.digest())[:DELTA_DIGEST_BYTES]
