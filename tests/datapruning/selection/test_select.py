"""Selection: exact counts, order of rows, seeds, floors, and each policy by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datapruning.errors import ScoreError, SelectionError
from datapruning.selection.policies import POLICIES, Policy, Scored, group_budgets
from datapruning.selection.select import fresh_random, parsed_keep, select
from datapruning.selection.table import ScoreTable

few = settings(max_examples=40)

RANKINGS = ("hardest", "easiest", "moderate", "beta-cut")
CUTS = {"coverage": 0.1, "beta-cut": 0.1, "ccs": 0.0}


def table(
    scores: list[float] | Tensor, labels: list[int] | None = None, ids: list[int] | None = None
) -> ScoreTable:
    values = torch.as_tensor(scores, dtype=torch.float64)
    return ScoreTable(
        ids=torch.arange(len(values)) if ids is None else torch.tensor(ids),
        scores=values,
        method="el2n",
        dataset="made",
        fingerprint="f" * 16,
        seed=0,
        labels=None if labels is None else torch.tensor(labels),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[ScoreTable, int, Tensor]:
    """A table with ties, scattered ids and uneven classes; a count; confidences."""
    n = draw(st.integers(2, 40))
    scores = draw(
        st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 7.0]), min_size=n, max_size=n)
    )
    scores[0], scores[1] = 0.25, 7.0
    labels = draw(st.lists(st.sampled_from([0, 0, 0, 1, 1, 5]), min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(0, 10**6), min_size=n, max_size=n, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    confidence = torch.rand(n, generator=generator, dtype=torch.float64)
    return table(scores, labels, ids), draw(st.integers(1, n)), confidence


# --- every policy --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*POLICIES, "auto"])
@few
@given(problem=problems(), seed=st.integers(0, 5), balanced=st.booleans())
def test_counts_are_exact_and_rows_may_come_in_any_order(
    policy: str, problem: tuple[ScoreTable, int, Tensor], seed: int, balanced: bool
) -> None:
    scores, count, confidence = problem
    arguments = {"policy": policy, "keep": count, "seed": seed, "class_balanced": balanced}
    cut = math.floor(CUTS.get(policy, 0.0) * len(scores))
    if policy in CUTS and (balanced or policy == "ccs" or count > len(scores) - cut):
        # Only a cut may leave too few, and it says so.
        try:
            select(scores, confidence=confidence, **arguments)
        except SelectionError as error:
            message = str(error)
            assert "dropping the hardest" in message
            return
        assert count <= len(scores) - cut
    subset = select(scores, confidence=confidence, **arguments)
    assert len(subset) == count == len(set(subset.ids.tolist()))
    assert set(subset.ids.tolist()) <= set(scores.ids.tolist())
    assert torch.equal(subset.ids, subset.ids.sort().values)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    assert scores.labels is not None
    moved = ScoreTable(
        scores.ids[order], scores.scores[order], "el2n", "made", "f" * 16, 0,
        labels=scores.labels[order],
    )  # fmt: skip
    again = select(moved, confidence=confidence[order], **arguments)
    assert torch.equal(again.ids, subset.ids)


@pytest.mark.parametrize("policy", RANKINGS)
@few
@given(problem=problems(), seed=st.integers(0, 5))
def test_keeping_more_keeps_the_same_and_more(
    policy: str, problem: tuple[ScoreTable, int, Tensor], seed: int
) -> None:
    scores, count, _ = problem
    options = {"cut": 0.0} if policy == "beta-cut" else {}
    kept = [
        set(select(scores, keep=k, policy=policy, seed=seed, **options).ids.tolist())
        for k in range(1, count + 1)
    ]
    assert all(fewer < more for fewer, more in pairwise(kept))


@pytest.mark.parametrize("policy", [*POLICIES])
def test_ties_and_draws_follow_the_seed(policy: str) -> None:
    scores = table([1.0, 2.0, *[1.5] * 60, 3.0, 0.5], [0] * 64)
    confidence = torch.full((64,), 0.5, dtype=torch.float64)
    chosen = {
        seed: tuple(
            select(scores, keep=20, policy=policy, seed=seed, confidence=confidence).ids.tolist()
        )
        for seed in range(6)
    }
    again = select(scores, keep=20, policy=policy, seed=3, confidence=confidence)
    assert tuple(again.ids.tolist()) == chosen[3]
    assert len(set(chosen.values())) == 6
    first = [r for seed in range(6) for r in chosen[seed] if 2 <= r < 62]
    assert len(set(first)) > 40  # and no favourite rows


@given(problem=problems(), floor=st.sampled_from([0.3, 0.5, 1.0]), seed=st.integers(0, 3))
@pytest.mark.parametrize("policy", ["hardest", "easiest", "moderate", "random", "dual-beta"])
def test_no_class_falls_below_its_floor(
    policy: str, problem: tuple[ScoreTable, int, Tensor], floor: float, seed: int
) -> None:
    scores, count, confidence = problem
    subset = select(
        scores, keep=count, policy=policy, seed=seed, class_balanced=True, class_floor=floor,
        confidence=confidence,
    )  # fmt: skip
    label = dict(zip(scores.ids.tolist(), scores.labels.tolist(), strict=True))  # type: ignore[union-attr]
    had, kept = Counter(label.values()), Counter(label[i] for i in subset.ids.tolist())
    for name, size in had.items():
        assert kept[name] >= math.floor(floor * count * size / len(scores) + 1e-9)


@pytest.mark.parametrize("policy", [*POLICIES, "auto"])
def test_scores_whose_range_is_no_number(policy: str) -> None:
    """Refused before any policy takes a difference; as far apart as float64 has it they serve."""
    wide = [4e307, -4e307, *map(float, range(38))]
    confidence = torch.full((40,), 0.5, dtype=torch.float64)
    options = {"policy": policy, "keep": 8, "confidence": confidence}
    if policy == "dual-beta":
        wide[1] = 0.0
    assert len(select(table(wide, [0] * 40), **options)) == 8  # type: ignore[arg-type]
    wide[:2] = [1e308, -1e308]
    if policy == "random":
        assert len(select(table(wide, [0] * 40), **options)) == 8  # type: ignore[arg-type]
    else:
        with pytest.raises(SelectionError, match=r"from -1e\+308 to 1e\+308, and float64 has no"):
            select(table(wide, [0] * 40), **options)  # type: ignore[arg-type]


def test_columns_of_any_type_are_the_same_table() -> None:
    plain = table([1.0, 3.0, 2.0], [0, 1, 0])
    about: tuple[Any, ...] = ("el2n", "made", "f" * 16, 0)
    for ids, scores, labels in (
        (np.arange(3, dtype=np.int32), np.array([1, 3, 2], np.float32), np.array([[0], [1], [0]])),
        ([0, 1, 2], [1, 3, 2], [False, True, False]),
        (torch.arange(3).short(), torch.tensor([1, 3, 2]), torch.tensor([0, 1, 0]).int()),
    ):
        found = ScoreTable(ids, scores, *about, labels=labels)  # type: ignore[arg-type]
        assert found.scores.dtype == torch.float64
        assert torch.equal(found.scores, plain.scores)
        assert select(found, keep=2).ids.tolist() == select(plain, keep=2).ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (([0.0, 1.0], [1, 2], None), "ids are float64; expected whole numbers"),
        (([0, 0], [1, 2], None), "sample id 0 occurs more than once"),
        (([[0, 1]], [1, 2], None), r"ids have shape \(1, 2\); expected one for each"),
        (([0, 1], [1, 2, 3], None), r"2 ids but scores of shape \(3,\)"),
        (([0, 1], ["a", "b"], None), "scores are texts, such as 'a'"),
        (([0, 1], [1j, 2], None), "scores are complex128; expected real numbers"),
        (([0, 1], [1, 2], [0, None]), "labels are object"),
        (([0, 1], [1, 2], [0, -1]), "sample 1 has the label -1"),
        (([0, 1], [1, 2], [0]), r"2 ids but labels of shape \(1,\)"),
    ],
)
def test_columns_that_are_no_table(columns: tuple[Any, Any, Any], words: str) -> None:
    ids, scores, labels = columns
    with pytest.raises(ScoreError, match=words):
        ScoreTable(ids, scores, "el2n", "made", "f" * 16, 0, labels=labels)


def test_floors_by_hand() -> None:
    """Ten samples, five a class, six kept by score, all of the best in class 0.

    Fair share 6 · 5/10 = 3, floor ⌊1.5⌋ = 1: hardest alone would take 5 + 1. At keep 4 it would
    take 4 + 0; the floor gives class 1 its best sample, and class 0 its three best.
    """
    scores = table([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], [0] * 5 + [1] * 5)
    assert select(scores, keep=4).ids.tolist() == [0, 1, 2, 3]
    assert select(scores, keep=4, class_balanced=True).ids.tolist() == [0, 1, 2, 5]
    kept = select(scores, keep=4, class_balanced=True, class_floor=1.0)
    assert kept.ids.tolist() == [0, 1, 5, 6]
    assert kept.provenance["options"] == {"class_floor": 1.0}


@given(problem=problems(), policy=st.sampled_from(["hardest", "random", "coverage"]))
def test_groups_keep_the_same_fraction(
    problem: tuple[ScoreTable, int, Tensor], policy: str
) -> None:
    scores, count, _ = problem
    options = {"cut": 0.0} if policy == "coverage" else {}
    subset = select(scores, keep=count, policy=policy, groups=scores.labels, **options)
    assert len(subset) == count
    group = dict(zip(scores.ids.tolist(), scores.labels.tolist(), strict=True))  # type: ignore[union-attr]
    had, kept = Counter(group.values()), Counter(group[i] for i in subset.ids.tolist())
    for name, size in had.items():
        assert abs(kept[name] - count * size / len(scores)) < 1
        if policy == "hardest":
            mine = [i for i in scores.ids.tolist() if group[i] == name]
            value = dict(zip(scores.ids.tolist(), scores.scores.tolist(), strict=True))
            best = sorted((value[i] for i in mine), reverse=True)[: kept[name]]
            chosen = {i for i in subset.ids.tolist() if group[i] == name}
            assert sorted((value[i] for i in chosen), reverse=True) == best


# --- what chance decides -------------------------------------------------------------------------


def first_ones(scored: Scored, count: int, generator: torch.Generator) -> Tensor:
    """A policy of the user's own, of which nobody knows what ties are to it."""
    return torch.arange(count)


