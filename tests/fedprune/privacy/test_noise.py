"""Differential privacy: what is clipped, what is added, and what it amounts to."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from federation import run_inline, tiny
from flwr.app import Context, Message
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.flower import client, wire
from fedprune.privacy.accounting import epsilon
from fedprune.privacy.noise import (
    clipped,
    difference,
    noisy,
    question,
    released,
    update_of,
)
from fedprune.privacy.randomness import new_key, seeded_key
from fedprune.reports.page import write_report
from fedprune.rounds.folder import read_metrics, read_model
from fedprune.settings import PrivacyConfig
from prunelab.errors import RunError
from sparsemodel.runtime.state import SparseState

CENTRAL = PrivacyConfig(dp="central", clip=0.5, noise_multiplier=2.0)
KEY = seeded_key("a test", 0)
PRIVATE = {
    "method__name": "magnitude", "training__rounds": 2, "privacy__noise_multiplier": 0.1,
}  # fmt: skip


def norm(state: SparseState) -> float:
    return math.sqrt(sum(float(np.vdot(v, v)) for v in map(np.float64, state.values.values())))


@given(
    st.lists(st.floats(-(2.0**60), 2.0**60), min_size=1, max_size=20),
    st.lists(st.floats(-1, 1), max_size=9),
    st.floats(1e-3, 1e3),
)
def test_an_update_keeps_its_direction_and_at_most_its_norm(
    first: list[float], second: list[float], clip: float
) -> None:
    update = SparseState({"a": np.array(first), "b": np.array(second)})
    found, before = clipped(update, clip), norm(update)
    assert norm(found) <= clip
    scale = min(1.0, clip / before) if before else 1.0
    for name, value in update.values.items():
        expected = scale * value
        assert found.values[name] == pytest.approx(expected, rel=2e-6, abs=1e-9 * clip)


def test_an_update_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ClientError, match="not finite"):
        clipped(SparseState({"a": np.array([1.0, np.inf])}), 1.0)


def test_noise_has_the_stated_deviation() -> None:
    """40,000 coordinates: of a client under "local" z · C, of the mean of 8 under "central"
    z · C / 8, by the chi-square distribution of their squares; normal by Kolmogorov and Smirnov.
    """
    size = 40_000
    zeros = SparseState({"w": np.zeros(size, np.float32)})
    local = PrivacyConfig(dp="local", clip=0.5, noise_multiplier=2.0)
    request = Request("train", states={MODEL: zeros})
    reply = update_of(Reply(5, {"loss": 1.0}, {MODEL: zeros}), request, local, key=KEY)
    mean = released(zeros, zeros, CENTRAL, num_clients=8, key=KEY)
    for found, deviation in ((reply.states[MODEL], 1.0), (mean, 1.0 / 8)):
        draws = found.values["w"] / deviation
        assert 1e-4 < stats.chi2(size).cdf(float(np.sum(np.float64(draws) ** 2))) < 1 - 1e-4
        assert stats.kstest(draws, "norm").pvalue > 1e-4
    assert reply.fields == {}
    assert not np.array_equal(noisy(zeros, 1.0, key=new_key()).values["w"], mean.values["w"])


def test_a_released_model_is_the_one_before_and_the_noisy_mean() -> None:
    """Under "local" nothing is added; a variance stays above what noise would hide."""
    before = SparseState({"w": np.float32([1, 2]), "n.running_var": np.float32([0.5, 3])})
    update = SparseState({"w": np.float32([0.25, -1]), "n.running_var": np.float32([-0.75, 1])})
    local = PrivacyConfig(dp="local", clip=0.5, noise_multiplier=0.4)
    found = released(before, update, local, num_clients=4, key=KEY)
    assert found.values["w"].tolist() == [1.25, 1.0]
    assert found.values["n.running_var"].tolist() == pytest.approx([0.5 * 0.4 / 2, 4.0])
    assert difference(found, before).values["w"].tolist() == [0.25, -1.0]


@pytest.mark.parametrize(("asked", "clients"), [(10, 10), (10, 1000)])
@pytest.mark.parametrize("multiplier", [0.5, 6.0])
def test_epsilon_is_the_library_s_own(multiplier: float, asked: int, clients: int) -> None:
    privacy = PrivacyConfig(dp="central", noise_multiplier=multiplier, delta=1e-6)
    event: Any = dp_accounting.GaussianDpEvent(multiplier / 2)  # one client moves the sum by 2 C
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    figures = []
    for some in (event, dp_accounting.SampledWithoutReplacementDpEvent(clients, asked, event)):
        account = RdpAccountant(neighboring_relation=relation)
        for _ in range(2):
            account.compose(some)
        figures.append(account.get_epsilon(1e-6))
    found = epsilon(privacy, releases=2, asked=asked, clients=clients)
    assert found == pytest.approx(figures[0] if asked == clients else min(figures))
    if asked < clients and multiplier == 6.0:
        assert found < figures[0] / 5


def test_epsilon_of_one_release_holds_by_the_gaussian_s_own_formula() -> None:
    """δ(ε) = Φ(1/(2s) − εs) − e^ε Φ(−1/(2s) − εs) (Balle and Wang, ICML 2018), s = z/2: exact, so
    that the accountant's epsilon may only be larger."""
    for multiplier in (1.0, 4.0, 20.0):
        privacy = PrivacyConfig(dp="local", noise_multiplier=multiplier, delta=1e-5)
        found, s = epsilon(privacy, releases=1, asked=1, clients=1), multiplier / 2
        below, above = stats.norm.cdf([0.5 / s - found * s, -0.5 / s - found * s])
        assert below - math.exp(found) * above <= 1e-5


