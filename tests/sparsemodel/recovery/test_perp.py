"""Training a few parts under a mask: the same at the start, the same when merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from tiny_language import VOCABULARY, llama, opt, texts
from torch import Tensor, nn
from torch.nn import functional

from sparsemodel.calibration.blocks import describe
from sparsemodel.errors import MaskError
from sparsemodel.masks.mask import Mask
from sparsemodel.recovery.adapters import ADAPTERS
from sparsemodel.recovery.perp import BIASES, HEAD, NORMS, PARTS, Retraining


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def half(model: nn.Module, *names: str, seed: int = 1) -> Mask:
    """A random half of some weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_parameter(name).shape for name in names}
    return Mask({name: torch.rand(s, generator=generator) < 0.5 for name, s in shapes.items()})


def inputs(seed: int = 2, *, size: int = 64) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def stir(parameters: Iterable[nn.Parameter], seed: int = 3) -> None:
    """Some other values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def fit(
    model: nn.Module, target: nn.Module, parts: list[str], mask: Mask, *, steps: int = 300
) -> tuple[float, float]:
    """Losses before and after, of what was merged; the target is another network's output."""
    x = inputs()
    goal = target(x).detach()

    def loss() -> Tensor:
        return functional.mse_loss(model(x), goal)

    with Retraining(model, mask, parts, rank=4) as retraining:
        before = loss().item()
        optimizer = torch.optim.Adam(retraining.parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return before, loss().item()


MASKED = ("0.weight", "3.weight")


@pytest.mark.parametrize("part", PARTS)
def test_at_the_start_nothing_changes(part: str) -> None:
    model, x = network(), inputs()
    mask = half(model, *MASKED)
    mask.apply(model)
    before, state = model(x), copy.deepcopy(model.state_dict())
    retraining = Retraining(model, mask, [part], rank=4)
    tolerance = 1e-6 if part == "scale-lora" else 0.0
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    retraining.merge()
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.parametrize("part", ["mask-lora", "lora-prune"])
def test_at_the_start_transformers_compute_the_same_bits(
    make: Callable[[], nn.Module], part: str
) -> None:
    model, (batch,) = make().eval(), texts(1)
    mask = half(model, *(f"{name}.weight" for block in describe(model) for name in block.linear))
    mask.apply(model)
    before = model(**batch).logits
    with Retraining(model, mask, [BIASES, NORMS, HEAD, part]) as retraining:
        assert torch.equal(model(**batch).logits, before)
        stir(retraining.parameters())
        changed = model(**batch).logits
        assert not torch.allclose(changed, before)
    if part == "mask-lora":
        assert torch.equal(model(**batch).logits, changed)


@pytest.mark.parametrize("part", ADAPTERS)
def test_an_adapter_is_its_formula_and_is_merged_so(part: str) -> None:
    model = network()
    mask = half(model, *MASKED)
    mask.apply(model)
    dense = model[0].weight.detach().double()
    active = mask["0.weight"]
    retraining = Retraining(model, mask, [part], rank=4, scale=0.5)
    stir(retraining.parameters())
    a, b = (one.detach().double() for one in retraining.parameters()[:2])
    assert a.shape == (4, 6)
    assert b.shape == (12, 4)
    trained = {
        "mask-lora": dense + 0.5 * (b @ a) * active,
        "scale-lora": dense * (b @ a),
        "lora-prune": dense + 0.5 * (b @ a),
    }[part]
    used, outputs = model[0].weight.detach().clone(), model(inputs()).detach()
    torch.testing.assert_close(used.double(), trained, rtol=1e-5, atol=1e-6)
    assert bool(used[~active].any()) == (part == "lora-prune")
    retraining.merge()
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, used * active)
    assert not model[0].weight[~active].any()
    assert not model[3].weight[~mask["3.weight"]].any()
    assert torch.equal(model(inputs()), outputs) == (part != "lora-prune")


@pytest.mark.parametrize(("part", "moves"), [("mask-lora", True), ("scale-lora", False)])
def test_an_active_weight_of_zero_stays_active(part: str, *, moves: bool) -> None:
    model, target = network(), network(5)
    mask = half(model, *MASKED)
    place = mask["0.weight"].nonzero()[0].tolist()
    with torch.no_grad():
        model[0].weight[tuple(place)] = 0.0
    fit(model, target, [part], mask, steps=20)
    assert bool(model[0].weight[tuple(place)] != 0) == moves


def test_pruned_weights_with_values_are_set_to_zero() -> None:
    model, mask = network(), half(network(), *MASKED)
    assert model[0].weight[~mask["0.weight"]].all()
    with Retraining(model, mask, [NORMS]):
        assert not model[0].weight[~mask["0.weight"]].any()


def test_counts_of_a_llama_and_an_opt() -> None:
    """Width 16, feed-forward 24, two key heads of 4 in two groups, two blocks, 40 words."""
    model = llama()
    blocks = describe(model)
    mask = half(model, *(f"{name}.weight" for block in blocks for name in block.linear))
    retraining = Retraining(model, mask, [BIASES, NORMS, HEAD, "mask-lora"], rank=3)
    square, narrow, wide = 3 * (16 + 16), 3 * (16 + 8), 3 * (16 + 24)
    assert retraining.counts == {
        BIASES: 0,
        NORMS: (2 * 2 + 1) * 16,
        HEAD: VOCABULARY * 16,
        "mask-lora": 2 * (2 * square + 2 * narrow + 3 * wide),
    }
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert trainable == set(retraining.parameters())
    retraining.merge()
    assert all(p.requires_grad for p in model.parameters())

    model = opt()
    mask = half(model, *(f"{name}.weight" for block in describe(model) for name in block.linear))
    retraining = Retraining(model, mask, [BIASES, NORMS])
    assert retraining.counts == {BIASES: 2 * (5 * 16 + 24), NORMS: (2 * 2 + 1) * 2 * 16}


