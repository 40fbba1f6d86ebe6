"""Four claims on distillation and data pruning (Ben-Baruch et al., 2024), tested in sign.

    python -m simulations.kd_fractions [--data FOLDER_OF_PARQUET]

1. A random subset with distillation does no worse than a chosen subset without, at every fraction.
2. Half of the data, at random, with distillation does no worse than all data without.
3. The best weight α of the teacher rises as the kept fraction falls.
4. At the lowest fraction the smaller teacher is better than the larger one.

α is chosen on a held-out split of the training side, at equal epochs. `small` is for one core.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datapruning.scoring.score import score
from datapruning.selection.select import select
from datapruning.students.comparison import full_steps, read_cell, write_cell
from datapruning.students.distill import choose_alpha, kd_objective, teacher_logits
from prunelab.data.datasets import ImageSet
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.pages.units import mean_and_spread
from prunelab.runs.seeds import stream_seed
from prunelab.runs.threads import computing
from prunelab.training.loop import Objective, TrainingConfig, evaluate, train
from prunelab.training.task import ImageClassification
from simulations.command import parse
from simulations.data_table import Preset, accuracy_page
from simulations.page import table

TASK = ImageClassification()
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHOSEN = (("el2n", "hardest"), ("el2n", "ccs"), ("aum", "hardest"))
BUDGETS = ("epochs", "steps")
_TEACHER, _STUDENT, _ALPHA = 3, 4, 5  # streams of the seed

PRESETS = {
    "small": Preset(
        "digits", "resnet8", 12, 64, 700, None,
        {"kept": (0.1, 0.3, 0.5), "teachers": ("resnet8", "resnet20"), "temperature": 4.0},
    ),
    "full": Preset(
        "cifar10", "resnet20", 160, 128, None, None,
        {"kept": (0.1, 0.3, 0.5, 0.7), "teachers": ("resnet20", "resnet18"), "temperature": 4.0},
    ),
}  # fmt: skip


@dataclass
class Laboratory:
    """One seed's data, models and files; every result is kept in a cell of its own."""

    preset: Preset
    data: ImageSet
    seed: int
    out: Path

    def __post_init__(self) -> None:
        self.samples = ImageSamples.of(self.data)
        self.test = ImageSamples(self.data.test_images, self.data.test_labels)
        self.config = TrainingConfig(epochs=self.preset.epochs, batch_size=self.preset.batch_size)
        self.signature = repr([self.data.fingerprint, asdict(self.preset)])

    def cell(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of that name, computed if it is not there yet."""
        path = self.out / f"s{self.seed}" / f"{name}.json"
        result = read_cell(path, self.signature)
        if result is None:
            result = run()
            write_cell(path, self.signature, result)
            print(f"seed {self.seed} {name}: {result}", flush=True)
        return result

    def build(self, name: str) -> Callable[[int], nn.Module]:
        """seed -> an untrained network."""
        return lambda seed: build_model(
            name,
            num_classes=self.data.num_classes,
            input_shape=self.data.input_shape,
            seed=seed,
        )

    def trained(
        self, rows: Tensor | None, *, budget: str = "epochs", objective: Objective | None = None
    ) -> dict[str, Any]:
        """Train a student and test it."""
        config = self.config
        if budget == "steps":
            config = replace(config, steps=full_steps(len(self.samples), config))
        seed = stream_seed(self.seed, _STUDENT)
        model = self.build(self.preset.model)(seed)
        result = train(
            model, self.samples, TASK, config=config, seed=seed, rows=rows, objective=objective
        )
        accuracy = evaluate(model, self.test, TASK).accuracy
        return {"test_accuracy": accuracy, "steps": result.steps}

    def teacher(self, name: str) -> nn.Module:
        """A teacher trained on all data, kept in a file."""
        seed = stream_seed(self.seed, _TEACHER)
        model = self.build(name)(seed)
        path = self.out / f"s{self.seed}" / f"teacher-{name}.pt"
        train(model, self.samples, TASK, config=self.config, seed=seed, checkpoint=path)
        return model.eval()

    def rows(self, method: str, policy: str, keep: float) -> Tensor:
        """Kept rows; the tables of scores are made once a seed."""
        tables = score(
            self.samples,
            method=["el2n", "aum", "random"],
            model=self.preset.model,
            seed=self.seed,
            training=self.config,
            out=self.out / f"s{self.seed}" / "scores.parquet",
        )
        return select(tables[method], keep=keep, policy=policy, seed=self.seed).rows(self.samples)


def run_seed(lab: Laboratory) -> dict[str, dict[str, Any]]:
    """All cells of a seed, by name."""
    results = {"full": lab.cell("full", lambda: lab.trained(None))}
    kept = lab.preset.settings["kept"]
    for keep in kept:
        for method, policy in (("random", "random"), *CHOSEN):
            for budget in BUDGETS:
                results[f"{method}-{policy}-k{keep:g}-{budget}"] = lab.cell(
                    f"{method}-{policy}-k{keep:g}-{budget}",
                    lambda m=method, p=policy, k=keep, b=budget: lab.trained(  # type: ignore[misc]
                        lab.rows(m, p, k), budget=b
                    ),
                )
    for name in lab.preset.settings["teachers"]:
        teacher = lab.teacher(name)
        accuracy = evaluate(teacher, lab.test, TASK).accuracy
        results[f"teacher-{name}"] = lab.cell(
            f"teacher-{name}",
            lambda a=accuracy: {"test_accuracy": a},  # type: ignore[misc]
        )
        cached = teacher_logits(teacher, lab.samples, TASK)

        def objective(alpha: float, cached: Any = cached) -> Objective:
            return kd_objective(
                alpha=alpha, temperature=lab.preset.settings["temperature"], cached=cached
            )

        for keep in kept:
            rows = lab.rows("random", "random", keep)
            results |= _distilled(lab, name, keep, rows, objective)
    return results


def _distilled(
    lab: Laboratory,
    teacher: str,
    keep: float,
    rows: Tensor,
    objective: Callable[[float], Objective],
) -> dict[str, dict[str, Any]]:
    """The choice of α, and a student with it under each budget."""

    def choice() -> dict[str, Any]:
        found = choose_alpha(
            lab.build(lab.preset.model), lab.samples, TASK,
            objective=objective, rows=rows, config=lab.config,
            seed=stream_seed(lab.seed, _ALPHA), alphas=ALPHAS,
        )  # fmt: skip
        return {"alpha": found.alpha, "curve": [asdict(point) for point in found.curve]}

    name = f"kd-{teacher}-k{keep:g}"
    results = {f"{name}-alpha": lab.cell(f"{name}-alpha", choice)}
    alpha = results[f"{name}-alpha"]["alpha"]
    for budget in BUDGETS:
        results[f"{name}-{budget}"] = lab.cell(
            f"{name}-{budget}",
            lambda b=budget: lab.trained(rows, budget=b, objective=objective(alpha)),  # type: ignore[misc]
        )
    return results


Results = Mapping[int, Mapping[str, Mapping[str, Any]]]


def accuracies(results: Results, name: str) -> list[float]:
    """Test accuracy of a cell, one a seed."""
    return [cells[name]["test_accuracy"] for cells in results.values()]


def accuracy_table(results: Results, preset: Preset, *, budget: str) -> str:
    """Students at each fraction, under one budget."""
    kept = preset.settings["kept"]
    lines = [
        ("random", "random-random"),
        *((f"{method}, {policy}", f"{method}-{policy}") for method, policy in CHOSEN),
        *((f"random + KD, {t} teacher", f"kd-{t}") for t in preset.settings["teachers"]),
    ]
    rows = [
        [label, *(_percent(results, f"{cell}-k{k:g}-{budget}") for k in kept)]
        for label, cell in lines
    ]
    rows.append(["all data, no KD", *[_percent(results, "full")] * len(kept)])
    return table(["kept set", *(f"{100 * k:g} %" for k in kept)], rows)


def alpha_curves(results: Results, preset: Preset) -> dict[float, list[float]]:
    """Kept fraction -> held-out accuracy at each α, mean over seeds; the smaller teacher."""
    teacher = preset.settings["teachers"][0]
    return {
        keep: [
            statistics.mean(
                cells[f"kd-{teacher}-k{keep:g}-alpha"]["curve"][place]["accuracy"]
                for cells in results.values()
            )
            for place in range(len(ALPHAS))
        ]
        for keep in preset.settings["kept"]
    }


def claims(results: Results, preset: Preset) -> list[list[str]]:
    """Each claim: what was measured, and whether its sign holds on the means over seeds."""
    kept = sorted(preset.settings["kept"])
    small, large = preset.settings["teachers"]
    rows = []
    for budget in BUDGETS:
        gains = []
        for keep in kept:
            ours = accuracies(results, f"kd-{small}-k{keep:g}-{budget}")
            chosen = [accuracies(results, f"{m}-{p}-k{keep:g}-{budget}") for m, p in CHOSEN]
            gains.append((keep, points(ours, max(chosen, key=statistics.mean))))
        text = ", ".join(f"{100 * keep:g} %: {gain}" for keep, (_, gain) in gains)
        holds = all(mean >= 0 for _, (mean, _) in gains)
        rows.append([f"1, equal {budget}", f"points over the best chosen set: {text}", _yes(holds)])
        half = accuracies(results, f"kd-{small}-k0.5-{budget}")
        mean, text = points(half, accuracies(results, "full"))
        rows.append([f"2, equal {budget}", f"points over all data: {text}", _yes(mean >= 0)])
    curves = alpha_curves(results, preset)
    best_alphas = [ALPHAS[max(range(len(ALPHAS)), key=curves[k].__getitem__)] for k in kept]
    text = ", ".join(f"{100 * k:g} %: {a:g}" for k, a in zip(kept, best_alphas, strict=True))
    falls = all(a >= b for a, b in itertools.pairwise(best_alphas))
    rises = falls and best_alphas[0] > best_alphas[-1]
    rows.append(["3", f"α with the best held-out mean: {text}", _yes(rises)])
    for budget in BUDGETS:
        mean, text = points(
            accuracies(results, f"kd-{small}-k{kept[0]:g}-{budget}"),
            accuracies(results, f"kd-{large}-k{kept[0]:g}-{budget}"),
        )
        text = f"{small} minus {large} teacher at {100 * kept[0]:g} %: {text}"
        rows.append([f"4, equal {budget}", text, _yes(mean > 0)])
    return rows


def points(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """Mean difference in points, paired by seed, and the same with its spread as text."""
    pairs = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    return statistics.mean(pairs), mean_and_spread(pairs, "+.2f")


def _percent(results: Results, cell: str) -> str:
    return mean_and_spread(accuracies(results, cell), scale=100)


def _yes(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def page_body(results: Results, preset: Preset) -> list[str]:
    """The tables of the page."""
    teachers = ", ".join(
        f"{name} {_percent(results, f'teacher-{name}')}" for name in preset.settings["teachers"]
    )
    body = [f"Teachers, trained on all data: {teachers}."]
    for budget in BUDGETS:
        body += ["", f"Equal {budget}:", "", accuracy_table(results, preset, budget=budget)]
    curves = alpha_curves(results, preset)
    rows = [[f"{100 * k:g} %", *(f"{100 * a:.2f}" for a in curve)] for k, curve in curves.items()]
    header = ["kept", *(f"α = {alpha:g}" for alpha in ALPHAS)]
    body += ["", "Held-out accuracy by α, mean over seeds:", "", table(header, rows)]
    verdicts = table(["claim", "measured", "sign"], claims(results, preset))
    note = (
        "Differences are paired by seed, mean ± sample standard deviation. The verdict is on the "
        "sign of the mean alone: a difference within its spread says little either way."
    )
    return [*body, "", "The four claims:", "", verdicts, "", note]


def main() -> None:
    call = parse("kd_fractions", list(PRESETS))
    preset = PRESETS[call.preset]
    data = call.load(preset.dataset, num_train=preset.num_train, num_test=preset.num_test)
    results = {}
    with computing(call.threads):
        for seed in call.seeds:
            results[seed] = run_seed(Laboratory(preset, data, seed, call.out))
    title = "Distillation on pruned data"
    body = page_body(results, preset)
    call.save(accuracy_page(title, call, preset, data, body=body))


if __name__ == "__main__":
    main()
