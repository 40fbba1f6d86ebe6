"""DEALRec's second score: how much effort a sample costs the language model.

Source: Lin et al. (SIGIR 2024), section 3.2: ‖∇φ ℓ(x)‖₂ of the language model's loss for its
trainable parameters φ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.recommend.sasrec import batches_by_length
from datapruning.scores.gradient import check_eval, grand
from prunelab.data.samples import TokenSamples
from prunelab.training.task import CausalLM, to_device

TOKENS = 4096
"""Of a batch, padding included."""


def effort(
    model: nn.Module,
    samples: TokenSamples,
    *,
    tokens: int = TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """‖∇φ ℓ_i‖₂ of every sample, over all trainable parameters φ.

    The loss is the mean over the answer's tokens; the prompt has none. Norms of a batch come
    from one backward pass, and no gradient of a sample is stored.

    Args:
        model: in eval mode: dropout, of adapters as well, draws nothing while scoring.
        tokens: of a batch; bounds the memory.
        progress: called with the number of samples scored so far.

    Returns:
        float64 [N] on the CPU; high means keep.

    Raises:
        ScoreError: as `scores.gradient.grand`.
    """
    return _all(samples, lambda batch: grand(CausalLM(), model, batch), tokens, progress)


@torch.no_grad()
def answer_loss(model: nn.Module, samples: TokenSamples, *, tokens: int = TOKENS) -> Tensor:
    """The mean loss of the answer's tokens, float64 [N]; high: hard for the model as it is."""
    check_eval(model)
    return _all(samples, lambda batch: CausalLM().loss(model, _there(model, batch)), tokens)


@torch.no_grad()
def answer_error(model: nn.Module, samples: TokenSamples, *, tokens: int = TOKENS) -> Tensor:
    """EL2N for an answer: the mean over its tokens of ‖softmax − onehot‖₂, float64 [N]."""
    check_eval(model)

    def errors(batch: dict[str, Tensor]) -> Tensor:
        batch = _there(model, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        targets = batch["labels"][:, 1:]
        real = targets != -100
        probabilities = model(**inputs).logits[:, :-1][real].double().softmax(-1)
        wrong = probabilities - functional.one_hot(targets[real], probabilities.shape[-1])
        norms = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        norms[real] = wrong.norm(dim=-1)
        return norms.sum(1) / real.sum(1)

    return _all(samples, errors, tokens)


def _all(
    samples: TokenSamples,
    score: Callable[[dict[str, Tensor]], Tensor],
    tokens: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    scores, done = torch.empty(len(samples), dtype=torch.float64), 0
    for rows in batches_of_tokens(samples.attention_mask.sum(1), tokens=tokens):
        scores[rows] = score(samples.batch(rows)).double().cpu()
        done += len(rows)
        if progress is not None:
            progress(done)
    return scores


def batches_of_tokens(lengths: Tensor, *, tokens: int) -> Iterator[Tensor]:
    """Row numbers in batches of similar lengths of at most so many tokens, or of one sample."""
    for rows in batches_by_length(lengths, batch_size=max(1, len(lengths))):
        start = 0
        while start < len(rows):
            # Lengths rise: the last row of a batch decides what it takes.
            padded = lengths[rows[start:]] * torch.arange(1, len(rows) - start + 1)
            size = max(1, int((padded <= tokens).sum()))
            yield rows[start : start + size]
            start += size


def _there(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    moved: dict[str, Tensor] = to_device(batch, next(model.parameters()).device)
    return moved
