"""Batches that are no whole number of vectors, which plans pad with zeros: nobody notices."""

from __future__ import annotations

import copy

import pytest
import torch
from little_networks import pooled, random_mask
from plan_networks import NETWORKS, assert_step_matches, batch, network
from torch import nn
from torch.nn import functional

from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.adjust import topk_pruned_gradients
from sparsemodel.plans.plan import TrainingPlan

SHAPE = (3, 16, 16)
SIZES = (12, 13, 15, 24, 30, 17, 20, 31)  # padded to 16 and 32, but for 17 and 20

pytestmark = pytest.mark.usefixtures("plans_on_one_thread")


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["plain", "recompute"])
@pytest.mark.parametrize("name", [*NETWORKS, "pooled"])
def test_steps_forward_passes_and_statistics_are_those_of_torch(
    name: str, options: dict[str, bool]
) -> None:
    model = pooled() if name == "pooled" else network(name)
    mask = random_mask(model, 0.3)
    mask.apply(model)
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=31, **options)
    reference = copy.deepcopy(model).double()
    for seed, size in enumerate(SIZES):
        assert_step_matches(plan, sparse, reference, mask, batch(size, seed))
    for own, value in sparse.named_buffers():
        if "running" in own:
            torch.testing.assert_close(
                value.double(), reference.get_buffer(own), rtol=1e-5, atol=1e-5
            )
    reference.eval()
    for size in SIZES:
        images, labels = batch(size, size)
        logits = reference(images.double())
        torch.testing.assert_close(plan.forward(images).double(), logits, rtol=1e-4, atol=1e-4)
        mean = functional.cross_entropy(logits, labels).item()
        assert plan.evaluate(images, labels)[0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_growth_is_that_of_torch(size: int) -> None:
    model = network("vgg11_bn")
    mask = random_mask(model, 0.3)
    mask.apply(model)
    plan = TrainingPlan(sparsify(model, mask), SHAPE, batch_size=31)
    images, labels = batch(size, size)
    counts = dict.fromkeys(mask, 7)
    found = plan.topk_pruned_gradients(counts, images, labels)
    wanted = topk_pruned_gradients(
        model.double(), mask, counts, lambda m: functional.cross_entropy(m(images.double()), labels)
    )
    for name, (indices, values) in wanted.items():
        assert set(found[name][0].tolist()) == set(indices.tolist())
        order = found[name][0].argsort()
        torch.testing.assert_close(
            found[name][1][order].double(), values[indices.argsort()].double(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0, 3e4])
def test_the_variance_of_samples_far_from_zero_is_theirs_alone(offset: float) -> None:
    """Zeros in their place would have the squares of the mean: 9·10⁴ beside a variance of 1."""
    norm = nn.BatchNorm2d(3, momentum=1.0)
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = nn.Sequential(norm, nn.Conv2d(3, 4, 3), *tail)
    sparse = sparsify(model, random_mask(model, 0.5))
    plan = TrainingPlan(sparse, SHAPE, batch_size=24)
    images, labels = batch(24, 0)
    plan.step(images + offset, labels)
    found = dict(sparse.named_buffers())
    exact = (images + offset).double().transpose(0, 1).flatten(1)
    for name, wanted in (("0.running_mean", exact.mean(1)), ("0.running_var", exact.var(1))):
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_normalised_as_floats_are(size: int) -> None:
    model = network("resnet8")
    mask = random_mask(model, 0.3)
    mask.apply(model)
    plans = [
        TrainingPlan(
            sparsify(model, mask), SHAPE, batch_size=31, normalization=((0.5,) * 3, (0.25,) * 3)
        )
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (size, *SHAPE), dtype=torch.uint8, generator=generator)
    labels = batch(size, 0)[1]
    loss = plans[0].step(images, labels)[0]
    floats = (images.float() / 255 - 0.5) / 0.25
    assert loss == pytest.approx(plans[1].step(floats, labels)[0], rel=1e-5)
