"""What travels of a training: round trips, what is left over, its cost, and what is refused."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.errors import ClientError
from fedprune.exchange.uplink import (
    CHOSEN,
    STATISTICS,
    VALUES,
    Uplink,
    compress,
    decompress,
    weights,
)
from sparsemodel.codec import encode_mask_delta
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, open_frame, seal_frame
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

DTYPES = ("fp32", "fp16", "bf16", "int8")
UPLINKS = st.builds(Uplink, st.sampled_from(DTYPES), st.sampled_from([1.0, 0.5, 0.1, 1e-9]))


def state(seed: int, scale: float, *, sparse: bool = True, norms: bool = True) -> SparseState:
    """Two layers, one of them pruned, a bias, and a batch norm."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    kept = np.sort(np.random.default_rng(7).choice(60, 17, replace=False))
    values = {"a": draw(17) if sparse else draw(6, 10), "b": draw(2, 3), "bias": draw(5)}
    if norms:
        values |= {"n.weight": draw(4), "n.running_mean": draw(4)}
        values |= {"n.running_var": draw(4) ** 2}
    patterns = Patterns({"a": Pattern.from_positions((6, 10), kept)}) if sparse else None
    return SparseState(values, patterns)


@st.composite
def trainings(draw: st.DrawFn) -> tuple[SparseState, SparseState, SparseState | None]:
    """Trained, received and, perhaps, a residual, in sizes far apart."""
    size = st.sampled_from([1e-4, 0.1, 1.0, 30.0])
    make = partial(state, sparse=draw(st.booleans()), norms=draw(st.booleans()))
    received, moved = make(draw(st.integers(0, 99)), draw(size)), make(draw(st.integers(100, 199)),
                                                                       draw(size))  # fmt: skip
    trained = {name: value + moved.values[name] for name, value in received.values.items()}
    left = draw(st.none() | st.just(weights(make(draw(st.integers(200, 299)), draw(size)))))
    return SparseState(trained, received.patterns), received, left


def flat(some: SparseState) -> np.ndarray:
    return np.concatenate([value.reshape(-1) for value in some.values.values()])


@settings(max_examples=200, deadline=None)
@given(trainings(), UPLINKS)
def test_what_is_told_and_what_is_left_over_are_all_that_changed(
    training: tuple[SparseState, SparseState, SparseState | None], uplink: Uplink
) -> None:
    trained, received, before = training
    frames, left = compress(trained, received, uplink, residual=before)
    told = decompress(frames, received, uplink)
    assert list(told.values) == list(received.values)
    assert told.patterns is received.patterns
    assert all(v.shape == received.values[n].shape for n, v in told.values.items())
    assert all(v.dtype == np.float32 for v in (*told.values.values(), *left.values.values()))
    assert list(left.values) == list(weights(received).values)
    old = flat(weights(received)).astype(np.float64)
    wanted = flat(weights(trained)) - old + (0 if before is None else flat(before))
    sent = flat(weights(told)) - old
    # Two roundings to float32, of numbers no larger than these.
    largest = np.abs([*flat(trained), *flat(received), *([] if before is None else flat(before))])
    assert np.abs(sent + flat(left) - wanted).max() <= 4 * 2.0**-24 * 4 * largest.max()


@settings(max_examples=200, deadline=None)
@given(trainings(), UPLINKS)
def test_the_largest_changes_travel_the_earlier_of_equals_and_no_others(
    training: tuple[SparseState, SparseState, SparseState | None], uplink: Uplink
) -> None:
    trained, received, before = training
    _, left = compress(trained, received, uplink, residual=before)
    changes = flat(weights(trained)) - flat(weights(received))
    if before is not None:
        changes += flat(before)
    count = math.ceil(uplink.topk * len(changes))
    order = np.lexsort((np.arange(len(changes)), -np.abs(changes)))
    chosen, rest = order[:count], order[count:]
    assert flat(left)[rest].tobytes() == changes[rest].tobytes()
    # Of those that travel the rounding alone is left over: the codec's own bounds.
    bounds = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.51 / 127}
    scale = np.abs(changes[chosen])
    if uplink.dtype == "int8":  # at most that of the largest of all
        scale = np.full_like(scale, scale.max())
    error = np.abs(flat(left)[chosen])
    assert (error <= bounds[uplink.dtype] * scale + 2.0**-24).all()


@settings(max_examples=100, deadline=None)
@given(trainings(), UPLINKS)
def test_statistics_travel_whole_and_as_they_are(
    training: tuple[SparseState, SparseState, SparseState | None], uplink: Uplink
) -> None:
    trained, received, _ = training
    frames, left = compress(trained, received, uplink)
    told = decompress(frames, received, uplink)
    assert (STATISTICS in frames) == ("n.running_var" in received.values)
    assert not any("running" in name for name in left.values)
    for name in ("n.running_mean", "n.running_var"):
        if name in received.values:
            np.testing.assert_allclose(told.values[name], trained.values[name], rtol=2.0**-8)


def test_error_feedback_by_hand() -> None:
    """Changes of 4, 3, 2, 1 each round, one of four told: a sum of what is owed, the largest first.

    4 3 2 1 -> 4; 4 6 4 2 -> 6; 8 3 6 3 -> 8; 4 6 8 4 -> 8; 8 9 2 5 -> 9. Without feedback the
    first weight alone is ever told.
    """
    received = SparseState({"w": np.zeros(4, np.float32)})
    trained = SparseState({"w": np.float32([4, 3, 2, 1])})
    uplink, left = Uplink(topk=0.25), None
    told = []
    for _ in range(5):
        frames, left = compress(trained, received, uplink, residual=left)
        told.append(decompress(frames, received, uplink).values["w"].tolist())
    assert told == [[4, 0, 0, 0], [0, 6, 0, 0], [8, 0, 0, 0], [0, 0, 8, 0], [0, 9, 0, 0]]
    assert left is not None
    assert left.values["w"].tolist() == [8, 0, 2, 5]


