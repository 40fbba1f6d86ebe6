"""SSFL: the mask of the clients' mean saliency, against a plain loop in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import laid_out, places_of, run_inline, tiny
from flwr.app import Context, Message
from torch import nn

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.flower import client, wire
from fedprune.local.site import Local
from fedprune.local.training import SEED_GROWTH, epoch_batches
from fedprune.methods.base import Start
from fedprune.methods.fixed_mask import largest
from fedprune.methods.ssfl import SALIENCY, SSFL, saliency
from fedprune.rounds.folder import read_metrics, read_summary
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import open_workspace
from prunelab.data.batches import Preprocessing
from prunelab.errors import RunError
from sparsemodel.codec import decode_state, encode_state
from sparsemodel.layers.from_state import load_state_
from sparsemodel.runtime.state import SparseState


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A laid-out federation whose method is SSFL, of two mini-batches."""
    settings = {"method__batches": 2, "data__alpha": 0.3, "training__batch_size": 16}
    return laid_out(tmp_path_factory.mktemp("setup"), method__name="ssfl", **settings)


def start_of(setup: Setup, ask: Any) -> Start:
    return Start(setup.start_state, setup.prunable, setup.blocks, ask, 4, setup.config.seed)


def asking(setup: Setup, *, only: tuple[int, ...] = (0, 1, 2, 3)) -> Any:
    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        for place in places_of(setup):
            if place.client in only:
                reply = saliency(request, place)
                request.check(reply)
                yield place.client, reply

    return ask


def by_hand(setup: Setup, place: Local, state: SparseState, batches: int) -> dict[str, Any]:
    """|w ⊙ mean gradient| by autograd in float64, weighted by samples of each mini-batch."""
    model = setup.network.build()
    load_state_(model, state)
    model.double().train()
    sums: dict[str, Any] = {}
    samples = 0
    source = epoch_batches(
        place.data.train.inputs, place.data.train.targets, epochs=1,
        batch_size=place.config.training.batch_size, seed=place.seed(SEED_GROWTH, 0),
        augmented=False,
    )  # fmt: skip
    for _, (_, images, labels) in zip(range(batches), source, strict=False):
        inputs = torch.from_numpy(Preprocessing().apply(images)).double()
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels)).backward()
        for name in setup.prunable:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            sums[name] = sums.get(name, 0.0) + len(labels) * gradient.numpy()
        samples += len(labels)
    return {n: np.abs(total * state.values[n]) / samples for n, total in sums.items()}


def test_the_mask_is_that_of_the_mean_saliency(setup: Setup) -> None:
    """All weights of the network ranked together; each client counts by its samples."""
    method = setup.method
    assert isinstance(method, SSFL)
    state = method.start(start_of(setup, asking(setup))).model
    dense = setup.start_state()
    mean: dict[str, Any] = dict.fromkeys(setup.prunable, 0.0)
    total = sum(len(place.data.train) for place in places_of(setup))
    for place in places_of(setup):
        share = len(place.data.train) / total
        for name, scores in by_hand(setup, place, dense, method.batches).items():
            mean[name] = mean[name] + share * scores
    flat = np.concatenate([mean[name].reshape(-1) for name in setup.prunable])
    kept = round(0.2 * len(flat))
    threshold = np.sort(flat)[-kept]
    assert state.patterns is not None
    assert state.patterns.num_active == pytest.approx(kept, abs=1)
    odd = 0
    for name, scores in mean.items():
        expected = np.flatnonzero(scores.reshape(-1) >= threshold)
        found = state.patterns[name].positions()
        differ = np.setxor1d(expected, found)
        odd += len(differ)
        # Only what rounding of float32 cannot tell from the threshold.
        assert np.allclose(scores.reshape(-1)[differ], threshold, rtol=1e-2)
        assert np.array_equal(state.values[name], dense.values[name].reshape(-1)[found])
    assert odd <= kept // 100
    for name in set(dense.values) - set(setup.prunable):
        assert np.array_equal(state.values[name], dense.values[name])


@pytest.mark.parametrize("batches", [1, 2, 99])
def test_a_client_measures_its_mean_gradient(batches: int, setup: Setup) -> None:
    """Over so many mini-batches, or all it has."""
    place, state = places_of(setup)[1], setup.start_state()
    fields = {"layers": list(setup.prunable), "batches": batches}
    reply = saliency(Request(SALIENCY, fields=fields, states={MODEL: state}), place)
    assert reply.num_examples == len(place.data.train)
    expected = by_hand(setup, place, state, batches)
    for name, scores in reply.tensors[SALIENCY].items():
        largest = expected[name].max()
        np.testing.assert_allclose(scores, expected[name], rtol=1e-3, atol=1e-3 * largest)


