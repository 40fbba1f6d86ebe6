"""Flower records on one side, plain requests and replies on the other.

The only file that knows both. A message holds one ConfigRecord of small numbers and codec
frames (sparsemodel/codec/FORMAT.md). Frames above 1 MiB travel as a Flower Array, which the
transport cuts into chunks; smaller ones inside the ConfigRecord, because an Array costs about
450 bytes of object headers, more than a tiny model's whole mask.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import WeightedMean
from fedprune.exchange.messages import (
    ClientInfo,
    MeasureReply,
    MeasureRequest,
    Pool,
    Reply,
    Request,
    ScoreReply,
    ScoreRequest,
    State,
    TrainReply,
    TrainRequest,
)
from sparsemodel.codec import (
    Limits,
    decode_entries,
    decode_mask,
    decode_mask_delta,
    decode_state,
    encode_entries,
    encode_mask,
    encode_mask_delta,
    encode_state,
)
from sparsemodel.errors import MaskMismatch, SparseModelError
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState

FRAME_STYPE = "fedprune.frame.v1"
ARRAY_THRESHOLD = 2**20
_FIELDS = "c"
_FRAMES = "a"

Shapes = Mapping[str, tuple[int, ...]]


class NeedsResync(Exception):  # noqa: N818 - an event, not a failure
    """The client lacks the mask or pool that a message refers to; send it whole."""


# --- records -----------------------------------------------------------------------------------


def build_record(fields: Mapping[str, Any], frames: Mapping[str, bytes]) -> RecordDict:
    """A Flower record of small fields and codec frames."""
    small = {key: data for key, data in frames.items() if len(data) < ARRAY_THRESHOLD}
    record = RecordDict({_FIELDS: ConfigRecord({**fields, **small})})
    if len(small) < len(frames):
        record[_FRAMES] = ArrayRecord(
            {
                key: Array(dtype="uint8", shape=(len(data),), stype=FRAME_STYPE, data=data)
                for key, data in frames.items()
                if key not in small
            }
        )
    return record


def read_record(record: RecordDict) -> dict[str, Any]:
    """Fields and frames of a record by key.

    Raises:
        ClientError: the record does not have this project's layout.
    """
    if _FIELDS not in record.config_records:
        raise ClientError(f"message without {_FIELDS!r}; it has {list(record)}")
    values: dict[str, Any] = dict(record.config_records[_FIELDS])
    for key, array in record.array_records.get(_FRAMES, {}).items():
        if array.stype != FRAME_STYPE:
            raise ClientError(f"array {key!r}: expected stype {FRAME_STYPE}, got {array.stype!r}")
        values[key] = array.data
    return values


def record_parts(record: RecordDict) -> tuple[ConfigRecord, ArrayRecord]:
    """Fields and arrays of a record, for a client to keep in its state."""
    arrays = record.array_records[_FRAMES] if _FRAMES in record else ArrayRecord()
    return record.config_records[_FIELDS], arrays


def join_parts(fields: ConfigRecord, arrays: ArrayRecord) -> RecordDict:
    """The record that `record_parts` took apart."""
    return RecordDict({_FIELDS: fields, _FRAMES: arrays})


def record_bytes(record: RecordDict) -> int:
    """Bytes of the record as Flower's transport sends it: all its objects, headers included."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(record).values())


def _field(values: Mapping[str, Any], key: str, expected: type) -> Any:
    value = values.get(key)
    if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
        raise ClientError(f"field {key!r}: expected {expected.__name__}, got {value!r:.60}")
    return value


def _count(values: Mapping[str, Any], key: str) -> int:
    count: int = _field(values, key, int)
    if count < 0:
        raise ClientError(f"field {key!r}: expected 0 or more, got {count}")
    return count


def _number_list(values: Mapping[str, Any], key: str, kind: type, length: int) -> list[Any]:
    numbers = _field(values, key, list)
    if len(numbers) != length or not all(isinstance(number, kind) for number in numbers):
        raise ClientError(f"field {key!r}: expected {length} of {kind.__name__}")
    return list(numbers)


def _patterns(mask: Mask | None) -> Patterns | None:
    return None if mask is None else mask.csr()


def _limits(shapes: Shapes) -> Limits:
    """No mask has more weights than the model."""
    return Limits(max_elements=sum(math.prod(shape) for shape in shapes.values()))


def _encode_weights(weights: State, mask: Mask | None = None, *, dtype: str = "fp32") -> bytes:
    patterns, values = _patterns(mask), {}
    for name, weight in weights.items():
        values[name] = weight.detach().cpu().numpy()
        if patterns is not None and name in patterns:
            values[name] = values[name].reshape(-1)[patterns[name].positions()]
    return encode_state(SparseState(values, patterns), dtype=dtype)


def _decode_weights(frame: bytes, *, shapes: Shapes, mask: Mask | None = None) -> State:
    dense = decode_state(frame, shapes=shapes, patterns=_patterns(mask)).dense()
    return {name: torch.from_numpy(value) for name, value in dense.items()}


