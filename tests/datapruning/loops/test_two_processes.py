"""Masks and scores under DistributedDataParallel: two real processes on the CPU, with gloo.

A process and two of them see the same batches: what one takes at once, each of two takes half of.
The mean of two gradients is the gradient of the whole batch, so weights, and what is recorded of
each sample, agree to rounding.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FORKS
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from training_loops import lightning_module, lightning_trainer, loader, texts, tiny_bert, trainer

import datapruning
import sparsemodel

EPOCHS, BATCH = 4, 8
METHODS = ("aum", "forgetting", "dyn-unc", "tdds")
OPTIONS = {"dyn-unc": {"window": 2}, "tdds": {"window": 3}}


def points(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=drawn), torch.randint(0, 3, (count,), generator=drawn)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def loop(rank: int, world: int) -> dict[str, Any]:
    """A plain loop under a mask; as torch's sampler does, it fills up with a sample given twice."""
    inputs, labels = points(31)
    net = make_net()
    mask = sparsemodel.prune(net, density=0.3)
    model = net if world == 1 else DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)
    recorder = datapruning.DynamicsRecorder((inputs, labels))
    largest = 0.0
    with sparsemodel.HeldMask(model, mask, optimizer):
        for epoch in range(EPOCHS):
            order = torch.randperm(31, generator=torch.Generator().manual_seed(epoch))
            order = torch.cat([order, order[:1]])
            for rows in order[rank::world].split(BATCH // world):
                logits = model(inputs[rows])
                recorder.record(rows, logits, labels[rows])
                functional.cross_entropy(logits, labels[rows]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                state = net.state_dict()
                largest = max(largest, *(float(state[n][~mask[n]].abs().max()) for n in mask))
            recorder.close_epoch()
    found = {
        method: recorder.table(method, options=OPTIONS.get(method)).scores for method in METHODS
    }
    scores = datapruning.score((inputs, labels), model=model, method=["el2n", "grand"])
    found |= {name: table.scores for name, table in scores.items()}
    return {"largest": largest, "state": net.state_dict(), "scores": found}


def by_trainer(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """transformers' Trainer."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    mask = sparsemodel.prune(model, density=0.2)
    data = texts(24)
    recorder = datapruning.DynamicsRecorder(data)
    run = trainer(
        model, datapruning.indexed(data), folder,
        callbacks=[sparsemodel.MaskCallback(mask), recorder], remove_unused_columns=False,
        per_device_train_batch_size=4 // world, num_train_epochs=3,
        train_sampling_strategy="sequential", ddp_find_unused_parameters=False, optim="sgd",
        learning_rate=0.5, average_tokens_across_devices=False,
    )  # fmt: skip
    run.train()
    state = model.state_dict()
    return {
        "largest": max(float(state[n][~mask[n]].abs().max()) for n in mask),
        "state": {name: value.clone() for name, value in state.items()},
        "scores": {"aum": recorder.table("aum").scores},
    }


def by_lightning(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Lightning's Trainer, in processes that are there already."""
    inputs, labels = points()
    net = make_net()
    mask = sparsemodel.prune(net, density=0.3)
    module = lightning_module(net)
    recorder = datapruning.DynamicsRecorder((inputs, labels))
    run = lightning_trainer(
        folder, callbacks=[sparsemodel.MaskCallback(mask), recorder], max_epochs=3,
        devices=world, strategy="ddp" if world > 1 else "auto", limit_val_batches=0,
        use_distributed_sampler=False,  # its own would shuffle
    )  # fmt: skip
    data = datapruning.indexed((inputs, labels))
    shares = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=False)
    run.fit(module, loader(data, shuffle=None, sampler=shares, batch_size=BATCH // world))
    state = net.state_dict()
    return {
        "largest": max(float(state[n][~mask[n]].abs().max()) for n in mask),
        "state": state,
        "scores": {"aum": recorder.table("aum").scores},
    }


def process(what: Any, rank: int, world: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    """One of `world`."""
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {**own, **rendezvous}
    if world > 1 and what is loop:
        distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(what(rank, world, *arguments), folder / f"{rank}-{world}.pt")
    if world > 1:
        distributed.destroy_process_group()


def by_processes(world: int, what: Any, folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """What each found; also of a single one, since libraries keep settings of earlier trainings."""
    import socket  # noqa: PLC0415

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    everyone = [
        FORKS.Process(target=process, args=(what, r, world, folder, arguments))
        for r in range(world)
    ]
    for one in everyone:
        one.start()
    for one in everyone:
        one.join(120)
        if one.is_alive():
            one.kill()
    assert [one.exitcode for one in everyone] == [0] * world
    return [torch.load(folder / f"{rank}-{world}.pt") for rank in range(world)]


def check(one: dict[str, Any], both: list[dict[str, Any]]) -> None:
    """Zeros are exact, both processes have the same bits, and one process nearly the same."""
    for found in (one, *both):
        assert found["largest"] == 0
    for name, value in both[0]["state"].items():
        assert torch.equal(value, both[1]["state"][name])
        torch.testing.assert_close(value, one["state"][name], rtol=1e-3, atol=1e-4)
    for name, scores in both[0]["scores"].items():
        assert torch.equal(scores, both[1]["scores"][name])
        torch.testing.assert_close(scores, one["scores"][name], rtol=1e-3, atol=1e-4)


def test_a_plain_loop(tmp_path: Path) -> None:
    (one,) = by_processes(1, loop, tmp_path)
    both = by_processes(2, loop, tmp_path)
    check(one, both)
    assert len(one["scores"]["aum"].unique()) > 20


@pytest.mark.slow
def test_transformers(tmp_path: Path) -> None:
    (one,) = by_processes(1, by_trainer, tmp_path, tmp_path)
    check(one, by_processes(2, by_trainer, tmp_path, tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
def test_lightning(tmp_path: Path) -> None:
    (one,) = by_processes(1, by_lightning, tmp_path, tmp_path)
    check(one, by_processes(2, by_lightning, tmp_path, tmp_path))