@pytest.mark.parametrize(
    ("policy", "keep", "options", "drawn"),
    [
        ("hardest", 1, {}, 0),
        ("hardest", 3, {}, 2),  # the 9 and two of the fives
        ("hardest", 4, {}, 0),  # the 9 and every five
        ("easiest", 2, {}, 0),
        ("easiest", 3, {}, 1),  # 0, 1 and one five
        ("moderate", 2, {}, 2),  # the median is 5
        ("moderate", 3, {}, 0),
        ("moderate", 4, {}, 1),  # the fives, and one of 1 and 9, both 4 away
        ("beta-cut", 3, {"cut": 0.2}, 0),  # the 9 is dropped
        ("beta-cut", 2, {"cut": 0.4}, 2),  # the 9 is dropped, and a five by chance
        ("random", 3, {}, 0),
        ("coverage", 3, {}, 0),
        (first_ones, 3, {}, 0),
    ],
)
def test_how_many_were_drawn_among_equals(
    policy: str | Policy, keep: int, options: dict[str, float], drawn: int
) -> None:
    """Scores 0, 1, 5, 5, 5, 9."""
    subset = select(table([0, 1, 5, 5, 5, 9]), keep=keep, policy=policy, **options)
    assert subset.provenance["drawn"] == drawn
    notes = [note for note in subset.provenance["notes"] if "drawn" in note]
    assert notes == [
        f"{drawn} of the {keep} kept samples were drawn by chance: others that are not kept have "
        "the same scores"
    ] * bool(drawn)