def test_without_the_accountant_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedprune\[privacy\]'"):
        run_inline(tiny(**PRIVATE, privacy__dp="central"), tmp_path / "run")
    assert not read_metrics(tmp_path / "run")


@pytest.mark.parametrize("dp", ["central", "local"])
def test_a_private_run_says_what_it_spent(dp: str, tmp_path: Path) -> None:
    """Epsilon of every round, the same bits twice in a simulation, and under masks as well."""
    outs = [tmp_path / str(n) for n in range(3)]
    for place, out in enumerate(outs):
        secure = place == 2
        run_inline(tiny(**PRIVATE, privacy__dp=dp, privacy__secure_aggregation=secure), out)
    lines = read_metrics(outs[0])[1:]
    settings = PrivacyConfig(dp=dp, noise_multiplier=0.1)
    spent = [epsilon(settings, releases=n, asked=4, clients=4) for n in (1, 2)]
    assert [line["epsilon"] for line in lines] == spent
    assert all(line["train_loss"] is None and line["delta"] == 1e-5 for line in lines)
    summary = json.loads((outs[0] / "summary.json").read_text())
    assert (summary["epsilon"], summary["delta"]) == (spent[1], 1e-5)
    states = [read_model(out)[0].values for out in outs]
    for name, value in states[0].items():
        assert value.tobytes() == states[1][name].tobytes() == states[2][name].tobytes()
    assert "epsilon of a client" in write_report(outs[0]).read_text(encoding="utf-8")


def test_noise_of_the_system_differs_every_time(tmp_path: Path) -> None:
    outs = [tmp_path / str(n) for n in range(2)]
    for out in outs:
        run_inline(tiny(**PRIVATE, privacy__dp="local", privacy__noise="system"), out)
    states = [read_model(out)[0].values for out in outs]
    assert all(value.tobytes() != states[1][name].tobytes() for name, value in states[0].items())


