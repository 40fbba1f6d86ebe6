"""Other ways to compute what the CUDA kernels do: name -> call, for benchmarks.cuda_kernels."""

# ruff: noqa: PLW0108 - the product is what is timed

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsemodel.gradients.sample_gradients import Active, Factored, norms_by_blocks
from sparsemodel.kernels import fixed_point
from sparsemodel.kernels import reference as plain
from sparsemodel.kernels.cuda import reference

Tensor = torch.Tensor
Call = Callable[[], Any]

EAGER, COMPILED = "torch", "torch.compile"
BLOCK_SIDE = 16  # of the BSR pattern


def both(function: Callable[..., Any], *arguments: Any) -> dict[str, Call]:
    """A function of tensors as it is, and compiled."""
    compiled = torch.compile(function)
    return {EAGER: lambda: function(*arguments), COMPILED: lambda: compiled(*arguments)}


def sgd(values: Tensor, gradient: Tensor, buffer: Tensor, step: tuple[Any, ...]) -> dict[str, Call]:
    return both(plain.sgd_step, values, gradient, buffer, *step)


def adam(
    values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: tuple[Any, ...]
) -> dict[str, Call]:
    return both(plain.adam_step, values, gradient, mean, square, *step)


def fixed_add(given: tuple[Any, ...]) -> dict[str, Call]:
    return both(fixed_point.add, *given)


def loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Call]:
    """The gradient by autograd."""

    def gradient(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        total = reference.kd_loss(logits, teacher, labels, 0.5, 2.0).sum()
        return torch.autograd.grad(total, logits)[0]

    forward = torch.compile(reference.kd_loss)

    def compiled() -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf, teacher, labels, 0.5, 2.0).sum(), leaf)[0]

    return {EAGER: lambda: gradient(logits, teacher, labels), COMPILED: compiled}


def sequence_norms(dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor) -> dict[str, Call]:
    """Each sample's gradient, of as many samples at a time as fit; `dy` and `x` [C, T, B]."""
    dense = Factored(*(t.permute(2, 1, 0).contiguous() for t in (dy, x)))
    return {EAGER: lambda: norms_by_blocks([Active(dense, row_ptr, cols)])}


@dataclass(frozen=True)
class Linear:
    """Peers of a sparse linear layer; `x` and `dy` are [B, features], stored features first."""

    weight: Tensor
    mask: Tensor
    row_ptr: Tensor
    cols: Tensor
    x: Tensor
    dy: Tensor

    def forward(self, density: float) -> dict[str, Call]:
        x, weight, csr = self.x.t(), self.weight, self._csr(self.weight)
        side = BLOCK_SIDE
        blocks = torch.rand(weight.shape[0] // side, weight.shape[1] // side) < density
        pattern = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
        bsr = _quietly(lambda: (pattern * torch.ones_like(weight)).to_sparse_bsr(side))
        return {
            "torch dense": lambda: (weight @ x).t(),
            "CSR": lambda: (csr @ x).t(),
            f"BSR {side}x{side} (another pattern)": lambda: (bsr @ x).t(),
        }

    def input_gradient(self) -> dict[str, Call]:
        dy, weight, csr = self.dy.t(), self.weight, self._csr(self.weight.t())
        return {
            "torch dense": lambda: (weight.t() @ dy).t(),
            "CSR of the transpose": lambda: (csr @ dy).t(),
        }

    def weight_gradient(self) -> dict[str, Call]:
        x, dy, mask = self.x.t(), self.dy.t(), self.mask
        zeros = self._csr(self.weight)
        return {
            "torch dense": lambda: (dy @ x.t())[mask],
            "CSR sampled_addmm": lambda: torch.sparse.sampled_addmm(
                zeros, dy, x.t(), beta=0.0
            ).values(),
        }

    def growth(self, k: int) -> dict[str, Call]:
        x, dy, mask = self.x.t(), self.dy.t(), self.mask

        def dense() -> Tensor:
            gradient = (dy @ x.t()).masked_fill_(mask, 0).flatten()
            return gradient[gradient.abs().topk(k).indices.sort().values]

        return {"torch dense and topk": dense}

    def norms(self) -> dict[str, Call]:
        x, dy, mask = self.x.t(), self.dy.t(), self.mask.float()

        def dense(x: Tensor, dy: Tensor) -> Tensor:
            return (dy.square() * (mask @ x.square())).sum(0)

        return both(dense, x, dy)

    @staticmethod
    def _csr(weight: Tensor) -> Tensor:
        return _quietly(weight.to_sparse_csr)


def _quietly(make: Callable[[], Tensor]) -> Tensor:
    """torch calls its sparse compressed tensors a beta state, each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make()
