"""The steps that scoring methods are made of: what they see, and how they look at it.

`Shard` and `Whole` are what a step is given. The functions below adapt the pure functions of
`datapruning.scores` to them: a mean over trained models, batches of a shard, a file to go on from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError
from datapruning.scores import dynamics, ensemble, memorization
from datapruning.scores.error import el2n, loss
from prunelab.data.samples import Samples
from prunelab.runs.seeds import generator
from prunelab.training.task import Classification, Task, batch_on

BATCH = 256


@dataclass(frozen=True)
class Shard:
    """Some samples, and the trained models to look at them with.

    Attributes:
        rows: int64 [B], row numbers.
        num_runs: trained models that the method asked for.
        models: run -> its model at each of the method's moments, in eval mode on the device.
        in_subset: () -> bool [M, B], what each model was trained on, for a share below 1.
        prepared: what the method's `prepare` returned.
    """

    samples: Samples
    task: Task
    rows: Tensor
    device: torch.device
    num_runs: int
    models: Callable[[int], Sequence[nn.Module]]
    in_subset: Callable[[], Tensor]
    prepared: Any = None

    def batches(self) -> Iterator[Any]:
        """The shard's samples in order, on the device."""
        for part in self.rows.split(BATCH):
            yield batch_on(self.samples, part, self.device)


@dataclass(frozen=True)
class Whole:
    """Everything that is known once all shards have been observed.

    Attributes:
        observed: [N, ...], rows in order; None for a method that observes nothing.
        recorders: one a run, for a method that records.
        in_subset: bool [M, N], what each model was trained on.
        models: run -> its models at the method's moments.
        rates: for each moment the mean learning rate of the steps since the one before.
        folder: for files that a step may leave, to go on from after a kill.
        seed: of the method's own random choices.
    """

    samples: Samples
    task: Task
    seed: int
    device: torch.device
    observed: Tensor | None = None
    recorders: Sequence[dynamics.Recorder] = ()
    in_subset: Tensor | None = None
    models: Callable[[int], Sequence[nn.Module]] | None = None
    rates: Sequence[float] = ()
    prepared: Any = None
    folder: Path | None = None


def of_logits(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Shard], Tensor]:
    """Mean over runs of a score of (logits, labels) at the run's last kept moment."""

    def observe(shard: Shard) -> Tensor:
        total = torch.zeros(len(shard.rows), dtype=torch.float64)
        for logits, labels in _logits(shard):
            total += score(logits, labels)
        return total / shard.num_runs

    return observe


@torch.no_grad()
def _logits(shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, C] and labels [B] of the shard, run by run."""
    task = shard.task
    assert isinstance(task, Classification)
    for run in range(shard.num_runs):
        model = shard.models(run)[-1]
        seen = [(task.logits(model, batch), task.labels(batch)) for batch in shard.batches()]
        logits, labels = zip(*seen, strict=True)
        yield torch.cat(logits), torch.cat(labels)


def of_models(score: Callable[[Task, nn.Module, Any], Tensor]) -> Callable[[Shard], Tensor]:
    """Mean over runs of a score of (task, model, batch)."""
    return of_runs(lambda task, models, batch: score(task, models[-1], batch))


def of_runs(
    score: Callable[[Task, Sequence[nn.Module], Any], Tensor],
) -> Callable[[Shard], Tensor]:
    """Mean over runs of a score of (task, the models of a run, batch)."""

    def observe(shard: Shard) -> Tensor:
        total = torch.zeros(len(shard.rows), dtype=torch.float64)
        for run in range(shard.num_runs):
            models = shard.models(run)
            scores = [score(shard.task, models, batch) for batch in shard.batches()]
            total += torch.cat(scores).cpu()
        return total / shard.num_runs

    return observe


def grand_of(task: Task, model: nn.Module, batch: Any) -> Tensor:
    from datapruning.scores.gradient import norms  # noqa: PLC0415

    return norms(task, model, batch)


@torch.no_grad()
def task_loss(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """The task's own loss, so that tasks without classes have a score too."""
    if isinstance(task, Classification) and type(task).loss is Classification.loss:
        return loss(task.logits(model, batch), task.labels(batch))
    return task.loss(model, batch).double()


