"""What training on the choice of each score is worth: the ten of Sorscher et al. and later ones.

    python -m simulations.ten_metrics [--preset fashion]

Every score keeps its hardest samples and its easiest, at several fractions; then policies that
were made for a score, a new random subset for each epoch, and a random one with a teacher. Each
kept set is trained on at equal epochs and at equal optimiser steps. `small` takes minutes;
`fashion` hours of a core, in pieces that are kept; `cifar10` wants a GPU.
"""

from __future__ import annotations

from prunelab.pages.units import mean_and_spread
from simulations.kept import call
from simulations.kept.grid import FRESH, RANDOM, Choice, Plan, Setting
from simulations.kept.steps import Found
from simulations.kept.tables import accuracy_table, difference, share, told, verdict
from simulations.page import table

TEN = (
    "el2n",
    "el2n-20",
    "forgetting",
    "memorization",
    "influence-max",
    "influence-sum-abs",
    "ddd",
    "active-learning",
    "prototypes-supervised",
    "prototypes-ssl",
)
LATER = ("grand", "aum", "dyn-unc", "dual", "tdds")
POLICIES = (
    Choice("aum", "ccs"),
    Choice("dual", "dual-beta"),
    Choice("d2"),
    Choice("prototypes-supervised", "moderate"),
)
BOTH = tuple(Choice(name, end) for name in (*TEN, *LATER) for end in ("hardest", "easiest"))
KEPT = (0.1, 0.3, 0.5, 0.7, 0.9)

PRESETS = {
    "small": Plan(
        Setting("digits", 700, None, "resnet8", 8, 64, score_epochs=8, window=4, runs=8),
        (RANDOM, FRESH, *BOTH, *POLICIES), (0.2, 0.5, 0.8), teachers=("resnet8",),
    ),
    "fashion": Plan(
        Setting(
            "fashion-mnist", 10_000, None, "resnet8", 8, 64, score_epochs=8, window=4,
            embedding="simclr",
        ),
        (RANDOM, FRESH, *BOTH, *POLICIES), KEPT, teachers=("resnet8",),
    ),
    "cifar10": Plan(
        Setting(
            "cifar10", None, None, "resnet18", 100, 128, augment=True, device="cuda",
            score_epochs=30, embedding="simclr",
        ),
        (RANDOM, FRESH, *BOTH, *POLICIES), KEPT, teachers=("resnet18",),
        notes=(
            "published, resnet18 at 30 and 10 % kept: DUAL with Beta sampling 93.0 and 87.1, CCS "
            "93.0 and 86.2, random 90.5 and 83.7",
        ),
    ),
}  # fmt: skip


def body(found: Found) -> list[str]:
    """The tables of the page."""
    lines = [
        "Kept are the hardest or the easiest samples by each score, or what a policy takes. "
        f"prototypes-ssl works in the space of {found.plan.setting.embedding}; pca is a control, "
        "nothing learned."
    ]
    for budget in found.plan.budgets:
        lines += ["", f"## Equal {budget}", "", accuracy_table(found, budget), ""]
        lines += ["Best choices, without a teacher, less random:", "", best_table(found, budget)]
        lines += ["", "Points over random:", "", gain_table(found, budget)]
    return lines


def best_table(found: Found, budget: str) -> str:
    """At each kept share the choice of the highest mean, what it gains, and what a teacher does.

    The best of many by the same runs flatters: its interval says nothing of the choice.
    """
    plan, rows = found.plan, []
    for keep in plan.kept:
        means = {
            choice: sum(values) / len(values)
            for choice in plan.choices
            if choice != RANDOM
            and (values := list(found.accuracies(choice, keep, budget).values()))
        }
        if not means:
            continue
        best = max(means, key=lambda choice: means[choice])
        ours = found.accuracies(best, keep, budget)
        plain = found.accuracies(RANDOM, keep, budget)
        gain = difference(ours, plain)
        row = [share(keep), best.label, mean_and_spread(ours.values()), told(gain), verdict(gain)]
        taught = found.accuracies(RANDOM, keep, budget, teacher=plan.teachers[0])
        rows.append([*row, told(difference(taught, plain)), told(difference(taught, ours))])
    header = ["kept", "best", "accuracy", "less random", "above random", "random + KD less random",
              "random + KD less best"]  # fmt: skip
    return table(header, rows, words=(0, 1, 4))


def gain_table(found: Found, budget: str) -> str:
    """Each choice's distance to random, paired by seed."""
    plan = found.plan
    rows = [
        [
            choice.label,
            *(
                told(
                    difference(
                        found.accuracies(choice, keep, budget),
                        found.accuracies(RANDOM, keep, budget),
                    )
                )
                for keep in plan.kept
            ),
        ]
        for choice in plan.choices
        if choice != RANDOM
    ]
    return table(["kept set", *map(share, plan.kept)], rows)


def main() -> None:
    """Command line."""
    call.main("ten_metrics", "Scores of data pruning against random", PRESETS, body)


if __name__ == "__main__":
    main()
