"""Products with the Hessian of a mean loss, and the solvers that stand on them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError
from datapruning.scores.gradient import batch_size, on_device
from prunelab.runs.seeds import generator
from prunelab.training.task import Task
from sparsemodel.layers.base import SparseLayer
from sparsemodel.masks.probe import differentiable

Batches = Callable[[], Iterator[Any]]
"""Goes once through the samples of a mean loss."""

MAX_EXACT = 4096
MAX_CG_STEPS = 1000
LISSA_LOOKS = 64
"""Steps of LiSSA after which the host waits to see whether it has diverged."""
POWER_STEPS = 30


def mean_gradient(
    task: Task, model: nn.Module, batches: Batches, names: Sequence[str] | None
) -> dict[str, Tensor]:
    """∇ of the mean loss over all batches, float64 sums of the batches' gradients."""
    if names is None:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
    with differentiable(model, names) as weights:
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in weights.items()}
        count = 0
        for part in batches():
            batch = on_device(model, part)
            gradients = torch.autograd.grad(
                task.loss(model, batch).sum(), list(weights.values()), materialize_grads=True
            )
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += gradient
            count += batch_size(batch)
        return {name: (sums[name] / count).to(p.dtype) for name, p in weights.items()}


class Product:
    """h -> (H + damping · I) h, on flat vectors of the named parameters.

    Raises:
        ScoreError: the model is sparse.
    """

    def __init__(self, task: Task, model: nn.Module, names: Sequence[str], damping: float) -> None:
        if any(isinstance(module, SparseLayer) for module in model.modules()):
            raise ScoreError(
                "sparse layers have no second derivatives; take densify(model), or tracin, which "
                "needs none"
            )
        self.task, self.model, self.damping = task, model, damping
        with differentiable(model, names) as weights:  # checks the names
            self.weights: dict[str, nn.Parameter] = dict(weights)

    def __call__(self, batches: Batches, h: Tensor) -> Tensor:
        """The product over all batches of the mean loss."""
        total = torch.zeros_like(h)
        count = 0
        for batch in batches():
            size = batch_size(batch)
            total += size * self.of_batch(batch, h)
            count += size
        return total / count + self.damping * h

    def of_batch(self, part: Any, h: Tensor) -> Tensor:
        """The product with one batch's Hessian, undamped."""
        batch = on_device(self.model, part)
        with differentiable(self.model, list(self.weights)) as weights, _twice_differentiable():
            parameters = list(weights.values())
            gradients = torch.autograd.grad(
                self.task.loss(self.model, batch).mean(),
                parameters,
                create_graph=True,
                materialize_grads=True,
            )
            along = torch.stack(
                [(g * d).sum() for g, d in zip(gradients, self.named(h).values(), strict=True)]
            ).sum()
            if not along.requires_grad:  # a loss linear in these parameters
                return torch.zeros_like(h)
            return self._joined(torch.autograd.grad(along, parameters, materialize_grads=True))

    def flat(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as one vector.

        Raises:
            ScoreError: a tensor has another shape than its parameter.
        """
        for name, p in self.weights.items():
            if vector[name].shape != p.shape:
                raise ScoreError(
                    f"the vector's {name!r} has shape {tuple(vector[name].shape)}, the parameter "
                    f"{tuple(p.shape)}"
                )
        return self._joined([vector[name].to(p) for name, p in self.weights.items()])

    def named(self, h: Tensor) -> dict[str, Tensor]:
        """A vector as named tensors of the parameters' shapes; views."""
        sizes = [p.numel() for p in self.weights.values()]
        parts = zip(self.weights.items(), h.split(sizes), strict=True)
        return {name: part.view_as(p) for (name, p), part in parts}

    @staticmethod
    def _joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def solve_exactly(product: Product, batches: Batches, v: Tensor) -> Tensor:
    """H written out column by column, in float64.

    Raises:
        ScoreError: too many parameters, or H + λI is singular.
    """
    if len(v) > MAX_EXACT:
        raise ScoreError(
            f"the exact solver writes out a matrix of {len(v):,} × {len(v):,}; choose at most "
            f'{MAX_EXACT:,} numbers by parameters=[...], or solver="cg"'
        )
    columns = [product(batches, unit) for unit in torch.eye(len(v), dtype=v.dtype, device=v.device)]
    matrix = torch.stack(columns).double()
    solution, info = torch.linalg.solve_ex((matrix + matrix.mT) / 2, v.double())
    if int(info) != 0 or not bool(solution.isfinite().all()):
        raise ScoreError(f"H + {product.damping:g}·I is singular; raise the damping")
    found: Tensor = solution.to(v.dtype)
    return found


def conjugate_gradients(
    product: Product, batches: Batches, v: Tensor, *, tolerance: float
) -> Tensor:
    """Conjugate gradients from zero, until ‖residual‖ ≤ tolerance · ‖v‖.

    Raises:
        ScoreError: a direction of negative curvature, or no convergence.
    """
    solution, residual = torch.zeros_like(v), v.clone()
    direction, square = residual.clone(), float(residual.dot(residual))
    goal = tolerance**2 * square
    for _ in range(MAX_CG_STEPS):
        if square <= goal:
            return solution
        image = product(batches, direction)
        curvature = float(direction.dot(image))
        if not curvature > 0:
            least = curvature / float(direction.dot(direction))
            raise ScoreError(
                f"H + {product.damping:g}·I is not positive definite (curvature {least:.3g} along "
                "a direction): the model is not at a minimum of this loss; raise the damping"
            )
        solution += (square / curvature) * direction
        residual -= (square / curvature) * image
        new = float(residual.dot(residual))
        direction = residual + (new / square) * direction
        square = new
    raise ScoreError(
        f"conjugate gradients left {math.sqrt(square / goal) * tolerance:.1e} of the vector after "
        f"{MAX_CG_STEPS} steps; raise the damping or the tolerance"
    )


def lissa(
    product: Product, draw: Callable[[], Any], v: Tensor, *, depth: int, scale: float
) -> Tensor:
    """h / scale after `depth` steps of h ← v + h − (H_b + λI) h / scale, from h = v.

    Raises:
        ScoreError: it diverged.
    """
    h = v.clone()
    finite = torch.zeros((), dtype=torch.int64, device=v.device)  # steps; once it is not, it stays
    for step in range(1, depth + 1):
        h = v + (1 - product.damping / scale) * h - product.of_batch(draw(), h) / scale
        finite += h.norm().isfinite()
        if (step % LISSA_LOOKS == 0 or step == depth) and int(finite) < step:
            raise ScoreError(
                f"LiSSA diverged after {int(finite) + 1} steps: its scale {scale:g} is below half "
                "the largest eigenvalue of a batch's Hessian; raise scale"
            )
    return h / scale


def largest_eigenvalue(product: Product, batches: Batches, *, seed: int) -> float:
    """Of H + λI, by power iteration on all rows; from below, mostly to a few percent."""
    start = product.flat(product.weights)
    h = torch.randn(len(start), generator=generator(seed), dtype=torch.float64).to(start)
    value = 0.0
    for _ in range(POWER_STEPS):
        h = product(batches, h / h.norm())
        value = float(h.norm())
        if value == 0:
            raise ScoreError("the Hessian is zero and so is the damping: nothing to invert")
    return value


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention by plain products: the fused kernels have first derivatives alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415

    with sdpa_kernel(SDPBackend.MATH):
        yield
