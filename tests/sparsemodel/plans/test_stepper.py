"""Plan, else modules: the same steps, growth and evaluation either way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsemodel.kernels.cpu import native
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.prune import prune
from sparsemodel.optim import SparseAdam, SparseSGD
from sparsemodel.plans.stepper import Stepper

needs_native = pytest.mark.skipif(not native.loaded(), reason="no native kernels here")
PIXELS = (0.5, 0.4), (0.25, 0.2)


class Odd(nn.Module):
    """Computes with a function that plans do not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 * torch.sin(x)


def network(*, odd: bool = False) -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        Odd() if odd else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 3),
    )
    return sparsify(dense, prune(dense, density=0.3))


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 2, 5, 5, generator=generator), torch.arange(size) % 3


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    images, labels = batch()
    model.train()
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("kind", [SparseSGD, SparseAdam, torch.optim.SGD])
def test_steps_are_those_of_a_plain_loop(odd: bool, kind: type[torch.optim.Optimizer]) -> None:
    ours = network(odd=odd)
    theirs = copy.deepcopy(ours)
    stepper = Stepper(ours, batch_size=8)
    pair = [kind(model.parameters(), lr=0.05) for model in (ours, theirs)]
    for _ in range(3):
        loss, num_correct = stepper.step(*batch(), optimizer=pair[0])
        assert loss == pytest.approx(by_hand(theirs, pair[1]), rel=1e-4)
        assert 0 <= num_correct <= 8
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-4)
    has_plan = native.loaded() and not odd
    assert (stepper.plan((2, 5, 5)) is not None) == has_plan


@needs_native
def test_modules_do_what_the_plan_does() -> None:
    """Without an optimiser gradients are filled; bytes are normalised alike."""
    results = []
    pixels = torch.randint(0, 256, (6, 2, 5, 5), dtype=torch.uint8)
    labels = torch.arange(6) % 3
    for odd in (False, True):
        model = network(odd=odd)
        stepper = Stepper(model, batch_size=8, normalization=PIXELS)
        loss, _ = stepper.step(pixels, labels)
        assert (stepper.plan((2, 5, 5)) is None) == odd
        growth = stepper.growth({"4.weight": 5}, pixels, labels)
        results.append((loss, [p.grad for p in model.parameters()], growth["4.weight"]))
    (loss, gradients, grown), (theirs, their_gradients, their_grown) = results
    assert loss == pytest.approx(theirs, rel=1e-5)
    for own, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(grown[0], their_grown[0])
    torch.testing.assert_close(grown[1], their_grown[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("odd", [False, True])
def test_evaluation_is_a_sum_and_leaves_the_model_alone(odd: bool) -> None:
    model = network(odd=odd)
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    images, labels = batch(19)
    total, num_correct = Stepper(model, batch_size=8).evaluate(images, labels)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    with torch.no_grad():
        logits = model.eval()(images)
    assert total == pytest.approx(
        float(functional.cross_entropy(logits, labels, reduction="sum")), rel=1e-5
    )
    assert num_correct == int((logits.argmax(1) == labels).sum())
