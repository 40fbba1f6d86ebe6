"""Records and plain messages: round trips, large frames, and records that are not ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federation import tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedprune.errors import ClientError
from fedprune.exchange.messages import (
    ClientInfo,
    MeasureReply,
    MeasureRequest,
    Pool,
    ScoreReply,
    ScoreRequest,
    TrainReply,
    TrainRequest,
)
from fedprune.flower import wire
from fedprune.methods.fedtiny.pool import candidate_pool
from fedprune.rounds.workspace import Workspace, open_workspace
from prunelab.networks import float_state
from sparsemodel.errors import CodecError
from sparsemodel.masks.mask import Mask

NOTHING: frozenset[str] = frozenset()


@pytest.fixture(name="work")
def fixture_work() -> Workspace:
    return open_workspace(tiny())


@pytest.fixture(name="pool")
def fixture_pool(work: Workspace) -> Pool:
    model = work.model()
    return Pool(float_state(model), candidate_pool(model, work.config.pruning, seed=1))


def masked(pool: Pool, mask: Mask) -> dict[str, torch.Tensor]:
    return {n: v * mask[n] if n in mask else v for n, v in pool.weights.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def encode(request: Any, *, held: frozenset[str] = NOTHING, base: Mask | None = None) -> RecordDict:
    return wire.encode_request(request, held=held, base=base, dtype="fp32")


def test_train_request_with_the_whole_mask(work: Workspace, pool: Pool) -> None:
    mask = pool.masks[0]
    name = next(iter(mask))
    request = TrainRequest(3, masked(pool, mask), mask, growth={name: 5}, report_resources=True)
    record = encode(request)
    decoded = wire.decode_train_request(record, shapes=work.shapes, masks=[])
    assert same(decoded.weights, request.weights)
    assert (decoded.mask, decoded.growth) == (mask, {name: 5})
    assert (decoded.round_index, decoded.report_resources) == (3, True)
    assert wire.mask_frame_bytes(record) > 0


def test_mask_travels_once_and_then_as_a_difference(work: Workspace, pool: Pool) -> None:
    old, new = pool.masks[:2]
    request = TrainRequest(0, masked(pool, new), new)
    whole = encode(request)
    difference = encode(request, held=frozenset([old.digest()]), base=old)
    values_only = encode(request, held=frozenset([new.digest()]))
    sizes = [wire.mask_frame_bytes(record) for record in (whole, difference, values_only)]
    assert sizes[0] > sizes[1] > sizes[2] == 0
    for record, held in ((whole, []), (difference, [old]), (values_only, [new])):
        decoded = wire.decode_train_request(record, shapes=work.shapes, masks=held)
        assert decoded.mask == new
        assert same(decoded.weights, request.weights)


def test_missing_or_older_mask_asks_for_a_resync(work: Workspace, pool: Pool) -> None:
    old, new = pool.masks[:2]
    request = TrainRequest(0, masked(pool, new), new)
    values_only = encode(request, held=frozenset([new.digest()]))
    difference = encode(request, held=frozenset([old.digest()]), base=old)
    for record, held in (
        (values_only, []),
        (values_only, [old]),
        (difference, []),
        (difference, [new]),
    ):
        with pytest.raises(wire.NeedsResync):
            wire.decode_train_request(record, shapes=work.shapes, masks=held)


def test_train_reply_carries_active_values_only(work: Workspace, pool: Pool) -> None:
    mask = pool.masks[0]
    name = next(iter(mask))
    request = TrainRequest(0, masked(pool, mask), mask, growth={name: 2})
    entries = {name: (mask.pruned(name)[:2], torch.tensor([0.5, -2.0]))}
    reply = TrainReply(17, 0.25, {}, entries, state_bytes=9, peak_rss_bytes=10)
    record = wire.encode_train_reply(reply, weights=request.weights, mask=mask, dtype="fp32")
    decoded = wire.decode_reply(record, request, shapes=work.shapes, batch_norms=work.batch_norms)
    assert isinstance(decoded, TrainReply)
    assert (decoded.num_examples, decoded.loss) == (17, 0.25)
    assert (decoded.state_bytes, decoded.peak_rss_bytes) == (9, 10)
    for key, pattern in mask.items():
        assert torch.equal(decoded.values[key], request.weights[key][pattern])
    assert torch.equal(decoded.growth[name][0], entries[name][0])
    assert torch.equal(decoded.growth[name][1], entries[name][1])


def test_more_growth_entries_than_asked_for_are_refused(work: Workspace, pool: Pool) -> None:
    """A dense gradient that calls itself a top-K, or one of another layer."""
    mask = pool.masks[0]
    name, other = list(mask)[:2]
    weights = masked(pool, mask)
    request = TrainRequest(0, weights, mask, growth={name: 2})
    every = mask.pruned(name)
    for entries in (
        {name: (every, torch.ones(len(every)))},
        {other: (mask.pruned(other)[:1], torch.ones(1))},
    ):
        reply = TrainReply(1, 0.0, {}, entries)
        record = wire.encode_train_reply(reply, weights=weights, mask=mask, dtype="fp32")
        with pytest.raises(ClientError, match="not asked for, or too many"):
            wire.decode_reply(record, request, shapes=work.shapes, batch_norms=work.batch_norms)


def test_selection_messages_round_trip(work: Workspace, pool: Pool) -> None:
    names = [name for pair in work.batch_norms for name in pair]
    statistics = [{n: torch.rand(work.shapes[n]) for n in names} for _ in pool.masks]
    record = encode(ScoreRequest(pool, statistics))
    digest, decoded = wire.decode_pool(record, shapes=work.shapes)
    assert digest == wire.pool_digest(pool)
    assert decoded is not None
    assert decoded.masks == pool.masks
    assert same(decoded.weights, pool.weights)
    shapes = {name: work.shapes[name] for name in names}
    received = wire.decode_statistics(record, shapes=shapes)
    assert all(map(same, received, statistics))
    # A client that holds the pool is sent statistics only.
    light = encode(ScoreRequest(pool, statistics), held=frozenset([digest]))
    assert wire.decode_pool(light, shapes=work.shapes) == (digest, None)
    assert wire.record_bytes(light) < wire.record_bytes(record)

    answer = wire.encode_reply(MeasureReply(5, statistics))
    measured = wire.decode_reply(
        answer, MeasureRequest(pool), shapes=work.shapes, batch_norms=work.batch_norms
    )
    assert isinstance(measured, MeasureReply)
    assert all(map(same, measured.statistics, statistics))
    score = ScoreReply(5, [1.5, 2.5], [3, 4])
    request = ScoreRequest(pool, statistics)
    decoded_score = wire.decode_reply(
        wire.encode_reply(score), request, shapes=work.shapes, batch_norms=work.batch_norms
    )
    assert decoded_score == score


def test_large_frames_travel_as_arrays() -> None:
    large, small = bytes(wire.ARRAY_THRESHOLD), b"small"
    record = wire.build_record({"r": 1}, {"w": large, "m": small})
    assert list(record.array_records["a"]) == ["w"]
    assert wire.read_record(record) == {"r": 1, "w": large, "m": small}
    assert len(large) < wire.record_bytes(record) < len(large) + 1500
    parts = wire.record_parts(record)
    assert wire.read_record(wire.join_parts(*parts)) == wire.read_record(record)


def test_client_info_round_trip() -> None:
    info = ClientInfo(client=3, num_train=10, num_dev=1, label_histogram=[5, 0, 6])
    assert wire.decode_client_info(wire.encode_reply(info)) == info


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"id": -1, "n": 1, "v": 1, "h": [1]},
        {"id": "0", "n": 1, "v": 1, "h": [1]},
        {"id": 0, "n": 1.5, "v": 1, "h": [1]},
        {"id": True, "n": 1, "v": 1, "h": [1]},
        {"id": 0, "n": 1, "v": 1, "h": [1.5]},
    ],
)
def test_fields_of_the_wrong_kind_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ClientError):
        wire.decode_client_info(RecordDict({"c": ConfigRecord(fields)}))


def test_arrays_of_another_kind_are_refused() -> None:
    array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"abcd")
    record = RecordDict({"c": ConfigRecord({}), "a": ArrayRecord({"w": array})})
    with pytest.raises(ClientError, match="stype"):
        wire.read_record(record)


def test_losses_must_be_finite_and_as_many_as_candidates(work: Workspace, pool: Pool) -> None:
    request = ScoreRequest(pool, [])
    for losses, correct in (([1.0, float("nan")], [1, 1]), ([1.0], [1]), ([1.0, 2.0], [1])):
        record = wire.encode_reply(ScoreReply(5, losses, correct))
        with pytest.raises(ClientError):
            wire.decode_reply(record, request, shapes=work.shapes, batch_norms=work.batch_norms)


def test_damaged_frames_are_refused(work: Workspace, pool: Pool) -> None:
    mask = pool.masks[0]
    request = TrainRequest(0, masked(pool, mask), mask)
    record = encode(request)
    values = dict(record.config_records["c"])
    frame = values["m"]
    assert isinstance(frame, bytes)
    for damaged in (
        frame[:-1],
        frame + b"\0",
        b"",
        frame[:20] + bytes([frame[20] ^ 1]) + frame[21:],
    ):
        values["m"] = damaged
        with pytest.raises((ClientError, CodecError)):
            wire.decode_train_request(
                RecordDict({"c": ConfigRecord(values)}), shapes=work.shapes, masks=[]
            )
