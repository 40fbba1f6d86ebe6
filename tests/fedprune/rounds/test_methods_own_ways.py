"""Methods that fold answers themselves, ask for tensors and masks, or ask each client its own."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from federation import run_inline, tiny

import fedprune
from fedprune.config import RunConfig
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.flower import wire
from fedprune.methods import Collector, Local, Pooled, RunState, train, train_request
from fedprune.methods.base import Action
from fedprune.rounds.folder import read_metrics
from prunelab.errors import RunError
from sparsemodel.codec import encode_mask
from sparsemodel.errors import CodecError
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state


class PlainMean:
    """Keeps every answer, and means them by weight in float64 in the order of clients."""

    def __init__(self) -> None:
        self._replies: dict[int, Reply] = {}

    def add(self, client: int, reply: Reply) -> None:
        self._replies[client] = reply

    def result(self) -> Pooled:
        clients = sorted(self._replies)
        weights = np.array([self._replies[c].weight for c in clients], np.float64)
        states = [self._replies[c].states[MODEL] for c in clients]
        means = {
            name: np.tensordot(weights / weights.sum(), [s.values[name] for s in states], 1)
            for name in states[0].values
        }
        model = states[0].replace({n: np.float32(value) for n, value in means.items()})
        return Pooled(clients, int(weights.sum()), states={MODEL: model})


@dataclass(frozen=True)
class CollectsItself(fedprune.Magnitude):
    name: ClassVar[str] = "collects-itself"
    collects: ClassVar[bool] = True

    def collector(self, state: RunState) -> Collector:
        return PlainMean()


def train_and_tell(request: Request, local: Local) -> Reply:
    """Training, the squares of the fully connected bias, and the mask of its largest weights."""
    reply = train(request, local)
    model = reply.states[MODEL]
    pattern = model.pattern("fc.weight")
    assert pattern is not None
    half = Pattern.from_positions(pattern.shape, pattern.positions()[: pattern.num_active // 2])
    told = {"squares": {"fc.bias": model.values["fc.bias"] ** 2}}
    return replace(reply, tensors=told, masks={"half": Patterns({"fc.weight": half})})


@dataclass(frozen=True)
class AsksForMore(fedprune.Magnitude):
    """Takes the mean of squares for its bias, and counts the masks."""

    name: ClassVar[str] = "asks-for-more"
    actions: ClassVar[Mapping[str, Action]] = {"train": train_and_tell}
    collects: ClassVar[bool] = True
    most: int = 10**6

    def request(self, state: RunState) -> Request:
        asked = train_request(state)
        expected = replace(
            asked.expected,
            tensors={"squares": ["fc.bias"]},
            masks={"half": {"fc.weight": self.most}},
        )
        return replace(asked, expected=expected)

    def collector(self, state: RunState) -> Collector:
        return CountsMasks()

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        return replace(super().update(state, pooled), memory={"masks": pooled.fields["masks"]})


class CountsMasks(PlainMean):
    def result(self) -> Pooled:
        masks = [reply.masks["half"]["fc.weight"].num_active for reply in self._replies.values()]
        return replace(super().result(), fields={"masks": masks})


@dataclass(frozen=True)
class TakesSquares(fedprune.Magnitude):
    """The mean of squares goes into the model's bias."""

    name: ClassVar[str] = "takes-squares"
    actions: ClassVar[Mapping[str, Action]] = {
        "train": lambda request, local: replace(train_and_tell(request, local), masks={})
    }

    def request(self, state: RunState) -> Request:
        asked = train_request(state)
        return replace(asked, expected=replace(asked.expected, tensors={"squares": ["fc.bias"]}))

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        model = pooled.model.replace({"fc.bias": pooled.tensors["squares"]["fc.bias"]})
        return super().update(state, pooled.with_model(model))


def run(method: fedprune.Method, out: Path, **changes: Any) -> SparseState:
    settings = {"training__rounds": 2, "training__batch_size": 16, **changes}
    config = replace(tiny(**settings), method=method)
    run_inline(config, out)
    return load_state(out / "model.safetensors")[0]


