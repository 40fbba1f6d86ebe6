"""Pieces of a grid: a seed's scores, a teacher, a student; what others need stays in files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from datapruning.errors import SelectionError
from datapruning.scoring.methods import METHODS
from datapruning.scoring.score import score, table_paths
from datapruning.selection.select import fresh_random, select
from datapruning.selection.table import ScoreTable
from datapruning.students.comparison import full_steps
from datapruning.students.distill import HELD_OUT, held_out_rows, kd_objective, teacher_logits
from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.errors import RunError
from prunelab.networks import build_model
from prunelab.runs.seeds import generator, stream_seed
from prunelab.runs.threads import computing
from prunelab.training.loop import Objective, Rows, TrainingConfig, evaluate, train
from prunelab.training.task import ImageClassification
from simulations.jobs import DID_DIVERGE, FINISHED, Outcome
from simulations.kept.flipped import flipped
from simulations.kept.grid import ALL, FRESH, RANDOM, Setting, Student
from simulations.kept.teachers import given_teacher

TASK = ImageClassification()
REFUSED = "refused"  # a policy that cannot choose from these scores
_STUDENT, _TEACHER, _NOISE, _HELD_OUT = 3, 4, 5, 6  # streams of the seed; scoring uses others


@lru_cache(maxsize=2)
def load(dataset: str, num_train: int | None, num_test: int | None) -> ImageSet:
    """The data, once in a process."""
    return load_dataset(dataset, num_train=num_train, num_test=num_test)


def data_of(setting: Setting) -> ImageSet:
    """The data of a grid."""
    return load(setting.dataset, setting.num_train, setting.num_test)


def training_samples(setting: Setting, noise: float = 0.0, seed: int = 0) -> ImageSamples:
    """The training side, with this share of its labels changed."""
    return _changed(setting, noise, seed if noise else 0)  # without noise every seed's are the same


@lru_cache(maxsize=4)
def _changed(setting: Setting, noise: float, seed: int) -> ImageSamples:
    data = data_of(setting)
    random = generator(stream_seed(seed, _NOISE))
    labels = flipped(data.train_labels, noise, num_classes=data.num_classes, random=random)
    return ImageSamples(data.train_images, labels, class_names=data.class_names)


def training_config(setting: Setting, *, epochs: int) -> TrainingConfig:
    """Of every training of a grid."""
    return TrainingConfig(
        epochs=epochs,
        batch_size=setting.batch_size,
        lr=setting.lr,
        augment=setting.augment,
        precision=setting.precision,
    )


@dataclass(frozen=True)
class ScoreJob:
    """All tables of a seed: methods that can, share their models."""

    setting: Setting
    methods: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Of its outcome and of its tables."""
        return f"scores-s{self.seed}"

    def run(self, out: Path) -> Outcome:
        """Score, or go on with it."""
        setting, started = self.setting, time.process_time()
        options = {"embedding": setting.embedding, "window": setting.window}
        known = {key for name in self.methods for key in METHODS[name].options}
        score(
            training_samples(setting), method=list(self.methods), model=setting.model,
            seed=self.seed, training=training_config(setting, epochs=setting.score_epochs),
            runs=setting.runs, early=setting.early, device=setting.device,
            options={key: value for key, value in options.items() if key in known},
            out=self.file(out),
        )  # fmt: skip
        return Outcome(FINISHED, values={"processor_seconds": time.process_time() - started})

    def file(self, out: Path) -> Path:
        """What the tables are named after."""
        return out / "scores" / f"s{self.seed}.parquet"

    def table(self, method: str, out: Path) -> ScoreTable:
        """One of its tables."""
        return ScoreTable.read(table_paths(self.file(out), self.methods)[method])


