"""Batches of calibration data: mappings of tensors, or (inputs, ...), or inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsemodel.errors import CalibrationError

Losses = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> the loss of each sequence or sample, [n]."""


def next_token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the next token, of each sequence [n].

    Args:
        model: gives an object with `logits` [n, tokens, vocabulary].
        batch: "input_ids" [n, tokens], and "attention_mask" where there is padding.
    """
    tokens = batch["input_ids"]
    logits = model(**batch).logits[:, :-1].float()
    each = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = torch.ones_like(each)
    if (mask := batch.get("attention_mask")) is not None:
        counted = mask[:, 1:].to(each.dtype)
    return (each * counted).sum(1) / counted.sum(1).clamp(min=1.0)


def usual_losses(model: nn.Module, batch: Any) -> Tensor:
    """Those of the next token, or of (inputs, labels) each sample's cross-entropy, [n].

    Raises:
        CalibrationError: the batch is neither.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return next_token_losses(model, batch)
    if not (isinstance(batch, tuple) and len(batch) == 2):
        raise CalibrationError(
            "gradients need a loss: give batches of (inputs, labels) or with input_ids, or `losses`"
        )
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels, reduction="none")


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, whose labels are left aside."""
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def padding_of(batch: Any) -> Tensor | None:
    """Which tokens count, bool [n, tokens], by the batch's "attention_mask"; None: all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.dim() != 2 else mask.bool()


def grid_of(batch: Any) -> tuple[int, int] | None:
    """Sequences and tokens of a batch, by its "input_ids" [n, tokens]; None: it has none."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return None if tokens is None or tokens.dim() != 2 else (tokens.shape[0], tokens.shape[1])


def unpadded(values: Tensor, padding: Tensor | None) -> Tensor:
    """All vectors of [..., features] that are of tokens that count: [m, features].

    Args:
        values: of tokens [n, tokens, features] or, laid one behind the other, [n * tokens,
            features]; in values of any other shape all vectors count.
        padding: as of `padding_of`.
    """
    vectors = values.reshape(-1, values.shape[-1])
    if padding is None or values.shape[:-1] not in {padding.shape, padding.reshape(-1).shape}:
        return vectors
    return vectors[padding.reshape(-1)]


def moved_to(batch: Any, device: torch.device) -> Any:
    """A batch's tensors on a device; arrays become tensors."""
    if isinstance(batch, Mapping):
        return {name: moved_to(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(moved_to(part, device) for part in batch)
    return torch.as_tensor(batch).to(device)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor that a module was called with.

    Raises:
        CalibrationError: there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise CalibrationError("a watched module was called without a tensor")
