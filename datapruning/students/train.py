"""One call that trains a model on a data set or on what was kept of it, with a teacher or without.

`runner` does the same in a run folder, to the same bits with the same number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.errors import SubsetWarning
from datapruning.selection.kept import KeptSamples
from datapruning.selection.select import fresh_random
from datapruning.students.distill import (
    TEMPERATURE,
    AlphaChoice,
    AlphaPoint,
    choose_alpha,
    kd_objective,
    teacher_logits,
)
from prunelab.data.objects import as_samples
from prunelab.data.samples import Samples, sizes
from prunelab.errors import RunError
from prunelab.networks import Network, build_model
from prunelab.runs.folder import run_name, write_file
from prunelab.runs.seeds import stream_seed
from prunelab.training import loop
from prunelab.training.loop import Callback, Objective, Rows, TrainingConfig, evaluating
from prunelab.training.task import Classification, Task, check_fits, make_task, task_of
from sparsemodel.storage.sealed import read_sealed_json, sealed_json

AUTO = "auto"
ALPHA_FILE, LOGITS = "alpha.json", "teacher_logits.pt"
Progress = Callable[[str], None]
_MODEL, _TRAIN, _ALPHA = 0, 1, 2  # streams of the seed


def train(
    data: Any,
    *,
    model: Network = "resnet8",
    teacher: nn.Module | None = None,
    alpha: float | str = AUTO,
    temperature: float = TEMPERATURE,
    fresh: float | int | None = None,
    task: str | Task | None = None,
    training: TrainingConfig | None = None,
    seed: int = 0,
    device: str = "cpu",
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> nn.Module:
    """Train a model on samples; its own loss, or a teacher's knowledge beside it.

    Args:
        data: what `Subset.of` gives, or anything that `as_samples` takes: all of it.
        model: a name, "module:function", a function that makes an untrained model (see
            `build_model`), or a model, dense or sparsified, which stays as it is: a copy of it
            goes on from its weights.
        teacher: a trained model with the same classes; None: no distillation.
        alpha: weight of the teacher in [0, 1], or "auto": of five the best on a held-out fifth of
            the samples, for which five models are trained.
        temperature: of the distillation.
        fresh: train each epoch on a new random part of the samples, a share or a number of them
            (`fresh_random`): the control that scores have to beat.
        task: a Task, its name or what makes it; None: what the samples are for.
        training: None: TrainingConfig().
        seed: decides start, order and augmentation; equal seeds give equal bits.
        progress: called with a line of text now and then.

    Returns:
        The trained model, in eval mode, on `device`.

    Raises:
        DataError: data that cannot be read as samples.
        ModelError: a model that cannot be made, or that does not fit the data.
        RunError: settings out of range, or a training that diverges.

    Warns:
        SubsetWarning: a class has no sample.

    >>> import torch
    >>> images, labels = torch.randn(60, 1, 8, 8), torch.arange(60) % 3
    >>> config = TrainingConfig(epochs=1, lr=0.01)
    >>> train((images, labels), training=config)(images).shape
    torch.Size([60, 3])
    """
    check_alpha(alpha)
    samples, rows, num_classes = _training_side(data)
    task, config = make_task(task or task_of(samples)), training or TrainingConfig()
    input_shape = sizes(samples)[1]
    if samples.labels is not None and num_classes is not None:
        warn_of_absent_classes(samples.labels, rows, num_classes)

    def build(run_seed: int) -> nn.Module:
        return build_model(
            model, num_classes=num_classes, input_shape=input_shape, seed=run_seed
        ).to(device)

    objective = None
    if teacher is not None:
        if not isinstance(task, Classification):
            raise RunError(f"a teacher needs a Classification task, got {type(task).__name__}")
        _, objective = Distillation(teacher.to(device), alpha, temperature).prepare(
            samples, task,
            build=build, rows=rows, config=config, seed=seed, device=device,
            say=progress or (lambda line: None),
        )  # fmt: skip
    student = build(model_seed(seed))
    check_fits(task, student, samples, num_classes=num_classes)
    with nullcontext() if teacher is None else evaluating(teacher):
        loop.train(
            student, samples, task,
            config=config, seed=training_seed(seed), objective=objective,
            rows=rows if fresh is None else _fresh(fresh, rows, len(samples), seed),
            callbacks=callbacks, device=device,
        )  # fmt: skip
    return student.eval()


@dataclass(frozen=True)
class Distillation:
    """A teacher, its weight in [0, 1] or "auto", and the temperature."""

    teacher: nn.Module
    alpha: float | str = AUTO
    temperature: float = TEMPERATURE

    def prepare(
        self,
        samples: Samples,
        task: Classification,
        *,
        build: Callable[[int], nn.Module],
        rows: Tensor | None,
        config: TrainingConfig,
        seed: int,
        device: str,
        say: Progress,
        folder: Path | None = None,
    ) -> tuple[AlphaChoice | None, Objective]:
        """The objective with the given α, or with the best of several and how it was chosen.

        Args:
            build: seed -> an untrained student.
            folder: of a run, where the teacher's logits and the choice are kept, to go on from
                after a kill.
        """
        objective = self._objective(samples, task, rows=rows, config=config, folder=folder)
        if self.alpha != AUTO:
            return None, objective(float(self.alpha))
        choice = None if folder is None else _read_choice(folder)
        if choice is None:
            choice = choose_alpha(
                build, samples, task,
                objective=objective, rows=rows, config=config,
                seed=stream_seed(seed, _ALPHA), device=device,
                progress=lambda done, total: say(f"choosing alpha: {done} of {total} trained"),
            )  # fmt: skip
            if folder is not None:
                content = sealed_json(_choice_of(folder), asdict(choice))
                write_file(folder / ALPHA_FILE, content)
        say(f"alpha {choice.alpha:g}, chosen on {choice.num_held_out} held-out training samples")
        return choice, objective(choice.alpha)

    def _objective(
        self,
        samples: Samples,
        task: Classification,
        *,
        rows: Tensor | None,
        config: TrainingConfig,
        folder: Path | None,
    ) -> Callable[[float], Objective]:
        """α -> objective; the teacher looks once a sample, or at each augmented batch."""
        source: dict[str, Any] = {"teacher": self.teacher, "task": task}
        if not config.augment:
            path = None if folder is None else folder / LOGITS
            source = {"cached": teacher_logits(self.teacher, samples, task, rows=rows, path=path)}
        return lambda alpha: kd_objective(alpha=alpha, temperature=self.temperature, **source)


def _read_choice(folder: Path) -> AlphaChoice | None:
    """The α that was chosen in a run's folder; None where none was.

    Raises:
        RunError: the file is damaged, or of another run.
    """
    file, cure = folder / ALPHA_FILE, "delete it, and alpha is chosen again"
    try:
        values = read_sealed_json(file, of=_choice_of(folder), error=RunError, cure=cure)
    except FileNotFoundError:
        return None
    curve = tuple(AlphaPoint(**point) for point in values.pop("curve"))
    return AlphaChoice(**values, curve=curve)


def _choice_of(folder: Path) -> str:
    return f"alpha of run {run_name(folder)}"


def model_seed(seed: int) -> int:
    """Seed of the student's start."""
    return stream_seed(seed, _MODEL)