@dataclass(frozen=True)
class TeacherJob:
    """A teacher's weights, trained on all data or from a file of somebody's, and its logits."""

    setting: Setting
    teacher: str
    seed: int
    noise: float = 0.0

    @property
    def is_given(self) -> bool:
        """Whether it comes from a file; what has seen the right labels is none for wrong ones."""
        return bool(self.setting.teachers) and not self.noise

    @property
    def name(self) -> str:
        """Of its outcome and its files."""
        if self.is_given:
            return f"teacher-{self.teacher}"
        noise = f"-n{self.noise:g}" if self.noise else ""
        return f"teacher-{self.teacher}{noise}-s{self.seed}"

    def run(self, out: Path) -> Outcome:
        """Train or read it, test it, and keep its logits of all samples."""
        setting, started = self.setting, time.process_time()
        samples = training_samples(setting, self.noise, self.seed)
        with computing(1):
            model = self.model(out)
            if not setting.augment:
                teacher_logits(model, samples, TASK, path=self._logits(out))
            accuracy = evaluate(model, _test_samples(setting), TASK).accuracy
        return Outcome(
            FINISHED,
            values={
                "test_accuracy": accuracy,
                "processor_seconds": time.process_time() - started,
            },
        )

    def model(self, out: Path) -> nn.Module:
        """In eval mode; one of ours is trained where its file does not have it all."""
        setting, seed = self.setting, stream_seed(self.seed, _TEACHER)
        model = _built(setting, self.teacher, seed)
        if self.is_given:
            return given_teacher(model, setting, self.teacher).eval()
        train(
            model, training_samples(setting, self.noise, self.seed), TASK,
            config=training_config(setting, epochs=setting.epochs), seed=seed,
            checkpoint=out / "teachers" / f"{self.name}.pt", device=setting.device,
        )  # fmt: skip
        return model.eval()

    def objective(self, samples: ImageSamples, alpha: float, out: Path) -> Objective:
        """Of a student: stored logits, or the teacher itself where images are augmented."""
        model, temperature = self.model(out), self.setting.temperature
        if self.setting.augment:
            model.to(self.setting.device)
            return kd_objective(alpha=alpha, temperature=temperature, teacher=model, task=TASK)
        cached = teacher_logits(model, samples, TASK, path=self._logits(out))
        return kd_objective(alpha=alpha, temperature=temperature, cached=cached)

    def _logits(self, out: Path) -> Path:
        return out / "teachers" / f"{self.name}.logits"


@dataclass(frozen=True)
class StudentJob:
    """A student and its test."""

    setting: Setting
    student: Student
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its outcome."""
        return self.student.name

    def run(self, out: Path) -> Outcome:
        """Choose, train and test."""
        setting, student, started = self.setting, self.student, time.process_time()
        samples = training_samples(setting, student.noise, student.seed)
        held_out = None
        if student.tuning:
            held_out = held_out_rows(
                samples, share=HELD_OUT, seed=stream_seed(student.seed, _HELD_OUT)
            )
        try:
            rows = self._rows(samples, held_out, out)
        except SelectionError as error:
            return Outcome(REFUSED, reason=str(error))
        config = training_config(setting, epochs=setting.epochs)
        if student.budget == "steps":
            config = replace(config, steps=full_steps(len(samples), config))
        seed = stream_seed(student.seed, _STUDENT)
        model = _built(setting, setting.model, seed)
        with computing(1):
            objective = None
            if student.teacher:
                teacher = TeacherJob(setting, student.teacher, student.seed, student.noise)
                objective = teacher.objective(samples, student.alpha, out)
            try:
                result = train(
                    model, samples, TASK,
                    config=config, seed=seed, rows=rows, objective=objective, device=setting.device,
                )  # fmt: skip
            except RunError as error:
                if "the loss became" in str(error):
                    return Outcome(DID_DIVERGE, reason=str(error))
                raise
            if held_out is None:
                found = evaluate(model, _test_samples(setting), TASK)
            else:
                found = evaluate(model, samples, TASK, rows=held_out)
        return Outcome(
            FINISHED,
            values={
                "held_out_accuracy" if student.tuning else "test_accuracy": found.accuracy,
                "loss": found.loss,
                "steps": result.steps,
                "samples_seen": result.samples_seen,
                "processor_seconds": time.process_time() - started,
            },
        )

    def _rows(self, samples: ImageSamples, held_out: Tensor | None, out: Path) -> Rows | None:
        choice, student = self.student.choice, self.student
        if choice == ALL:
            return None
        if choice == FRESH:
            return fresh_random(len(samples), keep=student.keep, seed=student.seed)
        if choice == RANDOM:
            table = score(samples, method="random", seed=student.seed)
        else:
            table = ScoreJob(self.setting, self.methods, student.seed).table(choice.method, out)
        rows = select(
            table, keep=student.keep, policy=choice.policy, seed=student.seed
        ).rows(samples)  # fmt: skip
        return rows if held_out is None else rows[~torch.isin(rows, held_out)]


def teacher_jobs(
    setting: Setting, teachers: Sequence[str], seeds: Sequence[int], *, noise: float = 0.0
) -> list[TeacherJob]:
    """One for each seed, or, of given ones, one for all."""
    jobs = [TeacherJob(setting, name, seed, noise) for seed in seeds for name in teachers]
    return list({job.name: job for job in jobs}.values())


def _built(setting: Setting, model: str, seed: int) -> nn.Module:
    data = data_of(setting)
    return build_model(model, num_classes=data.num_classes, input_shape=data.input_shape, seed=seed)


def _test_samples(setting: Setting) -> ImageSamples:
    data = data_of(setting)
    return ImageSamples(data.test_images, data.test_labels)
