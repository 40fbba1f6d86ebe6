"""The server's optimisers: float64 references, Flower's strategies, moving masks, runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from federation import digest, run_inline, tiny
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

from fedprune.config import RunConfig
from fedprune.errors import ConfigError
from fedprune.exchange.messages import Reply
from fedprune.exchange.pooled import Pooled
from fedprune.methods.base import Collector, Method, RunState
from fedprune.rounds.folder import CHECKPOINT, RunFolder, read_checkpoint, read_metrics, read_model
from fedprune.rounds.server_optimizer import FIRST, SECOND, Moments, followed, stepped
from fedprune.settings import ServerConfig
from prunelab.errors import RunError
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

ROUNDS = 5
SERVERS = {
    "momentum": ServerConfig(optimizer="momentum", lr=0.7, momentum=0.8),
    "adam": ServerConfig(optimizer="adam", lr=0.05, momentum=0.6, beta2=0.9, tau=1e-2),
    "yogi": ServerConfig(optimizer="yogi", lr=0.05, momentum=0.6, beta2=0.9, tau=1e-2),
    "adagrad": ServerConfig(optimizer="adagrad", lr=0.05, momentum=0.0, tau=1e-2),
}


def drawn(round_index: int, size: int = 6) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(round_index).standard_normal(size).astype(np.float32)


def at(positions: list[int], size: int = 6) -> Patterns:
    return Patterns({"w": Pattern.from_positions((size,), np.array(positions))})


def by_hand(server: ServerConfig, weights: Any, means: Iterable[Any]) -> Any:
    """The papers' formulas in float64, round by round."""
    w, m, v = weights.astype(np.float64), 0.0, 0.0
    b1, b2 = server.momentum, server.beta2
    for mean in means:
        delta = mean.astype(np.float64) - w
        if server.optimizer == "momentum":
            m = b1 * m + delta
            w = w + server.lr * m
            continue
        m = b1 * m + (1 - b1) * delta
        if server.optimizer == "adam":
            v = b2 * v + (1 - b2) * delta**2
        elif server.optimizer == "yogi":
            v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
        else:
            v = v + delta**2
        w = w + server.lr * m / (np.sqrt(v) + server.tau)
    return w


@pytest.mark.parametrize("name", list(SERVERS))
@pytest.mark.parametrize("sparse", [False, True])
def test_steps_are_those_of_the_papers(name: str, sparse: bool) -> None:
    server, patterns = SERVERS[name], at([0, 2, 3]) if sparse else None
    size = 3 if sparse else 6
    state, moments = SparseState({"w": drawn(99, size)}, patterns), {}
    means = [drawn(number, size) for number in range(ROUNDS)]
    for mean in means:
        answered = SparseState({"w": mean}, patterns)
        state, moments = stepped(state, answered, moments, server)
    expected = by_hand(server, drawn(99, size), means)
    np.testing.assert_allclose(state.values["w"], expected, rtol=1e-5, atol=1e-6)
    assert state.patterns is patterns
    assert set(moments) == ({FIRST} if name == "momentum" else {FIRST, SECOND})
    assert all(moment.values["w"].dtype == np.float32 for moment in moments.values())


