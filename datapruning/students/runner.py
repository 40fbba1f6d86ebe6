"""Train one model on a data set or a subset of it, in a run folder that can be resumed."""

from __future__ import annotations

import dataclasses
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.selection.table import Subset
from datapruning.students.distill import TEMPERATURE, AlphaChoice, check_classes
from datapruning.students.train import (
    AUTO,
    LOGITS,
    Distillation,
    Progress,
    check_alpha,
    model_seed,
    training_seed,
    warn_of_absent_classes,
)
from prunelab.data.datasets import fingerprint
from prunelab.data.given import load_sample_set
from prunelab.data.reading import TEST_SHARE, Reading, reading
from prunelab.data.samples import ImageSamples
from prunelab.data.sides import SampleSet
from prunelab.data.tensors import PREPROCESSING
from prunelab.errors import DataError, RunError
from prunelab.networks import build_model, check_model
from prunelab.runs import folder as runfolder
from prunelab.runs.settings import OR_ELSEWHERE, differences
from prunelab.runs.threads import computing
from prunelab.runs.version import __version__
from prunelab.training.loop import TrainingConfig, TrainingResult, predict, train
from prunelab.training.task import ImageClassification
from sparsemodel.storage.checkpoint import load_sparse, save_sparse
from sparsemodel.storage.meter import peak_rss_bytes

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class RunSettings:
    """All that decides the bits of a training run.

    Attributes:
        dataset: a name, folder, file or "module:function", as `load_sample_set` takes it.
        resize, columns, test_share: how it is taken (see `prunelab.data.reading`).
        subset: file of the kept samples; "" trains on all.
        kept: digest of their ids, filled in by `run`: a file may change under its name.
        teacher: run folder of a teacher; "" for none.
        alpha: weight of the teacher in [0, 1], or "auto".
        threads: of torch.
    """

    dataset: str = "digits"
    resize: str = ""
    columns: str = ""
    test_share: float = TEST_SHARE
    model: str = "resnet8"
    seed: int = 0
    subset: str = ""
    kept: str = ""
    teacher: str = ""
    alpha: float | str = AUTO
    temperature: float = TEMPERATURE
    device: str = "cpu"
    threads: int = 1
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_model(self.model)
        check_alpha(self.alpha)
        _ = self.reading
        if self.threads < 1:
            raise RunError(f"threads must be at least 1, got {self.threads}")

    @property
    def reading(self) -> Reading:
        """How the data set is taken."""
        return reading(resize=self.resize, columns=self.columns, test_share=self.test_share)

    def toml(self) -> str:
        """The settings as a TOML file."""
        values = asdict(self)
        # TOML has no word for nothing: a setting that is absent is None again when read.
        training = {k: v for k, v in values.pop("training").items() if v is not None}
        return tomli_w.dumps({**values, "training": training})

    @classmethod
    def read(cls, folder: Path) -> RunSettings:
        """The settings of a run folder.

        Raises:
            RunError: the folder holds no run of this kind.
        """
        path = folder / runfolder.CONFIG
        try:
            values = tomllib.loads(runfolder.read_config(folder))
        except tomllib.TOMLDecodeError as error:
            raise RunError(f"{path} is not a TOML file: {error}") from None
        known = {entry.name for entry in dataclasses.fields(cls)}
        if not set(values) <= known or "training" not in values:
            raise RunError(f"{path} is not of a run of `datapruning train`")
        try:
            training = TrainingConfig(**values.pop("training"))
            return cls(**values, training=training)
        except TypeError as error:
            raise RunError(f"{path}: {error}") from None

    def continued(self, given: Mapping[str, Any]) -> RunSettings:
        """These settings with others in their place, as a command names them: `lr`, not
        `training.lr`."""
        own = {entry.name for entry in dataclasses.fields(TrainingConfig)}
        training = {name: value for name, value in given.items() if name in own}
        rest = {name: value for name, value in given.items() if name not in own}
        return dataclasses.replace(
            self, **rest, training=dataclasses.replace(self.training, **training)
        )


