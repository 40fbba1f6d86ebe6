"""SASRec: a small self-attentive network that predicts the next item, the surrogate of DEALRec.

Source: Kang and McAuley, Self-Attentive Sequential Recommendation (ICDM 2018).
Departs from it: GELU and a feed-forward of four times the width, normalisation after each part
(as later public implementations), and a softmax over items in place of one sampled negative.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.recommend.histories import PADDING
from prunelab.training.task import Task


class SASRec(nn.Module):
    """Histories -> a vector at each position that scores the next item.

    Histories are padded on the right: with causal attention no item ever sees the padding, and
    short histories make short batches. Positions count back from the most recent item, so a
    history means the same however it is padded.

    Args:
        num_items: items are 1 ... num_items.
        hidden: width; a multiple of num_heads.
        max_length: of a history; a longer one is an error of the caller's.
    """

    def __init__(
        self,
        num_items: int,
        *,
        hidden: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 50,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_items, self.max_length = num_items, max_length
        self.items = nn.Embedding(num_items + 1, hidden, padding_idx=PADDING)
        self.positions = nn.Embedding(max_length, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden, num_heads, dropout) for _ in range(num_layers))
        self.apply(_initialise)

    def forward(self, history: Tensor) -> Tensor:
        """int64 [B, T] -> float [B, T, hidden]; what stands at padding has no meaning."""
        lengths = (history != PADDING).sum(1, keepdim=True)
        places = (lengths - 1 - torch.arange(history.shape[1], device=history.device)).clamp(min=0)
        x: Tensor = self.dropout(self.norm(self.items(history) + self.positions(places)))
        for block in self.blocks:
            x = block(x)
        return x

    def last(self, history: Tensor) -> Tensor:
        """The vector at the most recent item, [B, hidden]."""
        ends = (history != PADDING).sum(1).clamp(min=1) - 1
        vectors: Tensor = self(history)[torch.arange(len(history), device=history.device), ends]
        return vectors

    def scores(self, vectors: Tensor) -> Tensor:
        """[..., hidden] -> [..., num_items], item i at i − 1."""
        return functional.linear(vectors, self.items.weight[1:])

    @property
    def output_projection(self) -> list[str]:
        """The parameters of the last block's attention output projection."""
        name = f"blocks.{len(self.blocks) - 1}.attention.output"
        return [f"{name}.weight", f"{name}.bias"]


class Block(nn.Module):
    """Causal attention and a feed-forward part, each added to its input and normalised."""

    def __init__(self, hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(hidden, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, 4 * hidden)
        self.outer = nn.Linear(4 * hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        fed: Tensor = self.norm(x + self.dropout(self.outer(functional.gelu(self.inner(x)))))
        return fed


class Attention(nn.Module):
    """Multi-head attention to oneself and to what came before."""

    def __init__(self, hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.joint = nn.Linear(hidden, 3 * hidden)  # queries, keys, values
        self.output = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.joint(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # Written out: second derivatives are needed, and histories are short.
        weights = query @ key.mT / math.sqrt(query.shape[-1])
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = self.dropout(weights.masked_fill(later, -math.inf).softmax(-1))
        output: Tensor = self.output((weights @ value).transpose(1, 2).flatten(2))
        return output


class NextItem(Task):
    """The loss of a sample: the cross-entropy of its target over all items, after its history."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        history, targets = batch
        assert isinstance(model, SASRec)
        scores = model.scores(model.last(history))
        return functional.cross_entropy(scores, targets - 1, reduction="none")

    def embedding(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(model, SASRec)
        return model.last(batch[0])


def position_losses(model: SASRec, sequences: Tensor, *, negatives: Tensor | None = None) -> Tensor:
    """The loss at every position of some sequences, [number of items that follow another].

    Args:
        sequences: int64 [B, T + 1], padded on the right; item t + 1 is the target at t.
        negatives: int64 [K] item numbers, drawn uniformly with replacement; with them the
            softmax runs over the target and these, each standing for num_items / K items, so
            that its sum is right on average. Those that are a position's target are left out
            there. None: the softmax over all items.
    """
    history, targets = sequences[:, :-1], sequences[:, 1:]
    real = targets != PADDING
    # The last item of a row is a target alone.
    vectors, wanted = model(history * real)[real], targets[real]
    if negatives is None:
        return functional.cross_entropy(model.scores(vectors), wanted - 1, reduction="none")
    own = (vectors * model.items(wanted)).sum(-1, keepdim=True)
    others = vectors @ model.items(negatives).T
    others = others + math.log(model.num_items / len(negatives))
    others = others.masked_fill(negatives == wanted[:, None], -math.inf)
    losses: Tensor = torch.cat([own, others], dim=1).logsumexp(1) - own.squeeze(1)
    return losses


def batches_by_length(
    lengths: Tensor, *, batch_size: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Row numbers in batches of similar lengths, so that little of a batch is padding.

    Args:
        lengths: int64 [N].
        generator: shuffles rows of equal length and the order of batches; None: neither.
    """
    order = torch.arange(len(lengths))
    if generator is not None:
        order = torch.randperm(len(lengths), generator=generator)
    order = order[torch.argsort(lengths[order], stable=True)]
    bounds = pairwise([*range(0, len(order), batch_size), len(order)])
    parts = [order[start:stop] for start, stop in bounds]
    if generator is None:
        return parts
    return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