def answers(values: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> list[Message]:
    """Two clients' replies to Flower's strategies, of 3 and 1 samples."""
    from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415 - Message reads them

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    messages = []
    for value, samples in ((values, 3), (others, 1)):
        parts: Any = {
            "arrays": ArrayRecord({"w": Array(value)}),
            "metrics": MetricRecord({"num-examples": samples}),
        }
        messages.append(Message(RecordDict(parts), dst_node_id=1, message_type="train"))
    return messages


@pytest.mark.parametrize("name", list(SERVERS))
def test_steps_are_those_of_flower_on_the_same_dense_payload(name: str) -> None:
    """Flower's FedAdam alone multiplies its rate by Adam's correction, and begins it at round 2."""
    server = SERVERS[name]
    if name == "momentum":
        flower: Any = FedAvgM(server_learning_rate=server.lr, server_momentum=server.momentum)
    else:
        kind: Any = {"adam": FedAdam, "yogi": FedYogi, "adagrad": FedAdagrad}[name]
        rates = {"beta_1": server.momentum, "beta_2": server.beta2} if name != "adagrad" else {}
        flower = kind(eta=server.lr, tau=server.tau, **rates)
    state, moments = SparseState({"w": drawn(99)}), {}
    arrays = ArrayRecord({"w": Array(drawn(99).astype(np.float64))})
    for number in range(1, ROUNDS + 1):
        first, second = drawn(number), drawn(number + 50)
        if name == "momentum":
            flower.current_arrays = arrays
        else:
            flower.current_arrays = {"w": arrays["w"].numpy()}
        replies = answers(first.astype(np.float64), second.astype(np.float64))
        arrays, _ = flower.aggregate_train(number, replies)
        rate = server.lr
        if name == "adam":
            first_decay, second_decay = (
                server.momentum ** (number + 1),
                server.beta2 ** (number + 1),
            )
            rate *= (1 - second_decay) ** 0.5 / (1 - first_decay)
        mean = SparseState({"w": 0.75 * first + 0.25 * second})
        state, moments = stepped(state, mean, moments, dataclasses.replace(server, lr=rate))
        np.testing.assert_allclose(
            state.values["w"], arrays["w"].numpy(), rtol=1e-4, atol=1e-5, err_msg=str(number)
        )


def test_a_full_step_without_memory_is_the_mean() -> None:
    """β = 0 and η = 1: federated averaging."""
    server = ServerConfig(optimizer="momentum", lr=1.0, momentum=0.0)
    state, moments = SparseState({"w": drawn(99)}), {}
    for number in range(ROUNDS):
        state, moments = stepped(state, SparseState({"w": drawn(number)}), moments, server)
        assert np.array_equal(state.values["w"], drawn(number))


def test_statistics_are_taken_as_pooled() -> None:
    names = ("bn.running_mean", "bn.running_var")
    before = SparseState({name: drawn(1) for name in (*names, "bn.weight")})
    mean = SparseState({name: drawn(2) for name in (*names, "bn.weight")})
    after, moments = stepped(before, mean, {}, SERVERS["adam"])
    for name in names:
        assert np.array_equal(after.values[name], mean.values[name])
    assert not np.array_equal(after.values["bn.weight"], mean.values["bn.weight"])
    assert all(set(moment.values) == {"bn.weight"} for moment in moments.values())


def test_moments_go_with_their_weights() -> None:
    """0 2 3 become 0 3 5: the moments of 0 and 3 stay, that of 5 is zero; then 3 alone, whole."""
    moments: Moments = {FIRST: SparseState({"w": np.float32([1, 2, 3])}, at([0, 2, 3]))}
    moved = followed(moments, SparseState({"w": np.ones(3, np.float32)}, at([0, 3, 5])))
    assert moved[FIRST].values["w"].tolist() == [1, 3, 0]
    alone = followed(moved, SparseState({"w": np.ones(1, np.float32)}, at([3])))
    assert alone[FIRST].values["w"].tolist() == [3]
    whole = followed(alone, SparseState({"w": np.ones(6, np.float32)}))
    assert whole[FIRST].values["w"].tolist() == [0, 0, 0, 3, 0, 0]
    assert followed(whole, SparseState({"w": np.ones(2, np.float32)}, at([3, 4])))[FIRST].values[
        "w"
    ].tolist() == [3, 0]


def test_a_mean_under_another_mask_than_the_question() -> None:
    """A weight that the question did not have begins at zero, in value and moment."""
    server = ServerConfig(optimizer="momentum", lr=0.5, momentum=0.5)
    before = SparseState({"w": np.float32([1, 2])}, at([0, 1]))
    moments: Moments = {FIRST: SparseState({"w": np.float32([4, 8])}, at([0, 1]))}
    mean = SparseState({"w": np.float32([3, 6])}, at([1, 2]))
    after, moments = stepped(before, mean, moments, server)
    assert moments[FIRST].values["w"].tolist() == [5, 6]  # 8/2 + (3 − 2), 0 + (6 − 0)
    assert after.values["w"].tolist() == [4.5, 3]
    assert after.patterns == mean.patterns


ADAM = {"server__optimizer": "adam", "server__lr": 0.02}


SETTLING = {
    "growth_at": "fresh", "adjust_every": 1, "adjust_until": 3, "protect": 2, "keep_outputs": True
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"), [("fedtiny", {}), ("fedtiny-plus", SETTLING), ("fedavg", {})]
)
def test_a_run_takes_the_steps_and_a_resumed_one_the_same(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Under a mask that moves, with the answers or by a question after them, and dense."""
    own = {f"method__{key}": value for key, value in settings.items()}
    config = tiny(method__name=name, training__rounds=3, data__num_train=150, **own, **ADAM)
    whole = run_inline(config, tmp_path / "whole")
    checkpoint = read_checkpoint(whole)
    assert checkpoint is not None
    state = checkpoint.state
    trained = {n: v.shape for n, v in state.model.values.items() if "running" not in n}
    for kind in (FIRST, SECOND):
        assert {n: v.shape for n, v in state.kept[kind].values.items()} == trained
        assert state.kept[kind].patterns == state.model.patterns
    assert any(moment.any() for moment in state.kept[SECOND].values.values())
    assert run_stopped(config, tmp_path / "stopped") == digest(whole)


def run_stopped(config: RunConfig, out: Path) -> str:
    """The digest of a run that was stopped after its first round, and resumed."""
    real = RunFolder.save

    def stop(folder: RunFolder, state: Any) -> None:
        real(folder, state)
        if state.round_index == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_inline(config, out)
    assert (out / CHECKPOINT).exists()
    return digest(run_inline(config, out, resume=True))


def test_under_secure_sums_the_steps_are_the_same(tmp_path: Path) -> None:
    config = tiny(method__name="magnitude", training__rounds=2, **ADAM)
    secure = dataclasses.replace(
        config, privacy=dataclasses.replace(config.privacy, secure_aggregation=True)
    )
    one, other = run_inline(config, tmp_path / "plain"), run_inline(secure, tmp_path / "secure")
    plain, hidden = read_model(one)[0], read_model(other)[0]
    for name, value in plain.values.items():
        assert np.array_equal(value, hidden.values[name])


def test_noised_means_are_stepped_on(tmp_path: Path) -> None:
    """Post-processing: it costs no epsilon."""
    pytest.importorskip("dp_accounting")
    told = {}
    for optimizer in ("none", "momentum"):
        config = tiny(
            method__name="magnitude", training__rounds=2, privacy__dp="central",
            server__optimizer=optimizer, server__lr=0.5,
        )  # fmt: skip
        told[optimizer] = read_metrics(run_inline(config, tmp_path / optimizer))[-1]
    assert told["none"]["epsilon"] == told["momentum"]["epsilon"]
    assert told["none"]["test_loss"] != told["momentum"]["test_loss"]


class Nothing:
    """Takes answers and makes no model of them."""

    def add(self, client: int, reply: Reply) -> None:
        pass

    def result(self) -> Pooled:
        return Pooled([0], 1)


@dataclass(frozen=True)
class WithoutModel(Method):
    name: ClassVar[str] = "without-model"
    collects: ClassVar[bool] = True

    def collector(self, state: RunState) -> Collector:
        return Nothing()


def test_a_method_without_a_mean_model_is_refused(tmp_path: Path) -> None:
    config = tiny(
        method__name="fedavg", server__optimizer="momentum", training__rounds=1, data__num_train=150
    )
    with pytest.raises(RunError, match=r"server\.optimizer: method 'without-model' makes no mean"):
        run_inline(dataclasses.replace(config, method=WithoutModel()), tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", "sgd"),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("beta2", 1.0),
        ("tau", 0.0),
    ],
)
def test_settings_that_cannot_be_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"server.{key}"):
        RunConfig.parse({f"server.{key}": value})