def run(
    settings: RunSettings, folder: Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train, evaluate on the test side once at the end, and leave everything in `folder`.

    Args:
        resume: go on with what the folder holds; a complete run is left as it is.
        progress: called with a line of text now and then.

    Returns:
        The content of summary.json.

    Raises:
        RunError, DataError, ModelError, SelectionError: says what, where and what to do. A new
            folder in which nothing was computed is removed again.
    """
    data, samples, test = _both_sides(settings)
    subset = Subset.read(Path(settings.subset)) if settings.subset else None
    rows = None if subset is None else subset.rows(samples)
    if subset is not None:
        settings = dataclasses.replace(settings, kept=fingerprint(subset.ids))
        warn_of_absent_classes(samples.labels, rows, data.num_classes or 0)
    teacher = _teacher(settings, data, samples) if settings.teacher else None
    _open(folder, settings, resume=resume)
    if not (folder / runfolder.SUMMARY).exists():
        say = progress or (lambda line: None)
        try:
            with runfolder.locked(folder), computing(settings.threads):
                _run(settings, folder, data, samples, test, subset=subset, rows=rows,
                     teacher=teacher, say=say)  # fmt: skip
        except ValueError:
            if not resume:  # a run that was there before is not ours to remove
                runfolder.discard_unstarted(folder)
            raise
    return runfolder.read_summary(folder)


def load_model(folder: Path) -> nn.Module:
    """The trained model of a finished run folder, in eval mode.

    Raises:
        RunError: the folder holds no finished run, or the model is of another one.
        CheckpointError: the model is damaged.
    """
    settings = RunSettings.read(folder)
    summary = runfolder.read_summary(folder)
    model = build_model(
        settings.model,
        num_classes=summary["num_classes"],
        input_shape=tuple(summary["input_shape"]),
        seed=0,
    )
    stored = load_sparse(folder / runfolder.MODEL)
    runfolder.check_run(folder / runfolder.MODEL, stored.metadata.get("run"))
    model.load_state_dict(stored.state)
    return model.eval()


def _both_sides(settings: RunSettings) -> tuple[SampleSet, ImageSamples, ImageSamples]:
    """The data set, its training samples and those to test with: inputs with a class each.

    Raises:
        DataError: as `load_sample_set`, other samples, or none to test with.
    """
    data = load_sample_set(settings.dataset, how=settings.reading)
    if not isinstance(data.train, ImageSamples):
        raise DataError(
            f"{data.name}: these samples have no class each, and this command trains classifiers; "
            "datapruning.train(data, task=...) trains for other tasks"
        )
    if not isinstance(data.test, ImageSamples):
        raise DataError(f"{data.name} has no samples to test with; set a share of them aside")
    return data, data.train, data.test


def _teacher(settings: RunSettings, data: SampleSet, samples: ImageSamples) -> nn.Module:
    """The teacher, refused if its labels may mean something else."""
    folder = Path(settings.teacher)
    summary = runfolder.read_summary(folder)
    if "num_classes" not in summary:
        raise RunError(f"{folder} is not a run of `datapruning train`; give the folder of one")
    check_classes(data.num_classes or 0, summary["num_classes"])
    if summary["fingerprint"] != samples.fingerprint:
        raise RunError(
            f"the teacher in {folder} was trained on other data ({summary['dataset']}, "
            f"fingerprint {summary['fingerprint']}; these have {samples.fingerprint}): its classes "
            "may mean something else, and it may have seen these test samples; train one on these"
        )
    return load_model(folder).to(settings.device)


def _open(folder: Path, settings: RunSettings, *, resume: bool) -> None:
    if not resume:
        runfolder.prepare(folder, settings.toml())
        return
    changed = differences(asdict(settings), asdict(RunSettings.read(folder)))
    if changed:
        raise RunError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}; {OR_ELSEWHERE}"
        )


def _run(
    settings: RunSettings,
    folder: Path,
    data: SampleSet,
    samples: ImageSamples,
    test: ImageSamples,
    *,
    subset: Subset | None,
    rows: Tensor | None,
    teacher: nn.Module | None,
    say: Progress,
) -> None:
    task = ImageClassification()

    def build(seed: int) -> nn.Module:
        return build_model(
            settings.model,
            num_classes=data.num_classes,
            input_shape=tuple(samples.images.shape[1:]),
            seed=seed,
        ).to(settings.device)

    choice, objective = None, None
    if teacher is not None:
        distillation = Distillation(teacher, settings.alpha, settings.temperature)
        choice, objective = distillation.prepare(
            samples, task,
            build=build, rows=rows, config=settings.training, seed=settings.seed,
            device=settings.device, folder=folder, say=say,
        )  # fmt: skip
    model = build(model_seed(settings.seed))
    journal = _Journal(folder, settings.training, say)
    result = train(
        model,
        samples,
        task,
        config=settings.training,
        seed=training_seed(settings.seed),
        rows=rows,
        objective=objective,
        callbacks=[journal],
        checkpoint=folder / CHECKPOINT,
        run=runfolder.run_name(folder),
        device=settings.device,
    )
    summary = _summary(
        settings, data, samples, subset=subset, rows=rows, choice=choice, result=result
    )
    logits, labels = predict(model, test, task)
    right = (logits.argmax(1) == labels).double()
    summary |= {
        "test_accuracy": float(right.mean()),
        "test_loss": float(functional.cross_entropy(logits.double(), labels)),
        "test_accuracy_by_class": [
            float(right[labels == c].mean()) if bool((labels == c).any()) else None
            for c in range(data.num_classes or 0)
        ],
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds": journal.seconds,
        "version": __version__,
    }
    metadata = {"dataset": data.name, "model": settings.model, "seed": str(settings.seed)}
    metadata |= {"images": str(test.images.numpy().dtype), **PREPROCESSING.to_metadata()}
    metadata["run"] = runfolder.run_name(folder)
    save_sparse(folder / runfolder.MODEL, model.state_dict(), None, metadata=metadata)
    runfolder.write_summary(folder, summary)
    for name in (CHECKPOINT, LOGITS):
        (folder / name).unlink(missing_ok=True)


def _summary(
    settings: RunSettings,
    data: SampleSet,
    samples: ImageSamples,
    *,
    subset: Subset | None,
    rows: Tensor | None,
    choice: AlphaChoice | None,
    result: TrainingResult,
) -> dict[str, Any]:
    labels = samples.labels if rows is None else samples.labels[rows]
    alpha = None
    if settings.teacher:
        alpha = choice.alpha if choice is not None else float(settings.alpha)
    return {
        "dataset": data.name,
        "fingerprint": samples.fingerprint,
        "model": settings.model,
        "seed": settings.seed,
        "num_classes": data.num_classes,
        "input_shape": list(samples.images.shape[1:]),
        "num_samples": len(samples),
        "num_kept": len(labels),
        "kept_fraction": len(labels) / len(samples),
        "policy": "" if subset is None else subset.policy,
        "method": "" if subset is None else subset.method,
        "class_counts": samples.labels.bincount(minlength=data.num_classes or 0).tolist(),
        "class_counts_kept": labels.bincount(minlength=data.num_classes or 0).tolist(),
        "teacher": settings.teacher,
        "alpha": alpha,
        "temperature": settings.temperature if settings.teacher else None,
        "alpha_curve": None if choice is None else [asdict(point) for point in choice.curve],
        "num_held_out": None if choice is None else choice.num_held_out,
        "epochs": result.epochs,
        "steps": result.steps,
        "samples_seen": result.samples_seen,
    }


class _Journal:
    """Writes metrics.jsonl, a line an epoch; what a kill left behind a checkpoint is cut off."""

    def __init__(self, folder: Path, config: TrainingConfig, say: Progress) -> None:
        self._folder, self._config, self._say = folder, config, say
        self._lines: list[dict[str, Any]] = []
        self._before, self._started = 0.0, time.monotonic()
        self._reset()
        self._rewrite()

    @property
    def seconds(self) -> float:
        """Spent on this run, the parts before interruptions among them."""
        return self._before + time.monotonic() - self._started

    @torch.no_grad()
    def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._loss += float(functional.cross_entropy(logits.double(), labels, reduction="sum"))
        self._right += int((logits.argmax(1) == labels).sum())
        self._seen += len(labels)

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        line = {
            "epoch": epoch + 1,
            "train_accuracy": self._right / self._seen,
            "train_loss": self._loss / self._seen,
            "samples": self._seen,
        }
        self._lines.append(line)
        runfolder.append_metrics(self._folder, line)
        total = "" if self._config.steps is not None else f"/{self._config.epochs}"
        self._say(
            f"epoch {epoch + 1:>3}{total}  training accuracy {100 * line['train_accuracy']:6.2f} %"
            f"  loss {line['train_loss']:.4f}"
        )
        self._reset()

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self._lines, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lines, self._before = list(state["lines"]), state["seconds"]
        self._rewrite()

    def _rewrite(self) -> None:
        runfolder.write_metrics(self._folder, self._lines)

    def _reset(self) -> None:
        self._loss, self._right, self._seen = 0.0, 0, 0


def default_folder(settings: RunSettings, *, resume: bool) -> Path:
    """runs/DATASET-KEPT-sSEED, numbered; with resume, the latest of them."""
    kept = Path(settings.subset).stem if settings.subset else "all"
    stem = f"{Path(settings.dataset).name}-{kept}-s{settings.seed}"
    return runfolder.default_path(stem, resume=resume)
