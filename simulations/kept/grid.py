"""What a grid of trainings on kept sets is made of: its settings, its runs and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BUDGETS = ("epochs", "steps")
"""As many passes as over all data, so fewer optimiser steps; or as many steps, so more passes."""
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
NOISY_KEEP = 0.5  # of changed labels, against all of them


@dataclass(frozen=True)
class Choice:
    """How a kept set is chosen.

    Attributes:
        method: of scores, or one of those below, which need none.
        policy: how scores become a subset.
    """

    method: str
    policy: str = "hardest"

    @property
    def label(self) -> str:
        """In a table."""
        return self.method if self in PLAIN else f"{self.method}, {self.policy}"

    @property
    def name(self) -> str:
        """In a file's name."""
        return self.label.replace(", ", "-").replace(" ", "-")


ALL, RANDOM = Choice("all data", ""), Choice("random", "random")
FRESH = Choice("rs2", "random")
"""A new random subset for each epoch."""
PLAIN = (ALL, RANDOM, FRESH)


@dataclass(frozen=True)
class Setting:
    """What all runs of a grid share.

    Attributes:
        dataset: a name or a folder.
        num_train, num_test: a stratified subset; None: everything.
        model: of students, and of the models that score.
        epochs: over all data, which gives the number of steps too.
        score_epochs: of the models that score.
        window: epochs over which dyn-unc, dual and tdds look at a time.
        runs: models of each method that trains several; None: the method's own number.
        early: epochs after which early scores look; None: a tenth of score_epochs.
        embedding: that prototypes-ssl works in.
        temperature: of distillation.
        teachers: a folder of trained teachers, NAME.safetensors, instead of our own; they take
            images normalised by `mean` and `std` of each channel.
    """

    dataset: str
    num_train: int | None
    num_test: int | None
    model: str
    epochs: int
    batch_size: int
    lr: float = 0.1
    augment: bool = False
    precision: str = "float32"
    device: str = "cpu"
    score_epochs: int = 1
    window: int = 10
    runs: int | None = None
    early: int | None = None
    embedding: str = "pca"
    temperature: float = 4.0
    teachers: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Student:
    """One training run.

    Attributes:
        keep: share of the training side.
        noise: share of training labels that were changed.
        teacher: "": none.
        alpha: weight of the teacher.
        tuning: whether a part of the training side is held out and the student tested on that:
            the test set is left alone.
    """

    choice: Choice
    keep: float
    budget: str
    seed: int
    noise: float = 0.0
    teacher: str = ""
    alpha: float = 0.0
    tuning: bool = False

    @property
    def name(self) -> str:
        """Of its outcome."""
        parts = ["tune"] if self.tuning else []
        parts += [self.choice.name, f"k{self.keep:g}", self.budget]
        parts += [f"n{self.noise:g}"] if self.noise else []
        parts += [self.teacher, f"a{self.alpha:g}"] if self.teacher else []
        return "-".join([*parts, f"s{self.seed}"])


@dataclass(frozen=True)
class Plan:
    """A grid.

    Attributes:
        choices: of kept sets, trained on with labels alone.
        distilled: of these, those that are trained on with the first teacher too.
        teachers: networks; random sets are trained on with each.
        tuning_seeds: of the runs that choose α; none of them a seed of the table.
        noises: shares of changed labels at which all data are compared with a random half and a
            teacher that has learned from the same labels.
    """

    setting: Setting
    choices: Sequence[Choice]
    kept: Sequence[float]
    seeds: Sequence[int] = (0, 1, 2)
    distilled: Sequence[Choice] = (RANDOM,)
    teachers: Sequence[str] = ()
    alphas: Sequence[float] = ALPHAS
    tuning_seeds: Sequence[int] = (1000,)
    noises: Sequence[float] = ()
    budgets: Sequence[str] = BUDGETS
    notes: Sequence[str] = ()

    @property
    def methods(self) -> list[str]:
        """Methods whose scores are needed, each once."""
        return list(dict.fromkeys(c.method for c in self.choices if c not in PLAIN))

    @property
    def shared(self) -> dict[str, Any]:
        """What decides every run's result."""
        return {key: value for key, value in vars(self.setting).items() if key != "teachers"}


@dataclass(frozen=True)
class AlphaKey:
    """What an α is chosen for."""

    teacher: str
    keep: float
    budget: str
    noise: float = 0.0


def alpha_keys(plan: Plan) -> list[AlphaKey]:
    """Every α that has to be chosen."""
    keys = [AlphaKey(t, k, b) for t in plan.teachers for k in plan.kept for b in plan.budgets]
    return keys + [
        AlphaKey(plan.teachers[0], NOISY_KEEP, budget, noise)
        for noise in plan.noises
        for budget in plan.budgets
    ]


def tuning_students(plan: Plan) -> list[Student]:
    """Runs that choose α: a random set, labels alone at α = 0, whatever the teacher."""
    return [tuned(key, alpha, seed) for key in alpha_keys(plan) for alpha in plan.alphas
            for seed in plan.tuning_seeds]  # fmt: skip


def tuned(key: AlphaKey, alpha: float, seed: int) -> Student:
    """The run that tries an α."""
    teacher = key.teacher if alpha else ""
    return Student(RANDOM, key.keep, key.budget, seed, key.noise, teacher, alpha, tuning=True)


def students(plan: Plan, alphas: dict[AlphaKey, float]) -> list[Student]:
    """The table's runs, seed by seed, so that an early stop leaves whole seeds.

    Args:
        alphas: that were chosen; what has none yet is left out.
    """
    return [
        student
        for seed in plan.seeds
        for student in (*_clean(plan, alphas, seed), *_noisy(plan, alphas, seed))
    ]


def distilled_with(plan: Plan, choice: Choice) -> list[str]:
    """The teachers that a choice is trained with."""
    if choice == RANDOM:
        return list(plan.teachers)
    return list(plan.teachers[:1]) if choice in plan.distilled else []


def _clean(plan: Plan, alphas: dict[AlphaKey, float], seed: int) -> list[Student]:
    found = [Student(ALL, 1.0, "epochs", seed)]
    for budget in plan.budgets:
        for keep in plan.kept:
            for choice in plan.choices:
                found.append(Student(choice, keep, budget, seed))
                found += [
                    Student(choice, keep, budget, seed, 0.0, teacher, alpha)
                    for teacher in distilled_with(plan, choice)
                    if (alpha := alphas.get(AlphaKey(teacher, keep, budget))) is not None
                ]
    return found


def _noisy(plan: Plan, alphas: dict[AlphaKey, float], seed: int) -> list[Student]:
    found = []
    for noise in plan.noises:
        found.append(Student(ALL, 1.0, "epochs", seed, noise))
        for budget in plan.budgets:
            found.append(Student(RANDOM, NOISY_KEEP, budget, seed, noise))
            key = AlphaKey(plan.teachers[0], NOISY_KEEP, budget, noise)
            if (alpha := alphas.get(key)) is not None:
                found.append(Student(RANDOM, NOISY_KEEP, budget, seed, noise, key.teacher, alpha))
    return found