def test_a_parameter_counts_once() -> None:
    """The head's bias is a bias, too."""
    retraining = Retraining(network(), half(network(), "0.weight"), [BIASES, HEAD])
    assert retraining.counts == {BIASES: 12 + 8 + 3, HEAD: 3 * 8}


@pytest.mark.parametrize("part", PARTS)
def test_all_else_stays_to_the_bit(part: str) -> None:
    model, target = network(), network(5)
    mask = half(model, *MASKED)
    model[1].weight.requires_grad_(False)
    mask.apply(model)
    before = copy.deepcopy(model.state_dict())
    fit(model, target, [part], mask, steps=3)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {
        BIASES: {"0.bias", "3.bias", "4.bias"},
        NORMS: {"1.weight", "1.bias"},
        HEAD: {"4.weight", "4.bias"},
    }.get(part, set(MASKED))
    assert not model[1].weight.requires_grad
    assert model[0].weight.requires_grad


def planted(part: str) -> tuple[nn.Sequential, nn.Sequential, Mask]:
    """A network, the same with one part changed, and the mask of both."""
    model = network()
    mask = half(model, *MASKED)
    mask.apply(model)
    target = copy.deepcopy(model)
    with Retraining(target, mask, [part], rank=4) as retraining:
        stir(retraining.parameters())
    return model, target, mask


@pytest.mark.parametrize("part", [BIASES, NORMS, HEAD, "mask-lora", "scale-lora"])
def test_what_a_part_has_changed_that_part_mends(part: str) -> None:
    model, target, mask = planted(part)
    before, after = fit(model, target, [part], mask)
    assert before > 5e-4
    assert after < 0.05 * before


@pytest.mark.parametrize("part", [BIASES, NORMS])
def test_adapters_reach_what_small_parts_do_not(part: str) -> None:
    model, target, mask = planted("mask-lora")
    before, small = fit(copy.deepcopy(model), target, [part], mask)
    _, both = fit(model, target, [part, "mask-lora"], mask)
    assert 0.1 * before < small < before
    assert both < 0.2 * small


def test_every_adapter_helps_a_pruned_network() -> None:
    dense = network(5)
    for part in ADAPTERS:
        model = copy.deepcopy(dense)
        before, after = fit(model, dense, [part], half(dense, *MASKED))
        assert after < 0.8 * before, part


def test_the_seed_decides_what_adapters_start_from() -> None:
    def starts(seed: int) -> list[Tensor]:
        model = network()
        made = Retraining(model, half(model, *MASKED), ["mask-lora"], seed=seed)
        return made.parameters()

    one, same, other = starts(0), starts(0), starts(1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert one[0].abs().max() <= 6**-0.5
    assert not one[1].any()


def test_half_precision_weights_have_adapters_in_single() -> None:
    model = network().bfloat16()
    mask = half(model, *MASKED)
    with Retraining(model, mask, ["mask-lora"]) as retraining:
        assert {p.dtype for p in retraining.parameters()} == {torch.float32}
        stir(retraining.parameters())
        outputs = model(inputs().bfloat16())
    assert model[0].weight.dtype is torch.bfloat16
    assert torch.equal(model(inputs().bfloat16()), outputs)


def test_what_breaks_off_is_merged_and_merging_twice_does_nothing() -> None:
    model = network()
    retraining = Retraining(model, half(model, *MASKED), ["scale-lora"])
    with pytest.raises(RuntimeError, match="broken"), retraining:
        raise RuntimeError("broken")
    state = copy.deepcopy(model.state_dict())
    retraining.merge()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert type(model[0]) is nn.Linear


def test_small_parts_are_for_any_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    mask = half(model, "0.weight")
    assert Retraining(model, mask, [BIASES, NORMS]).counts == {BIASES: 4, NORMS: 8}


def test_what_cannot_be_is_refused() -> None:
    model = network()
    mask, before = half(model, *MASKED), copy.deepcopy(model.state_dict())

    def refused(parts: Iterable[str], reason: str, mask: Mask = mask, rank: int = 16) -> None:
        with pytest.raises(MaskError, match=reason):
            Retraining(model, mask, parts, rank=rank)

    refused(["bias"], r"expected some of the parts biases, norms.*got \['bias'\]")
    refused([], "got none")
    refused(["mask-lora", "scale-lora"], "a weight has one adapter")
    refused(["mask-lora"], "a rank of 1 or more, got 0", rank=0)
    refused([HEAD], r"'head' would train \['4.weight'\]", half(model, "4.weight"))
    refused(["mask-lora"], "'1.weight' belongs to a LayerNorm", half(model, "1.weight"))
    refused([BIASES], "no parameter 'x'", Mask({"x": torch.ones(1, dtype=torch.bool)}))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    plain = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(MaskError, match="nothing to train in the parts"):
        Retraining(plain, half(plain, "0.weight"), [BIASES, NORMS])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(MaskError, match=r"'0\.weight' is tied to another layer"):
        Retraining(tied, half(tied, "0.weight"), ["mask-lora"])
