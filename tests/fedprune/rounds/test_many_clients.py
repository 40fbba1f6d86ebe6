"""Ten thousand clients: joined at once, looked up when asked, and nothing kept of those who are not
drawn."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import run_inline, tiny
from flwr.app import Context, Message, RecordDict

from fedprune.config import RunConfig
from fedprune.exchange.messages import MODEL, ClientInfo, Expected, Reply, Request
from fedprune.flower import client
from fedprune.flower.inline import FIRST_NODE, Contexts, InlineGrid
from fedprune.flower.server import GridCohort
from fedprune.methods.base import RunState
from fedprune.rounds import population
from fedprune.rounds.folder import read_metrics, read_model
from fedprune.rounds.loop import Fold
from fedprune.rounds.run import run
from fedprune.rounds.setup import Setup, lay_out
from prunelab.data.batches import Integers

MANY = 10_000
KNOWN: Any = partial(InlineGrid, introduced=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("many") / "pictures.npz"
    count = 3 * MANY + 40
    inputs = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), np.uint8)
    np.savez(file, inputs=inputs, targets=np.arange(count) % 10)
    return file


def config(pictures: Path, **changes: Any) -> RunConfig:
    settings = {
        "data__dataset": str(pictures), "data__test_share": 0.001, "data__clients": MANY,
        "data__partition": "iid", "data__num_train": 0, "data__num_test": 0,
        "model__name": "resnet8", "method__name": "magnitude",
        "server__per_class": 1, "server__pretrain_epochs": 0,
        "federation__clients_per_round": 8, "training__rounds": 2,
    }  # fmt: skip
    return tiny(**{**settings, **changes})


def by_hand(labels: Integers, num_clients: int, seed: int) -> list[Integers]:
    """The iid division, a list of arrays."""
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.array_split(np.arange(len(labels)), num_clients)
    return [np.sort(order[part]) for part in parts]


def test_a_run_of_ten_thousand_clients(pictures: Path, tmp_path: Path) -> None:
    """The same bits as where every share was made by itself beforehand."""
    run(config(pictures), tmp_path / "run")
    start, *rounds = read_metrics(tmp_path / "run")
    assert start["all_clients"]["count"] == MANY
    assert len(start["clients"]) == population.LISTED
    assert [len(line["clients"]) for line in rounds] == [8, 8]
    assert not [skip for line in rounds for skip in line["skipped"]]
    assert (tmp_path / "run" / "report.html").stat().st_size < 2**20
    eager = config(pictures, data__partition=f"{__name__}:by_hand")
    run_inline(eager, tmp_path / "eager", grid=KNOWN)
    models = [read_model(tmp_path / name)[0] for name in ("run", "eager")]
    assert models[0].patterns == models[1].patterns
    for name, value in models[0].values.items():
        assert np.array_equal(value, models[1].values[name])


def test_clients_that_need_not_be_asked_are_those_that_were(pictures: Path, tmp_path: Path) -> None:
    small = config(pictures, data__clients=30)
    asked = run_inline(small, tmp_path / "asked")
    told = run_inline(small, tmp_path / "told", grid=KNOWN)
    assert (asked / "metrics.jsonl").read_bytes() == (told / "metrics.jsonl").read_bytes()
    assert (asked / "model.safetensors").read_bytes() == (told / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def setup(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    own = config(pictures, model__width=16, method__density=0.5)
    folder = tmp_path_factory.mktemp("setup") / "setup"
    lay_out(own, folder, with_start=True)
    return Setup(own, folder)


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def unchanged(message: Message, context: Context) -> Message:
    """The answer of a client that trains nothing."""
    request, local = client.open_request(message.content, context)
    states = {MODEL: request.state(MODEL)}
    reply = Reply(len(local.data.train), {"loss": 1.0}, states)
    return Message(client.encode_answer(reply, request, local), reply_to=message)


def joining(setup: Setup) -> GridCohort:
    values = {**setup.config.flower(), "run.setup": str(setup.folder)}
    return GridCohort(KNOWN(unchanged, run_config=values, num_nodes=MANY), setup)


@pytest.mark.usefixtures("traced")
def test_a_client_that_is_not_asked_takes_some_tens_of_bytes(setup: Setup) -> None:
    cohort = joining(setup)
    before, _ = tracemalloc.get_traced_memory()
    cohort.join()
    held, peak = tracemalloc.get_traced_memory()
    assert len(cohort.clients) == MANY
    assert held - before < 250 * MANY
    assert peak - before < 350 * MANY


@pytest.mark.usefixtures("traced")
def test_memory_does_not_grow_with_the_clients_of_a_round(setup: Setup) -> None:
    """Answers are 300 kB: those of 40 more clients would be 12 MB."""
    cohort = joining(setup)
    cohort.join()
    state = RunState(0, setup.start_state())
    request = Request(
        "train", states={MODEL: state.model}, expected=Expected(states=[MODEL], fields=["loss"])
    )
    size = sum(value.nbytes for value in state.model.values.values())
    peaks = []
    for number in (10, 10, 50):
        gc.collect()  # messages hold themselves in circles: from here on these are counted alone
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        fold = Fold(setup, state, state.model)
        for who, reply in cohort.ask(request, clients=list(range(number))):
            fold.add(who, reply)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        assert len(fold.losses) == number
    assert peaks[2] - peaks[1] < 40 * size / 10


def test_contexts_are_a_dictionary_made_when_it_is_read() -> None:
    contexts = Contexts({"a": 1}, 3)
    first = contexts[FIRST_NODE]
    assert contexts[FIRST_NODE] is first
    assert first.node_config == {"partition-id": 0, "num-partitions": 3}
    assert list(contexts) == [FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2]
    gone = contexts.pop(FIRST_NODE + 1)
    contexts[5] = Context(1, 5, gone.node_config, RecordDict(), gone.run_config)
    assert list(contexts) == [FIRST_NODE, FIRST_NODE + 2, 5]
    assert len(contexts) == 3
    assert FIRST_NODE + 1 not in contexts
    for missing in (FIRST_NODE + 1, FIRST_NODE + 3):
        with pytest.raises(KeyError):
            contexts[missing]
        with pytest.raises(KeyError):
            del contexts[missing]


def test_of_many_clients_the_sums_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = {c: ClientInfo(c, 10 + c, 2, [6 + c, 6]) for c in (3, 0, 1)}
    sizes = [(c, 10 + c, 2) for c in (0, 1, 3)]
    every = {"count": 3, "num_train": 34, "num_dev": 6, "smallest": 10, "largest": 13}
    listed = population.told(clients)
    assert [entry["client"] for entry in listed["clients"]] == [0, 1, 3]
    assert population.totals(listed) == every
    monkeypatch.setattr(population, "LISTED", 2)
    summed = population.told(clients)
    assert [entry["client"] for entry in summed["clients"]] == [0, 1]
    assert every.items() <= population.totals(summed).items()
    for start in (listed, summed):
        assert population.had(start, sizes)
        assert not population.had(start, [*sizes[:2], (3, 14, 2)])