@pytest.mark.parametrize("uplink", [Uplink("int8"), Uplink("fp16", 0.1), Uplink("int8", 0.05)])
def test_with_feedback_nothing_is_lost_for_good(uplink: Uplink) -> None:
    """All that was ever told falls short of all that ever changed by the residual, no more."""
    random, n = np.random.default_rng(0), 400
    received = SparseState({"w": np.zeros(n, np.float32)})
    changed, told, left = np.zeros(n), np.zeros(n), None
    sizes = []
    for _ in range(100):
        step = (random.standard_normal(n) + 0.5).astype(np.float32)
        changed += step
        frames, left = compress(SparseState({"w": step}), received, uplink, residual=left)
        told += decompress(frames, received, uplink).values["w"]
        sizes.append(float(np.linalg.norm(left.values["w"])))
        np.testing.assert_allclose(told + left.values["w"], changed, atol=1e-3)
    # It does not grow without end either: at most what one round in 1 / topk leaves behind.
    assert max(sizes[50:]) < 2 * 2 / uplink.topk * math.sqrt(n)


@pytest.mark.parametrize("share", [0.3, 0.1, 0.03, 0.01])
def test_which_weights_costs_their_entropy(share: float) -> None:
    n = 20_000
    received = SparseState({"w": np.zeros(n, np.float32)})
    change = np.random.default_rng(3).standard_normal(n).astype(np.float32)
    frames, _ = compress(SparseState({"w": change}), received, Uplink("int8", share))
    k = math.ceil(share * n)
    entropy = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8
    assert entropy < len(frames[CHOSEN]) <= 1.05 * entropy + 30
    assert len(frames[VALUES]) <= k + 35


# --- refusals ----------------------------------------------------------------------------------

RECEIVED, TRAINED = state(0, 1.0), state(1, 1.0)
HALF = Uplink("int8", 0.5)
FRAMES, _ = compress(TRAINED, RECEIVED, HALF)


def test_a_training_that_diverged_tells_nothing() -> None:
    for value in (np.nan, np.inf, 3e38):
        broken = TRAINED.replace({"bias": np.full(5, value, np.float32)})
        start = RECEIVED.replace({"bias": np.full(5, -3e38, np.float32)})
        with pytest.raises(ClientError, match=r"'bias' changed by NaN or infinite .* diverged"):
            compress(broken, start, HALF)


def test_parts_that_are_missing_or_were_not_asked_for_are_refused() -> None:
    for kind in FRAMES:
        rest = {key: data for key, data in FRAMES.items() if key != kind}
        with pytest.raises(ClientError, match="parts of an update"):
            decompress(rest, RECEIVED, HALF)
    for uplink in (Uplink("int8"), HALF):
        with pytest.raises(ClientError, match="parts of an update"):
            decompress({**FRAMES, "x": b""}, RECEIVED, uplink)


def test_an_update_of_another_mask_or_network_is_refused() -> None:
    moved = Pattern.from_positions((6, 10), np.arange(17))
    other = SparseState(RECEIVED.values, Patterns({"a": moved}))
    renamed = SparseState(
        {name.replace("bias", "shift"): v for name, v in RECEIVED.values.items()},
        RECEIVED.patterns,
    )
    for start, error in ((other, MaskMismatch), (renamed, CodecError)):
        for uplink in (HALF, Uplink("int8")):
            frames, _ = compress(TRAINED, RECEIVED, uplink)
            with pytest.raises(error):
                decompress(frames, start, uplink)


def test_more_or_fewer_changes_than_asked_for_are_refused() -> None:
    for share in (0.4, 0.6):
        frames, _ = compress(TRAINED, RECEIVED, Uplink("int8", share))
        with pytest.raises(ClientError, match=r"changes of \d+ weights: expected 16"):
            decompress(frames, RECEIVED, HALF)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 1e-40])
def test_scales_that_no_client_writes_are_refused(scale: float) -> None:
    reader = open_frame(FRAMES[VALUES], kind=Kind.TENSORS, limits=DEFAULT_LIMITS)
    head = bytes(reader.take(17, what="the dtype and two digests"))
    reader.take(4, what="the scale")
    steps = bytes(reader.take(reader.remaining, what="the values"))
    frame = seal_frame([head, np.float32(scale).tobytes(), steps], kind=Kind.TENSORS)
    with pytest.raises(CodecError, match="an int8 scale of"):
        decompress({**FRAMES, VALUES: frame}, RECEIVED, HALF)


def test_positions_in_a_longer_line_are_refused() -> None:
    """Sets ascend by the way they are written; one past the end is of another line."""
    longer = Patterns({"x": Pattern.full((40,))})
    some = Patterns({"x": Pattern.from_positions((40,), np.arange(16) * 2 + 9)})
    with pytest.raises(MaskMismatch):
        decompress({**FRAMES, CHOSEN: encode_mask_delta(longer, some)}, RECEIVED, HALF)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_read_as_an_update(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(FRAMES)))
    frame = bytearray(FRAMES[kind])
    payload = frame[5:-4]  # lengths below 128 take one byte
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    which = Kind.MASK_DELTA if kind.startswith(CHOSEN) else Kind.TENSORS
    damaged = seal_frame([bytes(payload)], kind=which)  # with a checksum that is right
    try:
        told = decompress({**FRAMES, kind: damaged}, RECEIVED, HALF)
    except (ClientError, CodecError):
        return
    assert list(told.values) == list(RECEIVED.values)
    assert all(v.shape == RECEIVED.values[n].shape for n, v in told.values.items())
