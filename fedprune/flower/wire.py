"""Flower records on one side, plain requests and replies on the other.

The only file that knows both. A message holds one ConfigRecord: a small header in JSON and codec
frames (sparsemodel/codec/FORMAT.md). Frames above 1 MiB travel as a Flower Array, which the
transport cuts into chunks; smaller ones inside the ConfigRecord, because an Array costs about
450 bytes of object headers, more than a tiny model's whole mask.

What a client holds between messages has tokens: "p:" the network's program, "m:" a mask, "v:"
the values of a state, each with a digest. A request brings what the client lacks; it is held from
then on exactly as long as requests name it, so that both sides know what the other holds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)

from fedprune.errors import DIVERGED, ClientError
from fedprune.exchange.messages import MODEL, Fields, Reply, Request, Resources
from fedprune.exchange.uplink import EXACT, UPDATE, Uplink, decompress
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
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState, Tensors

FRAME_STYPE = "fedprune.frame.v1"
ARRAY_THRESHOLD = 2**20
MAX_HEADER_BYTES = 2**24
DIGEST_DIGITS = 16
_FIELDS = "c"
_FRAMES = "a"
_HEADER = "h"

Shapes = Mapping[str, tuple[int, ...]]
Frames = dict[str, bytes]


class NeedsResync(Exception):  # noqa: N818 - an event, not a failure
    """The client lacks something that a message refers to; send it whole."""


# --- records -----------------------------------------------------------------------------------


def build_record(header: Mapping[str, Any], frames: Mapping[str, bytes]) -> RecordDict:
    """A Flower record of a header and codec frames.

    Raises:
        ClientError: a number of the header is not finite.
    """
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise ClientError(f"a number to be sent is not finite: {DIVERGED}") from None
    small = {key: data for key, data in frames.items() if len(data) < ARRAY_THRESHOLD}
    record = RecordDict({_FIELDS: ConfigRecord({_HEADER: text, **small})})
    if len(small) < len(frames):
        record[_FRAMES] = ArrayRecord(
            {
                key: Array(dtype="uint8", shape=(len(data),), stype=FRAME_STYPE, data=data)
                for key, data in frames.items()
                if key not in small
            }
        )
    return record


def read_record(record: RecordDict) -> tuple[dict[str, Any], Frames]:
    """Header and frames of a record.

    Raises:
        ClientError: the record does not have this project's layout.
    """
    if _FIELDS not in record.config_records or not set(record) <= {_FIELDS, _FRAMES}:
        held = f"{len(record)} records: {str(list(record)[:5])[:100]}"
        raise ClientError(f"expected records {_FIELDS!r} and {_FRAMES!r}, got {held}")
    values = dict(record.config_records[_FIELDS])
    text = values.pop(_HEADER, None)
    frames: Frames = {}
    for key, data in values.items():
        if not isinstance(data, bytes):
            raise ClientError(f"frame {key!r}: expected bytes, got {type(data).__name__}")
        frames[key] = data
    for key, array in record.array_records.get(_FRAMES, {}).items():
        if array.stype != FRAME_STYPE:
            raise ClientError(f"array {key!r}: expected stype {FRAME_STYPE}, got {array.stype!r}")
        frames[key] = array.data
    return _read_header(text), frames


def error_reply(message: Message, reason: str) -> Message:
    """Flower's own answer in place of a client that raised."""
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
    return Message(error, reply_to=message)


def is_secure_step(header: Mapping[str, Any]) -> bool:
    """Whether a message is a step of a secure sum (secure.py) and no question."""
    return str(header.get("a", "")).startswith("secure.")


def record_bytes(record: RecordDict) -> int:
    """Bytes of the record as Flower's transport sends it: all its objects, headers included."""
    with no_object_id_recompute():  # a hash of all content, which would be made twice
        return sum(len(part.deflate()) for part in get_all_nested_objects(record).values())


def _read_header(text: object) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    if not isinstance(text, str) or len(text) > MAX_HEADER_BYTES:
        raise ClientError(f"header: expected text, got {text!r:.60}")
    try:
        header = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ClientError(f"header: not JSON ({str(error)[:100]})") from None
    if not isinstance(header, dict):
        raise ClientError(f"header: expected an object, got {header!r:.60}")
    return header


def _field(header: Mapping[str, Any], key: str, expected: type, default: Any = None) -> Any:
    value = header.get(key, default)
    if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
        raise ClientError(f"field {key!r}: expected {expected.__name__}, got {value!r:.60}")
    return value


