"""The dense weight of a sparse layer takes no writes, and is a tensor like others besides."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsemodel.errors import SparseModelError
from sparsemodel.layers.linear_and_conv import SparseLinear
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.mask import Mask


def layer(density: float) -> SparseLinear:
    torch.manual_seed(0)
    mask = torch.rand(4, 6) < density
    mask[0, 0] = True
    return SparseLinear(6, 4, mask)


def add(weight: torch.Tensor) -> None:
    weight += 1


def store(weight: torch.Tensor) -> None:
    weight[0] = 1


def assign_data(weight: torch.Tensor) -> None:
    weight.data = weight.data + 1


def freeze(weight: torch.Tensor) -> None:
    weight.requires_grad = False


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda w: w.mul_(0),
    "add": add,
    "store": store,
    "zero_ of data": lambda w: w.data.zero_(),
    "data": assign_data,
    "part": lambda w: w[1:, ::2].fill_(1),
    "flat": lambda w: w.view(-1).add_(1),
    "transposed": lambda w: w.t().detach().sub_(1),
    "split": lambda w: w.unbind(0)[1].zero_(),
    "out": lambda w: torch.add(w, 1, out=w),
    "init": nn.init.zeros_,
    "init by a rule": nn.init.kaiming_uniform_,
    "copy": lambda w: w.copy_(torch.ones(4, 6)),
    "addmm": lambda w: w.addmm_(torch.ones(4, 2), torch.ones(2, 6)),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad": freeze,
}


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused_whatever_the_density(name: str, density: float) -> None:
    """A full layer's weight would be a view of its values, another's a copy."""
    sparse = layer(density)
    before = sparse.values.detach().clone()
    with (
        torch.no_grad(),
        pytest.raises(SparseModelError, match=r"write to layer\.values .*densify"),
    ):
        WRITES[name](sparse.weight)
    assert torch.equal(sparse.values, before)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_arrays_of_it_are_read_only(density: float) -> None:
    with pytest.raises(ValueError, match="read-only"):
        layer(density).weight.detach().numpy()[0, 0] = 1


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_what_is_computed_of_it_is_plain_and_differentiable(density: float) -> None:
    sparse = layer(density)
    x = torch.randn(5, 6)
    y = functional.linear(x, sparse.weight, sparse.bias)
    torch.testing.assert_close(y, sparse(x))
    assert type(y) is torch.Tensor
    (y.square().sum() + sparse.weight.square().sum()).backward()
    weight = sparse.weight.detach().clone().requires_grad_()
    (functional.linear(x, weight, sparse.bias).square().sum() + weight.square().sum()).backward()
    assert weight.grad is not None
    torch.testing.assert_close(sparse.values.grad, weight.grad[sparse.mask()])
    own = sparse.weight.detach().clone()
    assert type(own) is torch.Tensor
    own.mul_(2)  # its own memory
    assert torch.equal(sparse.weight, own / 2)
    assert int(sparse.weight[0, 0] * 0) == 0


def test_files_and_copies_hold_plain_tensors() -> None:
    weight = layer(0.4).weight.detach()
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, weight)
    assert torch.equal(copy.deepcopy(weight), weight)


def test_adapters_are_not_merged_into_it() -> None:
    """As peft does it: base.weight.data += delta would change nothing, or everything."""
    dense = nn.Sequential(nn.Linear(6, 4))
    sparse = sparsify(dense, Mask({"0.weight": torch.ones(4, 6).bool()}))
    with pytest.raises(SparseModelError, match="would be lost"):
        sparse[0].weight.data += torch.ones(4, 6)  # type: ignore[index, union-attr]
    merged = densify(sparse)
    merged[0].weight.data += torch.ones(4, 6)  # type: ignore[index, union-attr]
    assert torch.equal(merged[0].weight, dense[0].weight + 1)  # type: ignore[index, arg-type]
