"""Pruning in training: counts, zeros, growth and resuming, step by step against the plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.loops.gradual import GradualPruner, gmp, granet, journey
from sparsemodel.masks.distribution import erk
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters
from sparsemodel.masks.schedule import GradualPlan, average_density, cosine, cubic

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}
PLANS = {
    "layers": gmp(0.2, start=2, end=9, every=3),
    "all": gmp(0.2, start=2, end=9, every=3, within="all"),
    "granet": granet(0.2, start=2, end=9, every=3),
}
STEPS = 12


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7), nn.Linear(7, 3)
    )


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=drawn), torch.randint(0, 3, (8,), generator=drawn))
        for _ in range(count)
    ]


def one_step(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def erk_mask(model: nn.Module, density: float, seed: int = 3) -> Mask:
    drawn = torch.Generator().manual_seed(seed)
    scores = {
        n: torch.rand(w.shape, generator=drawn) for n, w in prunable_parameters(model).items()
    }
    return mask_from_scores(scores, erk({n: tuple(s.shape) for n, s in scores.items()}, density))


def assert_pruned_are_zero(model: nn.Module, optimizer: Any, mask: Mask) -> None:
    for name in mask:
        weight = model.get_parameter(name)
        assert not weight.detach()[~mask[name]].any()
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert not value[~mask[name]].any()


def expected_density(plan: GradualPlan, step: int, initial: float = 1.0) -> float:
    """The plan's, by a walk over all steps."""
    density = initial
    for t in range(1, step + 1):
        if plan.start < t <= plan.end and ((t - plan.start) % plan.every == 0 or t == plan.end):
            density = cubic(t, start=plan.start, end=plan.end, final=plan.density, initial=initial)
    return density


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("plan_name", PLANS)
def test_counts_zeros_and_nestedness_at_every_step(plan_name: str, optimizer_name: str) -> None:
    model, plan = make_net(), PLANS[plan_name]
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    pruner = GradualPruner(model, optimizer, plan=plan)
    masks = [pruner.mask]
    for step, batch in enumerate(batches(), start=1):
        one_step(model, optimizer, batch)
        assert_pruned_are_zero(model, optimizer, pruner.mask)  # through decay and momentum
        pruner.step()
        masks.append(pruner.mask)
        assert_pruned_are_zero(model, optimizer, pruner.mask)
        density = expected_density(plan, step)
        assert plan.density_after(step) == density
        if plan.within == "layer":
            for name, count in pruner.mask.counts().items():
                assert count == round(density * pruner.mask[name].numel())
        else:
            assert pruner.mask.num_active == round(density * pruner.mask.num_weights)
            assert min(pruner.mask.counts().values()) >= 1
        assert (masks[-2] == masks[-1]) is (step not in {5, 8, 9})
        if not max(plan.regeneration):
            assert all(not (masks[-1][n] & ~masks[-2][n]).any() for n in pruner.mask)
    assert masks[0].density == 1
    trained = [model.get_parameter(n).detach()[pruner.mask[n]] for n in pruner.mask]
    assert all(bool(part.ne(0).any()) for part in trained)


def test_the_smallest_weights_go() -> None:
    """A rate of zero moves nothing, so the kept weights are the largest of the start."""
    for within in ("layer", "all"):
        model, start = make_net(), make_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        pruner = GradualPruner(
            model, optimizer, plan=gmp(0.3, start=0, end=4, every=1, within=within)
        )
        for batch in batches(4):
            one_step(model, optimizer, batch)
            pruner.step()
        sizes = {n: start.get_parameter(n).detach().abs() for n in pruner.mask}
        if within == "layer":
            for name, size in sizes.items():
                assert size[pruner.mask[name]].min() > size[~pruner.mask[name]].max()
        else:
            kept = torch.cat([size[pruner.mask[n]] for n, size in sizes.items()])
            gone = torch.cat([size[~pruner.mask[n]] for n, size in sizes.items()])
            assert kept.min() > gone.max()


@pytest.mark.parametrize(
    "plan", [gmp(1.0, start=0, end=6, every=2), granet(1.0, start=0, end=6, every=2)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_density_one_is_dense_training_bit_for_bit(plan: GradualPlan, name: str) -> None:
    plain, model = make_net(), make_net()
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (plain, model)]
    pruner = GradualPruner(model, optimizers[1], plan=plan)
    for batch in batches(8):
        one_step(plain, optimizers[0], batch)
        one_step(model, optimizers[1], batch)
        pruner.step()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert pruner.average_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("stop", [4, 5, 11])
def test_resumed_is_the_run_in_one_go(plan_name: str, stop: int) -> None:
    """Before, at and after changes; the checkpoint goes through a copy of everything."""
    plan = PLANS[plan_name]

    def made() -> tuple[nn.Module, Any, GradualPruner]:
        model = make_net()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return model, optimizer, GradualPruner(model, optimizer, plan=plan)

    model, optimizer, pruner = made()
    saved: dict[str, Any] = {}
    for step, batch in enumerate(batches(), start=1):
        one_step(model, optimizer, batch)
        pruner.step()
        if step == stop:
            parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
            saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    again, optimizer, resumed = made()
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["pruner"])
    for batch in batches()[stop:]:
        one_step(again, optimizer, batch)
        resumed.step()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert resumed.mask == pruner.mask
    assert resumed.average_parameters == pruner.average_parameters