def _count(header: Mapping[str, Any], key: str) -> int:
    number: int = _field(header, key, int)
    if not 0 <= number < 2**53:
        raise ClientError(f"field {key!r}: expected 0 or more, got {number}")
    return number


def _frame(frames: Frames, key: str) -> bytes:
    if key not in frames:
        raise ClientError(f"message without its frame {key!r}; it has {sorted(frames)}")
    return frames[key]


# --- what a client holds -----------------------------------------------------------------------


def program_token(digest: str) -> str:
    """The token of a network's program."""
    return f"p:{digest[:DIGEST_DIGITS]}"


def mask_token(patterns: Patterns) -> str:
    """The token of a mask."""
    return f"m:{patterns.digest()[:DIGEST_DIGITS]}"


def values_token(frame: bytes) -> str:
    """The token of a state's values as they travel."""
    return f"v:{hashlib.sha256(frame).hexdigest()[:DIGEST_DIGITS]}"


@dataclass
class Held:
    """What a client holds between messages: token -> the bytes that it was sent, or made of them.

    Decoded masks are kept beside their bytes in `decoded`, which a process may share.
    """

    items: dict[str, bytes] = field(default_factory=dict)
    decoded: dict[str, Patterns] = field(default_factory=dict)

    def take(self, token: str) -> bytes:
        """The bytes of a token.

        Raises:
            NeedsResync: the client does not hold them.
        """
        if token not in self.items:
            raise NeedsResync
        return self.items[token]

    def mask(self, token: str) -> Patterns:
        """A mask, decoded.

        Raises:
            NeedsResync: the client does not hold it.
        """
        data = self.take(token)
        if token not in self.decoded:
            self.decoded[token] = decode_mask(data)
        return self.decoded[token]


# --- server to client --------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """A request encoded for clients that hold the same.

    Attributes:
        held: tokens of what they hold after it.
        size: bytes of the record as the transport sends it.
        mask_size: bytes of masks and mask changes in it.
    """

    record: RecordDict
    held: frozenset[str]
    size: int
    mask_size: int


@dataclass(frozen=True)
class ProgramText:
    """A network's program as it travels: canonical text and its digest; no text: there is none."""

    text: str = ""
    digest: str = ""

    @classmethod
    def of(cls, program: Program | None) -> ProgramText:
        """That of a program."""
        return cls() if program is None else cls(program.text(), program.digest())


def encode_request(
    request: Request,
    *,
    program: ProgramText,
    held: frozenset[str],
    base: Patterns | None,
    dtype: str,
    clients: int = 0,
) -> Envelope:
    """The record for a client.

    Args:
        program: of the network that the question is about.
        held: tokens of what this client is believed to hold.
        base: an older mask; a client that holds it is sent the difference only.
        dtype: how weights travel: fp32, fp16, bf16 or int8.
        clients: how many the run has, where its configuration does not say it.
    """
    frames: Frames = {}
    keep: set[str] = set()
    header: dict[str, Any] = {"a": request.action, "r": request.round_index}
    if clients:
        header["n"] = clients
    if program.text:
        token = program_token(program.digest)
        header["p"] = token[2:]
        keep.add(token)
        if token not in held:
            frames["p"] = program.text.encode()
    if request.program is not None:
        header["o"] = True
    states = [
        _encode_part(place, name, request, frames, keep, held=held, base=base, dtype=dtype)
        for place, name in enumerate(request.states)
    ]
    if states:
        header["s"] = states
    _encode_tensors(request.tensors, header, frames)
    if request.masks:
        header["q"] = list(request.masks)
    for place, patterns in enumerate(request.masks.values()):
        frames[f"q{place}"] = encode_mask(patterns)
    if request.fields:
        header["f"] = dict(request.fields)
    if request.report_resources:
        header["u"] = True
    record = build_record(header, frames)
    mask_size = sum(len(data) for key, data in frames.items() if key[0] in "mdq")
    return Envelope(record, frozenset(keep), record_bytes(record), mask_size)


def _encode_part(
    place: int,
    name: str,
    request: Request,
    frames: Frames,
    keep: set[str],
    *,
    held: frozenset[str],
    base: Patterns | None,
    dtype: str,
) -> dict[str, Any]:
    """A state's entry in the header; its frames, and the tokens that it keeps, are added."""
    state = request.states[name]
    entry: dict[str, Any] = {"n": name}
    if state.patterns is not None:
        token = mask_token(state.patterns)
        entry["m"] = token[2:]
        keep.add(token)
        if token not in held and base is not None and _can_differ(base, state.patterns, held):
            entry["b"] = mask_token(base)[2:]
            frames[f"d{place}"] = encode_mask_delta(base, state.patterns)
        elif token not in held:
            frames[f"m{place}"] = encode_mask(state.patterns)
    values = encode_state(state, dtype=dtype)
    token = values_token(values) if name in request.hold else ""
    if token:
        entry["v"] = token[2:]
        keep.add(token)
    if token not in held:
        frames[f"w{place}"] = values
    return entry