def training_seed(seed: int) -> int:
    """Seed of the order of samples."""
    return stream_seed(seed, _TRAIN)


def check_alpha(alpha: float | str) -> None:
    """Raise RunError unless the teacher's weight is a number in [0, 1] or "auto"."""
    is_good = alpha == AUTO if isinstance(alpha, str) else 0 <= alpha <= 1
    if not is_good:
        raise RunError(f"alpha must be a number in [0, 1] or auto, got {alpha!r}")


def warn_of_absent_classes(labels: Tensor, rows: Tensor | None, num_classes: int) -> None:
    """Warn of classes of which no sample is trained on; rows None: all are."""
    kept = labels if rows is None else labels[rows]
    absent = sorted(set(range(num_classes)) - set(kept.unique().tolist()))
    if absent:
        warnings.warn(
            f"the subset holds no sample of class {', '.join(map(str, absent))}: the model cannot "
            "learn it; select with class balance to keep some of each",
            SubsetWarning,
            stacklevel=3,
        )


def _fresh(keep: float | int, rows: Tensor | None, num_samples: int, seed: int) -> Rows:
    """For each epoch other ones of the rows."""
    among = torch.arange(num_samples) if rows is None else rows
    places = fresh_random(len(among), keep=keep, seed=seed)
    return lambda epoch: among[places(epoch)]


def _training_side(data: Any) -> tuple[Samples, Tensor | None, int | None]:
    """Samples, which rows of them (None: all), and the number of classes of the whole data set."""
    if isinstance(data, KeptSamples):
        samples, rows = data.training_samples()
        return samples, rows, data.subset.num_classes or sizes(samples)[0]
    samples = as_samples(data)
    return samples, None, sizes(samples)[0]
