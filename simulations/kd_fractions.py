"""Claims on distillation and data pruning (Ben-Baruch et al., 2024), each with an interval.

    python -m simulations.kd_fractions [--preset fashion]

1. A random subset with distillation does better than every chosen subset without.
2. Half of the data, at random, with distillation does better than all data without.
3. The best weight α of the teacher falls as the kept fraction grows.
4. At low fractions the smaller teacher is better than the larger one.
5. With changed labels, a random half with distillation does better than all data without.

α is chosen on a held-out part of the training side. `small` takes minutes; `fashion` and `cifar10`
hours of a core, in pieces that are kept; `full` wants a GPU.
"""

from __future__ import annotations

from prunelab.pages.units import mean_and_spread
from simulations.kept import call
from simulations.kept.grid import ALL, NOISY_KEEP, RANDOM, AlphaKey, Choice, Plan, Setting
from simulations.kept.steps import Found
from simulations.kept.tables import accuracy_table, all_of, difference, share, told, verdict
from simulations.page import table
from simulations.statistics import Interval

CHOSEN = (
    Choice("el2n-20"),
    Choice("forgetting"),
    Choice("aum"),
    Choice("aum", "ccs"),
    Choice("dual", "dual-beta"),
    Choice("d2"),
)
KEPT, NOISES, LOW = (0.05, 0.1, 0.3, 0.5, 0.8), (0.2, 0.4), 0.1
TUNED = (1000, 1001, 1002)

PRESETS = {
    "small": Plan(
        Setting("digits", 700, None, "resnet8", 12, 64, score_epochs=12),
        (RANDOM, Choice("el2n"), Choice("el2n", "ccs"), Choice("aum")),
        (0.1, 0.3, 0.5), teachers=("resnet8", "resnet20"), noises=(0.2,), tuning_seeds=TUNED,
    ),
    "fashion": Plan(
        Setting("fashion-mnist", 20_000, None, "resnet8", 6, 64, score_epochs=6, window=3),
        (RANDOM, *CHOSEN), KEPT, teachers=("resnet8", "resnet20"), noises=NOISES,
        tuning_seeds=TUNED,
    ),
    "cifar10": Plan(
        Setting("cifar10", None, None, "resnet20", 4, 128, score_epochs=4, window=3),
        (RANDOM, *CHOSEN), KEPT, teachers=("resnet20", "resnet56"), noises=NOISES,
        distilled=(RANDOM, *CHOSEN),
    ),
    "full": Plan(
        Setting(
            "cifar10", None, None, "resnet20", 100, 128, augment=True, device="cuda",
            score_epochs=30,
        ),
        (RANDOM, *CHOSEN), KEPT, teachers=("resnet20", "resnet56"), noises=NOISES,
        distilled=(RANDOM, *CHOSEN), tuning_seeds=TUNED,
    ),
}  # fmt: skip


def body(found: Found) -> list[str]:
    """The tables of the page."""
    plan, lines = found.plan, ["Teachers:", ""]
    for name in plan.teachers:
        accuracies = ", ".join(f"{value:.2f}" for value in found.teachers(name)) or "not yet"
        lines.append(f"- {name}: {accuracies} % of the test side")
    lines += ["", "## The claims", "", table(["claim", "measured", "verdict"], claims(found),
                                             words=(0, 1, 2))]  # fmt: skip
    for budget in plan.budgets:
        lines += ["", f"## Equal {budget}", "", accuracy_table(found, budget), ""]
        lines += [f"Random with the {plan.teachers[0]} teacher, less others without:", ""]
        rows = [
            [choice.label, *(told(_gain(found, choice, keep, budget)) for keep in plan.kept)]
            for choice in plan.choices
        ]
        lines += [table(["points over", *map(share, plan.kept)], rows)]
    return [*lines, *alpha_section(found), *noise_section(found)]


