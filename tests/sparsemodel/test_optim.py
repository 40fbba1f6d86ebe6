"""The sparse optimisers against torch.optim's on masked weights and gradients."""

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.optim import MaskedSGD, SparseAdam, SparseSGD


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """BLAS may use fewer threads on a busy machine, and then sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def sparse_network() -> tuple[nn.Sequential, Mask]:
    """A stem without a mask, two sparse layers and one whose mask is full."""
    model = network()
    generator = torch.Generator().manual_seed(1)
    patterns = {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.3
        for name in ("3.weight", "6.weight")
    }
    mask = Mask({**patterns, "8.weight": torch.ones(3, 8, dtype=torch.bool)})
    mask.apply(model)
    return model, mask


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 1, 6, 6, generator=generator)
    labels = torch.randint(0, 3, (8,), generator=generator)
    nn.functional.cross_entropy(model(images), labels).backward()


def reference_step(model: nn.Module, mask: Mask, optimizer: torch.optim.SGD) -> None:
    for name, pattern in mask.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient.mul_(pattern)
    optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("passes", [1, 3])
def test_steps_equal_masked_sgd(momentum: float, weight_decay: float, passes: int) -> None:
    model, mask = sparse_network()
    reference = copy.deepcopy(model)
    expected = torch.optim.SGD(
        reference.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay
    )
    with MaskedSGD(model, mask, lr=0.1, momentum=momentum, weight_decay=weight_decay) as optimizer:
        for step in range(25):
            optimizer.lr = expected.param_groups[0]["lr"] = 0.1 * (1 - step / 50)
            optimizer.zero_grad()
            expected.zero_grad()
            for number in range(passes):
                backward(model, 10 * step + number)
                backward(reference, 10 * step + number)
            optimizer.step()
            reference_step(reference, mask, expected)
    for name, parameter in model.named_parameters():
        # 25 steps, each rounded to float32 once: some processors add in another order.
        torch.testing.assert_close(
            parameter, reference.get_parameter(name), rtol=0, atol=25 * 2**-24, msg=name
        )
    for name in mask:
        pruned = model.get_parameter(name).detach()[~mask[name]]
        assert pruned.count_nonzero() == 0
        assert model.get_parameter(name).detach()[mask[name]].count_nonzero() > 0


def test_a_step_by_hand() -> None:
    """w = (1, 0, 2), active 0 and 2, g = (3, 5, 7), lr 0.1, momentum 0.5, weight decay 1.

    First v = g + w = (4, 9), w = (0.6, 1.1); then v = 0.5 v + g + w = (5.6, 12.6) and
    w = (0.04, -0.16).
    """
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
    mask = Mask({"weight": torch.tensor([[True, False, True]])})
    with MaskedSGD(model, mask, lr=0.1, momentum=0.5, weight_decay=1.0) as optimizer:
        for expected in ([[0.6, 0.0, 1.1]], [[0.04, 0.0, -0.16]]):
            optimizer.zero_grad()
            model(torch.tensor([[3.0, 5.0, 7.0]])).sum().backward()
            optimizer.step()
            torch.testing.assert_close(model.weight.detach(), torch.tensor(expected))


def test_steps_on_one_gradient_leave_it_as_it_is() -> None:
    """g = (3, 5), momentum 0.5: v = g, then 1.5 g, and w falls by lr 2.5 g in all."""
    for pattern in ([True, False], [True, True]):
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        mask = Mask({"weight": torch.tensor([pattern])})
        with MaskedSGD(model, mask, lr=0.1, momentum=0.5) as optimizer:
            model(torch.tensor([[3.0, 5.0]])).sum().backward()
            optimizer.step()
            optimizer.step()
        expected = torch.tensor([[-0.75, -1.25 * pattern[1]]])
        torch.testing.assert_close(model.weight.detach(), expected)


def test_without_a_mask_it_is_plain_sgd() -> None:
    model = network()
    reference = copy.deepcopy(model)
    expected = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    optimizer = MaskedSGD(model, None, lr=0.05, weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        expected.zero_grad()
        backward(model, step)
        backward(reference, step)
        optimizer.step()
        expected.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=0, atol=1e-7)


def test_dense_gradients_of_masked_layers_are_freed_during_the_backward_pass() -> None:
    model, mask = sparse_network()
    with MaskedSGD(model, mask, lr=0.1):
        backward(model, 0)
        left = [name for name, p in model.named_parameters() if p.grad is not None]
    assert "3.weight" not in left
    assert "6.weight" not in left
    assert {"0.weight", "3.bias", "8.weight"} <= set(left)


def test_state_bytes_count_active_weights_alone() -> None:
    """Sparse layers hold 4 bytes per active weight of gradient, of momentum and of index."""
    model, mask = sparse_network()
    counts = mask.counts()
    active = counts["3.weight"] + counts["6.weight"]
    numel = sum(p.numel() for p in model.parameters())
    dense = numel - mask["3.weight"].numel() - mask["6.weight"].numel()
    with MaskedSGD(model, mask, lr=0.1) as optimizer:
        before = optimizer.state_bytes()
        assert before == {
            "weights": 4 * numel,
            "gradients": 0,
            "momentum": 0,
            "indices": 4 * active,
        }
        backward(model, 0)
        optimizer.step()
        after = optimizer.state_bytes()
        assert after["gradients"] == after["momentum"] == 4 * (dense + active)
        assert after["indices"] == 4 * active
        optimizer.zero_grad()
        assert optimizer.state_bytes()["gradients"] == 0


def test_frozen_parameters_and_parameters_without_gradient_stay() -> None:
    model, mask = sparse_network()
    model.get_parameter("3.weight").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with MaskedSGD(model, mask, lr=0.1, weight_decay=0.5) as optimizer:
        optimizer.step()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
        backward(model, 0)
        optimizer.step()
    assert torch.equal(model.get_parameter("3.weight"), before["3.weight"])
    assert not torch.equal(model.get_parameter("6.weight"), before["6.weight"])


def test_a_gradient_that_was_there_before_counts() -> None:
    model, mask = sparse_network()
    reference = copy.deepcopy(model)
    expected = torch.optim.SGD(reference.parameters(), lr=0.1)
    backward(model, 0)
    backward(reference, 0)
    with MaskedSGD(model, mask, lr=0.1, momentum=0.0) as optimizer:
        optimizer.step()
    reference_step(reference, mask, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=0, atol=1e-7)


def test_closing_or_dropping_it_removes_the_hooks() -> None:
    model, mask = sparse_network()
    optimizer = MaskedSGD(model, mask, lr=0.1)
    optimizer.close()
    optimizer.close()
    backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    gc.disable()
    try:
        MaskedSGD(model, mask, lr=0.1)  # never closed, gone at once
        backward(model, 0)
    finally:
        gc.enable()
    assert all(p.grad is not None for p in model.parameters())


def test_two_open_optimisers_on_one_model_are_reported() -> None:
    model, mask = sparse_network()
    with (
        MaskedSGD(model, mask, lr=0.1),
        MaskedSGD(model, mask, lr=0.1),
        pytest.raises(MaskError, match="close the earlier MaskedSGD"),
    ):
        backward(model, 0)


def test_bad_arguments_are_refused() -> None:
    model, mask = sparse_network()
    for numbers in ({"lr": -1.0}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "weight_decay": -1.0}):
        with pytest.raises(SparseModelError, match="expected lr"):
            MaskedSGD(model, mask, **numbers)
    with pytest.raises(MaskError, match="no parameters"):
        MaskedSGD(model, Mask({"x": torch.tensor([True])}), lr=0.1)
    with pytest.raises(MaskError, match="has shape"):
        MaskedSGD(model, Mask({"6.weight": torch.tensor([True])}), lr=0.1)
    with pytest.raises(MaskError, match=r"call mask\.apply"):
        MaskedSGD(network(), mask, lr=0.1)
    channels_last, _ = sparse_network()
    channels_last.to(memory_format=torch.channels_last)
    with pytest.raises(MaskError, match="not contiguous"):
        MaskedSGD(channels_last, mask, lr=0.1)


STEPS = [
    (SparseSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.0}),
    (SparseSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    (SparseAdam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.05}),
    (SparseAdam, torch.optim.Adam, {"lr": 0.01, "betas": (0.0, 0.5), "eps": 1e-3}),
    (SparseAdam, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}),
]


@pytest.mark.parametrize(("ours", "torchs", "options"), STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_on_values_equal_torchs(
    ours: type[torch.optim.Optimizer],
    torchs: type[torch.optim.Optimizer],
    options: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Any length, a parameter without gradient, a change of lr, state dicts exchanged half-way."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=generator).to(dtype) for n in (0, 1, 7, 64, 1031)]
    start.append(torch.randn(6, 4, generator=generator).to(dtype).t())  # not contiguous
    mine, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    extra = {"decoupled": True} if torchs is torch.optim.AdamW else {}
    optimizer, expected = ours(mine, **options, **extra), torchs(theirs, **options)
    for step in range(12):
        for group in (optimizer.param_groups[0], expected.param_groups[0]):
            group["lr"] = options["lr"] / (1 + step)
        for one, two in zip(mine, theirs, strict=True):
            if step != 3 or one.dim() == 2:
                gradient = torch.randn(one.shape, generator=generator).to(dtype)
                one.grad, two.grad = gradient.clone(), gradient
            else:
                one.grad = two.grad = None
        optimizer.step()
        expected.step()
        if step == 6:
            saved = copy.deepcopy(optimizer.state_dict()["state"])
            swapped = copy.deepcopy(expected.state_dict()["state"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": swapped})
            expected.load_state_dict({**expected.state_dict(), "state": saved})
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_sparsified_model_trains_as_the_masked_one_step_by_step(weight_decay: float) -> None:
    model, mask = sparse_network()
    sparse = sparsify(model, mask, execution="sparse")
    mine = SparseSGD(sparse.parameters(), lr=0.1, weight_decay=weight_decay)
    with MaskedSGD(model, mask, lr=0.1, weight_decay=weight_decay) as theirs:
        for step in range(10):
            for network, optimizer in ((model, theirs), (sparse, mine)):
                optimizer.zero_grad()
                backward(network, step)
                optimizer.step()
            for name, found in densify(sparse).named_parameters():
                torch.testing.assert_close(
                    found, model.get_parameter(name), rtol=1e-4, atol=1e-5, msg=f"{step} {name}"
                )


def test_autograd_sees_a_native_step_as_a_change_in_place() -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    SparseSGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closures_and_schedules_work() -> None:
    """lr 1 then 0.1 on the gradient 1: 0 - 1 - 0.1."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SparseSGD([weight], lr=1.0, momentum=0.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0.0
    schedule.step()
    assert optimizer.step(closure) == -1.0
    torch.testing.assert_close(weight.detach(), torch.tensor([-1.1]))


def test_bad_numbers_are_refused() -> None:
    weights = [nn.Parameter(torch.ones(1))]
    with pytest.raises(SparseModelError, match="expected lr >= 0, momentum"):
        SparseSGD(weights, lr=0.1, momentum=1.0)
    with pytest.raises(SparseModelError, match="betas in"):
        SparseAdam(weights, betas=(0.9, 1.0))
