"""A grid in its steps: teachers and scores, the choice of α, the table's runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simulations.jobs import FINISHED, Job, Outcome, Workers, read_outcome, run_jobs
from simulations.kept.grid import (
    ALL,
    PLAIN,
    AlphaKey,
    Choice,
    Plan,
    Student,
    alpha_keys,
    students,
    tuned,
    tuning_students,
)
from simulations.kept.jobs import ScoreJob, StudentJob, TeacherJob, teacher_jobs


@dataclass
class Found:
    """What there is of a grid.

    Attributes:
        outcomes: of all pieces, by name.
        alphas: that were chosen.
    """

    plan: Plan
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    alphas: dict[AlphaKey, float] = field(default_factory=dict)

    def accuracy(self, student: Student) -> float | None:
        """In percent; None: its run has not finished."""
        outcome = self.outcomes.get(student.name)
        if outcome is None or outcome.status != FINISHED:
            return None
        key = "held_out_accuracy" if student.tuning else "test_accuracy"
        return 100 * float(outcome.values[key])

    def accuracies(
        self, choice: Choice, keep: float, budget: str, *, noise: float = 0.0, teacher: str = ""
    ) -> dict[int, float]:
        """Seed -> test accuracy in percent, of the runs that finished."""
        if choice == ALL:
            keep, budget = 1.0, "epochs"
        alpha = self.alphas.get(AlphaKey(teacher, keep, budget, noise), 0.0)
        found = {
            seed: self.accuracy(Student(choice, keep, budget, seed, noise, teacher, alpha))
            for seed in self.plan.seeds
        }
        return {seed: value for seed, value in found.items() if value is not None}

    def curve(self, key: AlphaKey) -> list[float] | None:
        """Held-out accuracy in percent at each α, mean over the tuning's seeds."""
        means = []
        for alpha in self.plan.alphas:
            found = [self.accuracy(tuned(key, alpha, seed)) for seed in self.plan.tuning_seeds]
            values = [value for value in found if value is not None]
            if len(values) < len(found):
                return None
            means.append(statistics.mean(values))
        return means

    def best_by_seed(self, key: AlphaKey) -> dict[int, float]:
        """The best α, that of labels alone among them, by seed of the tuning."""
        best = {}
        for seed in self.plan.tuning_seeds:
            found = [self.accuracy(tuned(key, alpha, seed)) for alpha in self.plan.alphas]
            pairs = [(v, -a) for v, a in zip(found, self.plan.alphas, strict=True) if v is not None]
            if len(pairs) == len(found):
                best[seed] = -max(pairs)[1]
        return best

    def is_ready(self, student: Student) -> bool:
        """Whether the scores and the teacher that a student needs are there."""
        setting, needs = self.plan.setting, []
        if student.choice not in PLAIN:
            needs.append(ScoreJob(setting, tuple(self.plan.methods), student.seed).name)
        if student.teacher:
            needs.append(TeacherJob(setting, student.teacher, student.seed, student.noise).name)
        found = [self.outcomes.get(name) for name in needs]
        return all(one is not None and one.status == FINISHED for one in found)

    def teachers(self, name: str) -> list[float]:
        """Test accuracies of a teacher, in percent, one a seed or one for all."""
        jobs = teacher_jobs(self.plan.setting, [name], self.plan.seeds)
        found = [self.outcomes[job.name] for job in jobs if job.name in self.outcomes]
        return [100 * one.values["test_accuracy"] for one in found if one.status == FINISHED]


def run_plan(plan: Plan, out: Path, workers: Workers | None) -> Found:
    """Run what is missing; with nobody to do it, only look at what there is."""
    found, setting, methods = Found(plan), plan.setting, tuple(plan.methods)

    def work(jobs: Sequence[Job]) -> None:
        if workers is not None:
            run_jobs(jobs, out, workers)
        ended = {job.name: read_outcome(job.name, out) for job in jobs}
        found.outcomes.update({name: one for name, one in ended.items() if one is not None})

    def runs(wanted: Sequence[Student]) -> list[Job]:
        # The choice of α comes once, whoever asks for it; what lacks its files is left out.
        return [
            StudentJob(setting, one, methods)
            for one in dict.fromkeys(wanted)
            if found.is_ready(one)
        ]

    teachers: list[TeacherJob] = []
    if plan.teachers:
        seeds = (*plan.tuning_seeds, *plan.seeds)
        teachers += teacher_jobs(setting, plan.teachers, seeds)
        for noise in plan.noises:
            teachers += teacher_jobs(setting, plan.teachers[:1], seeds, noise=noise)
    scores = [ScoreJob(setting, methods, seed) for seed in plan.seeds] if methods else []
    work([*teachers, *scores])
    if plan.teachers:
        work(runs(tuning_students(plan)))
        curves = {key: found.curve(key) for key in alpha_keys(plan)}
        found.alphas = best_alphas(plan.alphas, curves)
    work(runs(students(plan, found.alphas)))
    return found


def best_alphas(
    alphas: Sequence[float], curves: Mapping[AlphaKey, Sequence[float] | None]
) -> dict[AlphaKey, float]:
    """The α of the highest accuracy, the smaller of equals; a teacher is asked by one above 0.

    >>> key = AlphaKey("resnet8", 0.5, "steps")
    >>> best_alphas([0.0, 0.5, 1.0], {key: [90.0, 80.0, 80.0]})[key]
    0.5
    """
    best = {}
    for key, curve in curves.items():
        if curve is not None:
            pairs = [pair for pair in zip(alphas, curve, strict=True) if pair[0] > 0]
            best[key] = max(pairs, key=lambda pair: (pair[1], -pair[0]))[0]
    return best
