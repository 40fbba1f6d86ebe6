"""Records and plain messages: round trips, what a client holds, large frames, and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from federation import tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hostile import JSON, TEXT, hostile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import EntryMean, StateMean
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import (
    DESCRIBE,
    MODEL,
    ClientInfo,
    Expected,
    Reply,
    Request,
    Resources,
    client_info,
    describe_reply,
    number,
)
from fedprune.exchange.uplink import EXACT, Uplink, compress, decompress
from fedprune.flower import wire
from fedprune.flower.wire import Held, NeedsResync, ProgramText
from fedprune.methods.base import RunState, train_request
from fedprune.methods.fedtiny.pool import POOL, Pool, candidate_counts, candidate_pool, pool_request
from fedprune.methods.fedtiny.selection import check_scores
from fedprune.rounds.workspace import Workspace, open_workspace
from prunelab.networks import float_state
from sparsemodel.codec import encode_mask
from sparsemodel.errors import CodecError
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.adjust import prune_and_grow
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState, Tensors

NOTHING: frozenset[str] = frozenset()
SCORES = Expected(fields=["losses", "metrics"])
PROGRAM = ProgramText("a program", "0123456789abcdef0123")
DTYPES = ("fp32", "fp16", "bf16", "int8")
Shapes = dict[str, tuple[int, ...]]


def _statistics(names: list[str]) -> Expected:
    """Of two candidates."""
    return Expected(tensors={"0": names, "1": names})


def check(reply: Reply, request: Request) -> None:
    """As the gate does, but for what it knows of the client."""
    check_parts(reply, request)
    request.check(reply)


# --- a real model and its pool -----------------------------------------------------------------


@cache
def workspace() -> Workspace:
    return open_workspace(tiny())


@cache
def the_pool() -> Pool:
    values = float_state(workspace().model())
    dense = SparseState({name: values[name].numpy() for name in workspace().shapes})
    shapes = {name: tuple(p.shape) for name, p in prunable_parameters(workspace().model()).items()}
    return candidate_pool(dense, candidate_counts(shapes, 0.2, num_candidates=2, seed=1))


@pytest.fixture(name="work")
def fixture_work() -> Workspace:
    return workspace()


@pytest.fixture(name="pool")
def fixture_pool() -> Pool:
    return the_pool()


def adjusted(state: SparseState) -> SparseState:
    """The state after a few weights of its first layer have moved."""
    assert state.patterns is not None
    name, pattern = next(iter(state.patterns.items()))
    free = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())[:3]
    return prune_and_grow(state, {name: (free, np.ones(3, np.float32))}, {name: 3})


def encode(
    request: Request,
    *,
    held: frozenset[str] = NOTHING,
    base: Patterns | None = None,
    program: ProgramText = PROGRAM,
    dtype: str = "fp32",
) -> wire.Envelope:
    return wire.encode_request(request, program=program, held=held, base=base, dtype=dtype)


def decode(record: RecordDict, held: Held, shapes: Shapes | None = None) -> Request:
    return wire.receive(record, held).request(workspace().shapes if shapes is None else shapes)


def frames(record: RecordDict) -> set[str]:
    return set(wire.read_record(record)[1])


def same_tensors(a: Tensors, b: Tensors) -> bool:
    """Names, order, shapes and bits."""
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype == np.float32
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def same(a: SparseState, b: SparseState) -> bool:
    return a.patterns == b.patterns and same_tensors(a.values, b.values)


# --- round trips -------------------------------------------------------------------------------


@st.composite
def model_shapes(draw: st.DrawFn) -> Shapes:
    name = st.text(st.characters(exclude_categories=["Cs"]))
    names = draw(st.lists(name, min_size=1, max_size=4, unique=True))
    shape = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
    return {name: draw(shape) for name in names}


def arrays(draw: st.DrawFn, size: int) -> np.ndarray:
    """Any float32 values, NaN and infinities among them."""
    bits = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 2**32, size)
    return bits.astype(np.uint32).view(np.float32)


@st.composite
def states(draw: st.DrawFn, shapes: Shapes) -> SparseState:
    pruned = draw(st.sets(st.sampled_from(list(shapes))))
    patterns, values = {}, {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        if name in pruned:
            kept = sorted(draw(st.sets(st.integers(0, count - 1))))
            patterns[name] = Pattern.from_positions(shape, np.array(kept, np.int64))
            values[name] = arrays(draw, len(kept))
        else:
            values[name] = arrays(draw, count).reshape(shape)
    return SparseState(values, Patterns(patterns) if patterns else None)


@st.composite
def tensors(draw: st.DrawFn, shapes: Shapes) -> Tensors:
    names = draw(st.lists(st.sampled_from(list(shapes)), unique=True))
    return {name: arrays(draw, int(np.prod(shapes[name]))).reshape(shapes[name]) for name in names}


@st.composite
def requests(draw: st.DrawFn, shapes: Shapes) -> Request:
    named = draw(st.dictionaries(TEXT, states(shapes), max_size=3))
    return Request(
        action=draw(TEXT),
        round_index=draw(st.integers(0, 2**53 - 1)),
        fields=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        states=named,
        tensors=draw(st.dictionaries(TEXT, tensors(shapes), max_size=3)),
        hold=frozenset(draw(st.sets(st.sampled_from([*named, "another"])))),
        report_resources=draw(st.booleans()),
    )


@st.composite
def replies(draw: st.DrawFn, request: Request, shapes: Shapes) -> Reply:
    """An answer that may bring every state of the request, and entries at its pruned places."""
    returned = {
        name: SparseState(
            {n: arrays(draw, value.size).reshape(value.shape) for n, value in state.values.items()},
            state.patterns,
        )
        for name, state in request.states.items()
        if draw(st.booleans())
    }
    entries: dict[str, Any] = {}
    for name, state in request.states.items():
        for layer, pattern in (state.patterns or {}).items():
            free = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())
            chosen = draw(st.sets(st.sampled_from(free.tolist()))) if len(free) else set()
            if chosen:
                some = np.array(sorted(chosen), np.int64)
                entries.setdefault(name, {})[layer] = some, arrays(draw, len(some))
    count = st.integers(0, 2**53 - 1)
    return Reply(
        num_examples=draw(count),
        fields=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        states=returned,
        entries=entries,
        tensors=draw(st.dictionaries(TEXT, tensors(shapes), max_size=3)),
        resources=draw(st.none() | st.builds(Resources, count, count)),
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_request_comes_back_as_it_was(data: st.DataObject) -> None:
    shapes = data.draw(model_shapes())
    request = data.draw(requests(shapes))
    envelope, held = encode(request), Held()
    received = wire.receive(envelope.record, held)
    assert received.program_text() == b"a program"
    assert received.action == request.action
    back = received.request(shapes)
    assert (back.action, back.round_index) == (request.action, request.round_index)
    assert (back.fields, back.report_resources) == (request.fields, request.report_resources)
    assert list(back.states) == list(request.states)
    assert all(same(back.states[name], state) for name, state in request.states.items())
    assert list(back.tensors) == list(request.tensors)
    assert all(same_tensors(back.tensors[name], some) for name, some in request.tensors.items())
    assert set(held.items) == envelope.held
    assert envelope.size == wire.record_bytes(envelope.record)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_reply_comes_back_as_it_was(data: st.DataObject) -> None:
    shapes = data.draw(model_shapes())
    request = data.draw(requests(shapes))
    reply = data.draw(replies(request, shapes))
    record = wire.encode_reply(reply, request, dtype="fp32")
    assert not wire.wants_resync(record)
    back = wire.decode_reply(record, request, shapes=shapes)
    assert (back.num_examples, back.fields) == (reply.num_examples, reply.fields)
    assert back.resources == reply.resources
    assert list(back.states) == list(reply.states)
    assert all(same(back.states[name], state) for name, state in reply.states.items())
    assert list(back.tensors) == list(reply.tensors)
    assert all(same_tensors(back.tensors[name], some) for name, some in reply.tensors.items())
    assert list(back.entries) == list(reply.entries)
    for name, some in reply.entries.items():
        assert list(back.entries[name]) == list(some)
        for layer, (indices, values) in some.items():
            assert back.entries[name][layer][0].tolist() == indices.tolist()
            assert back.entries[name][layer][1].tobytes() == values.tobytes()


def test_train_request_with_the_whole_mask(work: Workspace, pool: Pool) -> None:
    state = pool.candidate(0)
    assert state.patterns is not None
    names = list(state.patterns)
    wanted = {names[2]: 5, names[0]: 1}
    request = train_request(RunState(3, state), fields={"mu": 0.5}, growth=wanted)
    envelope, held = encode(replace(request, report_resources=True)), Held()
    decoded = decode(envelope.record, held)
    assert same(decoded.states[MODEL], state)
    assert decoded.fields == {"mu": 0.5, "grow": [[2, 5], [0, 1]]}
    assert (decoded.action, decoded.round_index, decoded.report_resources) == ("train", 3, True)
    assert envelope.mask_size == len(encode_mask(state.patterns))


def test_train_reply_carries_active_values_only(work: Workspace, pool: Pool) -> None:
    state = pool.candidate(0)
    assert state.patterns is not None
    name, pattern = next(iter(state.patterns.items()))
    request = train_request(RunState(0, state), growth={name: 2})
    pruned = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())[:2]
    entries = {MODEL: {name: (pruned, np.array([0.5, -2.0], np.float32))}}
    reply = Reply(17, {"loss": 0.25}, {MODEL: state}, entries, resources=Resources(9, 10))
    record = wire.encode_reply(reply, request, dtype="fp32")
    decoded = wire.decode_reply(record, request, shapes=work.shapes)
    request.check(decoded)
    assert (decoded.num_examples, decoded.fields["loss"]) == (17, 0.25)
    assert decoded.resources == Resources(9, 10)
    assert same(decoded.states[MODEL], state)
    assert decoded.entries[MODEL][name][0].tolist() == pruned.tolist()
    assert decoded.entries[MODEL][name][1].tolist() == [0.5, -2.0]
    active = sum(value.nbytes for value in state.values.values())
    assert wire.record_bytes(record) < active + 1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_travel_in_the_run_s_type_and_tensors_exactly(
    dtype: str, work: Workspace, pool: Pool
) -> None:
    state = pool.candidate(0)
    statistics = {name: np.full(shape, 1 / 3, np.float32) for name, shape in work.shapes.items()}
    request = Request("ask", states={MODEL: state}, tensors={"0": statistics})
    back = decode(encode(request, dtype=dtype).record, Held())
    reply = Reply(1, states={MODEL: state}, tensors={"0": statistics})
    returned = wire.decode_reply(
        wire.encode_reply(reply, request, dtype=dtype), request, shapes=work.shapes
    )
    bounds = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 1 / 127}
    for message in (back, returned):
        assert same_tensors(message.tensors["0"], statistics)
        for name, value in state.values.items():
            largest = float(abs(value).max(initial=0))
            error = abs(message.states[MODEL].values[name] - value).max(initial=0)
            assert error <= bounds[dtype] * largest


@pytest.mark.parametrize(
    ("dtype", "share"), [("fp32", 0.3), *((t, s) for t in DTYPES[1:] for s in (1.0, 0.3))]
)
def test_a_model_travels_up_as_the_change_to_what_arrived(
    dtype: str, share: float, work: Workspace, pool: Pool
) -> None:
    """Sent in few bits, answered in as few: the two sides start from the same numbers."""
    state, uplink = pool.candidate(0), Uplink(dtype, share)
    request = train_request(RunState(0, state))
    arrived = decode(encode(request, dtype=dtype).record, Held())
    asked = wire.as_received(request, dtype=dtype)
    assert same(asked.states[MODEL], arrived.states[MODEL])
    trained = state.replace({name: value * 1.01 for name, value in state.values.items()})
    update, _ = compress(trained, arrived.states[MODEL], uplink)
    reply = Reply(1, {"loss": 0.0}, {MODEL: trained})
    record = wire.encode_reply(reply, arrived, dtype=dtype, update=update)
    assert frames(record) == ({"u0", "b0"} if share == 1 else {"u0", "k0", "b0"})
    back = wire.decode_reply(record, asked, shapes=work.shapes, uplink=uplink)
    check(back, request)
    assert same(back.states[MODEL], decompress(update, arrived.states[MODEL], uplink))
    # A model that travels whole where a change was asked for is refused, and the other way round.
    whole = wire.encode_reply(reply, arrived, dtype=dtype)
    for sent, way in ((whole, uplink), (record, EXACT)):
        with pytest.raises(ClientError, match="frames that it does not name"):
            wire.decode_reply(sent, asked, shapes=work.shapes, uplink=way)


def test_selection_messages_round_trip(work: Workspace, pool: Pool) -> None:
    names = [name for name in work.shapes if "running" in name]
    random = np.random.default_rng(0)
    statistics = {
        str(number): {n: random.random(work.shapes[n], np.float32) for n in names}
        for number in range(2)
    }
    first, held = encode(pool_request(pool, "measure")), Held()
    decoded = decode(first.record, held)
    assert same(decoded.states[POOL], pool.union)
    assert decoded.fields["counts"] == [list(each.values()) for each in pool.counts]
    # A client that holds the pool is sent statistics only, whose names travel once.
    request = pool_request(
        pool, "score", tensors=statistics, expected=SCORES, check=check_scores(2, "accuracy")
    )
    light = encode(request, held=first.held)
    assert frames(light.record) == {"t0", "t1"}
    again = decode(light.record, held)
    assert same(again.states[POOL], pool.union)
    assert all(same_tensors(again.tensors[c], statistics[c]) for c in statistics)
    header, _ = wire.read_record(light.record)
    assert header["k"] == [names]

    measured = wire.decode_reply(
        wire.encode_reply(Reply(5, tensors=statistics), decoded, dtype="int8"),
        decoded,
        shapes=work.shapes,
    )
    check_parts(measured, pool_request(pool, "measure", expected=_statistics(names)))
    assert all(same_tensors(measured.tensors[c], statistics[c]) for c in statistics)
    score = Reply(5, {"losses": [1.5, 2.5], "metrics": [3, 4]})
    back = wire.decode_reply(
        wire.encode_reply(score, request, dtype="int8"), request, shapes=work.shapes
    )
    check(back, request)
    assert back == score


def test_client_info_round_trip() -> None:
    info = ClientInfo(client=3, num_train=10, num_dev=1, label_histogram=[5, 0, 6])
    request = Request(DESCRIBE)
    record = wire.encode_reply(describe_reply(info), request, dtype="int8")
    assert client_info(wire.decode_reply(record, request, shapes={})) == info


def test_large_frames_travel_as_arrays() -> None:
    large, small = bytes(wire.ARRAY_THRESHOLD), b"small"
    record = wire.build_record({"r": 1}, {"w": large, "m": small})
    assert list(record.array_records["a"]) == ["w"]
    assert wire.read_record(record) == ({"r": 1}, {"w": large, "m": small})
    assert len(large) < wire.record_bytes(record) < len(large) + 1500


def test_skip_and_resync_are_told_apart() -> None:
    request = Request("train")
    assert wire.wants_resync(wire.resync_record())
    skip = wire.skip_record("too \ud800 few")
    assert not wire.wants_resync(skip)
    for record, words in ((skip, "too .* few"), (wire.resync_record(), "unknown keys")):
        with pytest.raises(ClientError, match=words):
            wire.decode_reply(record, request, shapes={})


# --- what a client holds -----------------------------------------------------------------------


def test_what_a_client_holds_is_not_sent_again(work: Workspace, pool: Pool) -> None:
    program, state, held = (
        ProgramText.of(program_of(work.torch.skeleton, work.torch.input_shape)),
        pool.candidate(0),
        Held(),
    )
    assert state.patterns is not None
    request = Request("train", states={MODEL: state})
    first = encode(request, program=program)
    assert frames(first.record) == {"p", "m0", "w0"}
    decode(first.record, held)
    assert set(held.items) == first.held
    assert first.held == {wire.program_token(program.digest), wire.mask_token(state.patterns)}

    changed = state.replace({name: value + 1 for name, value in state.values.items()})
    second = encode(Request("train", states={MODEL: changed}), program=program, held=first.held)
    assert frames(second.record) == {"w0"}
    assert second.mask_size == 0
    received = wire.receive(second.record, held)
    assert received.program_text().decode() == program.text
    assert same(received.request(work.shapes).states[MODEL], changed)

    # A network without a program sends none, and a dense model no mask.
    dense = Request("train", states={MODEL: SparseState(state.dense())})
    third = encode(dense, program=ProgramText(), held=first.held)
    assert (frames(third.record), third.held) == ({"w0"}, NOTHING)
    received = wire.receive(third.record, held)
    assert (received.program, held.items) == ("", {})
    assert same(received.request(work.shapes).states[MODEL], dense.states[MODEL])


def test_values_on_hold_are_not_sent_again(pool: Pool) -> None:
    state, held = pool.candidate(0), Held()
    request = Request("measure", states={"pool": state}, hold=frozenset(["pool"]))
    first = encode(request)
    decode(first.record, held)
    second = encode(replace(request, action="score"), held=first.held)
    assert frames(second.record) == set()
    assert same(decode(second.record, held).states["pool"], state)
    # A request that does not name them ends the hold, on both sides.
    third = encode(Request("train", states={MODEL: state}), held=second.held)
    assert frames(third.record) == {"w0"}
    decode(third.record, held)
    assert (
        {token[:2] for token in held.items} == {token[:2] for token in third.held} == {"p:", "m:"}
    )
    with pytest.raises(NeedsResync):
        wire.receive(second.record, held)
    # Other values are other values, however they are named.
    other = state.replace({name: value * 2 for name, value in state.values.items()})
    fourth = encode(replace(request, states={"pool": other}), held=first.held)
    assert frames(fourth.record) == {"w0"}
    assert same(decode(fourth.record, held).states["pool"], other)


def test_mask_travels_once_and_then_as_a_difference(pool: Pool) -> None:
    old, new = pool.candidate(0), adjusted(pool.candidate(0))
    assert old.patterns is not None
    assert new.patterns is not None
    before = encode(Request("train", states={MODEL: old}))
    request = Request("train", states={MODEL: new})
    whole = encode(request)
    difference = encode(request, held=before.held, base=old.patterns)
    values_only = encode(request, held=whole.held, base=old.patterns)
    sizes = [envelope.mask_size for envelope in (whole, difference, values_only)]
    assert sizes[0] > sizes[1] > sizes[2] == 0
    assert [frames(e.record) for e in (whole, difference, values_only)] == [
        {"p", "m0", "w0"},
        {"d0", "w0"},
        {"w0"},
    ]
    for envelope, earlier in ((whole, None), (difference, before), (values_only, whole)):
        held = Held()
        if earlier is not None:
            wire.receive(earlier.record, held)
        assert same(decode(envelope.record, held).states[MODEL], new)
        assert set(held.items) == envelope.held == whole.held
    # The base is no use to a client that does not hold it.
    other = encode(Request("train", states={MODEL: pool.candidate(1)}))
    assert frames(encode(request, held=other.held, base=old.patterns).record) == {"m0", "w0"}


def test_whoever_lacks_what_a_message_names_asks_for_a_resync(pool: Pool) -> None:
    old, new = pool.candidate(0), adjusted(pool.candidate(0))
    assert old.patterns is not None
    first = encode(Request("train", states={MODEL: old}))
    hold = frozenset([MODEL])
    request = Request("train", states={MODEL: new}, hold=hold)
    whole = encode(request)
    # Decoded masks may be shared with clients that hold more: they do not count.
    shared = Held()
    for envelope in (first, whole):
        wire.receive(envelope.record, shared)
    messages = {
        "values alone": encode(request, held=whole.held - {wire.values_token(_values(new))}),
        "nothing": encode(request, held=whole.held),
        "a difference": encode(request, held=first.held, base=old.patterns),
        "no program": encode(Request("other"), held=whole.held),
    }
    holders = {
        "nobody": {},
        "one without values": {t: d for t, d in shared.items.items() if t[:2] != "v:"},
        "one without masks": {t: d for t, d in shared.items.items() if t[:2] != "m:"},
        "one without a program": {t: d for t, d in shared.items.items() if t[:2] != "p:"},
    }
    lacking = {
        (what, who)
        for what, envelope in messages.items()
        for who, items in holders.items()
        if _asks_for_resync(envelope.record, Held(dict(items), dict(shared.decoded)))
    }
    assert lacking == {
        *((what, "nobody") for what in messages),
        *((what, "one without a program") for what in messages),
        *((what, "one without masks") for what in messages if what != "no program"),
        ("nothing", "one without values"),
        ("a difference", "one without values"),  # whose mask is the new one already
    }


def _values(state: SparseState) -> bytes:
    record = encode(Request("any", states={MODEL: state})).record
    return wire.read_record(record)[1]["w0"]


def _asks_for_resync(record: RecordDict, held: Held) -> bool:
    before = dict(held.items)
    try:
        decode(record, held)
    except NeedsResync:
        assert held.items == before
        return True
    return False


def test_values_of_another_mask_than_the_named_one_ask_for_a_resync(pool: Pool) -> None:
    """A frame whose mask is not that of the header: server and client have lost each other."""
    one, other = (encode(Request("train", states={MODEL: pool.candidate(c)})) for c in (0, 1))
    (header, ours), (_, theirs) = (wire.read_record(e.record) for e in (one, other))
    with pytest.raises(NeedsResync):
        decode(wire.build_record(header, {**ours, "w0": theirs["w0"]}), Held())
    with pytest.raises(CodecError, match="not the one that the message names"):
        decode(wire.build_record(header, {**ours, "m0": theirs["m0"]}), Held())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_both_sides_know_what_the_client_holds(data: st.DataObject) -> None:
    """Whatever is asked, in whatever order, and whenever the client forgets: what it decodes is
    what was sent, and it is sent again exactly where it asks for it.
    """
    shapes = data.draw(model_shapes())
    some = data.draw(st.lists(states(shapes), min_size=1, max_size=3))
    client, believed = Held(), NOTHING
    base: Patterns | None = None
    for step in range(data.draw(st.integers(1, 6))):
        names = data.draw(st.lists(st.sampled_from("ab"), unique=True))
        chosen = {name: data.draw(st.sampled_from(some)) for name in names}
        hold = frozenset(data.draw(st.sets(st.sampled_from("ab"))))
        request = Request("any", step, states=chosen, hold=hold)
        forgets = data.draw(st.integers(0, 3)) == 0
        if forgets:
            client = Held({}, client.decoded)
        envelope = encode(request, held=believed, base=base)
        lacks = forgets and bool(envelope.held & believed or _named_bases(envelope.record))
        try:
            back = decode(envelope.record, client, shapes)
            assert not lacks
        except NeedsResync:
            assert lacks
            envelope = encode(request, held=NOTHING, base=base)
            back = decode(envelope.record, client, shapes)
        believed = envelope.held
        assert set(client.items) == believed
        assert all(same(back.states[name], state) for name, state in chosen.items())
        base = next((s.patterns for s in chosen.values() if s.patterns is not None), base)


def _named_bases(record: RecordDict) -> list[str]:
    header, _ = wire.read_record(record)
    return [entry["b"] for entry in header.get("s", []) if "b" in entry]


# --- records that are not ours, or damaged -----------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"n": 1, "f": {"client": -1, "dev": 1, "labels": [1]}},
        {"n": 1, "f": {"client": "0", "dev": 1, "labels": [1]}},
        {"n": 1.5, "f": {"client": 0, "dev": 1, "labels": [1]}},
        {"n": -1, "f": {"client": 0, "dev": 1, "labels": [1]}},
        {"n": 2**53, "f": {"client": 0, "dev": 1, "labels": [1]}},
        {"n": 1, "f": {"client": True, "dev": 1, "labels": [1]}},
        {"n": 1, "f": {"client": 0, "dev": None, "labels": [1]}},
        {"n": 1, "f": {"client": 0, "dev": 1, "labels": [1.5]}},
        {"n": 1, "f": {"client": 0, "dev": 1, "labels": {"0": 1}}},
        {"n": 1, "f": [0, 1]},
    ],
)
def test_fields_of_the_wrong_kind_are_refused(header: dict[str, Any]) -> None:
    record = wire.build_record(header, {})
    with pytest.raises(ClientError):
        client_info(wire.decode_reply(record, Request(DESCRIBE), shapes={}))


def test_arrays_of_another_kind_are_refused() -> None:
    array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"abcd")
    record = RecordDict({"c": ConfigRecord({"h": "{}"}), "a": ArrayRecord({"w": array})})
    with pytest.raises(ClientError, match="stype"):
        wire.read_record(record)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (RecordDict({}), "expected records 'c' and 'a'"),
        (RecordDict({"c": ArrayRecord({})}), "expected records 'c' and 'a'"),
        (RecordDict({"c": ConfigRecord({})}), "header: expected text, got None"),
        (RecordDict({"c": ConfigRecord({"h": b"{}"})}), "header: expected text"),
        (RecordDict({"c": ConfigRecord({"h": 1})}), "header: expected text"),
        (RecordDict({"c": ConfigRecord({"h": "{}", "w0": "text"})}), "frame 'w0': expected bytes"),
        (RecordDict({"c": ConfigRecord({"h": "{}", "w0": [1, 2]})}), "frame 'w0': expected bytes"),
    ],
)
def test_records_of_another_layout_are_refused(record: RecordDict, words: str) -> None:
    with pytest.raises(ClientError, match=words):
        wire.read_record(record)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ("null", "expected an object"),
        ('{"n": NaN}', "NaN is no number"),
        ('{"n": -Infinity}', "-Infinity is no number"),
        ('{"f": {"loss": [Infinity]}}', "Infinity is no number"),
        ('{"f": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
        ('{"f": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "not JSON"),
        ('{"n": ' + "9" * 100_000 + "}", "not JSON"),
        ('"' + "x" * wire.MAX_HEADER_BYTES + '"', "header: expected text"),
    ],
    ids=str,
)
def test_headers_that_are_no_headers_are_refused(text: str, words: str) -> None:
    with pytest.raises(ClientError, match=words):
        wire.read_record(RecordDict({"c": ConfigRecord({"h": text})}))


@pytest.mark.parametrize("depth", [*range(900, 1000, 3), 10_000])
def test_deep_fields_are_refused_or_told_apart_at_any_depth(depth: int) -> None:
    """Just below the depth that JSON's reader takes, whoever prints them has to cope."""
    deep = "[" * depth + "]" * depth
    for text in (
        f'{{"n": {deep}}}',
        f'{{"n": 1, "f": {{"loss": {deep}, "client": {deep}}}}}',
        f'{{"n": 1, "s": {deep}, "e": {deep}, "t": {deep}, "k": {deep}, "u": {deep}}}',
    ):
        record = RecordDict({"c": ConfigRecord({"h": text})})
        assert _outcome(lambda r=record: _loss(r)) == "ClientError"  # type: ignore[misc]


