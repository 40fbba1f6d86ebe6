"""The scoring methods by name: what each trains and records, and the pure function that scores.

A method has up to four steps. Models are trained (`runs` of them, kept at some `moments`);
something is prepared once from all samples; every shard of samples is observed on its own; and
what was observed is finished into one score a sample. Steps that a method does not name are
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError
from datapruning.samples import Samples
from datapruning.scores import dynamics, ensemble, memorization
from datapruning.scores.error import el2n, entropy, loss, margin
from datapruning.seeds import generator
from datapruning.task import Classification, Task, to_device

BATCH = 256
NUM_MOMENTS = 5
"""Checkpoints of a run that "spread" keeps, evenly over its epochs."""


@dataclass(frozen=True)
class Shard:
    """Some samples, and the trained models to look at them with.

    Attributes:
        rows: int64 [B], row numbers.
        num_runs: trained models that the method asked for.
        models: run -> its model at each of the method's moments, in eval mode on the device.
        prepared: what the method's `prepare` returned.
    """

    samples: Samples
    task: Task
    rows: Tensor
    device: torch.device
    num_runs: int
    models: Callable[[int], Sequence[nn.Module]]
    prepared: Any = None

    def batches(self) -> Iterator[Any]:
        """The shard's samples in order, on the device."""
        for part in self.rows.split(BATCH):
            yield to_device(self.samples.batch(part), self.device)


@dataclass(frozen=True)
class Whole:
    """Everything that is known once all shards have been observed.

    Attributes:
        observed: [N, ...], rows in order; None for a method that observes nothing.
        recorders: one a run, for a method that records.
        in_subset: bool [M, N], what each model was trained on.
        models: run -> its models at the method's moments.
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
    prepared: Any = None
    folder: Path | None = None


@dataclass(frozen=True)
class Method:
    """How a score is made.

    Attributes:
        summary: one sentence; what a high score means.
        source: the paper.
        runs: models trained, each with a seed of its own.
        moments: when models are kept: "early" (a tenth of the epochs), "last", or "spread"
            (five moments over the run).
        share: part of the samples that each model is trained on.
        records: whether a Recorder watches each run.
        classes: whether the task has to be a Classification.
        prepare: Whole, options -> tensors, or containers of them, for `observe` or `finish`.
        observe: Shard, options -> [B, ...], a row a sample, independent of the other samples.
        finish: Whole, options -> float64 [N]; without it, what was observed is the score.
        options: names and defaults of what a user may change.
    """

    summary: str
    source: str
    runs: int = 0
    moments: str = "last"
    share: float = 1.0
    records: bool = False
    classes: bool = True
    prepare: Callable[..., Any] | None = None
    observe: Callable[..., Tensor] | None = None
    finish: Callable[..., Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def check_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ScoreError: unknown; the message lists the known ones.
    """
    if name not in METHODS:
        raise ScoreError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def checked_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with those that were given in their place.

    Raises:
        ScoreError: an option that the method does not have, or a value of another type.
    """
    known = dict(check_method(name).options)
    for key, value in given.items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ScoreError(f"method {name!r} has no option {key!r}; {has}")
        expected = type(known[key])
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = isinstance(value, expected) or (expected is float and whole)
        if known[key] is not None and value is not None and not fits:
            raise ScoreError(
                f"option {key!r} of {name!r}: expected {expected.__name__}, got {value!r}"
            )
        known[key] = value
    return known


def _of_logits(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Shard], Tensor]:
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


def _of_models(score: Callable[[Task, nn.Module, Any], Tensor]) -> Callable[[Shard], Tensor]:
    """Mean over runs of a score of (task, model, batch)."""

    def observe(shard: Shard) -> Tensor:
        total = torch.zeros(len(shard.rows), dtype=torch.float64)
        for run in range(shard.num_runs):
            model = shard.models(run)[-1]
            total += torch.cat([score(shard.task, model, batch).cpu() for batch in shard.batches()])
        return total / shard.num_runs

    return observe


def _grand(task: Task, model: nn.Module, batch: Any) -> Tensor:
    from datapruning.scores.gradient import grand  # noqa: PLC0415

    return grand(task, model, batch)


@torch.no_grad()
def _task_loss(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """The task's own loss, so that tasks without classes have a score too."""
    if isinstance(task, Classification) and type(task).loss is Classification.loss:
        return loss(task.logits(model, batch), task.labels(batch))
    return task.loss(model, batch).double()


