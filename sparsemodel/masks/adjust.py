"""Adjusting a mask: pruned weights of large gradient are grown, small active ones pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import nn

from sparsemodel.errors import MaskError
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.probe import Loss, differentiable, scalar_loss

TensorEntries = tuple[torch.Tensor, torch.Tensor]
"""Single weights of a layer: flat positions (int64) and values (float32), both [k]."""


class TopKBuffer:
    """The k entries of largest magnitude among all that were added, in memory of k entries.

    Of equal magnitudes the lower index wins, so the result depends neither on the order of the
    tiles nor on how they were cut. No more than k plus one tile's entries are held during a call.

    Args:
        k: number of entries to keep, >= 0.

    Raises:
        MaskError: a negative k.

    >>> buffer = TopKBuffer(2)
    >>> buffer.add(torch.tensor([0, 1]), torch.tensor([0.5, -3.0]))
    >>> buffer.add(torch.tensor([2, 3]), torch.tensor([0.5, 0.1]))
    >>> buffer.entries()
    (tensor([0, 1]), tensor([ 0.5000, -3.0000]))
    """

    def __init__(self, k: int) -> None:
        if k < 0:
            raise MaskError(f"a buffer holds k >= 0 entries, got k = {k}")
        self._k = k
        # Ordered by falling magnitude, then rising index.
        self._indices = torch.empty(0, dtype=torch.int64)
        self._values = torch.empty(0, dtype=torch.float32)

    def add(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Offer a tile of entries.

        Args:
            indices: flat indices, integer, shape [n]; each index is offered once in all.
            values: their values, floating point, shape [n]; kept as float32.

        Raises:
            MaskError: shapes that differ, or values that are NaN.
        """
        if indices.dim() != 1 or indices.shape != values.shape:
            raise MaskError(
                "expected indices and values of one shape [n], got "
                f"{tuple(indices.shape)} and {tuple(values.shape)}"
            )
        values = values.detach().to(torch.float32)
        if torch.isnan(values).any():
            raise MaskError("values hold NaN: no order can be made of them; has training diverged?")
        if self._k == 0:
            return
        if len(self._values) == self._k:  # full, so most entries fall short of the smallest one
            reaches = values.abs() >= self._values[-1].abs().to(values.device)
            indices, values = indices[reaches], values[reaches]
        if len(values) > self._k:  # those of the k-th magnitude all stay, for their order to say
            largest = values.abs()
            reaches = largest >= largest.topk(self._k, sorted=False).values.min()
            indices, values = indices[reaches], values[reaches]
        indices = torch.cat([self._indices.to(values.device), indices.to(torch.int64)])
        values = torch.cat([self._values.to(values.device), values])
        by_index = torch.argsort(indices)
        by_magnitude = torch.argsort(values[by_index].abs(), descending=True, stable=True)
        order = by_index[by_magnitude[: self._k]]
        self._indices, self._values = indices[order], values[order]

    def entries(self) -> TensorEntries:
        """The entries kept: indices (int64, ascending) and values (float32), on the CPU."""
        order = torch.argsort(self._indices)
        return self._indices[order].cpu(), self._values[order].cpu()