def _loss(record: RecordDict) -> float:
    return number(wire.decode_reply(record, Request(DESCRIBE), shapes={}).fields, "loss")


@pytest.mark.parametrize("text", ["1e999", "-1e999", "9" * 400, "-" + "9" * 4000])
def test_numbers_beyond_those_of_floats_are_refused(text: str) -> None:
    """They would end the run when they are added up."""
    record = RecordDict({"c": ConfigRecord({"h": f'{{"n": 1, "f": {{"loss": {text}}}}}'})})
    reply = wire.decode_reply(record, Request("train"), shapes={})
    with pytest.raises(ClientError, match="field 'loss': expected a finite number"):
        number(reply.fields, "loss")


def test_what_a_client_holds_is_said_in_as_many_bytes_whatever_it_is() -> None:
    """Otherwise the bytes of a run would differ from one engine, or machine, to another."""
    request, sizes = Request("train"), set()
    for held in (Resources(0, 9), Resources(999_999_999, 10**9), Resources(2**53, 2**53)):
        record = wire.encode_reply(Reply(1, resources=held), request, dtype="fp32")
        assert wire.decode_reply(record, request, shapes={}).resources == held
        sizes.add(wire.record_bytes(record))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "text", ["", "0" * 27, "0" * 29, "-" + "0" * 27, " " * 28, "0_0" * 9 + "0"]
)
def test_a_damaged_account_of_memory_is_refused(text: str) -> None:
    record = wire.build_record({"n": 1, "u": text}, {})
    with pytest.raises(ClientError, match="two numbers of fixed width"):
        wire.decode_reply(record, Request("train"), shapes={})


