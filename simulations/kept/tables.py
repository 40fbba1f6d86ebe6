"""What a grid's results say: accuracies, paired differences with intervals, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunelab.pages.units import mean_and_spread
from simulations.jobs import FINISHED
from simulations.kept.grid import ALL, distilled_with
from simulations.kept.steps import Found
from simulations.page import commits_of, page, table, without_paths
from simulations.statistics import Interval, interval, seeds_needed

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


def share(keep: float) -> str:
    """A kept share as tables have it.

    >>> share(0.05)
    '5 %'
    """
    return f"{100 * keep:g} %"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Ours less theirs, paired by the seeds that both have; None: there is none."""
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return interval(pairs) if pairs else None


def told(found: Interval | None) -> str:
    """A difference in points with its interval.

    >>> told(interval([1.0, 2.0, 3.0]))
    '+2.0 [-0.5, 4.5]'
    """
    if found is None:
        return "–"
    if found.count < 2:
        return f"{found.mean:+.1f} (one seed)"
    return f"{found.mean:+.1f} [{found.mean - found.half:.1f}, {found.mean + found.half:.1f}]"


def verdict(found: Interval | None) -> str:
    """Whether a difference is above zero; undecided: how many seeds would tell its sign.

    >>> verdict(interval([1.0, 2.0, 3.0]))
    'undecided; 4 seeds would tell'
    """
    if found is None:
        return f"{UNDECIDED}; it has not been run"
    if found.verdict != "not told apart":
        return HOLDS if found.verdict == "above" else FAILS
    needed = None
    if found.mean:
        needed = seeds_needed(found.spread, width=2 * abs(found.mean))
    return UNDECIDED if needed is None else f"{UNDECIDED}; {needed} seeds would tell"


def all_of(found: Sequence[Interval | None]) -> str:
    """The verdict on a claim that each of these differences is above zero."""
    each = [verdict(one) for one in found]
    if FAILS in each:
        return f"{FAILS}: below in {each.count(FAILS)} of {len(each)}"
    held = each.count(HOLDS)
    return HOLDS if held == len(each) else f"{UNDECIDED}: holds in {held} of {len(each)}"


def accuracy_table(found: Found, budget: str) -> str:
    """Test accuracy of every choice, with labels alone and with each teacher."""
    plan = found.plan
    rows = []
    for choice in plan.choices:
        for teacher in ("", *distilled_with(plan, choice)):
            label = f"{choice.label} + KD, {teacher} teacher" if teacher else choice.label
            cells = [found.accuracies(choice, k, budget, teacher=teacher) for k in plan.kept]
            rows.append([label, *(mean_and_spread(cell.values()) for cell in cells)])
    full = mean_and_spread(found.accuracies(ALL, 1.0, "epochs").values())
    rows.append([ALL.label, *[full] * len(plan.kept)])
    return table(["kept set", *map(share, plan.kept)], rows)


def refused(found: Found) -> list[str]:
    """Lines on runs that did not finish."""
    rows = sorted(
        {
            f"- {name}: {one.status}, {(one.reason.strip().splitlines() or ['?'])[-1][:300]}"
            for name, one in found.outcomes.items()
            if one.status != FINISHED
        }
    )
    return ["", "Runs that did not finish:", "", *rows] if rows else []


def kept_page(title: str, found: Found, *, command: str, data: str, body: Sequence[str]) -> str:
    """The whole page.

    Args:
        data: what the data are, in a line.
    """
    plan = found.plan
    notes = [
        data,
        "test accuracy in %, mean ± sample standard deviation over seeds "
        f"{', '.join(map(str, plan.seeds))}; the seed decides scores, selection, initial weights "
        "and order, and differences are paired by it, in points, with Student's intervals of 95 %, "
        "each for itself",
        "test data were read once a run, at its end, and decided nothing",
        "undecided: the interval holds zero; the number of seeds is that at which it would not, "
        "were mean and spread to stay",
    ]
    if plan.teachers:
        seeds = ", ".join(map(str, plan.tuning_seeds))
        notes.append(
            f"α is chosen on a fifth of the training side that the student does not see, on seeds "
            f"{seeds}; the teacher may have seen it, which flatters a large α a little"
        )
    settings = without_paths(plan.shared)
    return page(
        title,
        command=command,
        at=commits_of(found.outcomes.values()),
        notes=[*notes, *plan.notes],
        body=[*body, *refused(found)],
        settings=settings,
    )
