"""A reply as a vector: sums of vectors are the sums of replies, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, SPEC, Expected, Reply, Request
from fedprune.exchange.pooled import pooled
from fedprune.methods.base import RunState, train_request
from fedprune.privacy.vector import Spec, num_words, pooled_of, vector_of
from sparsemodel.runtime.fixed_sum import MAX_TOTAL_WEIGHT, FixedSum, word_width
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

SHAPES = {"a": (6, 10), "n.running_mean": (4,), "n.running_var": (4,), "b": (30,)}
PATTERNS = Patterns({
    "a": Pattern.from_positions((6, 10), np.arange(0, 60, 5)),
    "b": Pattern.from_positions((30,), np.array([3, 4, 20])),
})  # fmt: skip
GROWTH = {"b": 2, "a": 5}


def a_state(draw: np.random.Generator, scale: float) -> SparseState:
    values = {"a": 12, "n.running_mean": 4, "n.running_var": 4, "b": 3}
    made = {n: (scale * draw.normal(size=k)).astype(np.float32) for n, k in values.items()}
    made["n.running_var"] = abs(made["n.running_var"])
    return SparseState(made, PATTERNS)


def a_reply(draw: np.random.Generator, scale: float, most: int) -> Reply:
    entries = {}
    for name, count in GROWTH.items():
        pattern = PATTERNS[name]
        pruned = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())
        chosen = np.sort(draw.choice(pruned, int(draw.integers(0, count + 1)), replace=False))
        entries[name] = (chosen, draw.normal(size=len(chosen)).astype(np.float32))
    entries = {name: some for name, some in entries.items() if len(some[0])}
    statistics = {n: v for n, v in a_state(draw, scale).values.items() if "running" in n}
    return Reply(
        int(draw.integers(1, most + 1)),
        {"loss": abs(float(draw.normal())), "losses": [1.5, 2.0**-30], "hits": 7},
        {MODEL: a_state(draw, scale)},
        {MODEL: entries} if entries else {},
        {"0": statistics},
    )


def question(start: SparseState) -> Request:
    request = train_request(RunState(0, start), growth=GROWTH)
    names = ["n.running_mean", "n.running_var"]
    expected = Expected(
        fields=["loss"], states=[MODEL], growth=GROWTH, tensors={"0": names},
        sums={"losses": 2, "hits": 0},
    )  # fmt: skip
    return replace(request, expected=expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([1e-9, 0.1, 4.0, 100.0]))
def test_the_mean_of_a_sum_of_vectors_has_the_bits_of_the_plain_one(
    seed: int, num: int, scale: float
) -> None:
    """Weights, pooled statistics, tensors, losses and growth entries, whatever their size."""
    draw = np.random.default_rng(seed)
    most = int(draw.integers(1, MAX_TOTAL_WEIGHT // 6))
    request = question(a_state(draw, scale))
    replies = {client: a_reply(draw, scale, most) for client in range(num)}
    plain = pooled(replies.items(), request.expected)
    weights = {client: reply.weight for client, reply in replies.items()}
    spec = Spec.of(request, "s", list(replies), total_weight=sum(weights.values()))
    received = Spec.read(spec.asked(request).fields)
    assert received == spec
    vectors = [vector_of(reply, spec.asked(request), spec) for reply in replies.values()]
    assert {len(vector) for vector in vectors} == {num_words(request, spec, SHAPES)}
    total = sum(vectors, np.zeros_like(vectors[0]))
    total &= np.uint64(2 ** (8 * spec.width) - 1)  # as it travels
    found, complete = pooled_of(total, request, spec, SHAPES, weights=weights)
    assert complete
    assert (found.clients, found.weight) == (plain.clients, plain.weight)
    assert found.fields == plain.fields
    assert found.fields["hits"] == pytest.approx(
        sum(7 * r.weight / r.num_examples for r in replies.values()) / plain.weight
    )
    for name, value in plain.states[MODEL].values.items():
        assert found.states[MODEL].values[name].tobytes() == value.tobytes()
    for name, value in plain.tensors["0"].items():
        assert found.tensors["0"][name].tobytes() == value.tobytes()
    assert found.growth.keys() == plain.growth.keys()
    for name, (places, value) in plain.growth.items():
        assert found.growth[name][0].tolist() == places.tolist()
        assert found.growth[name][1].tobytes() == value.tobytes()


@pytest.mark.parametrize("weight", [1, 3, 2**11, 2**11 + 1, MAX_TOTAL_WEIGHT])
def test_words_of_their_width_hold_every_sum(weight: int) -> None:
    """The largest and smallest values at the whole weight, with the least and the largest rest."""
    edge = np.nextafter(np.float64(2**20), 0)
    values = np.array([edge, -edge, -(2.0**20) + 2.0**-32, 0.0, -(2.0**-60), 2.0**-16 - 2.0**-60])
    whole, width = FixedSum(values.shape), word_width(weight)
    assert whole.add(values, None, weight) == 0
    cut = whole.words() & np.uint64(2 ** (8 * width) - 1)
    found = FixedSum.of_words(values.shape, cut, width=width)
    assert np.array_equal(found.words(), whole.words())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.full(12, np.nan)}, "expected|diverged"),
        ({"a": np.full(12, 2.0**20)}, "diverged"),
        ({"n.running_var": np.full(4, -1.0)}, "negative variance"),
        ({"n.running_mean": np.full(4, 2.0**11)}, "beyond"),
    ],
)
def test_a_client_refuses_values_that_the_server_could_not(
    change: Mapping[str, Any], message: str
) -> None:
    draw = np.random.default_rng(0)
    request = question(a_state(draw, 1.0))
    reply = a_reply(draw, 1.0, 9)
    values = {name: np.float32(value) for name, value in change.items()}
    bad = replace(reply, states={MODEL: reply.states[MODEL].replace(values)})
    spec = Spec.of(request, "s", [0, 1], total_weight=100)
    with pytest.raises(ClientError, match=message):
        vector_of(bad, spec.asked(request), spec)
    for fields in ({"loss": float("inf")}, {"loss": "much"}, {"loss": [1.0, None]}):
        with pytest.raises(ClientError, match="expected a finite number"):
            vector_of(replace(reply, fields=fields), spec.asked(request), spec)


@pytest.mark.parametrize("cells", [1, 2**26])
def test_a_client_makes_no_table_but_that_of_the_entries_asked_for(cells: int) -> None:
    """The largest would take gigabytes."""
    draw = np.random.default_rng(0)
    request = question(a_state(draw, 1.0))
    spec = Spec.of(request, "s", [0, 1], total_weight=100)
    assert spec.cells > 1
    other = replace(spec, cells=cells)
    with pytest.raises(ClientError, match=f"a table of {cells} cells a row"):
        vector_of(a_reply(draw, 1.0, 9), other.asked(request), other)


WHOLE = {"session": "s", "clients": [0, 1], "width": 6, "cells": 0, "sums": {}}


@pytest.mark.parametrize(
    "given",
    [
        7,
        {},
        {**WHOLE, "session": 3},
        {**WHOLE, "width": 4},  # too few bytes for a sum would show some values
        {**WHOLE, "width": 9},
        {**WHOLE, "width": "6"},
        {**WHOLE, "cells": -1},
        {**WHOLE, "cells": 2**40},  # a table that no device could hold
        {**WHOLE, "clients": [0, -1]},
        {**WHOLE, "clients": ["0"]},
        {**WHOLE, "clients": [0] * 70_000},
        {key: value for key, value in WHOLE.items() if key != "sums"},
    ],
)
def test_hostile_descriptions_of_a_sum_are_refused(given: Any) -> None:
    with pytest.raises(ClientError):
        Spec.read({SPEC: given})
    assert Spec.read({}) is None
    assert Spec.read({SPEC: WHOLE}) == Spec("s", [0, 1], 6)
