"""The page of the DEALRec experiment, from its cells' results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunelab.pages.units import mean_and_spread
from simulations import page as markdown

SCORES = {
    "full": (),
    "random": (),
    "influence": ("influence",),
    "effort": ("effort",),
    "dealrec": ("influence", "effort"),
    "grand": ("grand",),
    "el2n": ("el2n",),
    "ccs": ("el2n",),
}
"""Arm -> scores whose time it pays."""

NAMES = {
    "full": "all samples",
    "random": "random",
    "influence": "influence alone, coverage",
    "effort": "effort alone, coverage",
    "dealrec": "**DEALRec**: both, coverage",
    "grand": "GraNd, early, hardest",
    "el2n": "EL2N of the answer, early, hardest",
    "ccs": "EL2N of the answer, early, CCS",
}
GROWING = ("dealrec", "random")
"""Arms that are tried at larger fractions too."""

QUALITY = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
METRICS = ("R@10", "NDCG@10", "R@20", "NDCG@20")

Results = dict[tuple[str, str, int], dict[str, Any]]
"""(arm, budget, seed) -> what the cell found, with `total_seconds`."""


def page(
    out: Path,
    seeds: Sequence[int],
    *,
    settings: Mapping[str, Any],
    fractions: Sequence[float],
    pool: int,
    questions: int,
    references: Mapping[str, Mapping[str, float]],
    command: str,
) -> str:
    """The whole page in Markdown."""
    results = read_results(out, seeds)
    commits = ", ".join(sorted({str(cell["commit"]) for cell in results.values()}))
    kept = int(results["random", "steps", seeds[0]]["num_samples"])
    notes = [
        "seconds of processor time on a CPU, of the clock on a GPU",
        f"{pool} training samples in the pool, {kept} of them kept by every method but the "
        f"first; {questions} test users, all items ranked, ties against the recommender",
        f"mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}; quality "
        f"times 100; one user found or missed at 10 is {100 / questions:.3f} of recall@10",
        "test items are used once, for this table; nothing was tuned on them or on anything else",
        "`test loss`: mean loss of the tokens of the first test title, which has far less noise "
        "than the rankings",
        "`total` counts scoring (training of the surrogate and of the early checkpoint "
        "included) and fine-tuning; a model from scratch has learned the titles of all items "
        "before, which every method shares and no time here includes",
    ]
    body: list[str] = []
    for budget, title in (
        ("steps", "Equal optimiser steps: as many as one run on all samples has"),
        ("epochs", "Equal epochs: as many passes over the kept samples"),
    ):
        body += [f"## {title}", "", *_table(results, seeds, budget), ""]
    body += ["For comparison, on the same test users:", "", *_references(references), ""]
    body += ["## How many samples it takes", "", *_growing(out, results, seeds, fractions), ""]
    body += ["## The claims", "", *_claims(results, seeds)]
    return markdown.page(
        "DEALRec on Amazon Games",
        command=f"python -m simulations.dealrec_games --data FOLDER {command}",
        at=commits,
        used=", one thread",
        notes=notes,
        body=body,
        settings=settings,
    )


def read_results(out: Path, seeds: Sequence[int]) -> Results:
    """Every cell; the run on all samples counts for both budgets."""
    results: Results = {}
    for seed in seeds:
        folder = out / f"s{seed}"
        scoring = {
            name: _read(folder / f"score-{name}")["seconds"]
            for name in ("influence", "effort", "grand", "el2n")
        }
        for arm, paid in SCORES.items():
            for budget in ("steps", "epochs"):
                cell = _read(folder / f"{arm}-{'steps' if arm == 'full' else budget}")
                cell["scoring_seconds"] = sum(scoring[name] for name in paid)
                cell["total_seconds"] = cell["scoring_seconds"] + cell["finetune_seconds"]
                results[arm, budget, seed] = cell
    return results


def _table(results: Results, seeds: Sequence[int], budget: str) -> list[str]:
    header = [
        *("samples", *METRICS, "test loss", "steps", "scoring, s", "fine-tuning, s"),
        "total of all samples'",
    ]
    rows = []
    full = _mean(results, "full", budget, seeds, "total_seconds")
    for arm in SCORES:
        cells = [results[arm, budget, seed] for seed in seeds]
        quality = [mean_and_spread((c[name] for c in cells), scale=100) for name in QUALITY]
        loss = mean_and_spread((cell["test_loss"] for cell in cells), ".3f")
        numbers = [
            _mean(results, arm, budget, seeds, name)
            for name in ("steps", "scoring_seconds", "finetune_seconds", "total_seconds")
        ]
        costs = [f"{numbers[0]:.0f}", f"{numbers[1]:.0f}", f"{numbers[2]:.1f}"]
        rows.append([NAMES[arm], *quality, loss, *costs, f"{100 * numbers[3] / full:.0f} %"])
    return [markdown.table(header, rows)]


def _growing(
    out: Path, results: Results, seeds: Sequence[int], fractions: Sequence[float]
) -> list[str]:
    """Test losses at growing fractions, at equal steps, and from which one all samples are met."""
    full = [results["full", "steps", seed]["test_loss"] for seed in seeds]
    header, rows = ["kept"], []
    for arm in GROWING:
        header += [NAMES[arm], "minus all samples"]
    met: dict[str, float] = {}
    for fraction in fractions:
        row = [f"{fraction:g}"]
        for arm in GROWING:
            losses = [
                _read(out / f"s{seed}" / f"{arm}-{fraction:g}")["test_loss"] for seed in seeds
            ]
            over = [loss - other for loss, other in zip(losses, full, strict=True)]
            row += [mean_and_spread(losses, ".3f"), mean_and_spread(over, "+.3f")]
            if statistics.mean(over) <= 0:
                met.setdefault(arm, fraction)
        rows.append(row)
    title = "Test loss at equal steps, and minus that of all samples, paired by seed:"
    lines = [title, "", markdown.table(header, rows, words=()), ""]
    for arm in GROWING:
        where = f"from {met[arm]:g} on" if arm in met else "at none of these fractions"
        lines.append(f"- {NAMES[arm]}: a mean loss of at most that of all samples {where}.")
    return lines


def _references(references: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [
        [name, *(f"{100 * found[metric]:.2f}" for metric in QUALITY)]
        for name, found in references.items()
    ]
    return [markdown.table(["", *METRICS], rows)]


def _claims(results: Results, seeds: Sequence[int]) -> list[str]:
    """Each claim with the difference paired by seed, and whether its sign is the paper's."""
    lines = []
    for budget in ("steps", "epochs"):
        for other, claim in (
            ("full", "DEALRec is at least as good as all samples"),
            ("random", "DEALRec is better than random"),
        ):
            found = []
            for metric, sign in (("recall@10", 1), ("ndcg@10", 1), ("test_loss", -1)):
                pairs = [
                    sign
                    * (
                        results["dealrec", budget, seed][metric]
                        - results[other, budget, seed][metric]
                    )
                    for seed in seeds
                ]
                scale = 1 if metric == "test_loss" else 100
                name = "minus test loss" if sign < 0 else metric
                won = sum(pair > 0 for pair in pairs)
                mean = mean_and_spread(pairs, "+.3f", scale=scale)
                found.append(f"{name} {mean}, {won} of {len(pairs)} seeds")
            lines.append(f"- {claim} (equal {budget}): {'; '.join(found)}.")
        for arm in ("dealrec", "random"):
            share = _mean(results, arm, budget, seeds, "total_seconds") / _mean(
                results, "full", budget, seeds, "total_seconds"
            )
            lines.append(
                f"- Time saved by {arm} (equal {budget}, scoring included): "
                f"{100 * (1 - share):+.0f} %."
            )
    return lines


def _mean(results: Results, arm: str, budget: str, seeds: Sequence[int], name: str) -> float:
    return statistics.mean(results[arm, budget, seed][name] for seed in seeds)


def _read(cell: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cell / "result.json").read_text(encoding="utf-8"))
    return found
