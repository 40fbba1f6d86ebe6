"""How well a causal language model predicts a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.language.text import BATCH, in_batches
from prunelab.training.loop import evaluating


def perplexity(model: nn.Module, chosen: Tensor, *, batch_size: int = BATCH) -> float:
    """exp of the mean cross-entropy of all next tokens; infinity where the model has broken.

    Args:
        chosen: sequences of tokens, int64 [n, length]; each is predicted from its own beginning.
    """
    device, total = next(model.parameters()).device, 0.0
    with evaluating(model), torch.no_grad():
        for batch in in_batches(chosen, size=batch_size):
            tokens = batch["input_ids"].to(device)
            logits = model(input_ids=tokens).logits[:, :-1].float()
            total += functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
            ).item()
    mean = total / (chosen.shape[0] * (chosen.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf  # NaN is no smaller