def test_numbers_that_are_not_finite_do_not_leave_a_client() -> None:
    """Training has diverged; Flower would report no more than that the client has failed."""
    reply = Reply(1, {"loss": float("nan")})
    with pytest.raises(ClientError, match="not finite"):
        wire.encode_reply(reply, Request("train"), dtype="fp32")


def test_losses_must_be_finite_and_as_many_as_candidates(work: Workspace, pool: Pool) -> None:
    request = pool_request(pool, "score", expected=SCORES, check=check_scores(2, "accuracy"))
    for losses, correct in (
        ("[1.0, 1e999]", "[1, 1]"),
        ("[1.0]", "[1]"),
        ("[1.0, 2.0]", "[1]"),
        ("[1.0, 2.0]", "[1, 6]"),
        ("[1.0, 2.0]", "[1, -1]"),
        ('{"0": 1.0}', "[1, 1]"),
    ):
        text = f'{{"n": 5, "f": {{"losses": {losses}, "metrics": {correct}}}}}'
        record = RecordDict({"c": ConfigRecord({"h": text})})
        with pytest.raises(ClientError):
            check(wire.decode_reply(record, request, shapes=work.shapes), request)


def test_more_growth_entries_than_asked_for_are_refused(work: Workspace, pool: Pool) -> None:
    """A dense gradient that calls itself a top-K, or one of another layer."""
    state = pool.candidate(0)
    assert state.patterns is not None
    name, other = list(state.patterns)[:2]
    request = train_request(RunState(0, state), growth={name: 2})
    for layer, count in ((name, None), (other, 1)):
        pattern = state.patterns[layer]
        pruned = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())[:count]
        entries = {MODEL: {layer: (pruned, np.ones(len(pruned), np.float32))}}
        reply = Reply(1, {"loss": 0.0}, {MODEL: state}, entries)
        record = wire.encode_reply(reply, request, dtype="fp32")
        with pytest.raises(ClientError, match="not asked for, or too many"):
            check(wire.decode_reply(record, request, shapes=work.shapes), request)