def claims(found: Found) -> list[list[str]]:
    """Each claim: what was measured, and the verdict."""
    plan, rows = found.plan, []
    first = plan.teachers[0]
    low = [keep for keep in plan.kept if keep <= LOW]
    for budget in plan.budgets:
        at = f"equal {budget}"
        each = [_gain(found, choice, k, budget) for k in plan.kept for choice in plan.choices[1:]]
        rows.append([f"1, {at}", f"random + KD over {len(each)} chosen sets", all_of(each)])
        half = found.accuracies(RANDOM, 0.5, budget, teacher=first)
        over = difference(half, found.accuracies(ALL, 1.0, budget))
        rows.append([f"2, {at}", f"50 % + KD over all data: {told(over)}", verdict(over)])
        moved = alpha_fall(found, budget)
        ends = f"{share(plan.kept[0])} less that at {share(plan.kept[-1])}"
        rows.append([f"3, {at}", f"best α at {ends}: {told(moved)}", verdict(moved)])
        for keep in low:
            small, large = (
                found.accuracies(RANDOM, keep, budget, teacher=name) for name in plan.teachers
            )
            gain = difference(small, large)
            what = f"{first} less {plan.teachers[1]} teacher at {share(keep)}: {told(gain)}"
            rows.append([f"4, {at}", what, verdict(gain)])
        for noise in plan.noises:
            over = difference(
                found.accuracies(RANDOM, NOISY_KEEP, budget, noise=noise, teacher=first),
                found.accuracies(ALL, 1.0, budget, noise=noise),
            )
            what = f"{share(noise)} changed, {share(NOISY_KEEP)} + KD over all data: {told(over)}"
            rows.append([f"5, {at}", what, verdict(over)])
    return rows


def alpha_fall(found: Found, budget: str) -> Interval | None:
    """The best α at the smallest kept share less that at the largest, by seeds of the tuning."""
    plan = found.plan
    ends = [
        found.best_by_seed(AlphaKey(plan.teachers[0], keep, budget))
        for keep in (plan.kept[0], plan.kept[-1])
    ]
    return difference(*ends)


def alpha_section(found: Found) -> list[str]:
    """Held-out accuracy by α."""
    plan = found.plan
    lines = ["", "## The choice of α", "", "Accuracy in % on the held-out part, mean over the "
             "tuning's seeds; α = 0 is training by labels alone.", ""]  # fmt: skip
    rows = []
    for key, alpha in found.alphas.items():
        curve = found.curve(key) or []
        noise = f", {share(key.noise)} changed" if key.noise else ""
        rows.append([
            key.teacher, f"{share(key.keep)}{noise}", key.budget,
            *(f"{value:.2f}" for value in curve), f"{alpha:g}",
        ])  # fmt: skip
    header = ["teacher", "kept", "budget", *(f"α = {alpha:g}" for alpha in plan.alphas), "taken"]
    return [*lines, table(header, rows, words=(0, 1, 2))]


def noise_section(found: Found) -> list[str]:
    """Trainings on changed labels."""
    plan, rows = found.plan, []
    for noise in plan.noises:
        for budget in plan.budgets:
            full = found.accuracies(ALL, 1.0, budget, noise=noise)
            half = found.accuracies(RANDOM, NOISY_KEEP, budget, noise=noise)
            taught = found.accuracies(
                RANDOM, NOISY_KEEP, budget, noise=noise, teacher=plan.teachers[0]
            )
            means = [mean_and_spread(values.values()) for values in (full, half, taught)]
            rows.append([share(noise), budget, *means, told(difference(taught, full))])
    if not rows:
        return []
    header = ["changed labels", "budget", "all data", "random half", "random half + KD",
              "half + KD less all data"]  # fmt: skip
    text = (
        "The teacher has learned from the same changed labels, all of them; the test side's are "
        "as they were."
    )
    return ["", "## Changed labels", "", text, "", table(header, rows, words=(1,))]


def _gain(found: Found, choice: Choice, keep: float, budget: str) -> Interval | None:
    teacher = found.plan.teachers[0]
    ours = found.accuracies(RANDOM, keep, budget, teacher=teacher)
    return difference(ours, found.accuracies(choice, keep, budget))


def main() -> None:
    """Command line."""
    call.main("kd_fractions", "Distillation on pruned data", PRESETS, body)


if __name__ == "__main__":
    main()
