"""What perplexity hides of a pruned language model: facts, retrieval, agreement.

Perplexity is a mean over all tokens, most of them easy. A pruned model may keep it and lose what it
knew: rare tokens of which the dense model was sure. It may lose facts and still copy what stands in
its context. After the questions of Jaiswal et al., Compressing LLMs: The Truth Is Rarely Pure and
Never Simple (ICLR 2024, LLM-KICK); departs from them in needing no data but a text and no answers
but tokens.

Models are called with `input_ids` [B, length] and return an object with `logits` [B, length,
tokens], in evaluation mode; they are left in the mode they were in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.errors import DataError
from prunelab.language.text import BATCH
from prunelab.training.loop import evaluating


@dataclass(frozen=True)
class Facts:
    """Rare tokens that the dense model predicts.

    Attributes:
        sequences: int64 [n, length].
        places: row and column of each predicted token, int64 [facts, 2]; columns from 1.
    """

    sequences: Tensor
    places: Tensor

    @property
    def tokens(self) -> Tensor:
        """What stands there, int64 [facts]."""
        return self.sequences[self.places[:, 0], self.places[:, 1]]

    def kept_by(self, said: Tensor) -> float:
        """Share of facts that are still chosen, in [0, 1].

        Args:
            said: what `choices` gives of a model and `sequences`.
        """
        found = said[self.places[:, 0], self.places[:, 1] - 1]
        return float((found == self.tokens).double().mean())


def facts(
    dense: nn.Module,
    chosen: Tensor,
    *,
    rare: float = 0.001,
    sure: float = 0.5,
    reference: Tensor | None = None,
    batch_size: int = BATCH,
) -> Facts:
    """Places where the token is rare and the dense model gives it more than `sure`.

    Args:
        chosen: sequences of tokens, int64 [n, length].
        rare: the largest share of the reference's tokens that a rare one has.
        sure: probability, in [.5, 1): above a half the dense model's choice is the token.
        reference: tokens of any shape that are counted; None: `chosen`.

    Raises:
        DataError: `sure` or `rare` out of range, sequences of another shape, or no such place.
    """
    _check_sequences(chosen)
    if not (0.5 <= sure < 1 and 0 < rare <= 1):
        raise DataError(
            f"expected sure in [.5, 1) and rare in (0, 1], got sure={sure} and rare={rare}"
        )
    counted = chosen if reference is None else reference
    size = 1 + max(int(counted.max()), int(chosen.max()))
    shares = torch.bincount(counted.flatten(), minlength=size).double() / counted.numel()
    is_fact = torch.zeros(chosen.shape, dtype=torch.bool)
    with _evaluating(dense) as logits_of:
        for rows, logits in _predicted(logits_of, chosen, batch_size):
            targets = chosen[rows, 1:]
            known = logits.softmax(2).gather(2, targets[..., None])[..., 0]
            is_fact[rows, 1:] = (known > sure) & (shares[targets] <= rare)
    if not is_fact.any():
        raise DataError(
            f"the model gives no token of a share up to {rare:g} more than {sure:g}; give a longer "
            "text, a higher share, or a text that it knows"
        )
    return Facts(chosen, is_fact.nonzero())


def facts_kept(model: nn.Module, asked: Facts, *, batch_size: int = BATCH) -> float:
    """Share of facts whose token is still the model's choice, in [0, 1].

    Of the dense model it is 1. A place with logits that are NaN has no choice.
    """
    return asked.kept_by(choices(model, asked.sequences, batch_size=batch_size))


def choices(model: nn.Module, chosen: Tensor, *, batch_size: int = BATCH) -> Tensor:
    """The token of highest logit at every place but the first, int64 [n, length - 1].

    A place with logits that are NaN has no choice, -1.

    Args:
        chosen: sequences of tokens, int64 [n, length].

    Raises:
        DataError: sequences of another shape.
    """
    _check_sequences(chosen)
    with _evaluating(model) as logits_of:
        parts = [_choices(logits) for _, logits in _predicted(logits_of, chosen, batch_size)]
    return torch.cat(parts)


def agreeing(ours: Tensor, theirs: Tensor) -> float:
    """Share of places where two models choose the same token, in [0, 1]; -1 agrees with nothing."""
    return float(_same(ours, theirs).double().mean())


def _same(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours == theirs) & (ours >= 0)


@dataclass(frozen=True)
class Planted:
    """Texts that begin with a pair and end with its key; the value should follow.

    Attributes:
        sequences: key, value, text, key: int64 [n, length].
        without: the same with the text's own two first tokens, [n, length].
        values: int64 [n].
    """

    sequences: Tensor
    without: Tensor
    values: Tensor


def planted(chosen: Tensor, *, seed: int, candidates: Tensor | None = None) -> Planted:
    """Put a random pair of tokens at the start of each sequence, and its key again at the end.

    Key and value differ and do not occur in the sequence otherwise, so that the value can be known
    from the pair alone.

    Args:
        chosen: sequences of real text, int64 [n, length], length of three or more.
        candidates: tokens of which pairs are drawn, int64 [k]; None: all that occur in `chosen`.

    Raises:
        DataError: sequences of another shape, or fewer than two candidates outside of one.

    >>> two = planted(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), seed=0)
    >>> bool((two.sequences[:, 0] == two.sequences[:, -1]).all()), two.without[:, :3].tolist()
    (True, [[0, 1, 2], [4, 5, 6]])
    """
    _check_sequences(chosen, least=3)
    pool = (chosen if candidates is None else candidates).unique()
    random = torch.Generator().manual_seed(seed)
    pairs = []
    for number, row in enumerate(chosen):
        others = pool[~torch.isin(pool, row)]
        if len(others) < 2:
            raise DataError(
                f"sequence {number} leaves {len(others)} tokens for a pair that does not occur in "
                "it; give more candidates or shorter sequences"
            )
        pairs.append(others[torch.randperm(len(others), generator=random)[:2]])
    drawn = torch.stack(pairs)
    without = torch.cat([chosen[:, :-1], drawn[:, :1]], 1)
    return Planted(torch.cat([drawn, without[:, 2:]], 1), without, drawn[:, 1].clone())


@dataclass(frozen=True)
class Found:
    """How a model answers at the ends of sequences.

    Attributes:
        first: share of sequences whose value is the only token of highest logit, in [0, 1].
        rank: median over sequences of the value's place, 1 for the highest logit; equal logits
            share the mean of their places.
        probability: mean of the value's probability.
    """

    first: float
    rank: float
    probability: float


@dataclass(frozen=True)
class Retrieval:
    """What a model finds in its context, and what it would have said anyway.

    Attributes:
        planted: with the pair.
        without: without it: chance.
    """

    planted: Found
    without: Found


def retrieval(model: nn.Module, asked: Planted, *, batch_size: int = BATCH) -> Retrieval:
    """Whether the model copies the value of a planted pair; NaN logits rank it last."""
    found = []
    with _evaluating(model) as logits_of:
        for sequences in (asked.sequences, asked.without):
            last = torch.cat([logits_of(part)[:, -1] for part in sequences.split(batch_size)])
            found.append(_found(last, asked.values))
    return Retrieval(*found)


@dataclass(frozen=True)
class Agreement:
    """How far a pruned model follows the dense one.

    Attributes:
        share: of predictions that choose the same token, in [0, 1].
        kl: mean KL(dense ‖ pruned) of a prediction, nats; infinity where the model has broken.
    """

    share: float
    kl: float


def agreement(
    pruned: nn.Module, dense: nn.Module, chosen: Tensor, *, batch_size: int = BATCH
) -> Agreement:
    """How often two models choose the same next token, and how far their probabilities are apart.

    Args:
        chosen: sequences of tokens, int64 [n, length]; the last token's prediction is left out, as
            in perplexity.

    Raises:
        DataError: sequences of another shape.
    """
    _check_sequences(chosen)
    same, total = 0, 0.0
    with _evaluating(pruned) as ours, _evaluating(dense) as theirs:
        for (_, q), (_, p) in zip(
            _predicted(ours, chosen, batch_size), _predicted(theirs, chosen, batch_size),
            strict=True,
        ):  # fmt: skip
            same += int(_same(_choices(p), _choices(q)).sum())
            log_p, log_q = p.log_softmax(2), q.log_softmax(2)
            # What the dense model excludes adds nothing, whatever the other says: 0 log 0 = 0.
            ratio = torch.where(log_p == -math.inf, 0.0, log_p - log_q)
            total += float((log_p.exp() * ratio).sum(dtype=torch.float64))
    count = chosen.shape[0] * (chosen.shape[1] - 1)
    return Agreement(same / count, math.inf if math.isnan(total) else max(0.0, total / count))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Tokens -> float32 logits on the CPU, in evaluation mode and without gradients."""
    device = next(model.parameters()).device

    def logits_of(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens.to(device)).logits.float().cpu()
        return logits

    with evaluating(model), torch.no_grad():
        yield logits_of