# --- server to client --------------------------------------------------------------------------


def pool_digest(pool: Pool) -> str:
    """Names a pool by its masks and weights."""
    sha = hashlib.sha256(_encode_weights(pool.weights))
    for mask in pool.masks:
        sha.update(mask.digest().encode())
    return sha.hexdigest()[:16]


def encode_request(
    request: Request, *, held: frozenset[str], base: Mask | None, dtype: str
) -> RecordDict:
    """The record for one client.

    Args:
        held: digests of the masks and pools that this client is believed to hold.
        base: an older mask; a client that holds it is sent the difference only.
        dtype: how weights travel: fp32, fp16, bf16 or int8.
    """
    if isinstance(request, TrainRequest):
        return _encode_train(request, held=held, base=base, dtype=dtype)
    frames: dict[str, bytes] = {}
    digest = pool_digest(request.pool)
    if digest not in held:
        frames["w"] = _encode_weights(request.pool.weights)
        frames |= {f"m{c}": encode_mask(mask.csr()) for c, mask in enumerate(request.pool.masks)}
    if isinstance(request, ScoreRequest):
        for c, statistics in enumerate(request.statistics):
            frames[f"s{c}"] = _encode_weights(statistics)
    return build_record({"p": digest, "k": len(request.pool.masks)}, frames)


def _encode_train(
    request: TrainRequest, *, held: frozenset[str], base: Mask | None, dtype: str
) -> RecordDict:
    fields: dict[str, Any] = {"r": request.round_index}
    frames = {"w": _encode_weights(request.weights, request.mask, dtype=dtype)}
    if request.mask is not None:
        if request.mask.digest() not in held:
            if base is not None and base.digest() in held:
                frames["d"] = encode_mask_delta(base.csr(), request.mask.csr())
            else:
                frames["m"] = encode_mask(request.mask.csr())
        if request.growth:
            order = list(request.mask)
            fields["gi"] = [order.index(name) for name in request.growth]
            fields["gk"] = list(request.growth.values())
    if request.report_resources:
        fields["rr"] = True
    return build_record(fields, frames)


def mask_frame_bytes(record: RecordDict) -> int:
    """Bytes of the mask, or mask difference, inside an encoded train request; 0 without."""
    values = read_record(record)
    return sum(len(values[key]) for key in ("m", "d") if key in values)


def decode_train_request(record: RecordDict, *, shapes: Shapes, masks: list[Mask]) -> TrainRequest:
    """Client side. `masks` are those it holds, the current one first.

    Raises:
        NeedsResync: the mask that the weights belong to is not among them.
        ClientError, CodecError: the message is damaged.
    """
    values = read_record(record)
    if "m" in values:
        masks = [Mask.from_csr(decode_mask(_field(values, "m", bytes), limits=_limits(shapes)))]
    elif "d" in values:
        if not masks:
            raise NeedsResync
        try:
            new = decode_mask_delta(_field(values, "d", bytes), base=masks[0].csr())
            masks = [Mask.from_csr(new)]
        except SparseModelError:
            raise NeedsResync from None
    frame = _field(values, "w", bytes)
    weights, mask = _decode_with_any(frame, shapes, masks)
    growth: dict[str, int] = {}
    if "gi" in values and mask is not None:
        order = list(mask)
        layers = _number_list(values, "gi", int, len(_field(values, "gk", list)))
        counts = _number_list(values, "gk", int, len(layers))
        if not all(0 <= layer < len(order) for layer in layers) or min(counts, default=0) < 0:
            raise ClientError("growth request names layers that the mask does not have")
        growth = {order[layer]: count for layer, count in zip(layers, counts, strict=True)}
    return TrainRequest(
        round_index=_count(values, "r"),
        weights=weights,
        mask=mask,
        growth=growth,
        report_resources=bool(values.get("rr", False)),
    )


def _decode_with_any(frame: bytes, shapes: Shapes, masks: list[Mask]) -> tuple[State, Mask | None]:
    """Decode with the mask that the frame was made for, or without one."""
    for mask in [*masks, None]:
        try:
            return _decode_weights(frame, shapes=shapes, mask=mask), mask
        except MaskMismatch:
            continue
    raise NeedsResync


def decode_pool(record: RecordDict, *, shapes: Shapes) -> tuple[str, Pool | None]:
    """Client side: the pool's digest, and the pool where the message holds it."""
    values = read_record(record)
    digest = _field(values, "p", str)
    if "w" not in values:
        return digest, None
    frames = [_field(values, f"m{c}", bytes) for c in range(_count(values, "k"))]
    masks = [Mask.from_csr(decode_mask(frame, limits=_limits(shapes))) for frame in frames]
    weights = _decode_weights(_field(values, "w", bytes), shapes=shapes)
    return digest, Pool(weights=weights, masks=masks)


