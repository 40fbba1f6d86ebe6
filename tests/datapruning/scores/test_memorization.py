"""The subset estimator: counts by hand, a plain loop, and planted label noise found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from datapruning.errors import ScoreError
from datapruning.scores.memorization import (
    influence_max,
    influence_sum_abs,
    memorization,
    outcomes,
    subsets,
)
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.training.loop import TrainingConfig
from prunelab.training.task import ImageClassification


def bools(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows).bool()


def test_memorization_by_hand() -> None:
    """Sample 0: in models 0, 1 (right, right), out of 2, 3 (right, wrong): 1 − 1/2. Sample 1: in
    model 0 (wrong), out of the others (2 of 3 right): 0 − 2/3. Sample 2 was in every subset."""
    in_subset = bools([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1]])
    correct = bools([[1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 1]])
    found = memorization(correct, in_subset)
    assert found.dtype == torch.float64
    assert found[:2].tolist() == pytest.approx([0.5, -2 / 3])
    assert bool(found[2].isnan())


def test_influence_by_hand() -> None:
    """Sample 0 in models 0, 1; two held-out samples, right in 1 1 0 0 and 0 1 1 1: influences
    1 − 0 and 1/2 − 1: the largest 1, the sum of absolute values 1.5."""
    in_subset, correct = bools([[1], [1], [0], [0]]), bools([[1, 0], [1, 1], [0, 1], [0, 1]])
    assert influence_max(correct, in_subset).tolist() == [1.0]
    assert influence_sum_abs(correct, in_subset).tolist() == [1.5]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 5, 300]), st.booleans())
def test_influence_equals_a_plain_loop(seed: int, num_samples: int, among_themselves: bool) -> None:
    """Over blocks of rows; on the samples themselves each leaves itself out."""
    random = torch.Generator().manual_seed(seed)
    in_subset = torch.rand(9, num_samples, generator=random) < 0.7
    rows = torch.randperm(num_samples, generator=random)[:4] if among_themselves else None
    correct = torch.rand(9, 4 if rows is None else len(rows), generator=random) < 0.5
    largest = influence_max(correct, in_subset, rows=rows)
    total = influence_sum_abs(correct, in_subset, rows=rows)
    for i in range(0, num_samples, 37):
        inside = in_subset[:, i]
        if bool(inside.all()) or not bool(inside.any()):
            assert bool(largest[i].isnan())
            assert bool(total[i].isnan())
            continue
        influences = [
            float(correct[inside, j].double().mean() - correct[~inside, j].double().mean())
            for j in range(correct.shape[1])
            if rows is None or rows[j] != i
        ]
        assert float(largest[i]) == pytest.approx(max(influences, default=float("-inf")))
        assert float(total[i]) == pytest.approx(sum(abs(x) for x in influences))


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 60), st.integers(4, 20), st.floats(0.3, 0.7), st.integers(0, 50))
def test_subsets_are_exact_and_leave_everybody_out_equally(
    num_samples: int, num_models: int, share: float, seed: int
) -> None:
    drawn = list(subsets(num_samples, share=share, num_models=num_models, seed=seed))
    counts = torch.zeros(num_samples, dtype=torch.int64)
    for rows in drawn:
        assert len(rows) == round(share * num_samples)
        assert rows.tolist() == sorted(set(rows.tolist()))
        counts[rows] += 1
    assert len(drawn) == num_models
    assert int(counts.max() - counts.min()) <= 1
    assert 0 < int(counts.min()) <= int(counts.max()) < num_models
    again = subsets(num_samples, share=share, num_models=num_models, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_subsets_are_not_blocks() -> None:
    """Pairs are left out together about as often as independent draws would have it."""
    together, trials = 0, 300
    for seed in range(trials):
        for rows in subsets(10, share=0.7, num_models=10, seed=seed):
            together += int(0 not in rows and 1 not in rows)
    # 3 of 10 left out: both with probability 3/10 · 2/9.
    assert together / (10 * trials) == pytest.approx(3 * 2 / 90, abs=0.015)


def test_refusals() -> None:
    with pytest.raises(ScoreError, match="train at least 4"):
        next(subsets(10, share=0.7, num_models=3, seed=0))
    with pytest.raises(ScoreError, match="train at least 5"):
        next(subsets(10, share=0.2, num_models=4, seed=0))
    for share in (0.0, 1.0):
        with pytest.raises(ScoreError, match=f"a share of {share:g} of 10 samples"):
            next(subsets(10, share=share, num_models=9, seed=0))
    table = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ScoreError, match="needs both of the same samples"):
        memorization(table[:, :2], table)
    with pytest.raises(ScoreError, match=r"correct must be bool .* got torch.float32"):
        memorization(table.float(), table)
    with pytest.raises(ScoreError, match="correct is of 2 models, in_subset of 3"):
        influence_max(table[:2], table)
    with pytest.raises(ScoreError, match="4 evaluated samples but 2 rows"):
        influence_sum_abs(table, table, rows=torch.arange(2))


def noisy_digits(num: int, num_noisy: int) -> tuple[ImageSamples, Tensor]:
    """Training digits of which the first few, in a random order, have another label."""
    digits = load_dataset("digits", num_train=num)
    noisy = torch.zeros(num, dtype=torch.bool)
    random = torch.Generator().manual_seed(0)
    noisy[torch.randperm(num, generator=random)[:num_noisy]] = True
    shift = torch.randint(1, 10, (num,), generator=random)
    labels = torch.where(noisy, (digits.train_labels + shift) % 10, digits.train_labels)
    return ImageSamples(digits.train_images, labels), noisy


def build_mlp(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def test_memorization_finds_planted_label_noise() -> None:
    """Sixteen small networks on 70 % of 400 digits, a tenth of them mislabelled."""
    samples, noisy = noisy_digits(400, 40)
    config = TrainingConfig(epochs=20, batch_size=32, lr=0.1, weight_decay=0)
    found = list(
        outcomes(build_mlp, samples, ImageClassification(), config=config, num_models=16, seed=0)
    )
    in_subset = torch.stack([outcome.in_subset for outcome in found])
    correct = torch.stack([outcome.correct for outcome in found])
    scores = memorization(correct, in_subset)
    assert bool(scores.isfinite().all())
    assert roc_auc_score(noisy.numpy(), scores.numpy()) >= 0.95
    # Most of the fit to wrong labels is gone as soon as they are left out.
    assert float(scores[noisy].mean()) > 0.7
    assert float(scores[~noisy].mean()) < 0.2


def test_outcomes_hold_samples_out() -> None:
    samples, _ = noisy_digits(60, 0)
    held_out = torch.arange(0, 60, 3)
    config = TrainingConfig(epochs=1, lr=0.05)
    for outcome in outcomes(
        build_mlp, samples, ImageClassification(),
        config=config, num_models=4, seed=0, held_out=held_out,
    ):  # fmt: skip
        assert not bool(outcome.in_subset[held_out].any())
        assert int(outcome.in_subset.sum()) == 28  # 70 % of the other 40
