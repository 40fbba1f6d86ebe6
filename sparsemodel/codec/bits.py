"""Sets of positions as bits: Golomb-Rice codes and varints of the gaps between them.

A set is `count` ascending positions below `num_total`. Its gaps are the numbers of positions
skipped before each member; where every position is a member with equal chance they follow a
geometric law, for which Golomb (Run-length encodings, IEEE Trans. Inf. Theory 12, 1966) and Rice
(JPL publication 79-22, 1979) give codes within 5 % of the entropy.
"""

from __future__ import annotations

import numpy as np

from sparsemodel.codec.reader import Reader
from sparsemodel.errors import CodecError
from sparsemodel.runtime.positions import complement

MAX_GAP_BYTES = 5  # 35 bits: more than the largest set allowed by Limits
_BITMAP_CHUNK = 1 << 16  # bytes of a bitmap unpacked at a time


def rice_parameter(num_total: int, count: int) -> int:
    """The Rice parameter that both sides derive for `count` of `num_total` positions.

    The least k >= 0 with 25 * count * 2**k >= 12 * num_total - 6 * count. Parameter k beats k + 1
    once the chance of a gap of at least 2**k falls below (sqrt(5) - 1) / 2, that is
    -2**k * ln(1 - p) >= 0.481 with p = count / num_total; the rule is this with 0.48 and
    ln(1 - p) = -2p / (2 - p), in integers so that every machine agrees.

    >>> rice_parameter(1000, 50), rice_parameter(1000, 400)
    (4, 0)
    """
    assert 1 <= count <= num_total
    parameter = 0
    while 25 * count << parameter < 12 * num_total - 6 * count:
        parameter += 1
    return parameter


def gaps_between(positions: np.ndarray) -> np.ndarray:
    """How many positions are skipped before each of the ascending `positions`: int64, [count]."""
    gaps: np.ndarray = np.diff(positions, prepend=-1)
    gaps -= 1
    return gaps


def count_rice_bits(gaps: np.ndarray, *, parameter: int) -> int:
    """Number of bits of the Rice code of `gaps`, padding apart."""
    return len(gaps) * (parameter + 1) + int((gaps >> parameter).sum())


def best_rice_parameter(gaps: np.ndarray, *, num_total: int) -> int:
    """The parameter of the shortest Rice code of `gaps`; the least one of equals."""
    best = rice_parameter(num_total, len(gaps))
    bits = count_rice_bits(gaps, parameter=best)
    # The cost is convex in the parameter, so the first step that does not pay ends the search.
    for step in (-1, 1):
        while 0 <= best + step < num_total.bit_length():
            candidate = count_rice_bits(gaps, parameter=best + step)
            if candidate > bits or (candidate == bits and step > 0):
                break
            best, bits = best + step, candidate
    return best


def encode_rice(gaps: np.ndarray, *, parameter: int) -> bytes:
    """The Rice code of at least one gap: remainders as bit planes, then quotients in unary.

    The two parts are apart so that both can be decoded without a loop over the elements.
    """
    quotients = gaps >> parameter
    ends = np.cumsum(quotients + 1) - 1
    num_low = len(gaps) * parameter
    bits = np.zeros(num_low + int(ends[-1]) + 1, dtype=np.uint8)
    for plane in range(parameter):
        start = plane * len(gaps)
        bits[start : start + len(gaps)] = (gaps >> (parameter - 1 - plane)) & 1
    bits[num_low + ends] = 1
    return np.packbits(bits).tobytes()