def test_draws_are_counted_in_every_class_and_group() -> None:
    """Four nines of class 0, four ones of class 1. Floors of ⌊.5 · 4 · 4/8⌋ = 1 give class 1 one
    of its four by chance; three of the four nines fill up. Two groups keep one of two each.
    """
    scores = table([9] * 4 + [1] * 4, [0] * 4 + [1] * 4)
    assert select(scores, keep=4).provenance["drawn"] == 0
    assert select(scores, keep=4, class_balanced=True).provenance["drawn"] == 4
    pairs = table([5, 5, 7, 7])
    assert select(pairs, keep=2, groups=torch.tensor([0, 0, 1, 1])).provenance["drawn"] == 2


def test_most_of_the_hardest_by_forgetting_are_drawn() -> None:
    """63 of 1,437 samples were ever forgotten: of the hardest 719, 656 are any of the others."""
    scores = table([1.0] * 63 + [0.0] * 1374)
    assert select(scores, keep=719).provenance["drawn"] == 656


@pytest.mark.parametrize("policy", RANKINGS)
@few
@given(problem=problems())
def test_nothing_drawn_means_that_the_seed_decides_nothing(
    policy: str, problem: tuple[ScoreTable, int, Tensor]
) -> None:
    """And all that is not drawn is kept whatever the seed."""
    scores, count, _ = problem
    options = {"cut": 0.0} if policy == "beta-cut" else {}
    subsets = [select(scores, keep=count, policy=policy, seed=seed, **options) for seed in range(8)]
    always = set.intersection(*(set(subset.ids.tolist()) for subset in subsets))
    drawn = {subset.provenance["drawn"] for subset in subsets}
    assert len(drawn) == 1
    assert len(always) >= count - min(drawn)


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        *(("0.5", 0.5), (".5", 0.5), ("1.0", 1.0), ("50%", 0.5), (" 50 % ", 0.5), ("100%", 1.0)),
        *(("1", 1), ("700", 700), ("0", 0), ("-3", -3), ("2.5", 2.5)),
    ],
)
def test_a_share_has_a_dot_or_a_percent_sign_and_a_number_has_none(
    text: str, keep: float | int
) -> None:
    found = parsed_keep(text)
    assert (found, type(found)) == (keep, type(keep))


