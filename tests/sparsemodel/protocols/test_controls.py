"""Controls of a pruned network: their weights, masks and steps; one training for real."""

from __future__ import annotations

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from little_networks import pooled
from torch import Tensor, nn
from torch.nn import functional

from sparsemodel.errors import MaskError, ProtocolError
from sparsemodel.masks.criteria import magnitude
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune
from sparsemodel.protocols.controls import (
    Budget,
    Control,
    controls,
    cost_ratio,
    random_mask,
    reinitialised,
    reversed_mask,
    train_controls,
)
from sparsemodel.storage.cost import layer_macs

BUDGET = Budget(30, 10, ratio=4.0)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def same(one: object, other: object) -> bool:
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_control_is_what_the_table_says() -> None:
    first = small()
    trained = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    before = copy.deepcopy(trained.state_dict())
    mask = prune(trained, 0.5)
    scores = magnitude(trained, list(mask))
    made = controls(trained, mask, BUDGET, scores=scores, first=first.state_dict(), seed=1)
    steps = {name: control.steps for name, control in made.items()}
    assert list(steps.items()) == [
        ("fine-tuned", 10), ("scratch-e", 30), ("scratch-b", 60), ("rewound", 30),
        ("random", 10), ("reversed", 10), ("dense", 10),
    ]  # fmt: skip
    for name in ("fine-tuned", "random", "reversed", "dense"):
        assert same(made[name].weights, dict(before))
    assert same(made["rewound"].weights, dict(first.state_dict()))
    assert same(made["scratch-e"].weights, made["scratch-b"].weights)
    assert same(made["scratch-e"].weights, dict(reinitialised(trained, seed=1).state_dict()))
    for name in ("fine-tuned", "scratch-e", "scratch-b", "rewound"):
        assert made[name].mask == mask
    assert made["dense"].mask is None
    for name in ("random", "reversed"):
        other = made[name].mask
        assert other is not None
        assert other.counts() == mask.counts()
        assert other != mask
    assert same(dict(trained.state_dict()), dict(before))
    fewer = controls(trained, mask, BUDGET, fresh=first.state_dict(), seed=1)
    assert list(fewer) == ["fine-tuned", "scratch-e", "scratch-b", "random", "dense"]
    assert same(fewer["scratch-e"].weights, dict(first.state_dict()))


def test_what_is_trained_is_a_copy_under_its_mask() -> None:
    model = small()
    mask = prune(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    seen = []

    def train(network: nn.Module, given_mask: Mask | None, steps: int) -> Tensor:
        seen.append((given_mask, steps))
        value = network.get_parameter("3.weight").detach().clone()
        with torch.no_grad():
            network.get_parameter("3.weight").fill_(9.0)
        return value

    made = controls(model, mask, BUDGET, seed=2)
    found = train_controls(model, made, train)
    assert seen == [(control.mask, control.steps) for control in made.values()]
    for name, control in made.items():
        expected = control.weights["3.weight"].clone()
        if control.mask is not None:
            expected[~control.mask["3.weight"]] = 0
        assert torch.equal(found[name], expected)
    assert same(dict(model.state_dict()), dict(before))


def test_a_good_mask_beats_its_reverse_when_trained() -> None:
    """Two of twelve inputs say the class; the mask keeps these, its reverse keeps none of them."""
    torch.manual_seed(0)
    x = torch.randn(200, 12)
    labels = (x[:, 3] + x[:, 7] > 0).long()
    model = nn.Sequential(nn.Linear(12, 2))

    def train(network: nn.Module, mask: Mask | None, steps: int) -> float:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(network(x), labels).backward()
            optimizer.step()
            if mask is not None:
                mask.apply(network)
        return float((network(x).argmax(1) == labels).double().mean())

    train(model, None, 100)
    scores = magnitude(model, ["0.weight"])
    mask = prune(model, 2 / 12, names=["0.weight"])
    made = controls(model, mask, Budget(100, 50, ratio=cost_ratio({"0.weight": 24}, mask)),
                    scores=scores)  # fmt: skip
    found = train_controls(model, made, train)
    assert made["scratch-b"].steps == 200
    assert min(found[name] for name in ("fine-tuned", "scratch-e", "scratch-b", "dense")) > 0.95
    assert found["reversed"] < 0.7


@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 5))
def test_other_masks_keep_exactly_as_many(counts: list[int], seed: int) -> None:
    """Even where all scores are equal; those of lower index are kept."""
    mask = Mask(
        {f"w{i}": (torch.arange(12) < count).reshape(3, 4) for i, count in enumerate(counts)}
    )
    drawn = random_mask(mask, seed=seed)
    assert drawn.counts() == mask.counts()
    assert drawn == random_mask(mask, seed=seed)
    assert reversed_mask(mask, {name: torch.ones(3, 4) for name in mask}) == mask


