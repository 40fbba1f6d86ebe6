"""Captured steps on a GPU: eager training's weights, no sync in a replay, no copy between steps.

Tolerances: without TF32 sums differ in their order alone, 1e-3 after ten steps with momentum; TF32
keeps 10 bits of a factor and bfloat16 7, which five small steps leave at 1e-2 and 5e-2 of the
largest change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

# Their modules are no package.
sys.path.insert(0, str(Path(__file__).parent.parent / "fedprune" / "local"))

from little_clients import narrow, random_mask, samples, state_of
from test_captured import Dropped, Guarded, waits

from fedprune.local.captured import (
    Body,
    CapturedTraining,
    CudaGraphs,
    Job,
    Plainly,
    Replays,
    forget_trainings,
)
from fedprune.local.model import Sgd
from fedprune.local.torch_models import DenseModel, MaskedModel, TorchModel
from fedprune.local.training import train_epochs, training_plan
from fedprune.settings import TrainingConfig
from prunelab.training.task import ImageClassification
from sparsemodel.masks.mask import Mask

SGD = Sgd(0.05, 0.9, 5e-4)


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    """Tensors are made on the CPU, as clients make them, and products are not rounded to TF32."""
    with torch.device("cpu"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    forget_trainings()


def model_of(
    mask: Mask | None, *, captures: bool, build: Callable[[], nn.Module] = narrow, **training: str
) -> TorchModel:
    config = TrainingConfig(batch_size=8, device="cuda", **training)  # type: ignore[arg-type]
    kind = DenseModel if mask is None else MaskedModel
    return kind(build, state_of(build(), mask), config, key="narrow" if captures else None)


def trained(
    model: TorchModel, *, augmented: bool = False, sgd: Sgd = SGD, epochs: int = 2
) -> float:
    images, labels = samples(37)
    return train_epochs(
        model, images, labels, sgd=sgd, epochs=epochs, batch_size=8, seed=3, augmented=augmented
    )


def assert_near(ours: TorchModel, theirs: TorchModel, *, share: float) -> None:
    """Within a share of the largest change from the start, of each tensor."""
    start, found = state_of(narrow(), ours._patterns).values, ours.state().values
    for name, value in theirs.state().values.items():
        change = np.abs(value - start[name]).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=share * change + 1e-6)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("sgd", [SGD, Sgd(0.05, 0.0, 0.0)])
def test_graphs_train_as_eager_steps(density: float | None, augmented: bool, sgd: Sgd) -> None:
    mask = None if density is None else random_mask(density)
    eager = model_of(mask, captures=False)
    expected = trained(eager, augmented=augmented, sgd=sgd)
    for _ in range(2):  # the second time the rest of five is replayed, too
        ours = model_of(mask, captures=True)
        loss = trained(ours, augmented=augmented, sgd=sgd)
        assert ours._captured is not None
        assert loss == pytest.approx(expected, rel=1e-3)
        assert_near(ours, eager, share=1e-2)
        for name in mask or ():
            assert mask is not None
            assert not ours._module.get_parameter(name).detach().cpu()[~mask[name]].any()


@pytest.mark.parametrize(("numbers", "share"), [("tf32", 1e-2), ("bfloat16", 5e-2)])
def test_lower_precision_is_near_its_eager_steps(numbers: str, share: float) -> None:
    mask = random_mask(0.3)
    precision = "bfloat16" if numbers == "bfloat16" else "float32"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=numbers == "tf32"):
        models = [model_of(mask, captures=way, precision=precision) for way in (False, True)]
        losses = [trained(model, sgd=Sgd(0.01, 0.9, 0.0), epochs=1) for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=share)
    assert_near(models[1], models[0], share=5 * share)


class Strict(CudaGraphs):
    """Graphs in whose replays whatever waits for the GPU is an error."""

    replays = 0

    def repeated(self, body: Body) -> Body:
        run, runs = super().repeated(body), 0

        def strictly() -> None:
            nonlocal runs
            runs += 1
            if runs <= 4:  # plain runs and the capture
                return run()
            Strict.replays += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                return run()
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return strictly


def job_of(*, epochs: int) -> Job:
    images, labels = samples(40)
    plan = training_plan(images, epochs=epochs, batch_size=8, seed=3, augmented=True)
    return Job(images, labels, plan, random_mask(0.3).csr(), SGD)


def training_of(replays: Callable[[], Replays]) -> CapturedTraining:
    return CapturedTraining(
        narrow(9).cuda(), ImageClassification(), precision="float32", replays=replays
    )


def test_a_replay_never_waits() -> None:
    Strict.replays = 0
    training_of(Strict).train(narrow().cuda(), job_of(epochs=3))
    assert Strict.replays == 15 - 4


def test_copies_do_not_grow_with_the_steps() -> None:
    """Samples, targets and draws go up once and the loss comes down, whatever the epochs."""
    training, found = training_of(CudaGraphs), []
    training.train(narrow().cuda(), job_of(epochs=8))  # the largest first: captures are over
    for epochs in (2, 8):
        model = narrow().cuda()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            training.train(model, job_of(epochs=epochs))
            torch.cuda.synchronize()
        names = [event.name for event in profile.events()]
        found.append([sum(way in name for name in names) for way in ("HtoD", "DtoH")])
    assert found[0] == found[1]
    assert found[0][1] == 1
    assert 1 <= found[0][0] <= 4


def test_graphs_and_plain_runs_of_the_body_agree() -> None:
    results = []
    for replays in (Plainly, CudaGraphs):
        model = narrow().cuda()
        training_of(replays).train(model, job_of(epochs=2))
        results.append({name: value.cpu() for name, value in model.state_dict().items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [lambda: Guarded(waits), Dropped], ids=["waits", "draws"])
def test_what_cannot_be_captured_is_trained_as_ever(build: Callable[[], nn.Module]) -> None:
    losses = []
    for captures in (False, True):
        model = model_of(None, captures=captures, build=build)
        losses.append(trained(model))
        assert model._captured is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
