"""From generated text to items: the nearest titles in the language model's own embedding.

Source: Bao et al., A Bi-Step Grounding Paradigm for Large Language Models in Recommendation
Systems (BIGRec, 2023), distance grounding; the popularity weights of its second step are left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.recommend.effort import batches_of_tokens
from datapruning.recommend.histories import Question
from datapruning.recommend.prompts import Prompts
from datapruning.recommend.ragged import Ragged
from datapruning.recommend.surrogate import Recommender
from prunelab.training.task import to_device

EMBEDDING_TOKENS = 8192


@torch.no_grad()
def embed(
    model: nn.Module, token_ids: Ragged, *, begin: int, tokens: int = EMBEDDING_TOKENS
) -> Tensor:
    """The mean last hidden state over each text's tokens, float32 [N, D] on the model's device.

    Args:
        model: a causal language model of transformers, in eval mode.
        token_ids: [N] texts; an empty one counts as the begin token alone.
        begin: token id that stands before every text, and is not averaged.
        tokens: of a batch, padding included.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    order: list[Tensor] = []
    for rows in batches_of_tokens(token_ids.lengths + 1, tokens=tokens):
        part = token_ids.take(rows)
        ids = torch.cat([torch.full((len(rows), 1), begin), part.padded(fill=begin)], dim=1)
        mask = torch.arange(ids.shape[1]) <= part.lengths[:, None]
        inputs = to_device({"input_ids": ids, "attention_mask": mask.long()}, device)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1].float()
        counted = inputs["attention_mask"].clone()
        counted[:, 0] = (part.lengths == 0).long().to(device)
        weights = counted.unsqueeze(-1).float()
        found.append((hidden * weights).sum(1) / weights.sum(1))
        order.append(rows)
    table = torch.empty_like(torch.cat(found))
    table[torch.cat(order).to(device)] = torch.cat(found)
    return table


def ground(queries: Tensor, items: Tensor) -> Tensor:
    """Minus the squared Euclidean distance of each query to each item, [Q, I].

    By one matrix product; equal texts have equal embeddings and so equal scores, up to
    rounding, which a ranking then counts as ties or as chance.

    >>> ground(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0], [3.0, 5.0]]))
    tensor([[  0., -25.]])
    """
    closeness = 2 * queries @ items.T - (queries**2).sum(1, keepdim=True) - (items**2).sum(1)
    return closeness.clamp(max=0)


@torch.no_grad()
def generate(model: nn.Module, prompts: Prompts, question: Question, *, max_tokens: int) -> Ragged:
    """The title that the model writes for each history, by greedy decoding: token ids."""
    ids, mask = prompts.to_generate(question.history, room=max_tokens + 1)
    device = next(model.parameters()).device
    generation: Any = model.generate
    written = generation(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_tokens,
        eos_token_id=prompts.end,
        pad_token_id=prompts.padding,
    )[:, ids.shape[1] :]
    return Ragged.of(_until(row, prompts.end) for row in written.tolist())


def language_recommender(
    model: nn.Module, prompts: Prompts, *, max_tokens: int = 24
) -> Recommender:
    """Ranks items by their distance to the title that the model writes.

    The items are embedded once, when this is called: call it again after further training.
    """
    model.eval()
    items = embed(model, Ragged.of(prompts.titles), begin=prompts.begin)

    def recommend(question: Question) -> Tensor:
        written = generate(model, prompts, question, max_tokens=max_tokens)
        return ground(embed(model, written, begin=prompts.begin), items)

    return recommend


def _until(row: Sequence[int], end: int) -> list[int]:
    return list(row[: row.index(end)]) if end in row else list(row)
