"""Changing the mask of a sparsified model in place, on its sparse storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import nn

from sparsemodel.errors import MaskError
from sparsemodel.kernels.csr import carry_values
from sparsemodel.layers.linear_and_conv import SparseLayer
from sparsemodel.layers.sparsify import sparse_layers
from sparsemodel.masks.adjust import TensorEntries, grown_positions
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.probe import Loss, differentiable, scalar_loss
from sparsemodel.masks.structure import check_structure


def change_mask(
    model: nn.Module, mask: Mask, *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a sparsified model under another mask, in place.

    Weights active before and after keep their value, those that are new are zero. Gradients of the
    values are dropped.

    Args:
        model: sparsified; its layers in `mask` change, others stay.
        mask: weight name -> new pattern.
        optimizer: if given, its state of a layer's values (momentum, moments) moves along; zero
            where a weight is new.

    Raises:
        MaskError: the model has no such sparse layer, its weight has another shape, or the
            pattern is not made as the layer's execution needs; the model is as it was.
    """
    layers = sparse_layers(model)
    for name, pattern in mask.items():
        if name not in layers or layers[name].weight_shape != pattern.shape:
            shape = layers[name].weight_shape if name in layers else None
            raise MaskError(
                f"mask of {name!r} has shape {tuple(pattern.shape)}, the sparse layer's weight "
                f"{shape}; sparse layers are {list(layers)}"
            )
        try:
            check_structure(pattern, layers[name].execution)
        except MaskError as error:
            raise MaskError(f"mask of {name!r}: {error}") from error
    for name in mask:
        _move(layers[name], mask.active(name), optimizer)


def prune_and_grow(
    model: nn.Module,
    candidates: Mapping[str, TensorEntries],
    counts: Mapping[str, int],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Exchange the smallest active weights for the candidates of largest gradient, in place.

    The rule is that of `runtime.adjust.prune_and_grow` on states, and so are patterns and weights
    afterwards.

    Args:
        model: sparsified.
        candidates: weight name -> (flat indices, gradients) at pruned places, for names in
            `counts`, as `topk_pruned_gradients` returns them.
        counts: weight name -> how many weights to exchange at most.
        optimizer: if given, its state moves along, as in `change_mask`.

    Raises:
        MaskError: names that do not fit; a negative count; candidates that are active, repeated,
            out of range or NaN; weights that are NaN.
    """
    layers = counted_layers(model, counts)
    if not candidates.keys() <= counts.keys():
        raise MaskError(f"candidates for {sorted(candidates)} but counts for {sorted(counts)}")
    moves = {
        name: _exchanged(name, layers[name], candidates[name], counts[name]) for name in candidates
    }
    for name, positions in moves.items():  # only when all are known to be right
        _move(layers[name], positions, optimizer)


def topk_pruned_gradients(
    model: nn.Module, counts: Mapping[str, int], loss: Loss
) -> dict[str, TensorEntries]:
    """The largest gradients, by magnitude, at the pruned weights of a sparsified model.

    As `adjust.topk_pruned_gradients` on the masked dense model, but no dense gradient is made:
    each layer's is computed tile by tile from its input and its output's gradient. The model is
    left as it was, buffers and `.grad` included.
    Source: Huang et al. (ICDCS 2023), progressive pruning.

    Args:
        model: sparsified.
        counts: weight name -> how many entries to keep.
        loss: takes the model and returns its scalar loss on a mini-batch.

    Returns:
        Name -> (flat indices, int64, ascending; gradients, float32), on the CPU, at most
        counts[name] of each: fewer where fewer weights are pruned, none where the loss does not
        use the layer.

    Raises:
        MaskError: names that do not fit, a negative count, a gradient that is NaN, or a layer
            that the loss calls twice (its gradient is a sum that has to be held whole).
    """
    layers = counted_layers(model, counts)
    found = {
        name: (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32))
        for name in counts
    }
    wanted = [name for name, count in counts.items() if count > 0]
    if not wanted:
        return found
    values = [f"{name.removesuffix('weight')}values" for name in wanted]
    seen: set[str] = set()
    with differentiable(model, values), ExitStack() as hooks:
        for name in wanted:
            watch = _watcher(name, layers[name], counts[name], found, seen)
            hooks.callback(layers[name].register_forward_hook(watch).remove)
        torch.autograd.backward(scalar_loss(model, loss))
    return found


def _watcher(
    name: str, layer: SparseLayer, count: int, found: dict[str, TensorEntries], seen: set[str]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    """A forward hook that takes the layer's largest gradients when its output's gradient comes."""

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if name in seen:
            raise MaskError(
                f"the layer of {name!r} is called twice in one pass, so its gradients cannot be "
                "ranked call by call; densify the model and use adjust.topk_pruned_gradients"
            )
        seen.add(name)
        x = inputs[0].detach()

        def take(gradient: torch.Tensor) -> None:
            indices, values = layer.topk_grad(x, gradient, count)
            found[name] = indices.cpu(), values.cpu()

        output.register_hook(take)

    return watch


def _exchanged(
    name: str, layer: SparseLayer, candidates: TensorEntries, count: int
) -> torch.Tensor:
    """The layer's active positions after pruning and growing: int64, ascending."""
    active = layer.active_positions().cpu()

    def is_active(indices: torch.Tensor) -> torch.Tensor:
        if len(active) == 0:
            return torch.zeros(len(indices), dtype=torch.bool)
        place = torch.searchsorted(active, indices).clamp_(max=len(active) - 1)
        return active[place] == indices

    numel = layer.weight_shape.numel()
    grown = grown_positions(name, numel, is_active, candidates, count)[: len(active)]
    magnitudes = layer.values.detach().abs().cpu()
    if torch.isnan(magnitudes).any():
        raise MaskError(f"weights of {name!r} hold NaN; has training diverged?")
    kept = torch.argsort(magnitudes, stable=True)[len(grown) :]
    return torch.cat([active[kept], grown]).sort().values


def _move(
    layer: SparseLayer, positions: torch.Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Change a layer's pattern; what the optimiser keeps for its values follows."""
    shape = layer.values.shape
    source = layer.move_pattern(positions)
    state = {} if optimizer is None else optimizer.state.get(layer.values, {})
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 1 and tensor.shape == shape:
            state[key] = carry_values(tensor, source)


def counted_layers(model: nn.Module, counts: Mapping[str, int]) -> dict[str, SparseLayer]:
    """The sparse layers of a model, after a look at counts for some of them.

    Raises:
        MaskError: a name that is no sparse layer's weight, or a negative count.
    """
    layers = sparse_layers(model)
    for name, count in counts.items():
        if name not in layers:
            raise MaskError(f"the model has no sparse layer {name!r}; it has {list(layers)}")
        if count < 0:
            raise MaskError(f"{name!r}: expected a count >= 0, got {count}")
    return layers