def _vog(shard: Shard) -> Tensor:
    from datapruning.scores.gradient import vog  # noqa: PLC0415

    total = torch.zeros(len(shard.rows), dtype=torch.float64)
    for run in range(shard.num_runs):
        models = shard.models(run)
        total += torch.cat([vog(shard.task, models, batch).cpu() for batch in shard.batches()])
    return total / shard.num_runs


def _correct(shard: Shard) -> Tensor:
    """bool [B, M]: which of the models get a sample right."""
    right = [(logits.argmax(1) == labels).cpu() for logits, labels in _logits(shard)]
    return torch.stack(right, dim=1)


def _ddd(shard: Shard) -> Tensor:
    return ensemble.ddd(_correct(shard).T)


def _disagreement(shard: Shard) -> Tensor:
    return ensemble.disagreement(logits.softmax(1) for logits, _ in _logits(shard))


def _of_recorders(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mean over runs of a score of the run's Recorder."""

    def finish(whole: Whole, **options: Any) -> Tensor:
        scores = [score(recorder, **options) for recorder in whole.recorders]
        return torch.stack(scores).mean(0)

    return finish


def _dual(recorder: dynamics.Recorder, *, window: int, epochs: int) -> Tensor:
    """DUAL over its first epochs; of a shorter run, over all of it."""
    return dynamics.dual(recorder, window=window, epochs=min(epochs, recorder.num_epochs))


def _of_subsets(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def finish(whole: Whole) -> Tensor:
        assert whole.observed is not None
        assert whole.in_subset is not None
        rows = torch.arange(len(whole.samples))
        correct = whole.observed.T.bool()
        if score is memorization.memorization:
            return score(correct, whole.in_subset)
        return score(correct, whole.in_subset, rows=rows)

    return finish


@torch.no_grad()
def _embedding(shard: Shard) -> Tensor:
    """float32 [B, D] of run 0's last model."""
    model = shard.models(0)[-1]
    return torch.cat(
        [shard.task.embedding(model, batch).float().cpu() for batch in shard.batches()]
    )


def _embed(whole: Whole, *, embedding: str, **_: Any) -> Tensor:
    from datapruning.embeddings import embed  # noqa: PLC0415

    return embed(
        whole.samples,
        embedding,
        seed=whole.seed,
        checkpoint=None if whole.folder is None else whole.folder / "embedding.pt",
        device=whole.device,
    )


def _prototypes_ssl(whole: Whole, *, embedding: str, num_clusters: int | None) -> Tensor:
    from datapruning.scores.prototypes import self_supervised  # noqa: PLC0415

    assert whole.samples.labels is not None
    num_classes = len(whole.samples.labels.unique())
    clusters = num_classes if num_clusters is None else num_clusters
    return self_supervised(whole.prepared, num_clusters=clusters, seed=whole.seed)


def _prototypes_supervised(whole: Whole) -> Tensor:
    from datapruning.scores.prototypes import supervised  # noqa: PLC0415

    assert whole.samples.labels is not None
    return supervised(_observed(whole), whole.samples.labels)


def _semdedup(whole: Whole, *, num_clusters: int) -> Tensor:
    from datapruning.scores.geometry import semdedup  # noqa: PLC0415

    return semdedup(_observed(whole), num_clusters=num_clusters, seed=whole.seed)


def _k_center(whole: Whole) -> Tensor:
    from datapruning.scores.geometry import k_center  # noqa: PLC0415

    return k_center(_observed(whole), seed=whole.seed)


def _embedding_and_el2n(shard: Shard) -> Tensor:
    score = _of_logits(el2n)(shard)
    return torch.cat([_embedding(shard).double(), score[:, None]], dim=1)


def _d2(whole: Whole) -> Tensor:
    from datapruning.scores.geometry import d2  # noqa: PLC0415

    observed = _observed(whole)
    return d2(observed[:, :-1].float(), observed[:, -1])


def _direction(solver: Any) -> Callable[..., Any]:
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


def _gradients(whole: Whole, *, parameters: str) -> Any:
    """Prepares the mean gradient at each checkpoint."""
    from datapruning.scores.influence import mean_gradient  # noqa: PLC0415

    assert whole.models is not None
    return [
        mean_gradient(
            whole.task, model, whole.samples, parameters=_parameter_names(model, parameters)
        )
        for model in whole.models(0)
    ]


def _products(shard: Shard) -> Tensor:
    """⟨∇ℓ_i, direction⟩, summed over the checkpoints where there are several."""
    from datapruning.scores.influence import influence_of  # noqa: PLC0415

    models = shard.models(0)
    directions = shard.prepared if isinstance(shard.prepared, list) else [shard.prepared]
    total = torch.zeros(len(shard.rows), dtype=torch.float64)
    for model, direction in zip(models, directions, strict=True):
        here = {name: part.to(shard.device) for name, part in direction.items()}
        parts = [influence_of(shard.task, model, batch, here) for batch in shard.batches()]
        total += torch.cat(parts)
    return total


def _ekfac(whole: Whole) -> Tensor:
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


def _random(whole: Whole) -> Tensor:
    return torch.rand(len(whole.samples), generator=generator(whole.seed, 0), dtype=torch.float64)


def _influence(solver: str, how: str) -> Method:
    return Method(
        f"Rise of the mean training loss without the sample, H⁻¹ by {how}; high: helps.",
        "Koh and Liang, Understanding Black-box Predictions via Influence Functions (ICML 2017)",
        runs=1,
        classes=False,
        prepare=_direction(solver),
        observe=_products,
        options={"damping": 0.01, "parameters": "head"},
    )


_PAUL = "Paul et al., Deep Learning on a Data Diet (NeurIPS 2021)"
_FELDMAN = "Feldman and Zhang, What Neural Networks Memorize and Why (NeurIPS 2020)"
_SNL = "Sorscher et al., Beyond neural scaling laws (NeurIPS 2022)"

METHODS: dict[str, Method] = {
    "el2n": Method(
        "Norm of the error vector softmax − onehot at an early checkpoint; high: hard.",
        _PAUL,
        runs=1,
        moments="early",
        observe=_of_logits(el2n),
    ),
    "el2n-20": Method(
        "EL2N, mean over 20 independently trained models.",
        _PAUL,
        runs=20,
        moments="early",
        observe=_of_logits(el2n),
    ),
    "grand": Method(
        "Norm of the loss gradient over all parameters at an early checkpoint; high: hard.",
        _PAUL,
        runs=1,
        moments="early",
        classes=False,
        observe=_of_models(_grand),
    ),
    "loss": Method(
        "Loss at the end of training; high: hard.",
        "the usual control",
        runs=1,
        classes=False,
        observe=_of_models(_task_loss),
    ),
    "margin": Method(
        "Largest other probability minus the label's, at the end of training; high: hard.",
        "Scheffer et al., Active Hidden Markov Models (IDA 2001)",
        runs=1,
        observe=_of_logits(margin),
    ),
    "entropy": Method(
        "Entropy of the prediction at the end of training; high: unsure.",
        "Settles, Active Learning Literature Survey (2009)",
        runs=1,
        observe=_of_logits(lambda logits, _: entropy(logits)),
    ),
    "ddd": Method(
        "Share of ten independently trained models that are wrong; high: hard.",
        "Meding et al., Trivial or Impossible (ICLR 2022)",
        runs=10,
        observe=_ddd,
    ),
    "active-learning": Method(
        "Disagreement of ten models, mutual information of prediction and model; high: disputed.",
        "Chitta et al., Training Data Subset Search with Ensemble Active Learning (2021)",
        runs=10,
        observe=_disagreement,
    ),
    "vog": Method(
        "Variance of the input gradient over five checkpoints; high: hard.",
        "Agarwal et al., Estimating Example Difficulty using Variance of Gradients (CVPR 2022)",
        runs=1,
        moments="spread",
        observe=_vog,
    ),
    "forgetting": Method(
        "Times that a sample went from right to wrong; never right is most; high: hard.",
        "Toneva et al., An Empirical Study of Example Forgetting (ICLR 2019)",
        runs=1,
        records=True,
        finish=_of_recorders(dynamics.forgetting),
    ),
    "aum": Method(
        "Minus the mean margin over epochs; high: hard or mislabelled.",
        "Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin (NeurIPS 2020)",
        runs=1,
        records=True,
        finish=_of_recorders(dynamics.aum),
        options={"margin": "logit"},
    ),
    "dyn-unc": Method(
        "Mean over windows of the deviation of the label's probability; high: unsure.",
        "He et al., Large-scale Dataset Pruning with Dynamic Uncertainty (CVPR workshops 2024)",
        runs=1,
        records=True,
        finish=_of_recorders(dynamics.dyn_unc),
        options={"window": 10},
    ),
    "dual": Method(
        "Dynamic uncertainty weighted by difficulty, first 30 epochs; high: hard and unsure.",
        "Cho et al., Lightweight Dataset Pruning without Full Training (ICML 2025)",
        runs=1,
        records=True,
        finish=_of_recorders(_dual),
        options={"window": 10, "epochs": 30},
    ),
    "tdds": Method(
        "Temporal dual-depth score: how unsteadily predictions change; high: unsteady.",
        "Zhang et al., Spanning Training Progress (CVPR 2024)",
        runs=1,
        records=True,
        finish=_of_recorders(dynamics.tdds),
        options={"window": 10, "decay": 0.9},
    ),
    "memorization": Method(
        "How much more often models get a sample right that were trained on it; high: memorized.",
        _FELDMAN,
        runs=40,
        share=0.7,
        observe=_correct,
        finish=_of_subsets(memorization.memorization),
    ),
    "influence-max": Method(
        "Largest change of another training sample's accuracy by this one; high: influential.",
        _FELDMAN,
        runs=40,
        share=0.7,
        observe=_correct,
        finish=_of_subsets(memorization.influence_max),
    ),
    "influence-sum-abs": Method(
        "Sum of absolute changes of the other samples' accuracies; high: influential.",
        _FELDMAN,
        runs=40,
        share=0.7,
        observe=_correct,
        finish=_of_subsets(memorization.influence_sum_abs),
    ),
    "prototypes-ssl": Method(
        "Distance to the nearest k-means centroid of a self-supervised embedding; high: untypical.",
        _SNL,
        prepare=_embed,
        finish=_prototypes_ssl,
        options={"embedding": "simclr", "num_clusters": None},
    ),
    "prototypes-supervised": Method(
        "Distance to the class mean in a trained model's embedding; high: untypical.",
        _SNL,
        runs=1,
        observe=_embedding,
        finish=_prototypes_supervised,
    ),
    "semdedup": Method(
        "One minus the similarity to a kept neighbour in the same cluster; low: a duplicate.",
        "Abbas et al., SemDeDup (2023)",
        runs=1,
        classes=False,
        observe=_embedding,
        finish=_semdedup,
        options={"num_clusters": 10},
    ),
    "d2": Method(
        "EL2N passed on between neighbours of an embedding; high: hard in a hard neighbourhood.",
        "Maharana et al., D² Pruning: Message Passing for Balancing Diversity (ICLR 2024)",
        runs=1,
        observe=_embedding_and_el2n,
        finish=_d2,
    ),
    "k-center": Method(
        "Farthest first in a trained model's embedding; high: chosen early.",
        "Sener and Savarese, Active Learning for CNNs: A Core-Set Approach (ICLR 2018)",
        runs=1,
        classes=False,
        observe=_embedding,
        finish=_k_center,
    ),
    "influence-exact": _influence("exact", "writing out the Hessian"),
    "influence-cg": _influence("cg", "conjugate gradients"),
    "influence-lissa": _influence("lissa", "LiSSA"),
    "influence-ekfac": Method(
        "Rise of the mean training loss without the sample, H⁻¹ by EK-FAC; high: helps.",
        "Grosse et al., Studying Large Language Model Generalization with Influence (2023)",
        runs=1,
        classes=False,
        finish=_ekfac,
    ),
    "tracin": Method(
        "How much training on the sample lowers the mean loss, over five checkpoints; high: helps.",
        "Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent "
        "(NeurIPS 2020)",
        runs=1,
        moments="spread",
        classes=False,
        prepare=_gradients,
        observe=_products,
        options={"parameters": "all"},
    ),
    "random": Method("A random number, the control.", "none", classes=False, finish=_random),
}