def _predicted(
    logits_of: Callable[[Tensor], Tensor], chosen: Tensor, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a batch, and logits for all their tokens but the first, [B, length - 1, tokens]."""
    for start in range(0, len(chosen), size):
        rows = slice(start, start + size)
        yield rows, logits_of(chosen[rows])[:, :-1]


def _choices(logits: Tensor) -> Tensor:
    """The token of highest logit, -1 where one is NaN."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


def _found(logits: Tensor, values: Tensor) -> Found:
    own = logits.gather(1, values[:, None])
    broken = logits.isnan().any(1)
    above, level = (logits > own).sum(1), (logits == own).sum(1)
    ranks = (above + (level + 1) / 2).masked_fill(broken, logits.shape[1])
    known = functional.softmax(logits, 1).gather(1, values[:, None])[:, 0].nan_to_num(0.0)
    return Found(
        first=float((ranks == 1).double().mean()),
        rank=float(ranks.double().quantile(0.5)),
        probability=float(known.double().mean()),
    )


def _check_sequences(chosen: Tensor, *, least: int = 2) -> None:
    if chosen.dim() != 2 or not len(chosen) or chosen.shape[1] < least:
        raise DataError(
            f"expected sequences of tokens [n, length], a length of {least} or more, got shape "
            f"{tuple(chosen.shape)}"
        )