def test_replies_of_another_mask_or_with_other_states_are_refused(
    work: Workspace, pool: Pool
) -> None:
    state, other = pool.candidate(0), pool.candidate(1)
    request = train_request(RunState(0, state))

    def answer(reply: Reply) -> None:
        record = wire.encode_reply(reply, request, dtype="fp32")
        check(wire.decode_reply(record, request, shapes=work.shapes), request)

    loss, statistics = {"loss": 1.0}, {"bn1.weight": state.values["bn1.weight"]}
    answer(Reply(1, loss, {MODEL: state}))
    for reply, error, words in (
        (Reply(1, loss, {MODEL: other}), CodecError, "the frame was made with mask"),
        (Reply(1, loss, {MODEL: SparseState(state.dense())}), CodecError, "zeros: no mask"),
        (Reply(1, loss, {"other": state}), ClientError, "was not asked for; asked: .'model'"),
        (Reply(1, loss), ClientError, "expected states .'model'., got"),
        (
            Reply(1, loss, {MODEL: state}, tensors={"x": statistics}),
            ClientError,
            "expected tensors",
        ),
        (Reply(1, {}, {MODEL: state}), ClientError, "expected fields .'loss'."),
    ):
        with pytest.raises(error, match=words):
            answer(reply)


def test_entries_of_a_dense_state_are_refused(work: Workspace, pool: Pool) -> None:
    state = pool.candidate(0)
    sparse, dense = (Request("a", states={MODEL: s}) for s in (state, SparseState(state.dense())))
    name = next(iter(state.patterns or {}))
    entries = {MODEL: {name: (np.empty(0, np.int64), np.empty(0, np.float32))}}
    record = wire.encode_reply(Reply(1, entries=entries), sparse, dtype="fp32")
    with pytest.raises(ClientError, match="entries of 'model', which is dense"):
        wire.decode_reply(record, dense, shapes=work.shapes)