def vog_of(task: Task, models: Sequence[nn.Module], batch: Any) -> Tensor:
    from datapruning.scores.gradient import vog  # noqa: PLC0415

    return vog(task, models, batch)


def correct_by_model(shard: Shard) -> Tensor:
    """bool [B, M]: which of the models get a sample right."""
    right = [(logits.argmax(1) == labels).cpu() for logits, labels in _logits(shard)]
    return torch.stack(right, dim=1)


def ddd_of(shard: Shard) -> Tensor:
    return ensemble.ddd(correct_by_model(shard).T)


def disagreement_of(shard: Shard) -> Tensor:
    return ensemble.disagreement(logits.softmax(1) for logits, _ in _logits(shard))


def of_recorders(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mean over runs of a score of the run's Recorder."""

    def finish(whole: Whole, **options: Any) -> Tensor:
        scores = [score(recorder, **options) for recorder in whole.recorders]
        return torch.stack(scores).mean(0)

    return finish


def dual_of(recorder: dynamics.Recorder, *, window: int, epochs: int) -> Tensor:
    """DUAL over its first epochs; of a shorter run, over all of it."""
    return dynamics.dual(recorder, window=window, epochs=min(epochs, recorder.num_epochs))


def mean_confidence(
    recorders: Sequence[dynamics.Recorder], *, epochs: int | None = None, **_: Any
) -> Tensor:
    """Mean over runs of the probability of the label, over those epochs that the score is of."""
    each = [
        dynamics.confidence(r, epochs=None if epochs is None else min(epochs, r.num_epochs))
        for r in recorders
    ]
    return torch.stack(each).mean(0)


def of_subsets(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def finish(whole: Whole) -> Tensor:
        assert whole.observed is not None
        assert whole.in_subset is not None
        rows = torch.arange(len(whole.samples))
        correct = whole.observed.T.bool()
        if score is memorization.memorization:
            return score(correct, whole.in_subset)
        return score(correct, whole.in_subset, rows=rows)

    return finish


def held_out_probabilities(shard: Shard) -> Tensor:
    """Mean probabilities, float64 [B, C], over those models that were not trained on a sample."""
    is_out = ~shard.in_subset()
    total = torch.zeros((), dtype=torch.float64)
    for (logits, _), out in zip(_logits(shard), is_out, strict=True):
        total = total + logits.double().softmax(1).cpu() * out[:, None]
    return total / is_out.sum(0)[:, None]


def of_held_out(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A score of (out-of-sample probabilities, labels)."""

    def finish(whole: Whole, **options: Any) -> Tensor:
        assert whole.samples.labels is not None
        return score(_observed(whole), whole.samples.labels, **options)

    return finish


@torch.no_grad()
def embedding_of(shard: Shard) -> Tensor:
    """float32 [B, D] of run 0's last model."""
    model = shard.models(0)[-1]
    parts = [shard.task.embedding(model, batch).float() for batch in shard.batches()]
    return torch.cat(parts).cpu()


def embed_all(whole: Whole, *, embedding: str, **_: Any) -> Tensor:
    from datapruning.embeddings.embed import embed  # noqa: PLC0415

    return embed(
        whole.samples,
        embedding,
        seed=whole.seed,
        checkpoint=None if whole.folder is None else whole.folder / "embedding.pt",
        device=whole.device,
    )


def prototypes_ssl(whole: Whole, *, embedding: str, num_clusters: int | None) -> Tensor:
    from datapruning.scores.prototypes import self_supervised  # noqa: PLC0415

    assert whole.samples.labels is not None
    num_classes = len(whole.samples.labels.unique())
    clusters = num_classes if num_clusters is None else num_clusters
    embeddings = whole.prepared.to(whole.device)
    return self_supervised(embeddings, num_clusters=clusters, seed=whole.seed)


def prototypes_supervised(whole: Whole) -> Tensor:
    from datapruning.scores.prototypes import supervised  # noqa: PLC0415

    assert whole.samples.labels is not None
    return supervised(_observed(whole), whole.samples.labels)


def semdedup_scores(whole: Whole, *, num_clusters: int) -> Tensor:
    from datapruning.scores.geometry import semdedup  # noqa: PLC0415

    return semdedup(_observed(whole), num_clusters=num_clusters, seed=whole.seed)


def k_center_order(whole: Whole) -> Tensor:
    from datapruning.scores.geometry import k_center  # noqa: PLC0415

    return k_center(_observed(whole), seed=whole.seed)


def embedding_and_el2n(shard: Shard) -> Tensor:
    score = of_logits(el2n)(shard)
    return torch.cat([embedding_of(shard).double(), score[:, None]], dim=1)


def d2_order(whole: Whole) -> Tensor:
    from datapruning.scores.geometry import d2  # noqa: PLC0415

    observed = _observed(whole)
    return d2(observed[:, :-1].float(), observed[:, -1])


def direction(solver: Any) -> Callable[..., Any]:
    """Prepares H⁻¹v, v the mean gradient over all samples: one for all of them."""

    def prepare(whole: Whole, *, damping: float, parameters: str) -> Any:
        from datapruning.scores.influence import inverse_hvp, mean_gradient  # noqa: PLC0415

        model = _last_model(whole)
        names = _parameter_names(model, parameters)
        v = mean_gradient(whole.task, model, whole.samples, parameters=names)
        return inverse_hvp(
            whole.task, model, whole.samples, v, solver=solver, damping=damping, seed=whole.seed
        )

    return prepare


def gradients(whole: Whole, *, parameters: str) -> Any:
    """Prepares η_k v(θ_k) of each checkpoint, v the mean gradient, for Σ_k η_k ⟨∇ℓ_i(θ_k), v(θ_k)⟩.

    To first order, what training on a sample took off the mean loss. η_k is the mean learning
    rate of the steps between checkpoint k − 1 and k, whose schedule decays. Needs no Hessian, and
    works with sparse models.
    Source: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent
    (NeurIPS 2020), equation of TracInCP.
    """
    from datapruning.scores.influence import mean_gradient  # noqa: PLC0415

    assert whole.models is not None
    directions = []
    for model, rate in zip(whole.models(0), whole.rates, strict=True):
        names = _parameter_names(model, parameters)
        v = mean_gradient(whole.task, model, whole.samples, parameters=names)
        directions.append({name: rate * part for name, part in v.items()})
    return directions


def products(shard: Shard) -> Tensor:
    """⟨∇ℓ_i, direction⟩, summed over the checkpoints where there are several."""
    from datapruning.scores import influence  # noqa: PLC0415

    models = shard.models(0)
    directions = shard.prepared if isinstance(shard.prepared, list) else [shard.prepared]
    total = torch.zeros(len(shard.rows), dtype=torch.float64)
    for model, direction in zip(models, directions, strict=True):
        here = {name: part.to(shard.device) for name, part in direction.items()}
        parts = [influence.products(shard.task, model, batch, here) for batch in shard.batches()]
        total += torch.cat(parts).cpu()
    return total


def ekfac_scores(whole: Whole) -> Tensor:
    from datapruning.scores.ekfac import ekfac  # noqa: PLC0415

    return ekfac(whole.task, _last_model(whole), whole.samples, seed=whole.seed)


def _last_model(whole: Whole) -> nn.Module:
    assert whole.models is not None
    return whole.models(0)[-1]


def _parameter_names(model: nn.Module, which: str) -> list[str] | None:
    """Names of the last layer's parameters, or None for all."""
    if which == "all":
        return None
    if which != "head":
        raise ScoreError(f"parameters: expected head (the last layer) or all, got {which!r}")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    owner = names[-1].rpartition(".")[0]
    return [name for name in names if name.rpartition(".")[0] == owner]


def _observed(whole: Whole) -> Tensor:
    assert whole.observed is not None
    return whole.observed


def random_scores(whole: Whole) -> Tensor:
    return torch.rand(len(whole.samples), generator=generator(whole.seed, 0), dtype=torch.float64)