def test_from_an_erk_mask_of_the_final_density_counts_stay() -> None:
    """GraNet with s_i = s_f is RigL: the places move, the counts of layers do not."""
    model = make_net()
    mask = erk_mask(model, 0.3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = GradualPruner(model, optimizer, plan=granet(0.3, start=0, end=9, every=3), mask=mask)
    for batch in batches():
        before = pruner.mask
        one_step(model, optimizer, batch)
        pruner.step()
        assert pruner.mask.counts() == mask.counts()
        if pruner.num_steps in {3, 6}:
            assert pruner.mask != before


def test_from_an_erk_mask_the_density_falls_from_its_own() -> None:
    model, plan = make_net(), granet(0.2, start=0, end=9, every=3)
    mask = erk_mask(model, 0.6)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = GradualPruner(model, optimizer, plan=plan, mask=mask)
    for step, batch in enumerate(batches(), start=1):
        one_step(model, optimizer, batch)
        pruner.step()
        density = expected_density(plan, step, initial=mask.density)
        assert pruner.mask.num_active == round(density * mask.num_weights)


class OneLayer(nn.Module):
    """y = W x, of which the loss is given."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(values.shape[1], values.shape[0], bias=False)
        self.fc.weight.data.copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def linear_step(model: OneLayer, optimizer: Any, gradient: Tensor, parts: int = 1) -> None:
    """A step of a loss with this gradient, accumulated over so many parts."""
    optimizer.zero_grad()
    for _ in range(parts):
        ((model.fc.weight * gradient).sum() / parts).backward()
    optimizer.step()


@pytest.mark.parametrize("parts", [1, 3])
def test_regeneration_by_hand(parts: int) -> None:
    """Of 8 weights 4 are active and stay so; the first exchange is of ⌊4 · .5 (1 + cos 60°) / 2⌋.

    That is one: the smallest active weight (at 3) goes, and the largest gradient among the zeros
    (at 6, of the last step, not at 5, of the step before) grows, from zero.
    """
    values = torch.tensor([[4.0, -3.0, 2.0, 1.0, 9.0, 9.0, 9.0, 9.0]])
    model = OneLayer(values)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    first = Mask({"fc.weight": torch.arange(8).reshape(1, 8) < 4})
    plan = granet(0.5, start=0, end=6, every=2, regeneration=(0.5, 0.0))
    pruner = GradualPruner(model, optimizer, plan=plan, mask=first)
    assert cosine(2, value=0.5, end=6) == pytest.approx(0.375)
    linear_step(model, optimizer, torch.tensor([[1.0, 1, 1, 1, 0, 50, 0, 0]]), parts)
    pruner.step()
    linear_step(model, optimizer, torch.tensor([[1.0, 1, 1, 1, 2, 1, -3, 2]]), parts)
    pruner.step()
    weight = model.fc.weight.detach()
    assert pruner.mask["fc.weight"].nonzero()[:, 1].tolist() == [0, 1, 2, 6]
    assert not weight[0, 3:].any()
    remembered = optimizer.state[model.fc.weight]["momentum_buffer"]
    assert not remembered[0, 3:].any()
    assert remembered[0, :3].all()


def test_a_dropped_weight_may_grow_again_and_starts_at_zero() -> None:
    """Its gradient is the largest: it stays active, without its value and its momentum."""
    model = OneLayer(torch.tensor([[4.0, 3.0, 1.0, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    first = Mask({"fc.weight": torch.tensor([[True, True, True, False]])})
    plan = granet(0.75, start=0, end=4, every=1, regeneration=(0.5, 0.5))
    pruner = GradualPruner(model, optimizer, plan=plan, mask=first)
    linear_step(model, optimizer, torch.tensor([[0.0, 0.0, 9.0, 1.0]]))
    pruner.step()
    assert pruner.mask == first
    assert model.fc.weight[0, 2] == 0
    assert optimizer.state[model.fc.weight]["momentum_buffer"][0, 2] == 0


def test_counts_are_exact_where_everything_is_equal() -> None:
    """All weights and all gradients the same, then all zero."""
    for value, gradient in ((1.0, 1.0), (0.0, 0.0)):
        model = OneLayer(torch.full((5, 7), value))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        plan = granet(0.25, start=0, end=5, every=1)
        pruner = GradualPruner(model, optimizer, plan=plan)
        for step in range(1, 7):
            linear_step(model, optimizer, torch.full((5, 7), gradient))
            pruner.step()
            assert pruner.mask.num_active == round(35 * expected_density(plan, step))


def test_growth_finds_planted_weights() -> None:
    """A teacher of 6 weights of 60; the first mask has none of them, and all are found."""
    drawn = torch.Generator().manual_seed(0)
    teacher = torch.zeros(3, 20)
    teacher[[0, 0, 1, 1, 2, 2], [1, 5, 2, 9, 4, 17]] = torch.tensor([2.0, -2, 2, 2, -2, 2])
    first = torch.zeros(3, 20, dtype=torch.bool)
    first[:, 10:14] = True
    model = OneLayer(0.1 * torch.randn(3, 20, generator=drawn))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    plan = granet(0.2, start=0, end=80, every=8)
    pruner = GradualPruner(model, optimizer, plan=plan, mask=Mask({"fc.weight": first}))
    for _ in range(100):
        x = torch.randn(64, 20, generator=drawn)
        optimizer.zero_grad()
        (model(x) - x @ teacher.T).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert not (teacher.ne(0) & ~pruner.mask["fc.weight"]).any()
    torch.testing.assert_close(model.fc.weight.detach(), teacher, rtol=0, atol=0.02)


def test_the_journey_is_from_a_quarter_to_three_and_averages_so() -> None:
    """N̄ / N = 1 − .625 s in the limit of many steps; the pruner counts what its plan says."""
    plan = journey(0.2, steps=4000, every=1)
    assert (plan.start, plan.end) == (1000, 3000)
    assert average_density(plan.density_after, 4000) == pytest.approx(0.5, abs=1e-3)
    model, plan = make_net(), journey(0.2, steps=STEPS, every=2)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pruner = GradualPruner(model, optimizer, plan=plan)
    seen = []
    for batch in batches():
        one_step(model, optimizer, batch)
        seen.append(pruner.mask.num_active)
        pruner.step()
    others = sum(p.numel() for p in model.parameters()) - pruner.mask.num_weights
    assert pruner.average_parameters == others + sum(seen) / STEPS
    by_plan = average_density(plan.density_after, STEPS) * pruner.mask.num_weights
    assert sum(seen) / STEPS == pytest.approx(by_plan, abs=1.5)


def test_released_nothing_is_held() -> None:
    model = make_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = GradualPruner(model, optimizer, plan=PLANS["granet"])
    for batch in batches():
        one_step(model, optimizer, batch)
        pruner.step()
    pruner.release()
    one_step(model, optimizer, batches(1)[0])
    assert any(model.get_parameter(n).detach()[~pruner.mask[n]].any() for n in pruner.mask)
    assert all(not model.get_parameter(n)._backward_hooks for n in pruner.mask)


def test_refusals() -> None:
    for given, reason, kind in (
        ({"density": 0.0}, "density must be in", DensityError),
        ({"start": 5, "end": 5}, "expected 0 <= start < end", MaskError),
        ({"every": 0}, "every >= 1", MaskError),
        ({"within": "row"}, "expected 'layer' or 'all'", MaskError),
        ({"regeneration": (1.5, 0.0)}, "are in", MaskError),
    ):
        with pytest.raises(kind, match=reason):
            GradualPlan(**{"density": 0.5, "start": 0, "end": 9, **given})
    model = make_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    below = erk_mask(model, 0.3)
    for plan in (PLANS["all"], PLANS["granet"]):
        GradualPruner(model, optimizer, plan=plan, mask=below).release()
    higher = gmp(0.5, start=0, end=4)
    with pytest.raises(MaskError, match=r"below the plan's 0\.5"):
        GradualPruner(model, optimizer, plan=higher, mask=below)
    with pytest.raises(MaskError, match=r"below the plan's 0\.5"):
        GradualPruner(model, optimizer, plan=granet(0.5, start=0, end=4), mask=below)
    empty = below.replace({"2.weight": torch.zeros(9, 8, dtype=torch.bool)})
    with pytest.raises(MaskError, match=r"no active weight in \['2.weight'\]"):
        GradualPruner(model, optimizer, plan=PLANS["granet"], mask=empty)
    with pytest.raises(DensityError, match="fewer than the 3 layers"):
        GradualPruner(model, optimizer, plan=granet(0.01, start=0, end=4))

    pruner = GradualPruner(model, optimizer, plan=PLANS["all"], mask=below)
    other = GradualPruner(make_net(1), optimizer, plan=PLANS["all"])
    with pytest.raises(MaskError, match="weights are not zero that the state's mask prunes"):
        other.load_state_dict(pruner.state_dict())
    with pytest.raises(MaskError, match="the state is of the plan"):
        other.load_state_dict({**pruner.state_dict(), "plan": {}})
    with pytest.raises(MaskError, match="the pruner of"):
        other.load_state_dict({**pruner.state_dict(), "mask": {"x": torch.ones(1).bool()}})


def test_a_broken_gradient_is_named() -> None:
    model = OneLayer(torch.ones(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plan = granet(0.5, start=0, end=4, every=1)
    pruner = GradualPruner(model, optimizer, plan=plan)
    linear_step(model, optimizer, torch.full((2, 4), torch.inf))
    with pytest.raises(MaskError, match="NaN"):  # inf · 0 in SGD's step
        pruner.step()
