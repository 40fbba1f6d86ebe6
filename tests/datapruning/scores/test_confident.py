"""Confident learning: joints and issues by hand, a plain loop, and planted label noise found."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from datapruning.errors import ScoreError, ScoreWarning
from datapruning.scores.confident import (
    calibrated_joint,
    confident_joint,
    confident_learning,
    label_issues,
    likely_labels,
    self_confidence,
    thresholds,
)
from datapruning.scoring.score import score
from datapruning.scoring.steps import Shard, held_out_probabilities
from datapruning.selection.select import select
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.training.loop import TrainingConfig
from prunelab.training.task import ImageClassification

RULES = ("noise-rate", "class", "both", "confident-joint")
P = torch.tensor(
    [
        [0.80, 0.10, 0.10],
        [0.60, 0.30, 0.10],
        [0.02, 0.61, 0.37],
        [0.32, 0.03, 0.65],
        [0.20, 0.70, 0.10],
        [0.30, 0.50, 0.20],
        [0.10, 0.10, 0.80],
        [0.45, 0.15, 0.40],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])


def named(p: Tensor, labels: Tensor, rule: str) -> list[int]:
    return label_issues(p, labels, prune_by=rule).nonzero()[:, 0].tolist()


def test_joint_by_hand() -> None:
    """Thresholds (.8 + .6 + .02 + .32) / 4, (.7 + .5) / 2 and (.8 + .4) / 2; row 5 reaches none;
    row 7 reaches that of class 0 alone. Label 1 has two samples and one that counts."""
    assert thresholds(P, LABELS).tolist() == pytest.approx([0.435, 0.6, 0.6])
    assert likely_labels(P, LABELS).tolist() == [0, 0, 1, 2, 1, -1, 2, 0]
    counts = confident_joint(P, LABELS)
    assert counts.tolist() == [[2, 1, 1], [0, 1, 0], [1, 0, 1]]
    joint = calibrated_joint(counts, LABELS)
    assert joint.dtype == torch.float64
    assert (8 * joint).flatten().tolist() == pytest.approx([2, 1, 1, 0, 2, 0, 1, 0, 1])


def test_rules_by_hand() -> None:
    """Of label 0 one sample belongs to class 1 and one to class 2. Row 2 has the largest
    p_1 − p_0 (.59) and, before row 3 (.33), the largest p_2 − p_0 (.35): by noise rate it is named
    twice and row 3 not at all. By class the two of lowest p_0 go, rows 2 and 3."""
    assert named(P, LABELS, "noise-rate") == [2, 7]
    assert named(P, LABELS, "class") == [2, 3, 7]
    assert named(P, LABELS, "both") == [2, 7]
    assert named(P, LABELS, "confident-joint") == [2, 3, 7]


def test_samples_that_count_nowhere_are_pruned_at_the_rate_of_those_that_do() -> None:
    """Four more of label 0 that reach no threshold: its 8 are split 4, 2, 2. By class the four of
    lowest p_0 are rows 2, 3, 8 and 10, of which row 10 is likeliest of its own label."""
    more = [[0.41, 0.44, 0.15], [0.425, 0.4, 0.175], [0.42, 0.41, 0.17], [0.426, 0.4, 0.174]]
    p = torch.cat([P, torch.tensor(more, dtype=torch.float64)])
    labels = torch.cat([LABELS, torch.zeros(4, dtype=torch.int64)])
    assert confident_joint(p, labels).tolist() == confident_joint(P, LABELS).tolist()
    assert named(p, labels, "confident-joint") == [2, 3, 7]
    assert named(p, labels, "class") == [2, 3, 7, 8]
    assert named(p, labels, "noise-rate") == [2, 3, 7, 8]


def test_scores_put_issues_above_one() -> None:
    """1 − p_y, and one more for rows 2 and 7."""
    doubt = [0.2, 0.4, 0.98, 0.68, 0.3, 0.5, 0.2, 0.6]
    assert self_confidence(P, LABELS).tolist() == pytest.approx(doubt)
    issues = [0, 0, 1, 0, 0, 0, 0, 1]
    expected = [a + b for a, b in zip(doubt, issues, strict=True)]
    assert confident_learning(P, LABELS).tolist() == pytest.approx(expected)


def test_the_best_of_the_classes_reached_counts_not_the_best_of_all() -> None:
    """Thresholds .9 and .25 (class 0, 1): row 1 is likeliest of class 0, but reaches class 1."""
    p = torch.tensor([[0.98, 0.01, 0.01], [0.82, 0.18, 0.0], [0.7, 0.3, 0.0], [0.8, 0.2, 0.0]])
    assert likely_labels(p, torch.tensor([0, 0, 1, 1])).tolist() == [0, -1, 1, -1]
    assert confident_joint(p, torch.tensor([0, 0, 1, 1])).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0] * 3,
    ]


def test_equal_probabilities_reach_their_mean_and_a_class_never_goes_whole() -> None:
    """3 · .1 / 3 is above .1 in float64. Label 1 counts only as class 0, yet keeps a sample."""
    p = torch.tensor([[0.9, 0.1]] * 6, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert confident_joint(p, labels).tolist() == [[3, 0], [3, 0]]
    joint = calibrated_joint(confident_joint(p, labels), labels)
    assert (6 * joint).flatten().tolist() == pytest.approx([3, 0, 2.25, 0.75])
    for rule in ("noise-rate", "class", "both"):
        assert named(p, labels, rule) == [3, 4]


def plain_issues(p: list[list[float]], labels: list[int], rule: str) -> set[int]:
    """The definitions, sample by sample."""
    rows, classes = range(len(p)), range(len(p[0]))
    own = {c: [i for i in rows if labels[i] == c] for c in classes}
    limits = {c: sum(p[i][c] for i in own[c]) / len(own[c]) for c in classes if own[c]}
    likely = {}
    for i in rows:
        reached = [c for c in limits if p[i][c] >= limits[c] - 1e-9]
        if reached:
            likely[i] = max(reached, key=lambda c: p[i][c])
    by_class: set[int] = set()
    by_rate: set[int] = set()
    for c in limits:
        counts = [sum(1 for i in own[c] if likely.get(i) == other) for other in classes]
        counts[c] = max(counts[c], 1)
        elsewhere = round(len(own[c]) * (sum(counts) - counts[c]) / sum(counts))
        by_class |= set(sorted(own[c], key=lambda i: p[i][c])[:elsewhere])
        for other in set(classes) - {c}:
            wrong = round(len(own[c]) * counts[other] / sum(counts))
            by_rate |= set(sorted(own[c], key=lambda i: p[i][c] - p[i][other])[:wrong])
    found = {
        "class": by_class,
        "noise-rate": by_rate,
        "both": by_class & by_rate,
        "confident-joint": {i for i in likely if likely[i] != labels[i]},
    }[rule]
    return {i for i in found if p[i][labels[i]] < max(p[i])}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.sampled_from(RULES))
def test_issues_equal_a_plain_loop(seed: int, num_classes: int, rule: str) -> None:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (53,), generator=random)
    logits = 2 * torch.randn(53, num_classes, generator=random, dtype=torch.float64)
    logits[torch.arange(53), labels] += 1.5
    p = logits.softmax(1)
    assert set(named(p, labels, rule)) == plain_issues(p.tolist(), labels.tolist(), rule)


def test_refusals() -> None:
    with pytest.raises(ScoreError, match=r"2 of 8 rows are no probabilities \(first: row 1\)"):
        self_confidence(P.index_fill(0, torch.tensor([1, 4]), torch.nan), LABELS)
    with pytest.raises(ScoreError, match="apply softmax to logits"):
        confident_joint(4 * P, LABELS)
    with pytest.raises(ScoreError, match=r"labels lie in 0 \.\.\. 3, but .* 3 classes"):
        thresholds(P, LABELS.clamp(max=1) * 3)
    with pytest.raises(ScoreError, match=r"got \(8, 3\) and \(7,\)"):
        thresholds(P, LABELS[:7])
    with pytest.raises(ScoreError, match="prune_by: expected one of noise-rate, class, both"):
        confident_learning(P, LABELS, prune_by="magic")


class Always(nn.Module):
    """Says the same of every sample."""

    def __init__(self, p: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(p).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def test_models_that_saw_a_sample_have_no_say() -> None:
    """Sample 0 is out of both models, 1 of the second; sample 2 of neither, and has no answer."""
    models = [Always([0.8, 0.2]), Always([0.4, 0.6])]
    samples = ImageSamples(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 1]))
    found = held_out_probabilities(
        Shard(
            samples, ImageClassification(), torch.arange(3), torch.device("cpu"), 2,
            models=lambda run: [models[run]],
            in_subset=lambda: torch.tensor([[False, True, True], [False, False, True]]),
        )
    )  # fmt: skip
    torch.testing.assert_close(found[:2], torch.tensor([[0.6, 0.4], [0.4, 0.6]]).double())
    assert bool(found[2].isnan().all())


def build_mlp(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def test_planted_label_noise_is_found_and_dropped_first() -> None:
    """Forty of four hundred digits mislabelled: the issues are nearly those, and one ranking of
    the table drops exactly the issues."""
    digits = load_dataset("digits", num_train=400)
    is_noisy = torch.zeros(400, dtype=torch.bool)
    is_noisy[::10] = True
    labels = torch.where(is_noisy, (digits.train_labels + 3) % 10, digits.train_labels)
    samples = ImageSamples(digits.train_images, labels)
    training = TrainingConfig(epochs=10, batch_size=32, lr=0.1, weight_decay=0)
    both = score(
        samples,
        method=["self-confidence", "confident-learning"],
        model=build_mlp,
        training=training,
    )
    assert roc_auc_score(is_noisy, both["self-confidence"].scores) >= 0.97
    table = both["confident-learning"]
    issues = table.scores > 1
    assert float(is_noisy[issues].double().mean()) >= 0.8
    assert float(issues[is_noisy].double().mean()) >= 0.8
    kept = select(table, keep=int((~issues).sum()), policy="easiest")
    assert torch.equal(kept.ids, table.ids[~issues])


def test_models_are_shared_with_methods_that_train_more() -> None:
    """memorization's forty models on 70 % of the samples begin with the ten: no bit changes."""
    digits = load_dataset("digits", num_train=40)
    samples = ImageSamples(digits.train_images, digits.train_labels)
    training = TrainingConfig(epochs=1, batch_size=32, lr=0.1)
    names = ["memorization", "self-confidence"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)
        both = score(samples, method=names, model=build_mlp, training=training)
    alone = score(samples, method="self-confidence", model=build_mlp, training=training)
    assert torch.equal(both["self-confidence"].scores, alone.scores)
