"""The scoring methods by name: what each trains and records, and the pure function that scores.

A method has up to four steps. Models are trained (`runs` of them, kept at some `moments`);
something is prepared once from all samples; every shard of samples is observed on its own; and
what was observed is finished into one score a sample. Steps that a method does not name are
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from datapruning.errors import ScoreError
from datapruning.scores import confident, dynamics, memorization
from datapruning.scores.error import el2n, entropy, margin
from datapruning.scoring import steps
from prunelab.errors import close_names

NUM_MOMENTS = 5
"""Checkpoints of a run that "spread" keeps, evenly over its epochs."""


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
        package: an optional one that it computes with; asked for before anything is trained.
        name: of a method that is not in METHODS.
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
    package: str = ""
    name: str = ""


Score = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, C], labels [B]) -> scores [B], high for keep."""


def named_methods(
    given: str | Method | Score | Iterable[str | Method | Score],
) -> dict[str, Method]:
    """Methods by name: those of METHODS, and objects by the name that they have.

    A function becomes a method that scores by one model at the end of its training.

    Raises:
        ScoreError: none, an unknown name, or a method without a name.
    """
    if isinstance(given, str | Method) or callable(given):
        given = [given]
    found = {}
    for one in given:
        if isinstance(one, str):
            found[one] = check_method(one)
            continue
        method = one if isinstance(one, Method) else _of_function(one)
        if not method.name:
            raise ScoreError('a Method of your own needs a name: Method(..., name="mine")')
        if METHODS.get(method.name, method) is not method:
            raise ScoreError(f"there is a method {method.name!r} already; take another name")
        found[method.name] = method
    if not found:
        raise ScoreError(f"no method given; known methods: {', '.join(METHODS)}")
    return found


def _of_function(score: Score) -> Method:
    name = getattr(score, "__name__", type(score).__name__)
    summary = (getattr(score, "__doc__", None) or "").strip().partition("\n")[0]
    return Method(summary, "a function", runs=1, observe=steps.of_logits(score), name=name)


def check_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ScoreError: unknown; the message lists the known ones.
    """
    if name not in METHODS:
        raise ScoreError(
            f"unknown method {name!r}; known methods: {', '.join(METHODS)}"
            f"{close_names(name, METHODS)}"
        )
    return METHODS[name]


def checked_options(name: str, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with those that were given in their place.

    Raises:
        ScoreError: an option that the method does not have, or a value of another type.
    """
    known = dict(method.options)
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


def _influence(solver: str, how: str) -> Method:
    return Method(
        f"Rise of the mean training loss without the sample, H⁻¹ by {how}; high: helps.",
        "Koh and Liang, Understanding Black-box Predictions via Influence Functions (ICML 2017)",
        runs=1,
        classes=False,
        prepare=steps.direction(solver),
        observe=steps.products,
        options={"damping": 0.01, "parameters": "head"},
    )


