"""Clients trained together on a GPU: the numbers of the CPU, and cohorts that its memory ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs flwr, which fedprune installs")

# Their modules are no package.
sys.path.insert(0, str(Path(__file__).parent.parent / "fedprune"))
sys.path.insert(0, str(Path(__file__).parent.parent / "fedprune" / "local"))

from federation import tiny
from little_clients import narrow, state_of
from test_cohort import alone, masks, members, sgd_of

from fedprune.config import TrainingConfig
from fedprune.exchange.messages import MODEL
from fedprune.local.cohort import Member, train_cohort, train_in_cohorts
from fedprune.local.cohort_memory import fitting_cohort
from fedprune.rounds import run as runner
from fedprune.rounds.folder import read_metrics

CONFIG = TrainingConfig(batch_size=16, local_epochs=2, execution="masked", device="cuda")


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    """Tensors are made on the CPU, as clients make them, and products are not rounded to TF32."""
    with torch.device("cpu"), torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.parametrize("density", [None, 0.2])
def test_each_member_is_trained_as_it_would_be_alone(density: float | None) -> None:
    mask = None if density is None else masks(density)
    model, cohort = narrow(9).cuda(), members(mask)
    together = train_cohort(model, cohort, config=CONFIG, sgd=sgd_of(CONFIG))
    for name, pattern in (mask or {}).items():
        assert not model.get_parameter(name).detach().cpu()[~pattern].any()
    for member, reply in zip(cohort, together, strict=True):
        loss, expected, _ = alone(member, CONFIG, augmented=False)
        assert reply.fields["loss"] == pytest.approx(loss, rel=1e-2)
        state = reply.states[MODEL]
        assert state.patterns == expected.patterns
        for name, value in expected.values.items():
            np.testing.assert_allclose(state.values[name], value, rtol=1e-2, atol=2e-3)


def larger(count: int) -> list[Member]:
    """Members whose activations need some hundred megabytes each."""
    images = np.random.default_rng(0).integers(0, 256, (128, 1, 64, 64), dtype=np.uint8)
    labels = np.arange(128) % 3
    state = state_of(narrow())
    return [Member(state, images, labels, seed=number) for number in range(count)]


def test_cohorts_follow_the_memory() -> None:
    """As many as are measured to fit do fit; where more are tried, the memory ends, and all is
    done in smaller ones."""
    config = TrainingConfig(batch_size=128, local_epochs=1, device="cuda")
    device, everyone = torch.device("cuda"), larger(8)
    train = partial(train_cohort, narrow(9).cuda(), config=config, sgd=sgd_of(config))
    tried: list[int] = []

    def counted(cohort: Sequence[Member]) -> list:  # type: ignore[type-arg]
        tried.append(len(cohort))
        return train(cohort)

    total = torch.cuda.mem_get_info()[1]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = train(everyone[:2])
    each = (torch.cuda.max_memory_allocated() - before) // 2
    fitting = fitting_cohort(train, everyone, batch_size=128, at_most=8, device=device)
    assert fitting == 8
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((before + 4.5 * each) / total)
        results, size = train_in_cohorts(counted, everyone, size=8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tried[0] == 8
    assert size < 8
    assert len(results) == 8
    for found, wanted in zip(results, expected, strict=False):
        for name, value in wanted.states[MODEL].values.items():
            np.testing.assert_allclose(
                found.states[MODEL].values[name], value, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("method", ["fedavg", "fedtiny"])
def test_the_batched_engine_gives_the_rounds_of_inline(method: str, tmp_path: Path) -> None:
    config = tiny(
        method__name=method, training__lr=0.02, training__rounds=3, training__device="cuda"
    )
    for engine in ("inline", "batched"):
        runner.run(config, tmp_path / engine, engine=engine)
    theirs, ours = (read_metrics(tmp_path / engine) for engine in ("inline", "batched"))
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine["clients"] == other["clients"]
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=2e-2)
        assert mine["bytes_up"] == pytest.approx(other["bytes_up"], rel=1e-2)