def test_a_random_mask_favours_no_place() -> None:
    """Each of 10 weights is among the 3 kept in 300 of 1,000 draws, within five deviations."""
    mask = Mask({"w": torch.arange(10) < 3})
    times = sum(random_mask(mask, seed=seed)["w"].int() for seed in range(1000))
    assert isinstance(times, Tensor)
    assert int((times - 300).abs().max()) < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_the_reverse_keeps_the_lowest() -> None:
    """Of 3, 1, 2, 0 the mask keeps 3 and 2, its reverse 1 and 0."""
    scores = {"w": torch.tensor([3.0, 1.0, 2.0, 0.0])}
    mask = Mask({"w": torch.tensor([True, False, True, False])})
    assert reversed_mask(mask, scores)["w"].tolist() == [False, True, False, True]


def test_costs_by_hand() -> None:
    """6 · 8 = 48 and 8 · 3 = 24 products; a third of the second left: 72 / (48 + 8)."""
    model = small()
    macs = layer_macs(model, (6,))
    pattern = (torch.arange(24) < 8).reshape(3, 8)
    assert cost_ratio(macs, Mask({"3.weight": pattern})) == pytest.approx(72 / 56)
    both = {"0.weight": torch.zeros(8, 6).bool(), "3.weight": torch.zeros(3, 8).bool()}
    assert cost_ratio(macs, Mask(both)) == math.inf
    assert Budget(100, 0, ratio=72 / 56).scratch_b == 129
    assert Budget(100, 0, ratio=5.0, cap=math.inf).scratch_b == 500
    assert Budget(100, 0, ratio=math.inf).scratch_b == 200


def test_networks_start_anew_by_the_seed() -> None:
    model = pooled()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    state = torch.get_rng_state()
    new, again, other = (dict(reinitialised(model, seed=s).state_dict()) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(new, again)
    assert not torch.equal(new["0.weight"], other["0.weight"])
    assert all(not (value == 7).any() for value in new.values())
    torch.manual_seed(0)
    assert same(new, dict(pooled().state_dict()))


def test_what_cannot_be_a_control_is_told() -> None:
    model = small()
    mask = prune(model, 0.5)
    with pytest.raises(ProtocolError, match="steps must be 1 or more, got 0; ratio must be 1"):
        Budget(0, 1, ratio=0.5)
    with pytest.raises(ProtocolError, match="cap must be 1 or more, got nan"):
        Budget(1, 1, cap=math.nan)
    with pytest.raises(ProtocolError, match="needs a finite cap"):
        Budget(1, 1, ratio=math.inf, cap=math.inf)
    with pytest.raises(MaskError, match="no parameter 'other'"):
        controls(model, Mask({"other": torch.ones(2).bool()}), BUDGET)
    with pytest.raises(ProtocolError, match=r"scores of '3.weight': .* got nothing"):
        controls(model, mask, BUDGET, scores={})
    with pytest.raises(ProtocolError, match=r"no multiply-accumulates of \['3.weight'\]"):
        cost_ratio({}, mask)
    with pytest.raises(ProtocolError, match="the dense network has no multiply-accumulates"):
        cost_ratio({"3.weight": 0}, mask)
    own = nn.Module()
    own.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ProtocolError, match="Module '' has parameters and no reset_parameters"):
        reinitialised(own, seed=0)
    assert train_controls(model, {"a": Control(model.state_dict(), None, 1)}, lambda *_: 3) == {
        "a": 3
    }