@pytest.mark.parametrize("text", ["", "half", "1e-1", "%", "1,000", "0.5.5", "50%%"])
def test_anything_else_is_refused_with_both_forms(text: str) -> None:
    with pytest.raises(SelectionError, match=r"0.5 or 50%.*samples \(700\)"):
        parsed_keep(text)


# --- each policy by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("hardest", [3, 5, 6]),
        ("easiest", [0, 1, 4]),
        ("moderate", [1, 2, 6]),
        ("beta-cut", [2, 5, 6]),
    ],
)
def test_rankings_by_hand(policy: str, expected: list[int]) -> None:
    """Scores 0, 4, 5, 99, 1, 8, 7: the median is 5, and the three nearest are 5, 4, 7.

    beta-cut with 15 % of seven drops one, the 99.
    """
    scores = table([0, 4, 5, 99, 1, 8, 7])
    options = {"cut": 0.15} if policy == "beta-cut" else {}
    assert select(scores, keep=3, policy=policy, **options).ids.tolist() == expected


def test_the_median_of_an_even_number_is_between_the_middle_two() -> None:
    """0, 1, 10, 12: median 5.5; 1 and 10 are 4.5 away, 0 is 5.5, 12 is 6.5."""
    assert select(table([0, 1, 10, 12]), keep=3, policy="moderate").ids.tolist() == [0, 1, 2]