def _can_differ(base: Patterns, patterns: Patterns, held: frozenset[str]) -> bool:
    """Whether a client can be told a mask by its difference from `base`: same layers, and held."""
    same_layers = list(base.shapes().items()) == list(patterns.shapes().items())
    return same_layers and mask_token(base) in held


def as_received(request: Request, *, dtype: str) -> Request:
    """A request with the model as clients read it where values travel as `dtype`."""
    if dtype == "fp32" or MODEL not in request.states:
        return request
    model = request.states[MODEL]
    read = decode_state(
        encode_state(model, dtype=dtype), shapes=model.shapes(), patterns=model.patterns
    )
    return replace(request, states={**request.states, MODEL: read})


@dataclass(frozen=True)
class Received:
    """A request as a client reads it, part by part: what it brings is decoded when asked for.

    Attributes:
        program: token of the network's program; "" where the network has none.
    """

    action: str
    program: str
    _header: Mapping[str, Any]
    _frames: Frames
    _held: Held

    def nbytes(self) -> int:
        """Bytes of the message's frames, and of what is held from now on."""
        frames = {
            id(data): len(data) for data in (*self._frames.values(), *self._held.items.values())
        }
        return sum(frames.values())

    def clients(self) -> int:
        """How many clients the run has, where the message says it, else 0.

        Raises:
            ClientError: it is no number.
        """
        return _count(self._header, "n") if "n" in self._header else 0

    def is_other(self) -> bool:
        """Whether the question is about another network than the run's."""
        return bool(_field(self._header, "o", bool, False))

    def program_text(self) -> bytes:
        """The program of the question's network."""
        return self._held.take(self.program)

    def request(self, shapes: Shapes) -> Request:
        """The whole request.

        Args:
            shapes: of the model's tensors, in its order.

        Raises:
            NeedsResync: something that it refers to is not held.
            ClientError, CodecError: the message is damaged.
        """
        states = {}
        for place, entry in enumerate(_field(self._header, "s", list, [])):
            name = _field(entry, "n", str)
            states[name] = self._state(place, entry, shapes)
        return Request(
            action=self.action,
            round_index=_count(self._header, "r"),
            fields=_field(self._header, "f", dict, {}),
            states=states,
            tensors=_decode_tensors(self._header, self._frames, shapes),
            masks={
                name: _decode_mask_of(shapes, _frame(self._frames, f"q{place}"))
                for place, name in enumerate(_names(self._header, "q"))
            },
            report_resources=_field(self._header, "u", bool, False),
        )

    def _state(self, place: int, entry: Mapping[str, Any], shapes: Shapes) -> SparseState:
        patterns = self._held.mask(f"m:{_field(entry, 'm', str)}") if "m" in entry else None
        frame = (
            self._held.take(f"v:{_field(entry, 'v', str)}")
            if "v" in entry
            else _frame(self._frames, f"w{place}")
        )
        try:
            return decode_state(frame, shapes=shapes, patterns=patterns)
        except MaskMismatch:
            raise NeedsResync from None


def receive(record: RecordDict, held: Held) -> Received:
    """Read a request's header, and bring `held` to what the client holds from now on.

    Raises:
        NeedsResync: something that it refers to is not held; `held` is as it was.
        ClientError, CodecError: the message is damaged.
    """
    header, frames = read_record(record)
    kept: dict[str, bytes] = {}
    program = ""
    if "p" in header:
        program = f"p:{_field(header, 'p', str)}"
        kept[program] = frames["p"] if "p" in frames else held.take(program)
    for place, entry in enumerate(_field(header, "s", list, [])):
        if not isinstance(entry, dict):
            raise ClientError(f"state {place}: expected an object, got {entry!r:.60}")
        if "m" in entry:
            token = f"m:{_field(entry, 'm', str)}"
            kept[token] = _mask_bytes(token, place, entry, frames, held)
        if "v" in entry:
            token = f"v:{_field(entry, 'v', str)}"
            kept[token] = frames[f"w{place}"] if f"w{place}" in frames else held.take(token)
    held.items = kept
    return Received(_field(header, "a", str), program, header, frames, held)


