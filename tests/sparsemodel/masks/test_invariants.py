"""What holds for every criterion of weights and every distribution, whatever the network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsemodel.masks.distribution import DISTRIBUTIONS
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import CRITERIA

NAMES = ["0.weight", "2.weight"]
GLOBAL = {"global", "global-minimum"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 6, generator=generator).abs(), torch.arange(20) % 3


def pruned(model: nn.Module, density: float, **asked: str) -> Mask:
    return prune(model, density, names=NAMES, data=data(), **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("within", ["layer", "row"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_counts_are_exact_where_all_weights_are_equal(distribution: str, within: str) -> None:
    """Of 72 weights, so few that the fiftieth by which noise may be off is none."""
    model = network()
    with torch.no_grad():
        for name in NAMES:
            model.get_parameter(name).fill_(0.5)
    for density in (0.1, 0.37, 0.5):
        mask = pruned(model, density, distribution=distribution, within=within)
        assert mask.num_active == round(density * 72)
    again = pruned(model, 0.5, distribution=distribution, within=within)
    assert again == mask


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_density_one_is_the_dense_network(criterion: str, distribution: str) -> None:
    model = network()
    mask = pruned(model, 1.0, criterion=criterion, distribution=distribution)
    assert mask.density == 1
    before = model(data()[0])
    mask.apply(model)
    assert torch.equal(model(data()[0]), before)


def test_a_mask_applied_twice_is_one_applied_once() -> None:
    model = network()
    mask = pruned(model, 0.3)
    mask.apply(model)
    once = copy.deepcopy(model.state_dict())
    mask.apply(model)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())
    assert pruned(model, 0.3) == mask  # what is zero goes first


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_permuting_units_permutes_the_mask(criterion: str) -> None:
    model, order = network(), torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("0.weight").copy_(model.get_parameter("0.weight")[order])
        other.get_parameter("0.bias").copy_(model.get_parameter("0.bias")[order])
        other.get_parameter("2.weight").copy_(model.get_parameter("2.weight")[:, order])
    one, two = (pruned(m, 0.4, criterion=criterion) for m in (model, other))
    assert torch.equal(one["0.weight"][order], two["0.weight"])
    assert torch.equal(one["2.weight"][:, order], two["2.weight"])
    assert not torch.equal(one["0.weight"], two["0.weight"])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_scaling_scores_changes_nothing_but_between_layers(distribution: str) -> None:
    def size(model: nn.Module, names: list[str], factors: dict[str, float]) -> dict[str, Tensor]:
        return {name: factors[name] * model.get_parameter(name).abs().detach() for name in names}

    def scaled(first: float, second: float) -> Mask:
        factors = {"0.weight": first, "2.weight": second}
        return prune(
            network(), 0.4, names=NAMES, distribution=distribution,
            criterion=lambda model, names: size(model, names, factors),
        )  # fmt: skip

    assert scaled(8.0, 8.0) == scaled(1.0, 1.0) == scaled(0.25, 0.25)
    assert (scaled(1.0, 8.0) != scaled(1.0, 1.0)) == (distribution in GLOBAL)