def topk_pruned_gradients(
    model: nn.Module, mask: Mask, counts: Mapping[str, int], loss: Loss, *, tile: int = 65536
) -> dict[str, TensorEntries]:
    """The largest gradients, by magnitude, at the pruned weights of some layers.

    Only the layers in `counts` are differentiated, and each layer's dense gradient is read tile
    by tile and freed before the next one is computed: beside activations, memory peaks at one
    dense layer gradient. The model is left as it was, buffers and `.grad` included; train or
    eval mode is the caller's choice.
    Source: Huang et al. (ICDCS 2023), progressive pruning.

    Args:
        model: holds the weights under `mask`.
        mask: the mask in force.
        counts: name -> how many entries to keep.
        loss: takes the model and returns its scalar loss on a mini-batch.
        tile: number of coordinates read at a time, >= 1.

    Returns:
        Name -> (flat indices, int64, ascending; gradients, float32), at most counts[name] of
        each: fewer where fewer weights are pruned, none where the loss does not use the layer.

    Raises:
        MaskError: names or shapes that do not fit, a negative count, a gradient that is NaN, or
            an open MaskedSGD that takes the gradients away first.
    """
    if tile < 1:
        raise MaskError(f"a tile has at least one coordinate, got {tile}")
    _check_layers(mask, counts)
    buffers = {name: TopKBuffer(count) for name, count in counts.items()}
    wanted = [name for name, count in counts.items() if count > 0]
    if wanted:
        with differentiable(model, wanted) as weights, ExitStack() as hooks:
            for name, weight in weights.items():
                pattern = _pattern(mask, name, weight)
                consume = _consumer(name, pattern, buffers[name], tile)
                handle = weight.register_post_accumulate_grad_hook(consume)
                hooks.callback(handle.remove)
            torch.autograd.backward(scalar_loss(model, loss))
    return {name: buffer.entries() for name, buffer in buffers.items()}


def _consumer(
    name: str, pattern: torch.Tensor, buffer: TopKBuffer, tile: int
) -> Callable[[torch.Tensor], None]:
    """A hook that moves a gradient's pruned coordinates into `buffer` and frees the gradient."""
    flat_pattern = pattern.reshape(-1)

    def consume(weight: torch.Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            raise MaskError(
                f"the gradient of {name!r} was taken by another hook; close the MaskedSGD of "
                "this model before asking for pruned gradients"
            )
        flat = gradient.reshape(-1)
        for start in range(0, len(flat), tile):
            pruned = torch.nonzero(~flat_pattern[start : start + tile]).reshape(-1).to(flat.device)
            buffer.add(pruned + start, flat[start : start + tile][pruned])

    return consume


def grown_positions(
    name: str,
    numel: int,
    active: Callable[[torch.Tensor], torch.Tensor],
    candidates: TensorEntries,
    count: int,
) -> torch.Tensor:
    """Flat indices of the `count` best candidates that are not zero, best first.

    Args:
        name: the layer, for messages.
        numel: number of its weights, active or pruned.
        active: tells of flat indices (int64) which are active now (bool).
        candidates: flat indices and gradients.
        count: how many to grow at most.

    Raises:
        MaskError: candidates that are active, repeated, out of range or NaN.
    """
    indices, values = (tensor.detach().cpu() for tensor in candidates)
    if indices.dim() != 1 or indices.shape != values.shape:
        raise MaskError(
            f"candidates of {name!r}: expected indices and values of one shape [n], got "
            f"{tuple(indices.shape)} and {tuple(values.shape)}"
        )
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= numel):
        raise MaskError(
            f"candidates of {name!r}: indices must be in [0, {numel}), got "
            f"{int(indices.min())} to {int(indices.max())}"
        )
    if len(torch.unique(indices)) != len(indices):
        raise MaskError(f"candidates of {name!r} name a coordinate twice; sum them first")
    if active(indices.long()).any():
        raise MaskError(f"candidates of {name!r} hold active weights; were they of an older mask?")
    if torch.isnan(values).any():
        raise MaskError(f"candidates of {name!r} hold NaN; leave out the client that sent it")
    indices, values = indices[values != 0].long(), values[values != 0]
    by_index = torch.argsort(indices)
    order = torch.argsort(values[by_index].abs(), descending=True, stable=True)
    return indices[by_index][order[:count]]


def _check_layers(mask: Mask, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if name not in mask:
            raise MaskError(f"no layer {name!r} in this mask; it has {list(mask)}")
        if count < 0:
            raise MaskError(f"{name!r}: expected a count >= 0, got {count}")


def _pattern(mask: Mask, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The pattern of a layer, checked to have the shape of its weight."""
    if mask[name].shape != weight.shape:
        raise MaskError(
            f"mask of {name!r} has shape {tuple(mask[name].shape)}, "
            f"its weight {tuple(weight.shape)}"
        )
    return mask[name]