def test_names_that_are_not_the_model_s_are_refused(work: Workspace) -> None:
    array = {"no such tensor": np.zeros(3, np.float32)}
    record = wire.encode_reply(Reply(1, tensors={"x": array}), Request("a"), dtype="fp32")
    with pytest.raises(ClientError, match=r"of the model's tensors, got \['no such tensor'\]"):
        wire.decode_reply(record, Request("a"), shapes=work.shapes)
    with pytest.raises(ClientError, match="names of the model's tensors"):
        decode(encode(Request("a", tensors={"x": array})).record, Held())


def test_damaged_frames_are_refused(work: Workspace, pool: Pool) -> None:
    record = encode(Request("train", states={MODEL: pool.candidate(0)})).record
    header, parts = wire.read_record(record)
    for key in ("m0", "w0"):
        frame = parts[key]
        for damaged in (
            frame[:-1],
            frame + b"\0",
            b"",
            frame[:20] + bytes([frame[20] ^ 1]) + frame[21:],
        ):
            with pytest.raises(CodecError):
                decode(wire.build_record(header, {**parts, key: damaged}), Held())
    with pytest.raises(ClientError, match="without its frame 'w0'"):
        decode(wire.build_record(header, {"m0": parts["m0"], "p": parts["p"]}), Held())