def decode_statistics(record: RecordDict, *, shapes: Shapes) -> list[State]:
    """Batch-norm statistics of each candidate; `shapes` names the statistics only."""
    values = read_record(record)
    return [
        _decode_weights(_field(values, f"s{c}", bytes), shapes=shapes)
        for c in range(_count(values, "k"))
    ]


# --- client to server --------------------------------------------------------------------------


def encode_train_reply(
    reply: TrainReply, *, weights: State, mask: Mask | None, dtype: str
) -> RecordDict:
    """`weights` is the trained dense state; its active values are what travels."""
    fields: dict[str, Any] = {"n": reply.num_examples, "l": reply.loss}
    frames = {"w": _encode_weights(weights, mask, dtype=dtype)}
    if reply.growth and mask is not None:
        growth = {name: (i.numpy(), v.numpy()) for name, (i, v) in reply.growth.items()}
        frames["g"] = encode_entries(growth, patterns=mask.csr())
    if reply.state_bytes:
        fields |= {"sb": reply.state_bytes, "rss": reply.peak_rss_bytes}
    return build_record(fields, frames)


def encode_reply(reply: ClientInfo | MeasureReply | ScoreReply) -> RecordDict:
    """Every other reply."""
    if isinstance(reply, ClientInfo):
        return build_record(
            {
                "id": reply.client,
                "n": reply.num_train,
                "v": reply.num_dev,
                "h": list(reply.label_histogram),
            },
            {},
        )
    if isinstance(reply, MeasureReply):
        frames = {f"s{c}": _encode_weights(s) for c, s in enumerate(reply.statistics)}
        return build_record({"n": reply.num_examples}, frames)
    return build_record({"n": reply.num_examples, "l": reply.loss_sums, "k": reply.num_correct}, {})


def resync_record() -> RecordDict:
    """A client's answer when it lacks the mask or pool of a message."""
    return build_record({"resync": True}, {})


def skip_record(reason: str) -> RecordDict:
    """A client's answer when it cannot take part."""
    return build_record({"skip": reason}, {})


def wants_resync(record: RecordDict) -> bool:
    """Whether a reply is `resync_record()`."""
    return bool(read_record(record).get("resync", False))


def decode_client_info(record: RecordDict) -> ClientInfo:
    """A client's answer to "describe"."""
    values = read_record(record)
    histogram = _field(values, "h", list)
    return ClientInfo(
        client=_count(values, "id"),
        num_train=_count(values, "n"),
        num_dev=_count(values, "v"),
        label_histogram=_number_list(values, "h", int, len(histogram)),
    )


def decode_reply(
    record: RecordDict,
    request: Request,
    *,
    shapes: Shapes,
    batch_norms: list[tuple[str, str]],
) -> Reply:
    """Server side: what a client answered to `request`.

    Raises:
        ClientError, CodecError: it cannot take part, or the reply is damaged, of other shapes,
            or made for another mask.
    """
    values = read_record(record)
    if "skip" in values:
        raise ClientError(str(values["skip"]))
    num_examples = _count(values, "n")
    if isinstance(request, TrainRequest):
        patterns, growth = _patterns(request.mask), {}
        if request.growth and patterns is not None and "g" in values:
            entries = decode_entries(_field(values, "g", bytes), patterns=patterns)
            growth = {
                n: (torch.from_numpy(i), torch.from_numpy(v)) for n, (i, v) in entries.items()
            }
        for name, (indices, _) in growth.items():
            if name not in request.growth or len(indices) > request.growth[name]:
                raise ClientError(f"growth entries of {name!r} were not asked for, or too many")
        trained = decode_state(_field(values, "w", bytes), shapes=shapes, patterns=patterns)
        return TrainReply(
            num_examples=num_examples,
            loss=float(_field(values, "l", float)),
            values={name: torch.from_numpy(value) for name, value in trained.values.items()},
            growth=growth,
            state_bytes=_count(values, "sb") if "sb" in values else 0,
            peak_rss_bytes=_count(values, "rss") if "rss" in values else 0,
        )
    num_candidates = len(request.pool.masks)
    if isinstance(request, MeasureRequest):
        wanted = {name: shapes[name] for pair in batch_norms for name in pair}
        statistics = [
            _decode_weights(_field(values, f"s{c}", bytes), shapes=wanted)
            for c in range(num_candidates)
        ]
        for candidate in statistics:  # refuse the whole reply before any part is folded in
            WeightedMean(batch_norms).add(candidate, weight=num_examples)
        return MeasureReply(num_examples=num_examples, statistics=statistics)
    losses = _number_list(values, "l", float, num_candidates)
    if not all(abs(loss) < float("inf") for loss in losses):
        raise ClientError("a candidate's loss is not finite")
    correct = _number_list(values, "k", int, num_candidates)
    return ScoreReply(num_examples=num_examples, loss_sums=losses, num_correct=correct)