def decode_rice(reader: Reader, *, num_total: int, count: int, parameter: int) -> np.ndarray:
    """Read the positions that `encode_rice` wrote: int64, ascending, shape [count].

    Raises:
        CodecError: too few bytes for `count` members, a position not below `num_total`, or
            padding bits that are not zero.
    """
    assert 1 <= count <= num_total
    num_low = count * parameter
    if num_low + count > 8 * reader.remaining:
        raise CodecError(
            f"{count} positions need at least {num_low + count} bits but only "
            f"{reader.remaining} bytes are left in the frame"
        )
    # The gaps add up to num_total - count at most; so do not look at more bits than that takes.
    num_unary = count + ((num_total - count) >> parameter)
    bits = np.unpackbits(reader.window((num_low + num_unary + 7) // 8))
    ends = np.flatnonzero(bits[num_low:].view(np.bool_))[:count]
    if len(ends) < count:
        raise CodecError(f"found {len(ends)} of {count} positions below {num_total}")
    num_bits = num_low + int(ends[-1]) + 1
    num_bytes = (num_bits + 7) // 8
    reader.take(num_bytes, what="a set of positions")
    if bits[num_bits : 8 * num_bytes].any():
        raise CodecError("padding bits are not zero")
    gaps = (np.diff(ends, prepend=-1) - 1) << parameter
    for plane in range(parameter):
        low = bits[plane * count : (plane + 1) * count].astype(np.int64)
        gaps |= low << (parameter - 1 - plane)
    return _positions(gaps, num_total=num_total)


def count_varint_bytes(gaps: np.ndarray) -> int:
    """Number of bytes of `encode_gaps`."""
    return sum(int((gaps >= 1 << 7 * index).sum()) for index in range(1, MAX_GAP_BYTES)) + len(gaps)


def encode_gaps(gaps: np.ndarray) -> bytes:
    """The gaps as LEB128 varints, one after the other."""
    num_groups = np.ones(len(gaps), dtype=np.int64)
    for index in range(1, MAX_GAP_BYTES):
        num_groups += gaps >= 1 << 7 * index
    starts = np.cumsum(num_groups) - num_groups
    out = np.zeros(int(num_groups.sum()), dtype=np.uint8)
    for index in range(int(num_groups.max())):
        present = num_groups > index
        group = (gaps[present] >> 7 * index) & 0x7F
        out[starts[present] + index] = group | np.where(num_groups[present] > index + 1, 0x80, 0)
    return out.tobytes()


def decode_gaps(reader: Reader, *, num_total: int, count: int) -> np.ndarray:
    """Read the positions that `encode_gaps` wrote: int64, ascending, shape [count].

    Raises:
        CodecError: too few bytes, a gap not in its shortest form, or a position not below
            `num_total`.
    """
    assert 1 <= count <= num_total
    if count > reader.remaining:
        raise CodecError(f"{count} gaps need {count} bytes or more; {reader.remaining} are left")
    raw = reader.window(MAX_GAP_BYTES * count)
    ends = np.flatnonzero(raw < 0x80)[:count]
    num_groups = np.diff(ends, prepend=-1)
    if len(ends) < count or num_groups.max() > MAX_GAP_BYTES:
        raise CodecError(f"a gap of more than {MAX_GAP_BYTES} bytes, or fewer than {count} gaps")
    if ((num_groups > 1) & (raw[ends] == 0)).any():
        raise CodecError("a gap is not in its shortest form")
    reader.take(int(ends[-1]) + 1, what="a set of positions")
    gaps = np.zeros(count, dtype=np.int64)
    for index in range(int(num_groups.max())):
        present = num_groups > index
        group = raw[ends[present] - num_groups[present] + 1 + index] & 0x7F
        gaps[present] |= group.astype(np.int64) << 7 * index
    return _positions(gaps, num_total=num_total)


def decode_bitmap(reader: Reader, *, num_total: int) -> np.ndarray:
    """Read the positions of the ones among `num_total` bits: int32, ascending.

    Raises:
        CodecError: too few bytes, or padding bits that are not zero.
    """
    assert 1 <= num_total < 1 << 31
    packed = np.frombuffer(reader.take((num_total + 7) // 8, what="a bitmap"), dtype=np.uint8)
    if num_total % 8 and packed[-1] & 0xFF >> num_total % 8:
        raise CodecError("padding bits are not zero")
    found = []
    for start in range(0, len(packed), _BITMAP_CHUNK):
        ones = np.flatnonzero(np.unpackbits(packed[start : start + _BITMAP_CHUNK]))
        found.append((ones + 8 * start).astype(np.int32))
    return np.concatenate(found)


def encode_subset(positions: np.ndarray, *, num_total: int) -> bytes:
    """Ascending positions below `num_total`, for a reader who knows how many there are.

    The smaller of the set and its complement travels, with the derived Rice parameter; an empty
    and a full set take no bytes.
    """
    if 2 * len(positions) > num_total:
        positions = complement(positions, num_total=num_total)
    if len(positions) == 0:
        return b""
    parameter = rice_parameter(num_total, len(positions))
    return encode_rice(gaps_between(positions), parameter=parameter)


def decode_subset(reader: Reader, *, num_total: int, count: int) -> np.ndarray:
    """Read the `count` positions that `encode_subset` wrote: int64, ascending, shape [count].

    Raises:
        CodecError: see `decode_rice`.
    """
    assert 0 <= count <= num_total
    coded = min(count, num_total - count)
    if coded == 0:
        return np.arange(count, dtype=np.int64)
    parameter = rice_parameter(num_total, coded)
    positions = decode_rice(reader, num_total=num_total, count=coded, parameter=parameter)
    return positions if coded == count else complement(positions, num_total=num_total)


def _positions(gaps: np.ndarray, *, num_total: int) -> np.ndarray:
    # A single gap is checked before the sum: the sum of checked gaps cannot overflow int64.
    if gaps.max() < num_total:
        positions = np.cumsum(gaps + 1) - 1
        if positions[-1] < num_total:
            return positions
    raise CodecError(f"a position lies past the end: there are {num_total}")
