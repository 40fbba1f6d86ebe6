"""Stages that share one budget: exact counts, masks within masks, and going on where it was cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_language import llama, opt, texts
from torch import Tensor, nn

from sparsemodel.calibration.blocks import describe
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.structure import is_n_of_m
from sparsemodel.pipeline.chosen_units import UNIT_CHOICES, chosen_units
from sparsemodel.pipeline.running import Pipeline
from sparsemodel.pipeline.stages import (
    Bias,
    Dsnot,
    Perp,
    Stage,
    Units,
    Weights,
    check_stages,
)
from sparsemodel.recovery.reconstruction import reconstruct
from sparsemodel.units.unit import num_parameters

ALL = (Units(0.75), Weights(0.5), Dsnot(), Bias(), Perp(steps=3))


def stepped(model: nn.Module, stages: Sequence[Stage]) -> list[Mask]:
    pipeline = Pipeline(model, stages, texts(2), seed=1)
    masks = []
    for stage in stages:
        assert pipeline.advance() == stage
        masks.append(pipeline.mask)
    return masks


def is_within(inner: Mask, outer: Mask) -> bool:
    return all(not (inner[name] & ~outer[name]).any() for name in outer)


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.parametrize(
    ("criterion", "kinds", "within", "density"),
    [
        ("flap", ("heads", "channels"), "row", 0.4321),
        ("amp", ("heads", "channels"), "layer", 0.5),
        ("cfsp", ("channels",), "row", 0.5),
        ("minitron", ("heads",), "row", 0.7),
    ],
)
def test_the_whole_is_the_share_that_was_asked_for(
    make: Callable[[], nn.Module],
    criterion: str,
    kinds: tuple[str, ...],
    within: str,
    density: float,
) -> None:
    model = make().eval()
    units, weights = stepped(
        model, [Units(0.75, criterion, kinds), Weights(density, within=within)]
    )
    names = [name for block in block_weights(model).values() for name in block]
    assert list(weights) == list(units) == names
    total = sum(model.get_parameter(name).numel() for name in names)
    assert weights.num_active == round(density * total)
    assert is_within(weights, units)
    share = weights.num_active / units.num_active
    for name in names:
        assert not model.get_parameter(name)[~weights[name]].any()
        left, kept = units[name].sum(1), weights[name].sum(1)
        assert abs(int(kept.sum()) - share * int(left.sum())) < 1
        if within == "row":  # as many in every row of which something was left
            assert kept[left > 0].max() - kept[left > 0].min() <= 1
            assert not kept[left == 0].any()


def test_weights_alone_are_pruned_as_they_were() -> None:
    one, other = llama(), llama()
    mask = prune_blocks(one, 0.3, texts(2), criterion="gblm", seed=1)
    assert stepped(other, [Weights(0.3, "gblm")]) == [mask]
    assert all(torch.equal(value, other.state_dict()[n]) for n, value in one.state_dict().items())


def test_groups_keep_the_best_of_what_units_left() -> None:
    """Of every four neighbours two, or as many as the units left."""
    units, weights, moved = stepped(llama(), [Units(0.6), Weights(within="2:4"), Dsnot()])
    assert is_within(weights, units)
    assert is_within(moved, units)
    for name in weights:
        left = units[name].reshape(-1, 4).sum(1)
        assert torch.equal(weights[name].reshape(-1, 4).sum(1), left.clamp(max=2))
        assert is_n_of_m(moved[name])
        assert torch.equal(moved[name].sum(1), weights[name].sum(1))


def test_dsnot_takes_back_weights_but_no_units() -> None:
    units, weights, moved = stepped(llama(), ALL[:3])
    assert moved != weights
    assert is_within(moved, units)
    assert all(torch.equal(moved[name].sum(1), weights[name].sum(1)) for name in moved)
    alone, swapped = stepped(llama(), [Weights(0.5), Dsnot()])
    assert not is_within(swapped, alone)


@pytest.mark.parametrize("make", [llama, opt])
def test_biases_are_what_removed_weights_gave_on_average(make: Callable[[], nn.Module]) -> None:
    """Of the second block: Σ w x̄ over removed w, x behind the first block as it is in the end."""
    model, dense = make().eval(), make().eval()
    mask = stepped(model, [Units(0.75), Weights(0.5), Bias()])[-1]
    blocks = describe(model)
    mixed = copy.deepcopy(dense)
    for name in mask:
        if name.startswith(f"{blocks[0].name}."):
            path = name.removesuffix(".weight")
            layer, mended = mixed.get_submodule(path), model.get_submodule(path)
            layer.weight, layer.bias = mended.weight, mended.bias
    for name in blocks[1].linear:
        before, after = dense.get_submodule(name), model.get_submodule(name)
        inputs = inputs_of(mixed, name)
        removed = before.weight.detach().double() * ~mask[f"{name}.weight"]
        wanted = removed @ inputs.mean(0)
        wanted[~mask[f"{name}.weight"].any(1)] = 0.0
        if before.bias is not None:
            wanted += before.bias.detach().double()
        assert torch.allclose(after.bias.double(), wanted, atol=1e-6)
        assert torch.equal(after.weight, before.weight * mask[f"{name}.weight"])


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """What a layer is given of all batches, [tokens, in], float64."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().double().flatten(0, -2))

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in texts(2):
            model(**batch)
    handle.remove()
    return torch.cat(seen)


