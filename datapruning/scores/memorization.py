"""Memorization and influence by training many models on random subsets.

Source: Feldman and Zhang, What Neural Networks Memorize and Why (NeurIPS 2020), section 2: the
subset estimator, with 70 % subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError
from prunelab.data.samples import Samples
from prunelab.runs.seeds import generator, stream_seed
from prunelab.training.loop import TrainingConfig, predict, train
from prunelab.training.task import Classification

_DRAW, _MODEL = 0, 1  # streams of the seed
_BLOCK = 256


class Outcome(NamedTuple):
    """One model: which samples it trained on, and which it then got right; both bool [N]."""

    in_subset: Tensor
    correct: Tensor


def subsets(
    num_samples: int, *, num_models: int, seed: int, share: float = 0.7
) -> Iterator[Tensor]:
    """Random subsets, one for each model: row numbers, int64, ascending.

    Every subset has round(share · N) rows and is uniform among those of its size.
    Departs from: independent draws. Here each sample is left out of equally many subsets, to
    within one, so that few models suffice to have an estimate for every sample.

    Raises:
        ScoreError: a share that leaves nobody in or out, or so few models that a sample might be
            in all of them.

    >>> [rows.tolist() for rows in subsets(4, share=0.5, num_models=2, seed=0)]
    [[1, 3], [0, 2]]
    """
    num_out = num_samples - round(share * num_samples)
    if not 0 < num_out < num_samples:
        raise ScoreError(
            f"a share of {share:g} of {num_samples} samples leaves {num_out} out; the estimator "
            "compares models with and without a sample"
        )
    needed = -(-num_samples // min(num_out, num_samples - num_out))
    if num_models < needed:
        raise ScoreError(
            f"{num_models} models with {num_out} of {num_samples} samples left out of each: some "
            f"sample would be in every subset or in none; train at least {needed}"
        )
    random = generator(seed, _DRAW)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(num_models):
        if len(queue) < num_out:
            # What is left of one shuffle comes first; in the next, those rows wait their turn.
            fresh = torch.randperm(num_samples, generator=random)
            waiting = torch.isin(fresh, queue)
            queue = torch.cat([queue, fresh[~waiting], fresh[waiting]])
        out, queue = queue[:num_out], queue[num_out:]
        inside = torch.ones(num_samples, dtype=torch.bool)
        inside[out] = False
        yield inside.nonzero()[:, 0]


def outcomes(
    build: Callable[[int], nn.Module],
    samples: Samples,
    task: Classification,
    *,
    config: TrainingConfig,
    num_models: int,
    seed: int,
    share: float = 0.7,
    held_out: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Outcome]:
    """Train a model on each subset and see what it gets right, in eval mode, on all samples.

    One model exists at a time. What comes before an outcome decides nothing but its subset:
    a caller may skip the training of stored ones by taking their rows from `subsets`.

    Args:
        build: seed -> a model, fresh for each subset.
        held_out: rows of the training side that no model trains on, to measure influence on.
    """
    seen = torch.arange(len(samples))
    if held_out is not None:
        seen = seen[~torch.isin(seen, held_out)]
    drawn = subsets(len(seen), num_models=num_models, seed=seed, share=share)
    for number, part in enumerate(drawn):
        own_seed = stream_seed(seed, _MODEL, number)
        model = build(own_seed)
        rows = seen[part]
        train(model, samples, task, config=config, seed=own_seed, rows=rows, device=device)
        logits, labels = predict(model, samples, task)
        in_subset = torch.zeros(len(samples), dtype=torch.bool)
        in_subset[rows] = True
        yield Outcome(in_subset, logits.argmax(1) == labels)


def memorization(correct: Tensor, in_subset: Tensor) -> Tensor:
    """P[right | trained on it] − P[right | not trained on it], in [−1, 1]; high is memorized.

    Args:
        correct: bool [M, N], whether model m gets sample i right.
        in_subset: bool [M, N], whether model m trained on sample i.

    Returns:
        float64 [N], NaN for samples that were in every subset or in none.

    Raises:
        ScoreError: other shapes or dtypes.

    Example: four models, in_subset 1 1 0 0, correct 1 1 1 0 gives 2/2 − 1/2 = .5.
    """
    _check(correct, in_subset)
    if correct.shape != in_subset.shape:
        raise ScoreError(
            f"correct is {tuple(correct.shape)}, in_subset {tuple(in_subset.shape)}; memorization "
            "needs both of the same samples"
        )
    num_in, num_out = in_subset.sum(0).double(), (~in_subset).sum(0).double()
    # 0 / 0 is the NaN that the docstring promises.
    right_in = (correct & in_subset).sum(0) / num_in
    right_out = (correct & ~in_subset).sum(0) / num_out
    return (right_in - right_out).cpu()


def influence_max(correct: Tensor, in_subset: Tensor, *, rows: Tensor | None = None) -> Tensor:
    """The largest influence of a training sample on any evaluated one; high is influential.

    The influence of i on j is P[j right | i in S] − P[j right | i not in S].
    Departs from: the paper, which evaluates on test data; those must not touch a selection, so
    the evaluated samples are a held-out part of the training side, or the training samples
    themselves, each without its influence on itself (that is its memorization).

    Args:
        correct: bool [M, K], whether model m gets evaluated sample j right.
        in_subset: bool [M, N], whether model m trained on sample i.
        rows: int64 [K], which of the N samples were evaluated; None: others, held out.

    Returns:
        float64 [N], NaN for samples that were in every subset or in none.

    Raises:
        ScoreError: other shapes or dtypes.
    """
    return _reduced(correct, in_subset, rows, lambda influence: influence.amax(1), -torch.inf)


def influence_sum_abs(correct: Tensor, in_subset: Tensor, *, rows: Tensor | None = None) -> Tensor:
    """The sum of the absolute influences of a training sample on all evaluated ones.

    Arguments, returns and errors are those of `influence_max`; high is influential. With few
    models it is dominated by sampling noise, which adds up over the evaluated samples.
    """
    return _reduced(correct, in_subset, rows, lambda influence: influence.abs().sum(1), 0.0)


def _reduced(
    correct: Tensor,
    in_subset: Tensor,
    rows: Tensor | None,
    reduce: Callable[[Tensor], Tensor],
    own: float,
) -> Tensor:
    """`reduce` of the influences [N, K], a block of rows at a time; `own` stands at i = j."""
    _check(correct, in_subset)
    if rows is not None and rows.shape != correct.shape[1:]:
        raise ScoreError(f"{correct.shape[1]} evaluated samples but {len(rows)} rows")
    right = correct.float()  # products of 0 and 1 sum exactly, up to 2²⁴ models
    all_right = right.sum(0).double()
    scores = []
    for start in range(0, in_subset.shape[1], _BLOCK):
        block = in_subset[:, start : start + _BLOCK].float()
        num_in = block.sum(0).double()[:, None]
        right_in = (block.T @ right).double()
        influence = right_in / num_in - (all_right - right_in) / (len(correct) - num_in)
        unknown = influence.isnan().any(1)
        if rows is not None:
            own_rows = torch.arange(start, start + block.shape[1], device=rows.device)
            itself = (own_rows[:, None] == rows[None]).to(influence.device)
            influence = influence.masked_fill(itself, own)
        scores.append(reduce(influence).masked_fill(unknown, torch.nan))
    return torch.cat(scores).cpu()


def _check(correct: Tensor, in_subset: Tensor) -> None:
    for name, table in (("correct", correct), ("in_subset", in_subset)):
        if table.dtype != torch.bool or table.dim() != 2 or not table.numel():
            raise ScoreError(
                f"{name} must be bool [models, samples], got {table.dtype} {tuple(table.shape)}"
            )
    if len(correct) != len(in_subset):
        raise ScoreError(f"correct is of {len(correct)} models, in_subset of {len(in_subset)}")
