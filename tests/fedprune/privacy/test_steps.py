"""The steps of a secure sum on the wire: whatever comes, a client and the server survive it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import SESSION, Party, ready

from fedprune.config import RunConfig
from fedprune.errors import ClientError
from fedprune.flower import secure, wire
from fedprune.privacy.secure_sum import SECRET, Secrets

CONFIG = RunConfig.parse({"data.clients": 4, "privacy.secure_aggregation": True})


def steps() -> list[tuple[dict[str, Any], dict[str, bytes], dict[str, bytes]]]:
    """Headers and frames of honest steps, and what client 0 keeps when they come."""
    empty = Party(4)
    advertised = Party(4)
    advertised.advertise([0, 1, 2, 3])
    masked = ready(4)
    for client in range(4):
        masked.mask(client, np.zeros(3, np.uint64), 6)
    begun = {"s": SESSION, "n": 4}
    publics = b"".join(advertised.publics[client] for client in range(4))
    sealed = b"".join(masked.sealed[client][0] for client in (1, 2, 3))
    return [
        ({"a": secure.KEYS, **begun}, {}, empty.kept[0]),
        (
            {"a": secure.SHARES, **begun, "c": [0, 1, 2, 3], "w": 3},
            {"k": publics},
            advertised.kept[0],
        ),
        (
            {"a": secure.UNMASK, **begun, "c": [1, 2, 3], "u": [0, 1, 2]},
            {"k": sealed},
            masked.kept[0],
        ),
    ]


def answer(header: dict[str, Any], frames: dict[str, bytes], kept: dict[str, bytes]) -> Any:
    record = secure.answer(header, frames, kept, config=CONFIG, client=0)
    return wire.read_record(record)


def test_honest_steps_are_answered() -> None:
    sizes = []
    for header, frames, kept in steps():
        assert wire.is_secure_step(header)
        assert secure.num_clients(header) == 4
        sizes.append(len(answer(header, frames, dict(kept))[1]["k"]))
    assert sizes == [64, 32 + 3 * 120, 4 * 52]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_hostile_steps_are_refused_or_answered(data: st.DataObject) -> None:
    """A few fields and bytes changed: an answer, or one kind of error, and no secret is told."""
    header, frames, kept = data.draw(st.sampled_from(steps()))
    kept = dict(kept)
    for key in data.draw(st.lists(st.sampled_from(["s", "n", "c", "w", "u"]), max_size=2)):
        header[key] = data.draw(HOSTILE | st.lists(st.integers(-1, 5), max_size=5))
    if frames and data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(frames["k"])))
        frames["k"] = frames["k"][:cut] + data.draw(st.binary(max_size=150))
    before = kept.get(SECRET, b"")
    try:
        answered = answer(header, frames, kept)
    except ClientError:
        return
    if header["a"] == secure.UNMASK:
        told = answered[1]["k"]
        assert SECRET not in kept
        assert len(told) == 4 * 52
    assert not any(some in b"".join(answered[1].values()) for some in _private(before))


def _private(kept: bytes) -> list[bytes]:
    if not kept:
        return []
    secrets = Secrets.of({SECRET: kept}, SESSION)
    return [bytes.fromhex(text) for text in (secrets.talk, secrets.mask, secrets.seed) if text]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hostile_shares_end_in_one_error(data: st.DataObject) -> None:
    party = ready(4)
    words = np.zeros(3, np.uint64)
    for client in range(4):
        party.mask(client, words, 6)
    survivors = [0, 1, 2]
    told = {client: party.unmask(client, survivors) for client in survivors}
    liar, about = data.draw(st.sampled_from(survivors)), data.draw(st.integers(0, 3))
    right = told[liar][about]
    kind = data.draw(st.sampled_from(["bytes", "number", "length", "another"]))
    wrong = {
        "bytes": right[:4] + data.draw(st.binary(min_size=48, max_size=48)),
        "number": data.draw(st.binary(min_size=4, max_size=4)) + right[4:],
        "length": right[: data.draw(st.integers(0, 51))],
        "another": told[(liar + 1) % 3][about],
    }[kind]
    told[liar][about] = wrong
    if wrong == right:
        return
    with pytest.raises(ClientError):
        party.unmasked(words.copy(), told, survivors, 6)
