"""Scores of training samples on a GPU: those of the CPU, and batches that never wait.

Tolerance: without TF32 sums differ in their order alone, 1e-3 of the largest score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from datapruning.scores import gradient, influence
from datapruning.scores.kmeans import settled
from datapruning.scores.prototypes import self_supervised
from datapruning.scoring.methods import METHODS, Method
from datapruning.scoring.score import score
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.training.task import ImageClassification, batch_on

TASK, CUDA = ImageClassification(), torch.device("cuda")


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    """Tensors are made on the CPU, as users make them, and products are not rounded to TF32."""
    with torch.device("cpu"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def network() -> nn.Module:
    return build_model("resnet8", num_classes=4, input_shape=(3, 16, 16), seed=0, width=8).eval()


def pictures(count: int) -> ImageSamples:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=random)
    return ImageSamples(images, torch.arange(count) % 4)


@pytest.mark.parametrize(
    "method",
    [
        "el2n",
        "grand",
        "prototypes-supervised",
        "influence-cg",
        replace(METHODS["tracin"], moments="last", name="tracin-last"),
    ],
    ids=lambda method: getattr(method, "name", method),
)
def test_scores_are_those_of_the_cpu(method: str | Method) -> None:
    options = {"damping": 1.0} if method == "influence-cg" else {}
    here, there = (
        score(pictures(600), method=method, model=network(), device=device, options=options).scores
        for device in ("cpu", "cuda")
    )
    assert float((here - there).abs().max() / here.abs().max()) < 1e-3


def test_clusters_are_those_of_the_cpu() -> None:
    """From the same starts, and of clear clusters from any."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(3000, 8, generator=random, dtype=torch.float64)
    centroids, labels, _ = settled(noise, noise[:5])
    theirs, own, _ = settled(noise.cuda(), noise[:5].cuda())
    torch.testing.assert_close(theirs.cpu(), centroids)
    assert torch.equal(own.cpu(), labels)
    clear = torch.eye(8, dtype=torch.float64).repeat(375, 1) + 0.01 * noise
    here, there = (self_supervised(x, num_clusters=8, seed=0) for x in (clear, clear.cuda()))
    torch.testing.assert_close(there, here)


def test_batches_never_wait() -> None:
    model, samples = network().cuda(), pictures(64)
    q = {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def batches() -> list[Tensor]:
        found = []
        for rows in torch.arange(len(samples)).split(16):
            batch = batch_on(samples, rows, CUDA)
            found.append(gradient.norms(TASK, model, batch))
            found.append(influence.products(TASK, model, batch, q))
            found.append(TASK.embedding(model, batch).detach())
        return found

    batches()  # libraries load, memory is pinned
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batches()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(part.isfinite().all()) for part in found)