_NORTHCUTT = (
    "Northcutt et al., Confident Learning: Estimating Uncertainty in Dataset Labels (JAIR 2021)"
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
        observe=steps.of_logits(el2n),
    ),
    "el2n-20": Method(
        "EL2N, mean over 20 independently trained models.",
        _PAUL,
        runs=20,
        moments="early",
        observe=steps.of_logits(el2n),
    ),
    "grand": Method(
        "Norm of the loss gradient over all parameters at an early checkpoint; high: hard.",
        _PAUL,
        runs=1,
        moments="early",
        classes=False,
        observe=steps.of_models(steps.grand_of),
    ),
    "loss": Method(
        "Loss at the end of training; high: hard.",
        "the usual control",
        runs=1,
        classes=False,
        observe=steps.of_models(steps.task_loss),
    ),
    "margin": Method(
        "Largest other probability minus the label's, at the end of training; high: hard.",
        "Scheffer et al., Active Hidden Markov Models (IDA 2001)",
        runs=1,
        observe=steps.of_logits(margin),
    ),
    "entropy": Method(
        "Entropy of the prediction at the end of training; high: unsure.",
        "Settles, Active Learning Literature Survey (2009)",
        runs=1,
        observe=steps.of_logits(lambda logits, _: entropy(logits)),
    ),
    "ddd": Method(
        "Share of ten independently trained models that are wrong; high: hard.",
        "Meding et al., Trivial or Impossible (ICLR 2022)",
        runs=10,
        observe=steps.ddd_of,
    ),
    "active-learning": Method(
        "Disagreement of ten models, mutual information of prediction and model; high: disputed.",
        "Chitta et al., Training Data Subset Search with Ensemble Active Learning (2021)",
        runs=10,
        observe=steps.disagreement_of,
    ),
    "vog": Method(
        "Variance of the input gradient over five checkpoints; high: hard.",
        "Agarwal et al., Estimating Example Difficulty using Variance of Gradients (CVPR 2022)",
        runs=1,
        moments="spread",
        observe=steps.of_runs(steps.vog_of),
    ),
    "forgetting": Method(
        "Times that a sample went from right to wrong; never right is most; high: hard.",
        "Toneva et al., An Empirical Study of Example Forgetting (ICLR 2019)",
        runs=1,
        records=True,
        finish=steps.of_recorders(dynamics.forgetting),
    ),
    "aum": Method(
        "Minus the mean margin over epochs; high: hard or mislabelled.",
        "Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin (NeurIPS 2020)",
        runs=1,
        records=True,
        finish=steps.of_recorders(dynamics.aum),
        options={"margin": "logit"},
    ),
    "dyn-unc": Method(
        "Mean over windows of the deviation of the label's probability; high: unsure.",
        "He et al., Large-scale Dataset Pruning with Dynamic Uncertainty (CVPR workshops 2024)",
        runs=1,
        records=True,
        finish=steps.of_recorders(dynamics.dyn_unc),
        options={"window": 10},
    ),
    "dual": Method(
        "Dynamic uncertainty weighted by difficulty, first 30 epochs; high: hard and unsure.",
        "Cho et al., Lightweight Dataset Pruning without Full Training (ICML 2025)",
        runs=1,
        records=True,
        finish=steps.of_recorders(steps.dual_of),
        options={"window": 10, "epochs": 30},
    ),
    "tdds": Method(
        "Temporal dual-depth score: how unsteadily predictions change; high: unsteady.",
        "Zhang et al., Spanning Training Progress (CVPR 2024)",
        runs=1,
        records=True,
        finish=steps.of_recorders(dynamics.tdds),
        options={"window": 10, "decay": 0.9},
    ),
    "memorization": Method(
        "How much more often models get a sample right that were trained on it; high: memorized.",
        _FELDMAN,
        runs=40,
        share=0.7,
        observe=steps.correct_by_model,
        finish=steps.of_subsets(memorization.memorization),
    ),
    "influence-max": Method(
        "Largest change of another training sample's accuracy by this one; high: influential.",
        _FELDMAN,
        runs=40,
        share=0.7,
        observe=steps.correct_by_model,
        finish=steps.of_subsets(memorization.influence_max),
    ),
    "influence-sum-abs": Method(
        "Sum of absolute changes of the other samples' accuracies; high: influential.",
        _FELDMAN,
        runs=40,
        share=0.7,
        observe=steps.correct_by_model,
        finish=steps.of_subsets(memorization.influence_sum_abs),
    ),
    "self-confidence": Method(
        "How far models not trained on a sample doubt its label, 1 − p_y; high: mislabelled.",
        _NORTHCUTT,
        runs=10,
        share=0.7,
        observe=steps.held_out_probabilities,
        finish=steps.of_held_out(confident.self_confidence),
    ),
    "confident-learning": Method(
        "Self-confidence, above 1 for labels that the confident joint finds wrong; high: "
        "mislabelled.",
        _NORTHCUTT,
        runs=10,
        share=0.7,
        observe=steps.held_out_probabilities,
        finish=steps.of_held_out(confident.confident_learning),
        options={"prune_by": "noise-rate"},
    ),
    "prototypes-ssl": Method(
        "Distance to the nearest k-means centroid of a self-supervised embedding; high: untypical.",
        _SNL,
        prepare=steps.embed_all,
        finish=steps.prototypes_ssl,
        options={"embedding": "simclr", "num_clusters": None},
    ),
    "prototypes-supervised": Method(
        "Distance to the class mean in a trained model's embedding; high: untypical.",
        _SNL,
        runs=1,
        observe=steps.embedding_of,
        finish=steps.prototypes_supervised,
    ),
    "semdedup": Method(
        "One minus the similarity to a kept neighbour in the same cluster; low: a duplicate.",
        "Abbas et al., SemDeDup (2023)",
        runs=1,
        classes=False,
        observe=steps.embedding_of,
        finish=steps.semdedup_scores,
        options={"num_clusters": 10},
    ),
    "d2": Method(
        "EL2N passed on between neighbours of an embedding; high: hard in a hard neighbourhood.",
        "Maharana et al., D² Pruning: Message Passing for Balancing Diversity (ICLR 2024)",
        runs=1,
        observe=steps.embedding_and_el2n,
        finish=steps.d2_order,
    ),
    "k-center": Method(
        "Farthest first in a trained model's embedding; high: chosen early.",
        "Sener and Savarese, Active Learning for CNNs: A Core-Set Approach (ICLR 2018)",
        runs=1,
        classes=False,
        observe=steps.embedding_of,
        finish=steps.k_center_order,
    ),
    "influence-exact": _influence("exact", "writing out the Hessian"),
    "influence-cg": _influence("cg", "conjugate gradients"),
    "influence-lissa": _influence("lissa", "LiSSA"),
    "influence-ekfac": Method(
        "Rise of the mean training loss without the sample, H⁻¹ by EK-FAC; high: helps.",
        "Grosse et al., Studying Large Language Model Generalization with Influence (2023)",
        runs=1,
        classes=False,
        finish=steps.ekfac_scores,
        package="kronfluence",
    ),
    "tracin": Method(
        "How much training on the sample lowers the mean loss, over five checkpoints; high: helps.",
        "Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent "
        "(NeurIPS 2020)",
        runs=1,
        moments="spread",
        classes=False,
        prepare=steps.gradients,
        observe=steps.products,
        options={"parameters": "all"},
    ),
    "random": Method(
        "A random number, the control.", "none", classes=False, finish=steps.random_scores
    ),
}
