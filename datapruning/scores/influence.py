"""Influence: how much a target loss would rise if a training sample were left out.

With H the damped Hessian of the mean training loss and v the target's mean gradient, leaving
sample i out of n raises the target's loss by about ⟨H⁻¹v, ∇ℓ_i⟩ / n. That product is the score:
high means that the sample helps, keep. (The influence of *up-weighting* a sample, as Koh and
Liang write it, −∇ℓ_iᵀ H⁻¹ v, is its negative.) One inverse-Hessian product q = H⁻¹v serves all
samples, whose products with it come a batch at a time: `influence_of`.
Source: Koh and Liang, Understanding Black-box Predictions via Influence Functions (ICML 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError
from datapruning.scores import hessian
from datapruning.scores.gradient import (
    batch_size,
    check_eval,
    device_of,
    explained,
    on_device,
)
from prunelab.data.samples import Samples
from prunelab.runs.seeds import generator
from prunelab.training.task import Task, batch_on
from sparsemodel.gradients.per_sample import gradient_dots

Direction = dict[str, Tensor]
"""Parameter name -> tensor of its shape."""

Solver = Literal["exact", "cg", "lissa"]
SOLVERS: tuple[Solver, ...] = ("exact", "cg", "lissa")
BATCH = 256


def influence(
    task: Task,
    model: nn.Module,
    samples: Samples,
    *,
    solver: Solver = "cg",
    target: Samples | None = None,
    parameters: Sequence[str] | None = None,
    damping: float = 0.01,
    rows: Tensor | None = None,
    seed: int = 0,
    chunk: int = BATCH,
) -> Tensor:
    """⟨H⁻¹v, ∇ℓ_i⟩ of every sample; v is the mean gradient of the target.

    Args:
        model: trained, in eval mode.
        solver: how H⁻¹v is found, see `inverse_hvp`.
        target: whose loss counts, a held-out split of the training side; None: the samples of
            `rows` themselves. Never test data.
        parameters: a subset of the parameters; None: all that require a gradient.
        damping: λ of H + λI.
        rows: of which training samples H is the Hessian; None: all.
        seed: of the samples that LiSSA draws.
        chunk: samples of a batch.

    Returns:
        float64 [N] on the CPU; high means keep.

    Raises:
        ScoreError: see `inverse_hvp`.
    """
    about = samples if target is None else target
    v = mean_gradient(
        task, model, about, parameters=parameters, rows=rows if target is None else None,
        chunk=chunk,
    )  # fmt: skip
    q = inverse_hvp(
        task, model, samples, v, solver=solver, damping=damping, rows=rows, seed=seed, chunk=chunk
    )
    return _all_products(task, model, samples, q, chunk)


def influence_of(
    task: Task, model: nn.Module, batch: Any, direction: Mapping[str, Tensor]
) -> Tensor:
    """⟨∇ℓ_i, direction⟩ of each sample of a batch, at about the cost of two forward passes more.

    Args:
        model: in eval mode.
        batch: what `Samples.batch` returned; moved to the model's device.
        direction: parameter name -> tensor, such as `inverse_hvp` returns.

    Returns:
        float64 [B] on the CPU.

    Raises:
        ScoreError: as `gradient.grand`, or a direction that does not fit.
    """
    return products(task, model, batch, direction).cpu()


def products(task: Task, model: nn.Module, batch: Any, direction: Mapping[str, Tensor]) -> Tensor:
    """`influence_of` on the model's device; the host has not waited for it."""
    check_eval(model)
    batch = on_device(model, batch)
    return explained(
        lambda: gradient_dots(
            model, lambda m: task.loss(m, batch), direction, num_samples=batch_size(batch)
        )
    )


def mean_gradient(
    task: Task,
    model: nn.Module,
    samples: Samples,
    *,
    parameters: Sequence[str] | None = None,
    rows: Tensor | None = None,
    chunk: int = BATCH,
) -> Direction:
    """∇θ of the mean loss over samples, in their parameters' shapes and types.

    Args:
        parameters: a subset of the parameters; None: all that require a gradient.
        rows: int64; None: all samples.
    """
    check_eval(model)
    return explained(
        lambda: hessian.mean_gradient(task, model, _parts(model, samples, rows, chunk), parameters)
    )