def _mask_bytes(
    token: str, place: int, entry: Mapping[str, Any], frames: Frames, held: Held
) -> bytes:
    """A mask that a message brings, changes or names, as the bytes of a whole one."""
    if f"m{place}" in frames:
        data, patterns = frames[f"m{place}"], decode_mask(frames[f"m{place}"])
    elif f"d{place}" in frames:
        base = held.mask(f"m:{_field(entry, 'b', str)}")
        try:
            patterns = decode_mask_delta(frames[f"d{place}"], base=base)
        except MaskMismatch:
            raise NeedsResync from None
        data = encode_mask(patterns)
    else:
        return held.take(token)
    if mask_token(patterns) != token:
        raise CodecError(f"the mask of state {place} is not the one that the message names")
    held.decoded[token] = patterns
    return data


# --- client to server --------------------------------------------------------------------------


def encode_reply(
    reply: Reply, request: Request, *, dtype: str, update: Frames | None = None
) -> RecordDict:
    """The record of an answer to `request`.

    Args:
        dtype: how states travel.
        update: frames of exchange/uplink.py, in place of the model's state.
    """
    frames: Frames = {}
    header: dict[str, Any] = {"n": reply.num_examples}
    if reply.states:
        header["s"] = list(reply.states)
    for place, (name, state) in enumerate(reply.states.items()):
        if update is not None and name == MODEL:
            frames |= {f"{kind}{place}": data for kind, data in update.items()}
        else:
            frames[f"w{place}"] = encode_state(state, dtype=dtype)
    entries = {name: some for name, some in reply.entries.items() if some}
    if entries:
        header["e"] = list(entries)
    for place, (name, some) in enumerate(entries.items()):
        patterns = request.states[name].patterns
        assert patterns is not None, "entries are at pruned places"
        frames[f"e{place}"] = encode_entries(some, patterns=patterns)
    _encode_tensors(reply.tensors, header, frames)
    if reply.masks:
        header["m"] = list(reply.masks)
    for place, patterns in enumerate(reply.masks.values()):
        frames[f"m{place}"] = encode_mask(patterns)
    if reply.masked:
        header["x"], frames["x"] = True, reply.masked
    if reply.fields:
        header["f"] = dict(reply.fields)
    if reply.resources is not None:
        header["u"] = _resources_text(reply.resources)
    return build_record(header, frames)


def resync_record() -> RecordDict:
    """A client's answer when it lacks something that a message refers to."""
    return build_record({"resync": True}, {})


def skip_record(reason: str) -> RecordDict:
    """A client's answer when it cannot take part."""
    return build_record({"skip": reason}, {})


def wants_resync(record: RecordDict) -> bool:
    """Whether a reply is `resync_record()`."""
    return bool(read_record(record)[0].get("resync", False))


def decode_reply(
    record: RecordDict, request: Request, *, shapes: Shapes, uplink: Uplink = EXACT
) -> Reply:
    """Server side: what a client answered to `request`.

    Args:
        shapes: of the model's tensors, in its order; `request` may expect others besides.
        uplink: how the model travels; unless exactly, `request` must be as the client read it.

    Raises:
        ClientError, CodecError: it cannot take part, or the reply is damaged, of other shapes,
            or made for another mask.
    """
    header, frames = read_record(record)
    if "skip" in header:
        raise ClientError(str(header["skip"]))
    _check_keys(header, frames, uplink)
    states = {}
    for place, name in enumerate(_names(header, "s")):
        asked = _asked(request, name)
        if name == MODEL and not uplink.exact:
            keys = {kind: f"{kind}{place}" for kind in UPDATE}
            update = {kind: frames[key] for kind, key in keys.items() if key in frames}
            states[name] = decompress(update, asked, uplink)
        else:
            frame = _frame(frames, f"w{place}")
            states[name] = decode_state(frame, shapes=shapes, patterns=asked.patterns)
    entries = {}
    for place, name in enumerate(_names(header, "e")):
        patterns = _asked(request, name).patterns
        if patterns is None:
            raise ClientError(f"entries of {name!r}, which is dense")
        entries[name] = decode_entries(_frame(frames, f"e{place}"), patterns=patterns)
    return Reply(
        num_examples=_count(header, "n"),
        fields=_field(header, "f", dict, {}),
        states=states,
        entries=entries,
        tensors=_decode_tensors(header, frames, {**shapes, **request.expected.shapes}),
        masks={
            name: _decode_mask_of(_asked_layers(request, name, shapes), _frame(frames, f"m{place}"))
            for place, name in enumerate(_names(header, "m"))
        },
        resources=_resources(_field(header, "u", str)) if "u" in header else None,
        masked=_frame(frames, "x") if "x" in header else b"",
    )