@cache
def _real_requests() -> tuple[list[RecordDict], dict[str, bytes]]:
    pool = the_pool()
    statistics = {str(c): {"bn1.weight": pool.union.values["bn1.weight"]} for c in range(2)}
    old = pool.candidate(0)
    first = encode(Request("train", states={MODEL: old}))
    measure = encode(pool_request(pool, "measure"))
    held = Held()
    wire.receive(first.record, held)
    return [
        first.record,
        measure.record,
        encode(pool_request(pool, "score", tensors=statistics), held=measure.held).record,
        encode(
            Request("train", states={MODEL: adjusted(old)}), held=first.held, base=old.patterns
        ).record,
        encode(Request("ask", states={MODEL: old}, masks={"m": old.patterns})).record,
        encode(Request(DESCRIBE)).record,
    ], held.items


@cache
def _real_replies() -> tuple[list[RecordDict], list[Request]]:
    """Answers, and the questions that each of them may be taken for."""
    pool = the_pool()
    state = pool.candidate(0)
    assert state.patterns is not None
    name, pattern = next(iter(state.patterns.items()))
    names = [n for n in pool.union.values if "running" in n]
    statistics = {str(c): {n: pool.union.values[n] for n in names} for c in range(2)}
    train = train_request(RunState(0, state), growth={name: 2})
    measure = pool_request(pool, "measure", expected=_statistics(names))
    score = pool_request(pool, "score", expected=SCORES, check=check_scores(2, "accuracy"))
    free = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())[:2]
    entries = {MODEL: {name: (free, np.ones(2, np.float32))}}
    answers = [
        (train, Reply(3, {"loss": 1.0}, {MODEL: state}, entries, resources=Resources(1, 2))),
        (measure, Reply(3, tensors=statistics)),
        (score, Reply(3, {"losses": [1.0, 2.0], "metrics": [1, 2]})),
        (
            Request("ask", expected=Expected(masks={"m": state.patterns.counts()})),
            Reply(3, masks={"m": state.patterns}),
        ),
        (Request(DESCRIBE), describe_reply(ClientInfo(0, 3, 1, [2, 2]))),
    ]
    records = [wire.encode_reply(reply, request, dtype="fp32") for request, reply in answers]
    return [*records, wire.resync_record(), wire.skip_record("no")], [r for r, _ in answers]