def inverse_hvp(
    task: Task,
    model: nn.Module,
    samples: Samples,
    vector: Mapping[str, Tensor],
    *,
    solver: Solver = "cg",
    damping: float = 0.01,
    rows: Tensor | None = None,
    seed: int = 0,
    chunk: int = BATCH,
    tolerance: float = 1e-6,
    depth: int = 1000,
    scale: float | None = None,
    repeats: int = 1,
) -> Direction:
    """(H + λI)⁻¹ vector, where H is the Hessian of the mean loss for the vector's parameters.

    - "exact": H is written out (at most 4,096 numbers) and solved for.
    - "cg": conjugate gradients on Hessian products over all rows, until the residual is below
      `tolerance` of the vector. Needs H + λI positive definite; where a model is not at a
      minimum, that takes a larger damping.
    - "lissa": h ← v + h − (H_b + λI) h / s on random batches b of `chunk` rows, `depth` times;
      H⁻¹v ≈ h / s, averaged over `repeats`. s must exceed half the largest eigenvalue.
      Source: Agarwal, Bullins and Hazan, Second-Order Stochastic Optimization for Machine
      Learning in Linear Time (JMLR 2017).

    The damping is the effective λ, for every solver. LiSSA codes that write
    h ← v + (1 − damp) h − H h / s have λ = damp · s: DEALRec's .01 and 25 are λ = .25 here.

    Args:
        vector: parameter name -> tensor of its shape.
        scale: LiSSA's s; None: 1.5 times the largest eigenvalue, by power iteration.

    Returns:
        Parameter name -> tensor of the parameter's shape.

    Raises:
        ScoreError: an unknown solver, a sparse model (its kernels have no second derivatives), an
            H + λI that is not positive, or a solver that did not converge.
    """
    if solver not in SOLVERS:
        raise ScoreError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ScoreError(f"damping must be at least 0, got {damping}")
    check_eval(model)
    rows = torch.arange(len(samples)) if rows is None else rows
    names = list(vector)
    product = hessian.Product(task, model, names, damping)
    v = product.flat(vector)
    parts = _parts(model, samples, rows, chunk)
    if solver == "exact":
        return product.named(hessian.solve_exactly(product, parts, v))
    if solver == "cg":
        return product.named(hessian.conjugate_gradients(product, parts, v, tolerance=tolerance))
    scale = 1.5 * hessian.largest_eigenvalue(product, parts, seed=seed) if scale is None else scale
    found = torch.zeros_like(v)
    for repeat in range(repeats):
        draw = _drawn(model, samples, rows, chunk, generator(seed, repeat))
        found += hessian.lissa(product, draw, v, depth=depth, scale=scale) / repeats
    return product.named(found)


def _all_products(
    task: Task, model: nn.Module, samples: Samples, direction: Direction, chunk: int
) -> Tensor:
    parts = _parts(model, samples, None, chunk)
    return torch.cat([products(task, model, batch, direction) for batch in parts()]).cpu()


def _parts(model: nn.Module, samples: Samples, rows: Tensor | None, chunk: int) -> hessian.Batches:
    """A function that goes through the rows in order, batch by batch."""
    order = torch.arange(len(samples)) if rows is None else rows
    if not len(order):
        raise ScoreError("no samples to take gradients of")
    device = device_of(model)
    return lambda: (batch_on(samples, part, device) for part in order.split(chunk))


def _drawn(
    model: nn.Module, samples: Samples, rows: Tensor, chunk: int, random: torch.Generator
) -> Callable[[], Any]:
    """A function that draws a batch of distinct rows at each call."""
    size, device = min(chunk, len(rows)), device_of(model)

    def draw() -> Any:
        drawn = torch.randperm(len(rows), generator=random)[:size]
        return batch_on(samples, rows[drawn], device)

    return draw