def _asked_layers(request: Request, name: str, shapes: Shapes) -> Shapes:
    """Of the layers that a mask was asked of; a few bytes may stand for many full masks."""
    if name not in request.expected.masks:
        raise ClientError(f"a mask {name!r:.60} that was not asked for")
    return {layer: shapes[layer] for layer in request.expected.masks[name]}


def _decode_mask_of(shapes: Shapes, frame: bytes) -> Patterns:
    weights = sum(math.prod(shape) for shape in shapes.values())
    limits = Limits(max_elements=max(1, weights), max_layers=max(1, len(shapes)))
    patterns = decode_mask(frame, limits=limits)
    for name, shape in patterns.shapes().items():
        if shapes.get(name) != shape:
            raise ClientError(f"a mask of {name!r:.60} of shape {shape}: the model has another")
    return patterns


def _check_keys(header: Fields, frames: Frames, uplink: Uplink) -> None:
    """Whether a reply has the parts that it names and no others."""
    if not set(header) <= set("nsetkmfux"):
        raise ClientError(f"unknown keys in the header: {str(sorted(header)[:9])[:100]}")
    named = {
        f"{key}{place}" for key in "etm" for place in range(len(_field(header, key, list, [])))
    }
    for place, name in enumerate(_names(header, "s")):
        kinds = ("w",) if uplink.exact or name != MODEL else UPDATE
        named |= {f"{kind}{place}" for kind in kinds}
    named |= {"x"} & set(header)
    if not set(frames) <= named:
        raise ClientError(f"frames that it does not name: {sorted(set(frames) - named)[:5]!s}")


# As wide whatever they say, so that the bytes of a run do not depend on what a machine held.
_RESOURCE_DIGITS = 14


def _resources_text(resources: Resources) -> str:
    held = (resources.state_bytes, resources.peak_rss_bytes)
    return "".join(f"{size:0{_RESOURCE_DIGITS}x}" for size in held)


def _resources(text: str) -> Resources:
    if len(text) != 2 * _RESOURCE_DIGITS or not set(text) <= set("0123456789abcdef"):
        raise ClientError(f"field 'u': expected two numbers of fixed width, got {text!r:.60}")
    return Resources(int(text[:_RESOURCE_DIGITS], 16), int(text[_RESOURCE_DIGITS:], 16))


def _asked(request: Request, name: str) -> SparseState:
    if name not in request.states:
        raise ClientError(f"a state {name!r} that was not asked for; asked: {list(request.states)}")
    return request.states[name]


def _names(header: Fields, key: str) -> list[str]:
    names = _field(header, key, list, [])
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ClientError(f"field {key!r}: expected names, each once, got {names!r:.60}")
    return list(names)


# --- dictionaries of tensors -------------------------------------------------------------------


def _encode_tensors(groups: Mapping[str, Tensors], header: dict[str, Any], frames: Frames) -> None:
    """Whole tensors of the model: their names travel, since a group may hold any of them."""
    if not groups:
        return
    # Mostly all groups hold the same tensors: the names of each kind travel once.
    kinds: list[list[str]] = []
    listed = []
    for place, (name, tensors) in enumerate(groups.items()):
        names = list(tensors)
        if names not in kinds:
            kinds.append(names)
        listed.append([name, kinds.index(names)])
        frames[f"t{place}"] = encode_state(SparseState(tensors))
    header["t"] = listed
    header["k"] = kinds


def _decode_tensors(header: Fields, frames: Frames, shapes: Shapes) -> dict[str, Tensors]:
    kinds = _field(header, "k", list, [])
    groups: dict[str, Tensors] = {}
    for place, entry in enumerate(_field(header, "t", list, [])):
        match entry:
            case [str(name), int(kind)] if 0 <= kind < len(kinds) and name not in groups:
                wanted = {key: shapes[key] for key in _known(kinds[kind], shapes)}
                frame = _frame(frames, f"t{place}")
                groups[name] = decode_state(frame, shapes=wanted, patterns=None).values
            case _:
                raise ClientError(f"field 't': expected a name and a kind, got {entry!r:.60}")
    return groups


def _known(names: object, shapes: Shapes) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(n, str) and n in shapes for n in names):
        raise ClientError(f"field 'k': expected names of the model's tensors, got {names!r:.60}")
    return names