def _outcome(work: Callable[[], object]) -> str:
    try:
        work()
    except (ClientError, CodecError, NeedsResync) as error:
        return type(error).__name__
    return "taken"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_client_survives_any_message(data: st.DataObject) -> None:
    records, items = _real_requests()
    record = data.draw(hostile(records))
    held = Held(dict(items) if data.draw(st.booleans()) else {})

    def work() -> None:
        received = wire.receive(record, held)
        if received.program:
            received.program_text()
        received.request(workspace().shapes)

    assert _outcome(work)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_server_survives_any_answer(data: st.DataObject) -> None:
    """Decoded, checked and folded into the sums of a round."""
    records, asked = _real_replies()
    record, request = data.draw(hostile(records)), data.draw(st.sampled_from(asked))

    def work() -> None:
        wire.wants_resync(record)
        reply = wire.decode_reply(record, request, shapes=workspace().shapes)
        if request.action == DESCRIBE:
            client_info(reply)
            return
        check(reply, request)
        if request.action == "train":
            EntryMean().add(reply.entries.get(MODEL, {}), weight=reply.num_examples)
            StateMean().add(reply.states[MODEL], weight=reply.num_examples)
            float(reply.fields["loss"])
        for tensors in reply.tensors.values():
            StateMean().add(SparseState(tensors), weight=reply.num_examples)

    assert _outcome(work) != NeedsResync.__name__


@settings(max_examples=200, deadline=None)
@given(st.text() | JSON.map(json.dumps))
@example('{"s":[{"n":"model","m":"\\ud800"}]}')
def test_any_text_for_a_header(text: str) -> None:
    record = RecordDict({"c": ConfigRecord({"h": text})})
    _, asked = _real_replies()
    assert _outcome(lambda: decode(record, Held()))
    for request in asked:
        assert _outcome(lambda r=request: wire.decode_reply(record, r, shapes={}))  # type: ignore[misc]
