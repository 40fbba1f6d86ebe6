"""Train the surrogate, rank all items by it or by popularity, and measure the ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datapruning.recommend.histories import PADDING, Histories, Question
from datapruning.recommend.metrics import CUTOFFS, ranking_metrics, target_ranks
from datapruning.recommend.ragged import Ragged
from datapruning.recommend.sasrec import SASRec, batches_by_length, position_losses
from prunelab.data.datasets import fingerprint
from prunelab.errors import RunError, check_settings
from prunelab.runs.seeds import generator, seeded, stream_seed
from prunelab.training import checkpoint as checkpoints

CRITERION = "ndcg@10"
EVALUATION_BATCH = 256

Recommender = Callable[[Question], Tensor]
"""Histories -> float scores of all items, [Q, num_items]; high for recommended."""


@dataclass(frozen=True)
class SurrogateConfig:
    """How the surrogate is trained: Adam, until validation NDCG@10 stops rising.

    Attributes:
        epochs: at most.
        patience: epochs without a better validation before the end.
        batch_size: histories of a step.
        lr: of Adam, constant.
        negatives: sampled for each step; None: the softmax runs over all items.
        hidden, num_layers, num_heads, max_length, dropout: of SASRec.

    Raises:
        RunError: values out of range, all of them named.
    """

    epochs: int = 200
    patience: int = 10
    batch_size: int = 256
    lr: float = 1e-3
    negatives: int | None = None
    hidden: int = 64
    num_layers: int = 2
    num_heads: int = 2
    max_length: int = 50
    dropout: float = 0.5

    def __post_init__(self) -> None:
        checks = {
            f"{name} must be at least 1, got {value}": value is None or value >= 1
            for name, value in asdict(self).items()
            if name not in ("lr", "dropout")
        }
        checks[f"lr must be positive and finite, got {self.lr}"] = 0 < self.lr < math.inf
        checks[f"dropout must be in [0, 1), got {self.dropout}"] = 0 <= self.dropout < 1
        checks[f"hidden = {self.hidden} is no multiple of num_heads = {self.num_heads}"] = (
            self.num_heads < 1 or self.hidden % self.num_heads == 0
        )
        check_settings("surrogate", checks)


@dataclass
class SurrogateResult:
    """What training found.

    Attributes:
        losses: mean training loss of each epoch.
        validation: NDCG@10 on the validation items after each epoch.
        best_epoch: whose weights the model has.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0


def train_surrogate(
    histories: Histories,
    *,
    config: SurrogateConfig,
    seed: int,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[SurrogateResult], None] | None = None,
) -> tuple[SASRec, SurrogateResult]:
    """A SASRec of the histories, with the weights of its best epoch, in eval mode.

    Each epoch passes once over all users with two training items or more, at every position.
    The weights that are returned are those with the highest NDCG@10 on the validation items, not
    the last ones. Nobody with validation items: all epochs run, and the last weights stay.
    Same seed, same bits on the CPU; a checkpoint continues to the same bits.

    Raises:
        RunError: a loss that is not finite, or a checkpoint of another run.
    """
    device = torch.device(device)
    with seeded(stream_seed(seed, 0), torch.device("cpu")):
        model = SASRec(
            histories.num_items,
            hidden=config.hidden,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            max_length=config.max_length,
            dropout=config.dropout,
        ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    question = histories.question("valid")
    result, best = SurrogateResult(), _copied(model)
    signature = {"seed": seed, "data": _name_of(histories), **asdict(config)}
    state = None if checkpoint is None else checkpoints.load(checkpoint, signature=signature)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        result, best = SurrogateResult(**state["result"]), state["best"]
    while not _finished(result, config):
        _train_epoch(model, optimizer, histories, config, seed=seed, result=result)
        if len(question):
            found = evaluate(sasrec_recommender(model), question, cutoffs=(10,))[CRITERION]
            result.validation.append(float(found.mean()))
        epoch = len(result.losses) - 1
        if not len(question) or result.validation[epoch] > max(
            result.validation[:epoch], default=-1
        ):
            result.best_epoch, best = epoch, _copied(model)
        if checkpoint is not None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "result": asdict(result),
                "best": best,
            }
            checkpoints.save(checkpoint, state, signature=signature)
        if on_epoch is not None:
            on_epoch(result)
    model.load_state_dict(best)
    return model.eval(), result


@torch.no_grad()
def evaluate(
    recommender: Recommender, question: Question, *, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, Tensor]:
    """Recall@K, NDCG@K and MRR of each user over all items, float64 [Q] on the CPU.

    No item is left out of the ranking, not even those of the history.
    """
    ranks = torch.empty_like(question.targets.values)
    places = Ragged(torch.arange(len(ranks)), question.targets.starts)
    for rows in batches_by_length(question.history.lengths, batch_size=EVALUATION_BATCH):
        part = question.take(rows)
        ranks[places.take(rows).values] = target_ranks(recommender(part), part.targets).cpu()
    return ranking_metrics(ranks, question.targets, cutoffs=cutoffs)


def sasrec_recommender(model: SASRec) -> Recommender:
    """Ranks by the surrogate's scores; the model is put into eval mode."""

    def recommend(question: Question) -> Tensor:
        history = question.history.last(model.max_length).padded(fill=PADDING)
        return model.scores(model.last(history.to(model.items.weight.device)))

    model.eval()
    return recommend


def popularity_recommender(histories: Histories) -> Recommender:
    """Ranks by the number of training interactions, the same for everybody."""
    counts = torch.bincount(histories.train.values, minlength=histories.num_items + 1)[1:].float()
    return lambda question: counts.expand(len(question), -1)


def _train_epoch(
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    histories: Histories,
    config: SurrogateConfig,
    *,
    seed: int,
    result: SurrogateResult,
) -> None:
    epoch, device = len(result.losses), model.items.weight.device
    order = generator(seed, 1, epoch)
    rows = torch.nonzero(histories.train.lengths >= 2).flatten()
    sequences = histories.train.take(rows).last(config.max_length + 1)
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    model.train()
    with seeded(stream_seed(seed, 2, epoch), device):
        for part in batches_by_length(
            sequences.lengths, batch_size=config.batch_size, generator=order
        ):
            negatives = None
            if config.negatives is not None:
                shape = (config.negatives,)
                negatives = torch.randint(1, model.num_items + 1, shape, generator=order).to(device)
            batch = sequences.take(part).padded(fill=PADDING).to(device)
            losses = position_losses(model, batch, negatives=negatives)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            total += losses.detach().sum(dtype=torch.float64)
            count += len(losses)
    result.losses.append(float(total) / count)
    if not math.isfinite(result.losses[-1]):
        raise RunError(f"surrogate: the loss became {result.losses[-1]} in epoch {epoch}; lower lr")


def _finished(result: SurrogateResult, config: SurrogateConfig) -> bool:
    waited = len(result.validation) - 1 - result.best_epoch
    return len(result.losses) >= config.epochs or waited >= config.patience


def _copied(model: SASRec) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _name_of(histories: Histories) -> str:
    train, valid = histories.train, histories.valid
    return fingerprint(histories.users, train.values, train.starts, valid.values, valid.starts)