def test_nodes_do_not_take_noise_from_the_run_s_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Flower gives nodes every key of the app's configuration, that of the setup as ""."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def node(message: Message, context: Context) -> Message | None:
        context.run_config = {**context.run_config, client.SETUP: ""}
        return client.app(message, context)

    outs = [tmp_path / str(n) for n in range(2)]
    for out in outs:
        settings = {**PRIVATE, "training__rounds": 1, "privacy__dp": "local"}
        run_inline(tiny(**settings), out, clients=node)
    states = [read_model(out)[0].values for out in outs]
    assert all(value.tobytes() != states[1][name].tobytes() for name, value in states[0].items())


def test_the_server_refuses_an_update_that_nobody_clipped() -> None:
    """Of norm .5 at most under "central"; under "local" the noise is allowed for."""
    start = SparseState({"w": np.zeros(100, np.float32)})
    asked = {
        dp: question(Request("train", states={MODEL: start}), replace(CENTRAL, dp=dp))
        for dp in ("central", "local")
    }
    for length, dp, right in ((0.5, "central", True), (0.501, "central", False),
                              (20, "local", True), (21, "local", False)):  # fmt: skip
        update = SparseState({"w": np.full(100, 0.1 * length, np.float32)})
        reply = Reply(7, states={MODEL: clipped(update, length)})
        if right:
            check_parts(reply, asked[dp])
        else:
            with pytest.raises(ClientError, match="an update of norm"):
                check_parts(reply, asked[dp])


def test_more_than_an_update_is_left_out(tmp_path: Path) -> None:
    """Client 2 tells its label counts, client 3 its loss."""

    def lying(message: Message, context: Context) -> Message | None:
        reply = client.app(message, context)
        assert reply is not None
        header, frames = wire.read_record(reply.content)
        action = wire.read_record(message.content)[0]["a"]
        number = int(context.node_config["partition-id"])
        if action == "describe" and number == 2:
            header["f"]["labels"] = [1] * 10
        elif action == "train" and number == 3:
            header["f"] = {"loss": 1.0}
        reply.content = wire.build_record(header, frames)
        return reply

    out = run_inline(tiny(**PRIVATE, privacy__dp="central"), tmp_path / "run", clients=lying)
    lines = read_metrics(out)
    assert "counts of 10 classes: expected 0" in lines[0]["skipped"][0]["reason"]
    for line in lines[1:]:
        assert line["clients"] == [0, 1]
        reasons = {entry["client"]: entry["reason"] for entry in line["skipped"]}
        assert "expected fields [], got ['loss']" in reasons[3]


def test_what_is_not_accounted_for_is_refused() -> None:
    for name in ("fedtiny", "fedtiny-fixed", "ssfl"):
        with pytest.raises(ConfigError, match=r"privacy\.dp covers training alone"):
            tiny(method__name=name, privacy__dp="central")
    for settings, message in (
        ({"federation__evaluate": "clients"}, "tests by clients are not covered by privacy.dp"),
        ({"federation__value_dtype": "int8"}, "value_dtype: it changes what the client has"),
        ({"privacy__clip": 0.0}, "privacy.clip: expected a positive number"),
        ({"privacy__noise_multiplier": -1.0}, "privacy.noise_multiplier: expected a positive"),
        ({"privacy__delta": 0.0}, "privacy.delta: expected 0 < delta < 1"),
        ({"privacy__noise": "dice"}, "privacy.noise: expected one of auto, seed, system"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(method__name="magnitude", privacy__dp="central", **settings)
    with pytest.raises(ConfigError, match=r"privacy\.dp: expected one of none, central, local"):
        tiny(method__name="magnitude", privacy__dp="some")


def test_growth_is_not_sent_even_if_it_is_asked_for(tmp_path: Path) -> None:
    def asking(message: Message, context: Context) -> Message | None:
        header, frames = wire.read_record(message.content)
        if header["a"] == "train":
            header["f"] = {"grow": [[0, 3]]}
            message.content = wire.build_record(header, frames)
        return client.app(message, context)

    with pytest.raises(RunError, match="growth entries are asked for"):
        run_inline(tiny(**PRIVATE, privacy__dp="local"), tmp_path / "run", clients=asking)
