"""Streaming top-K, gradients at pruned weights."""

import copy
import gc
import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sparsemodel.errors import MaskError
from sparsemodel.masks.adjust import TopKBuffer, topk_pruned_gradients
from sparsemodel.masks.mask import Mask
from sparsemodel.optim import MaskedSGD

NAMES = ["0.weight", "4.weight", "7.weight"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Identity(),
        nn.Conv2d(4, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def random_mask(model: nn.Module, density: float = 0.3) -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Mask(
        {n: torch.rand(model.get_parameter(n).shape, generator=generator) < density for n in NAMES}
    )


def loss(model: nn.Module) -> torch.Tensor:
    images = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    images = images.to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0, 1, 2]))


def plain_topk(entries: list[tuple[int, float]], k: int) -> list[tuple[int, float]]:
    return sorted(sorted(entries, key=lambda e: (-abs(e[1]), e[0]))[:k])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), max_size=30),
    st.integers(0, 12),
    st.data(),
)
def test_topk_equals_sorting_whatever_the_tiles(
    values: list[float], k: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(values))))
    buffer = TopKBuffer(k)
    rest = list(order)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        tile, rest = rest[:size], rest[size:]
        buffer.add(torch.tensor(tile), torch.tensor([values[i] for i in tile]))
        assert len(buffer.entries()[0]) <= k
    indices, kept = buffer.entries()
    assert indices.dtype == torch.int64
    assert kept.dtype == torch.float32
    found = list(zip(indices.tolist(), kept.tolist(), strict=True))
    assert found == plain_topk(list(enumerate(values)), k)


def test_topk_takes_infinities_and_refuses_nan_and_bad_shapes() -> None:
    buffer = TopKBuffer(1)
    buffer.add(torch.tensor([0, 1]), torch.tensor([1.0, -float("inf")]))
    assert buffer.entries()[0].tolist() == [1]
    with pytest.raises(MaskError, match="NaN"):
        buffer.add(torch.tensor([2]), torch.tensor([float("nan")]))
    with pytest.raises(MaskError, match="one shape"):
        buffer.add(torch.tensor([2, 3]), torch.tensor([1.0]))
    with pytest.raises(MaskError, match="k >= 0"):
        TopKBuffer(-1)


@pytest.mark.parametrize("tile", [1, 7, 65536])
def test_pruned_gradients_equal_the_top_of_the_dense_gradient(tile: int) -> None:
    model = network().double()
    mask = random_mask(model)
    counts = {"0.weight": 5, "4.weight": 11, "7.weight": 10**6}
    reference = copy.deepcopy(model)
    loss(reference).backward()

    entries = topk_pruned_gradients(model, mask, counts, loss, tile=tile)

    for name, count in counts.items():
        gradient = reference.get_parameter(name).grad
        assert gradient is not None
        flat = gradient.float().reshape(-1).tolist()
        expected = plain_topk([(i, flat[i]) for i in mask.pruned(name).tolist()], count)
        indices, values = entries[name]
        assert list(zip(indices.tolist(), values.tolist(), strict=True)) == expected


def test_pruned_gradients_hold_one_dense_gradient_at_a_time() -> None:
    """Hooks on the leaves see every gradient as it is made; earlier ones must be gone by then."""
    model = network()
    alive: list[weakref.ref[torch.Tensor]] = []
    largest = 0
    seen = []

    def watch(name: str, weight: nn.Parameter) -> None:
        def on_gradient(gradient: torch.Tensor) -> None:
            nonlocal largest
            alive.append(weakref.ref(gradient))
            largest = max(largest, sum(reference() is not None for reference in alive))
            assert all(p.grad is None for p in model.parameters())
            seen.append(name)

        weight.register_hook(on_gradient)

    for name, weight in model.named_parameters():
        watch(name, weight)
    gc.disable()  # freed by reference count, not by luck of the collector
    try:
        topk_pruned_gradients(model, random_mask(model), dict.fromkeys(NAMES, 3), loss)
    finally:
        gc.enable()
    assert seen == ["7.weight", "4.weight", "0.weight"]
    assert largest == 1
    assert all(p.grad is None for p in model.parameters())


def test_only_the_layers_asked_for_are_differentiated() -> None:
    model = network()
    flags = {}

    def recording(model: nn.Module) -> torch.Tensor:
        flags.update({name: p.requires_grad for name, p in model.named_parameters()})
        return loss(model)

    counts = {"0.weight": 0, "7.weight": 2}
    entries = topk_pruned_gradients(model, random_mask(model), counts, recording)
    assert [name for name, flag in flags.items() if flag] == ["7.weight"]
    assert len(entries["0.weight"][0]) == 0
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_left_as_it_was(train: bool) -> None:
    model = network().train(train)
    model.get_parameter("4.bias").requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [p.grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    topk_pruned_gradients(model, random_mask(model), dict.fromkeys(NAMES, 3), loss)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert model.training is train
    assert not model.get_parameter("4.bias").requires_grad
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.ones_like(parameter))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_open_sparse_optimiser_is_reported() -> None:
    model = network()
    mask = random_mask(model)
    mask.apply(model)
    with MaskedSGD(model, mask, lr=0.1), pytest.raises(MaskError, match="close the MaskedSGD"):
        topk_pruned_gradients(model, mask, {"7.weight": 1}, loss)
    topk_pruned_gradients(model, mask, {"7.weight": 1}, loss)


def test_pruned_gradients_refuse_what_does_not_fit() -> None:
    model = network()
    mask = random_mask(model)
    with pytest.raises(MaskError, match="no layer 'x'"):
        topk_pruned_gradients(model, mask, {"x": 1}, loss)
    with pytest.raises(MaskError, match="count >= 0"):
        topk_pruned_gradients(model, mask, {"0.weight": -1}, loss)
    with pytest.raises(MaskError, match="tile"):
        topk_pruned_gradients(model, mask, {"0.weight": 1}, loss, tile=0)
    with pytest.raises(MaskError, match="NaN"):
        topk_pruned_gradients(model, mask, {"0.weight": 1}, lambda m: loss(m) * float("nan"))
