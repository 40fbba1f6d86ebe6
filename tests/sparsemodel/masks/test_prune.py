"""One call from a model to a mask: criteria, distributions and data by name and by object."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from little_networks import Residual
from torch import nn
from torch.nn import functional

from sparsemodel.calibration.statistics import Calibration
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.criteria import magnitude, synflow, taylor
from sparsemodel.masks.distribution import DISTRIBUTIONS, erk, noise_uniform, uniform
from sparsemodel.masks.mask import Mask, mask_from_scores
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import CALIBRATED, CRITERIA, WeightCriterion

Scores = dict[str, torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


NAMES = ["3.weight", "5.weight"]


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 6, 6, generator=generator), torch.arange(8) % 3


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_criterion_and_distribution_by_name(criterion: str, distribution: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    names = ["5.weight"] if criterion in CALIBRATED else None  # statistics are of linear layers
    mask = prune(
        model, 0.3, criterion=criterion, distribution=distribution, data=batch(), names=names
    )
    assert list(mask) == (names or NAMES)
    tolerance = 0.02 if distribution == "noise" else 1 / mask.num_weights
    assert mask.density == pytest.approx(0.3, rel=tolerance, abs=1 / mask.num_weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.training


def test_magnitude_at_uniform_density_is_the_default() -> None:
    model = network()
    scores = magnitude(model, NAMES)
    expected = mask_from_scores(scores, uniform({n: s.shape for n, s in scores.items()}, 0.2))
    assert prune(model, density=0.2) == expected
    assert prune(model, 0.2, criterion=magnitude, distribution=uniform) == expected


def one_shot(
    model: nn.Module, names: list[str], input_shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """synflow under another name, which `prune` takes in one step."""
    return synflow(model, names, input_shape)


def test_synflow_prunes_in_a_hundred_steps_without_collapse() -> None:
    """resnet20 at density .1: scored once, layers go down to the one weight that every one keeps.

    Of half the width, for time; at its own width 7 of 21 layers collapse in one step, none in 100.
    """
    model = build_resnet20()
    images = torch.zeros(2, 3, 8, 8), torch.zeros(2).long()
    masks = [
        prune(model, 0.1, criterion=criterion, distribution="global", data=images)
        for criterion in ("synflow", one_shot)
    ]
    collapsed = [sum(count == 1 for count in mask.counts().values()) for mask in masks]
    assert collapsed[0] == 0
    assert collapsed[1] > 0
    assert masks[0].num_active == masks[1].num_active == round(0.1 * masks[0].num_weights)


def test_steps_of_synflow_are_those_of_a_plain_loop() -> None:
    """Step k keeps density^(k/100) of the weights, of those that step k - 1 kept."""
    model = network()
    images = batch()
    masked = copy.deepcopy(model)
    active = {name: torch.ones_like(model.get_parameter(name)).bool() for name in NAMES}
    for step in range(1, 101):
        scores = synflow(masked, NAMES, (2, 6, 6))
        flat = torch.cat([scores[n].where(active[n], -1).flatten() for n in NAMES])
        count = round(0.2 ** (step / 100) * len(flat))
        kept = torch.zeros(len(flat)).bool()
        kept[flat.argsort(descending=True, stable=True)[:count]] = True
        sizes = [active[n].numel() for n in NAMES]
        for name, part in zip(NAMES, kept.split(sizes), strict=True):
            active[name] = part.view(active[name].shape)
            masked.get_parameter(name).data.mul_(active[name])
    found = prune(model, 0.2, criterion="synflow", distribution="global", data=images)
    assert found == Mask(active)
    assert prune(model, 0.2, criterion=synflow, distribution="global", data=images) == found


def build_resnet20() -> nn.Module:
    """Three stages of three blocks, as wide as 8, 16 and 32."""
    torch.manual_seed(0)
    return Residual(blocks=3, width=8)


def test_functions_are_given_what_their_parameters_are_named_after() -> None:
    model = network()

    def least(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: -model.get_parameter(name).detach().abs() for name in names}

    def only_last(shapes: dict[str, tuple[int, ...]], scores: object) -> dict[str, int]:
        return {name: 5 if name == "5.weight" else 0 for name in shapes}

    mask = prune(model, 0.5, criterion=least, distribution=only_last)
    assert mask.counts() == {"3.weight": 0, "5.weight": 5}
    kept = model.get_parameter("5.weight").detach().abs()[mask["5.weight"]]
    assert kept.max() == model.get_parameter("5.weight").detach().abs().flatten().sort().values[4]
    wide = prune(model, 0.5, distribution=partial(noise_uniform, spread=0.0))
    assert wide == prune(model, 0.5)


def test_an_entry_of_ones_own_says_its_statistics_and_steps() -> None:
    def shy(model: nn.Module, names: list[str], calibration: Calibration) -> Scores:
        seen.append(calibration.moments("inputs", "5").count)
        return {name: model.get_parameter(name).detach().abs() for name in names}

    seen: list[float] = []
    model, names = network(), ["5.weight"]
    entry = WeightCriterion(shy, criterion="size", source="here", statistics=("inputs",), steps=3)
    assert prune(model, 0.2, criterion=entry, names=names, data=batch()) == prune(
        model, 0.2, names=names
    )
    assert seen == [8, 8, 8]
    assert (entry.data, entry.when, entry.units) == (
        ("inputs",), "after", ("weights", "N:M"),
    )  # fmt: skip
    with pytest.raises(MaskError, match="'shy' looks at data"):
        prune(model, 0.2, criterion=entry, names=names)
    with pytest.raises(MaskError, match="a value is there for"):  # alone it says of no statistics
        prune(model, 0.2, criterion=shy, names=names, data=batch())


def test_gradients_of_samples_are_of_the_cross_entropy() -> None:
    """gblm looks at √Σ g² over samples; those of the last layer are (p − y) x."""
    model, names = network().eval(), ["5.weight"]
    images, labels = batch()
    x = model[:5](images).detach().double()
    errors = model(images).detach().double().softmax(1) - functional.one_hot(labels, 3)
    gradients = torch.einsum("bo,bi->boi", errors, x).square().sum(0).sqrt()
    weight = model.get_parameter("5.weight").detach().double().abs()
    expected = weight * (x.square().sum(0).sqrt() + 100 * gradients)
    kept = expected.flatten().argsort(descending=True)[:20]
    mask = prune(model, 20 / 72, criterion="gblm", names=names, data=(images, labels))
    assert mask["5.weight"].flatten().nonzero().flatten().tolist() == sorted(kept.tolist())


def test_scores_of_several_batches_are_averaged() -> None:
    model = network()
    parts = [batch(1), batch(2)]

    def loss_on(part: Batch) -> dict[str, torch.Tensor]:
        return taylor(model, NAMES, lambda m: functional.cross_entropy(m(part[0]), part[1]))

    first, second = map(loss_on, parts)
    scores = {name: (first[name] + second[name]) / 2 for name in NAMES}
    expected = mask_from_scores(scores, erk({n: s.shape for n, s in scores.items()}, 0.4))
    for data in (parts, iter(parts), [(x.numpy(), y.numpy()) for x, y in parts]):
        assert prune(model, 0.4, criterion="taylor", distribution="erk", data=data) == expected


def test_a_loss_of_ones_own_sees_its_batches() -> None:
    model = network()
    images, labels = batch()

    def loss(probed: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(probed(batch["images"]), batch["labels"])

    named = prune(
        model, 0.3, criterion="snip", data={"images": images, "labels": labels}, loss=loss
    )
    assert named == prune(model, 0.3, criterion="snip", data=(images, labels))


def test_the_seed_decides_random_masks() -> None:
    def drawn(seed: int) -> Mask:
        return prune(network(), 0.3, criterion="random", distribution="noise", seed=seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_some_layers_alone() -> None:
    assert prune(network(), 0.5, names=["0.weight"]).counts() == {"0.weight": 36}


def test_refusals_say_what_to_do() -> None:
    model = network()
    with pytest.raises(MaskError, match="unknown criterion 'size'; known: magnitude, random"):
        prune(model, 0.1, criterion="size")
    with pytest.raises(MaskError, match="unknown distribution 'flat'; known: uniform, erk"):
        prune(model, 0.1, distribution="flat")
    with pytest.raises(MaskError, match=r"'snip' looks at data; give data=\(inputs, labels\)"):
        prune(model, 0.1, criterion="snip")
    with pytest.raises(MaskError, match="DataLoader"):
        prune(model, 0.1, criterion="snip", data=[(torch.zeros(2, 6, 6), 1)])
    with pytest.raises(MaskError, match="holds no batch"):
        prune(model, 0.1, criterion="snip", data=iter([]))
    with pytest.raises(MaskError, match="got int"):
        prune(model, 0.1, criterion="snip", data=3)
    with pytest.raises(MaskError, match=r"parameters \['net'\]; a value is there for \['model'"):
        prune(model, 0.1, criterion=lambda net: {})
    with pytest.raises(MaskError, match=r"gave nothing for '3\.weight'"):
        prune(model, 0.1, criterion=lambda names: {})
    with pytest.raises(MaskError, match="no parameter 'x'"):
        prune(model, 0.1, names=["x"])
    with pytest.raises(DensityError, match="density must be in"):
        prune(model, 5)