def test_coverage_takes_its_budget_from_each_group() -> None:
    """The docstring's example: groups of 0, 1, 2, 5, 8, 9 samples give 0, 1, 2, 3, 4, 4."""
    sizes = torch.tensor([9, 0, 5, 1, 8, 2])
    # Group g spans [10 g, 10 g + 10) of a range of 60; 0 and 60 are its ends, both inside.
    values: list[float] = []
    for group, size in enumerate(sizes.tolist()):
        values += [10 * group + 1 + k for k in range(size)]
    values[0], values[-1] = 0.0, 60.0
    scores = table(values)
    for seed in range(5):
        kept = select(scores, keep=14, policy="coverage", seed=seed, cut=0.0, num_groups=6)
        groups = [min(5, int(values[i] // 10)) for i in kept.ids.tolist()]
        assert [groups.count(g) for g in range(6)] == [4, 0, 3, 1, 4, 2]


def test_coverage_drops_the_hardest_first_and_draws_uniformly_in_a_group() -> None:
    scores = table([*range(10), 1000.0])
    counts: Counter[int] = Counter()
    for seed in range(400):
        kept = select(scores, keep=4, policy="coverage", seed=seed, cut=0.1, num_groups=2)
        ids = kept.ids.tolist()
        assert 10 not in ids
        assert sum(i < 5 for i in ids) == 2
        counts.update(ids)
    # Each of ten is in 400 · 2/5 = 160 draws, standard deviation √(400 · .4 · .6) = 9.8.
    assert all(abs(counts[i] - 160) < 45 for i in range(10))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.data())
def test_budgets_are_exact_and_level(sizes: list[int], data: st.DataObject) -> None:
    """As a plain loop over groups by size; and no group gives less than a smaller one."""
    count = data.draw(st.integers(0, sum(sizes)))
    found = group_budgets(torch.tensor(sizes), count).tolist()
    left, to_take, expected = sorted(sizes), count, []
    while left:
        smallest = left.pop(0)
        expected.append(min(smallest, to_take // (len(left) + 1)))
        to_take -= expected[-1]
    assert sum(found) == count
    assert sorted(found) == sorted(expected)
    assert all(0 <= give <= size for give, size in zip(found, sizes, strict=True))
    pairs = sorted(zip(sizes, found, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))


def test_ccs_cuts_nothing_at_half_and_three_tenths_at_a_tenth() -> None:
    scores = table(list(range(100)))
    hardest = {
        keep: max(
            max(select(scores, keep=keep, policy="ccs", seed=s, num_groups=5).ids.tolist())
            for s in range(30)
        )
        for keep in (50, 30, 10, 5)
    }
    # cut: 0, 0.15, 0.3, 0.3.
    assert hardest == {50: 99, 30: 84, 10: 69, 5: 69}


def test_dual_beta_draws_with_the_weights_of_its_formula() -> None:
    """Three samples, one kept: shares of 4,000 draws against score · Beta density.

    N = 3, r = 2/3, all three are among the ten highest: m = (.2 + .5 + .9) / 3 = .5333,
    b = 15 · .4667 · (1 − (2/3)⁴) = 5.617, a = 16 − b = 10.383. Densities are proportional to
    μ^9.383 (1 − μ)^4.617: .2: 9.89e-8, .5: 6.11e-5, .9: 8.97e-6; with the scores the shares are
    .008, .624 and .368.
    """
    confidence = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    scores = table([8.0, 1.0, 4.0])
    weights = [
        8 * 0.2**9.383 * 0.8**4.617,
        0.5**9.383 * 0.5**4.617,
        4 * 0.9**9.383 * 0.1**4.617,
    ]
    shares = [weight / sum(weights) for weight in weights]
    assert shares == pytest.approx([0.008, 0.624, 0.368], abs=5e-4)
    draws = Counter(
        int(select(scores, keep=1, policy="dual-beta", seed=s, confidence=confidence).ids)
        for s in range(4000)
    )
    for row, share in enumerate(shares):
        error = math.sqrt(share * (1 - share) / 4000)
        assert abs(draws[row] / 4000 - share) < 4 * error


def test_a_table_s_own_confidence_is_taken_where_none_is_given(tmp_path: Path) -> None:
    """In the order of its rows; it survives the file, and other policies do not look at it."""
    confidence = torch.tensor([0.1, 0.9, 0.5, math.nan], dtype=torch.float64)
    scores = replace(table([8.0, 1.0, 4.0, 2.0]), confidence=confidence)
    scores.write(tmp_path / "s.parquet")
    read = ScoreTable.read(tmp_path / "s.parquet")
    assert read.confidence is not None
    assert torch.equal(read.confidence, confidence) or bool(read.confidence[3].isnan())
    assert select(read, keep=2).ids.tolist() == [0, 2]
    with pytest.raises(SelectionError, match="outside"):
        select(read, keep=2, policy="dual-beta")
    known = torch.tensor([0.1, 0.9, 0.5, 0.4], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(
        scores, ids=scores.ids[order], scores=scores.scores[order], confidence=known[order]
    )
    for seed in range(5):
        given = select(scores, keep=2, policy="dual-beta", seed=seed, confidence=known)
        own = select(shuffled, keep=2, policy="dual-beta", seed=seed)
        assert own.ids.tolist() == given.ids.tolist()


def test_dual_beta_moves_from_uncertain_to_confident_samples() -> None:
    confidence = torch.linspace(0.01, 0.99, 1000, dtype=torch.float64)
    # DUAL's score is highest for confidences somewhat below a half.
    scores = table(confidence * (1 - confidence) * (1 - confidence))
    means = [
        float(
            confidence[select(scores, keep=k, policy="dual-beta", confidence=confidence).ids].mean()
        )
        for k in (700, 300, 50)
    ]
    assert means[0] < means[1] < means[2]
    assert means[2] > 0.6


def test_auto_says_what_it_took() -> None:
    scores = table(list(range(40)), [0, 1] * 20)
    few = select(scores, keep=0.5, policy="auto")
    assert few.ids.tolist() == list(range(20))
    assert few.policy == "auto"
    assert few.provenance["notes"] == [
        "auto took the easiest samples: 10 a class are kept, fewer than 1000"
    ]
    plenty = select(scores, keep=0.5, policy="auto", plentiful=10)
    assert plenty.ids.tolist() == list(range(20, 40))
    assert plenty.provenance["notes"] == [
        "auto took the hardest samples: 10 a class are kept, at least 10"
    ]


def test_a_policy_of_ones_own_is_checked() -> None:
    def every_other(scored: Scored, count: int, _: torch.Generator) -> Tensor:
        return torch.arange(0, 2 * count, 2)

    subset = select(table(list(range(10))), keep=3, policy=every_other)
    assert (subset.ids.tolist(), subset.policy) == ([0, 2, 4], "every_other")

    def short(scored: Scored, count: int, _: torch.Generator) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    with pytest.raises(
        SelectionError, match="returned 3 samples, 1 of them different; asked for 3"
    ):
        select(table(list(range(10))), keep=3, policy=short)


# --- what is refused, and what is said -----------------------------------------------------------


def test_a_share_is_rounded_to_the_nearest_count() -> None:
    scores = table(list(range(7)))
    assert [len(select(scores, keep=k)) for k in (0.5, 0.35, 0.36, 1.0, 1, 7)] == [4, 2, 3, 7, 1, 7]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "keep = 0: expected 1 to 5"),
        (6, "keep = 6: expected 1 to 5"),
        (0.0, r"no share in \(0, 1\]"),
        (1.5, r"no share in \(0, 1\]"),
        (math.nan, r"no share in \(0, 1\]"),
        (0.05, "less than one sample"),
        (True, "share or a number"),
    ],
)
def test_counts_that_cannot_be_met(keep: float, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(table([1, 2, 3, 4, 5]), keep=keep)


def test_scores_that_rank_nothing_are_refused() -> None:
    broken = table([1.0, math.nan, 2.0, math.inf], ids=[4, 30, 5, 20])
    with pytest.raises(SelectionError, match=r"2 of 4 scores are NaN or infinite.*ids 20, 30"):
        select(broken, keep=2)
    with pytest.raises(SelectionError, match=r'all 4 scores equal 3.*policy="random"'):
        select(table([3.0] * 4), keep=2, policy="moderate")
    assert len(select(broken, keep=2, policy="random")) == 2
    assert len(select(table([3.0] * 4), keep=4)) == 4


def test_a_cut_that_leaves_too_few_is_an_error() -> None:
    with pytest.raises(SelectionError, match=r"19 samples are asked for.*10 % of 20 leaves 18"):
        select(table(list(range(20))), keep=0.95, policy="coverage")
    with pytest.raises(SelectionError, match=r"cut must be a share in \[0, 1\)"):
        select(table(list(range(20))), keep=1, policy="beta-cut", cut=1.0)


def test_arguments_that_do_not_fit() -> None:
    scores = table([1, 2, 3, 4])
    with pytest.raises(SelectionError, match="unknown policy 'best'; known: auto, hardest"):
        select(scores, keep=2, policy="best")
    with pytest.raises(
        SelectionError, match=r"policy coverage has no option groups_; .*cut, num_gr"
    ):
        select(scores, keep=2, policy="coverage", groups_=3)
    with pytest.raises(SelectionError, match="class_balanced needs labels"):
        select(scores, keep=2, class_balanced=True)
    with pytest.raises(SelectionError, match="no labels"):
        select(scores, keep=2, policy="auto")
    with pytest.raises(SelectionError, match="dual-beta needs the mean probability"):
        select(scores, keep=2, policy="dual-beta")
    with pytest.raises(SelectionError, match="confidence holds values outside"):
        select(scores, keep=2, policy="dual-beta", confidence=torch.tensor([0.1, 0.2, 0.3, 1.2]))
    with pytest.raises(SelectionError, match=r"groups of shape \(3,\)"):
        select(scores, keep=2, groups=torch.zeros(3))
    with pytest.raises(SelectionError, match="class_floor must be"):
        select(table([1, 2], [0, 1]), keep=1, class_balanced=True, class_floor=2)
    half = torch.full((4,), 0.5)
    with pytest.raises(SelectionError, match="at least 0"):
        select(table([-1, 2, 3, 4]), keep=2, policy="dual-beta", confidence=half)
    with pytest.raises(SelectionError, match="can draw 2 samples of positive score; asked for 3"):
        select(table([0, 0, 3, 4]), keep=3, policy="dual-beta", confidence=half)
    sure = torch.ones(4, dtype=torch.int64)
    assert len(select(table([1, 2, 3, 4]), keep=2, policy="dual-beta", confidence=sure)) == 2


@pytest.mark.parametrize(
    ("policy", "option", "value", "message"),
    [
        ("dual-beta", "power", "4", "option power of policy dual-beta: expected a number, got '4'"),
        ("dual-beta", "sharpness", math.nan, "expected a number, got nan"),
        ("dual-beta", "sharpness", True, "expected a number, got True"),
        ("coverage", "num_groups", 2.5, "expected a whole number, got 2.5"),
        ("coverage", "cut", [0.1], r"expected a number, got \[0.1\]"),
        ("ccs", "cut", "much", "expected a number, got 'much'"),
        ("beta-cut", "cut", None, "expected a number, got None"),
        ("auto", "plentiful", "many", "option plentiful of policy auto: expected a number"),
    ],
)
def test_options_that_are_no_numbers_are_refused(
    policy: str, option: str, value: object, message: str
) -> None:
    scores = replace(table([1, 2, 3, 4], [0, 0, 1, 1]), confidence=torch.full((4,), 0.5))
    with pytest.raises(SelectionError, match=message):
        select(scores, keep=2, policy=policy, **{option: value})


def test_a_class_or_group_without_a_kept_sample_is_named() -> None:
    scores = table([1, 2, 3, 9, 8, 7, 6, 5], [2, 2, 2, 0, 0, 0, 7, 7])
    subset = select(scores, keep=3)
    assert subset.provenance["notes"] == [
        "no sample of class 2 is kept; the data have 3",
        "no sample of class 7 is kept; the data have 2",
    ]
    by_group = select(scores, keep=2, groups=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    assert "no sample of group 2 is kept; the data have 2" in by_group.provenance["notes"]
    assert (subset.method, subset.num_samples, subset.fingerprint) == ("el2n", 8, "f" * 16)
    assert select(scores, keep=3, policy="random").method == ""


# --- a fresh subset each epoch -------------------------------------------------------------------


@given(st.integers(1, 30), st.data(), st.integers(0, 9))
def test_fresh_random_sees_each_sample_before_it_repeats(
    num_samples: int, data: st.DataObject, seed: int
) -> None:
    count = data.draw(st.integers(1, num_samples))
    rows = fresh_random(num_samples, keep=count, seed=seed)
    whole = num_samples // count
    for shuffle in range(2):
        seen = torch.cat([rows(shuffle * whole + place) for place in range(whole)]).tolist()
        assert len(seen) == len(set(seen)) == whole * count
    assert torch.equal(rows(3), fresh_random(num_samples, keep=count, seed=seed)(3))


def test_fresh_random_differs_by_epoch_and_seed_and_feeds_training() -> None:
    rows = fresh_random(100, keep=0.3, seed=1)
    drawn = {tuple(rows(epoch).tolist()) for epoch in range(9)}
    assert len(drawn) == 9
    assert tuple(fresh_random(100, keep=0.3, seed=2)(0).tolist()) not in drawn
    with pytest.raises(SelectionError, match="expected 1 to 100"):
        fresh_random(100, keep=101, seed=0)


def test_what_is_shown_is_a_line() -> None:
    scored = table(torch.arange(2000.0))
    assert repr(scored) == "<ScoreTable: el2n of 2,000 samples of made>"
    kept = scored.select(keep=0.5, policy="hardest")
    assert repr(kept) == "<Subset: 1,000 of 2,000 samples of made, hardest by el2n>"