def test_a_collector_takes_the_place_of_the_runs_mean(tmp_path: Path) -> None:
    """One that makes the plain mean gives the plain method's model, up to rounding."""
    own = run(CollectsItself(density=0.2), tmp_path / "own")
    plain = run(fedprune.Magnitude(density=0.2), tmp_path / "plain")
    assert own.patterns == plain.patterns
    for name, value in plain.values.items():
        # The run pools variances over the union of samples, the collector means them.
        if not name.endswith("running_var"):
            np.testing.assert_allclose(own.values[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        {"privacy.secure_aggregation": True},
        {"privacy.dp": "central"},
        {"federation.aggregation": "median", "federation.byzantine": 0.3},
    ],
)
def test_a_collector_sees_single_answers_and_says_so(setting: dict[str, Any]) -> None:
    values = {"method.name": f"{__name__}:CollectsItself", **setting}
    key = next(iter(setting))
    with pytest.raises(ConfigError, match=f"{key}: collects-itself needs to see single"):
        RunConfig.parse(values)


def test_tensors_of_training_are_averaged(tmp_path: Path) -> None:
    state = run(TakesSquares(density=0.2), tmp_path / "squares", training__rounds=1)
    plain = run(fedprune.Magnitude(density=0.2), tmp_path / "plain", training__rounds=1)
    bias = state.values["fc.bias"]
    # The mean of squares is at least the square of the mean, and more where clients differ.
    assert (bias >= plain.values["fc.bias"] ** 2 - 1e-9).all()
    assert (bias > plain.values["fc.bias"] ** 2 + 1e-7).any()
    assert np.array_equal(state.values["fc.weight"], plain.values["fc.weight"])


def test_masks_travel_up_and_are_bounded(tmp_path: Path) -> None:
    run(AsksForMore(density=0.2), tmp_path / "more")
    with pytest.raises(RunError, match=r"a mask keeps .* of 'fc.weight': at most 3"):
        run(AsksForMore(density=0.2, most=3), tmp_path / "less")
    skipped = read_metrics(tmp_path / "less")[-1]["skipped"]
    assert "at most 3" in skipped[0]["reason"]


def test_a_mask_that_nobody_asked_for_or_of_another_shape_is_refused() -> None:
    request = Request("ask", expected=Expected())
    mask = Patterns({"a": Pattern.full((2, 3))})
    with pytest.raises(ClientError, match="expected masks"):
        check_parts(Reply(1, masks={"m": mask}), request)
    asked = replace(request, expected=Expected(masks={"m": {"a": 6, "b": 6}}))
    with pytest.raises(ClientError, match="a mask of"):
        check_parts(Reply(1, masks={"m": mask}), asked)
    record = wire.encode_reply(Reply(1, masks={"m": mask}), request, dtype="fp32")
    with pytest.raises(ClientError, match="a mask 'm' that was not asked for"):
        wire.decode_reply(record, request, shapes={"a": (2, 3)})
    one = replace(request, expected=Expected(masks={"m": {"a": 6}}))
    back = wire.decode_reply(record, one, shapes={"a": (2, 3)})
    assert back.masks == {"m": mask}
    with pytest.raises(ClientError, match="of shape"):
        wire.decode_reply(record, one, shapes={"a": (3, 2)})


def test_a_few_bytes_do_not_stand_for_a_mask_of_more_than_was_asked_for() -> None:
    """A full layer takes one byte, whatever its shape, and four bytes a weight once it is read."""
    asked = Request("ask", expected=Expected(masks={"m": {"a": 6}}))
    shapes = {"a": (2, 3), "b": (1000, 1000)}
    for name in ("a", "b"):
        full = encode_mask(Patterns({name: Pattern.full((1000, 1000))}))
        record = wire.build_record({"n": 1, "m": ["m"]}, {"m0": full})
        assert len(full) < 40
        tracemalloc.start()
        with pytest.raises(CodecError, match="more weights than the limit"):
            wire.decode_reply(record, asked, shapes=shapes)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()