def test_measuring_moves_nothing(setup: Setup) -> None:
    state = setup.start_state()
    kept = {name: value.copy() for name, value in state.values.items()}
    fields = {"layers": list(setup.prunable), "batches": 2}
    request = Request(SALIENCY, fields=fields, states={MODEL: state})
    first, second = (saliency(request, places_of(setup)[0]).tensors[SALIENCY] for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(np.array_equal(kept[name], value) for name, value in state.values.items())


def test_equal_scores_go_to_the_earlier() -> None:
    """Four of eight, of scores 3 2 2 2 | 4 2 2 0: the 4, the 3 and the first two of the 2s."""
    scores = {
        "a": np.array([[3, 2], [2, 2]], np.float32),
        "b": np.array([[4, 2], [2, 0]], np.float32),
    }
    patterns = largest(scores, 0.5, "global")
    assert patterns["a"].positions().tolist() == [0, 1, 2]
    assert patterns["b"].positions().tolist() == [0]


def test_no_answer_is_an_error_and_one_is_enough(setup: Setup) -> None:
    with pytest.raises(RunError, match="no client could measure"):
        setup.method.start(start_of(setup, asking(setup, only=())))
    alone = setup.method.start(start_of(setup, asking(setup, only=(2,)))).model
    assert alone.patterns is not None
    assert alone.patterns.density == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize(
    "layers", [None, "fc.weight", ["what"], [3], {"fc.weight": 1}, ["bn1.running_mean"]]
)
def test_layers_that_are_not_there_are_refused(layers: Any, setup: Setup) -> None:
    fields = {"layers": layers, "batches": 1}
    request = Request(SALIENCY, fields=fields, states={MODEL: setup.start_state()})
    with pytest.raises(ClientError, match="layers"):
        saliency(request, places_of(setup)[0])


@pytest.mark.parametrize("batches", [0, -1, None, "two"])
def test_a_number_of_batches_that_cannot_be_is_refused(batches: Any, setup: Setup) -> None:
    fields = {"layers": list(setup.prunable), "batches": batches}
    request = Request(SALIENCY, fields=fields, states={MODEL: setup.start_state()})
    with pytest.raises(ClientError, match="batches"):
        saliency(request, places_of(setup)[0])


@pytest.mark.parametrize("change", ["missing", "other", "group", "nan", "negative"])
def test_answers_are_checked(change: str, setup: Setup) -> None:
    """What lacks a layer, or holds more or other things, is refused."""

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        for place in places_of(setup)[:1]:
            tensors = dict(saliency(request, place).tensors)
            scores = dict(tensors[SALIENCY])
            if change == "missing":
                del scores["fc.weight"]
            elif change == "other":
                scores["fc.bias"] = np.ones(10, np.float32)
            elif change == "nan":
                scores["fc.weight"] = scores["fc.weight"] * np.nan
            elif change == "negative":
                scores["fc.weight"] = -1 - scores["fc.weight"]
            tensors = {SALIENCY: scores} if change != "group" else {"scores": scores}
            odd = Reply(5, tensors=tensors)
            check = request.check if change == "negative" else lambda r: check_parts(r, request)
            with pytest.raises(ClientError):
                check(odd)
        yield from ()

    with pytest.raises(RunError):
        setup.method.start(start_of(setup, ask))


def test_batches_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="batches"):
        SSFL(batches=0)


def test_the_start_travels_whole_once_and_masks_after(tmp_path: Path) -> None:
    """The account shows what SSFL costs: a dense model to every client before the first round."""
    out = run_inline(tiny(method__name="ssfl", training__rounds=2), tmp_path / "run")
    summary = read_summary(out)
    assert summary["bytes_start_down"] > summary["bytes_dense_round"]
    assert summary["bytes_start_up"] < summary["bytes_dense_round"] * 1.1
    assert summary["bytes_down_steady_round"] < 0.5 * summary["bytes_dense_round"]


def test_a_client_whose_saliency_is_no_number_is_left_out(tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        header, frames = wire.read_record(reply.content)
        asked = wire.read_record(message.content)[0]["a"]
        if context.node_config["partition-id"] != 1 or asked != SALIENCY:
            return reply
        shapes = open_workspace(config).shapes
        wanted = {name: shapes[name] for name in header["k"][0]}
        state = decode_state(frames["t0"], shapes=wanted, patterns=None)
        next(iter(state.values.values())).reshape(-1)[0] = np.nan
        return Message(wire.build_record(header, {"t0": encode_state(state)}), reply_to=message)

    config = tiny(method__name="ssfl", training__rounds=1)
    start, line = read_metrics(run_inline(config, tmp_path / "run", clients=app))
    assert [entry["client"] for entry in start["skipped"]] == [1]
    assert "NaN" in start["skipped"][0]["reason"]
    assert line["clients"] == [0, 1, 2, 3]