def test_perp_follows_the_dense_network_after_biases() -> None:
    """A teacher that is no longer the model itself: its own blocks would ask for no change."""
    model, dense = llama().eval(), llama().eval()
    mask = stepped(model, [Units(0.75), Bias()])[-1]
    first, second = block_weights(model)
    biased, given = copy.deepcopy(model), f"{second}.self_attn.q_proj"
    errors = reconstruct(model, mask, texts(2), dense=dense, steps=50, lr=3e-4)
    assert all(0 < error.mended < error.pruned for error in errors.values())
    assert all(not model.get_parameter(name)[~mask[name]].any() for name in mask)
    outputs = []
    for network in (biased, dense):
        network.get_submodule(f"{second}.input_layernorm").register_forward_pre_hook(
            lambda _, args: outputs.append(args[0].detach())
        )
        inputs_of(network, given)
    both = torch.cat(outputs[:2]), torch.cat(outputs[2:])
    assert errors[first].pruned == pytest.approx((both[0] - both[1]).square().mean().item(), 1e-4)
    alone = reconstruct(biased, mask, texts(2), steps=1)
    assert all(error.pruned == 0 for error in alone.values())


@pytest.mark.parametrize("finished", range(1, len(ALL)))
def test_a_run_that_goes_on_has_the_same_bits(finished: int) -> None:
    whole, first, second = llama(), llama(), llama()
    mask = stepped(whole, ALL)[-1]
    cut = Pipeline(first, ALL, texts(2), seed=1)
    for _ in range(finished):
        cut.advance()
    left = cut.progress()
    assert bool(left.values) == (finished > 3)  # masks alone until biases come
    rest = Pipeline(second, ALL, texts(2), seed=1)
    rest.restore(left)
    assert rest.num_finished == finished
    assert rest.run() == mask
    state = second.state_dict()
    assert list(state) == list(whole.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    with pytest.raises(MaskError, match="are to be restored, after"):
        rest.restore(left)


@pytest.mark.parametrize("criterion", UNIT_CHOICES)
def test_units_come_to_the_share_of_parameters(criterion: str) -> None:
    model, kinds = llama(), ("channels",) if criterion == "cfsp" else ("heads", "channels")
    blocks = describe(model)
    kept = chosen_units(model, texts(2), 0.75, criterion=criterion, kinds=kinds)
    whole = {key: torch.ones_like(each) for key, each in kept.items()}
    share = num_parameters(model, blocks, kept) / num_parameters(model, blocks, whole)
    channel = 48 / num_parameters(model, blocks, whole)
    assert {kind for kind, _ in kept} == set(kinds)
    assert 0.75 - (0.2 if criterion == "flap" else channel) <= share <= 0.75 + channel
    again = chosen_units(model, texts(2), 0.75, criterion=criterion, kinds=kinds)
    assert all(torch.equal(each, again[key]) for key, each in kept.items())


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: check_stages([Weights(), Units(0.8)]), MaskError, "in the order units, weights"),
        (lambda: check_stages([Units(0.8), Perp(), Bias()]), MaskError, "in the order"),
        (lambda: check_stages([Weights(0.7), Weights(0.5)]), MaskError, "each once at most"),
        (lambda: check_stages([Bias()]), MaskError, "nothing is pruned"),
        (lambda: check_stages([]), MaskError, "nothing is pruned"),
        (lambda: check_stages([Units(0.8), Dsnot()]), MaskError, "exchanges single weights"),
        (lambda: check_stages([Units(0.5), Weights()]), DensityError, "leave no weight to remove"),
        (
            lambda: check_stages([Units(0.8), Weights(0.5, within="2:4")]),
            DensityError, "leave the density out",
        ),
        (lambda: Weights(0.3, within="2:4"), DensityError, "keeps 0.5 of all weights, not 0.3"),
        (lambda: Weights(1.5), DensityError, "in \\(0, 1\\]"),
        (lambda: Weights(criterion="snip"), MaskError, "unknown criterion 'snip'"),
        (lambda: Units(0.8, "wanda"), MaskError, "unknown criterion of units 'wanda'; known: flap"),
        (lambda: Units(0.0), DensityError, "in \\(0, 1\\]"),
        (lambda: Units(0.8, kinds=("blocks",)), MaskError, "expected some of"),
        (lambda: Units(0.8, "cfsp"), MaskError, "channels alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_without_a_model(
    make: Callable[[], object], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        make()


def test_a_budget_above_what_is_left_is_refused() -> None:
    pipeline = Pipeline(llama(), [Units(0.25, "amp", ("channels",)), Weights(0.9)], texts(1))
    pipeline.advance()
    with pytest.raises(DensityError, match="but the mask before has left"):
        pipeline.advance()
