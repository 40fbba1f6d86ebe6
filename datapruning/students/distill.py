"""Knowledge distillation on a pruned data set: the loss, the teacher's logits, the choice of α.

Source: Ben-Baruch et al., Distilling the Knowledge in Data Pruning (2024), after Hinton et al.,
Distilling the Knowledge in a Neural Network (2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.data.datasets import fingerprint
from prunelab.data.samples import Samples
from prunelab.errors import RunError
from prunelab.runs.seeds import generator, stream_seed
from prunelab.training import checkpoint
from prunelab.training.loop import Objective, TrainingConfig, evaluate, predict, train
from prunelab.training.task import Classification
from sparsemodel.kernels.cuda import array_ops as cuda_array_ops
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import reference as cuda_reference

TEMPERATURE = 4.0
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
HELD_OUT = 0.2


def kd_loss(
    logits: Tensor, labels: Tensor, teacher: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """(1 − α) CE(y, p) + α τ² KL(p_T^τ ‖ p_S^τ) of each sample, [B].

    The factor τ² keeps the size of the gradient: that of KL alone falls with 1/τ². Softmaxes are
    taken in float32 at least, of the logits as they are. A sample of label −100 has the loss 0.

    Args:
        logits, teacher: [B, C] of student and teacher; each in any floating dtype.
        labels: int64 [B], or −100 for samples that are left out.
        alpha: weight of the teacher, in [0, 1].
        temperature: τ > 0.

    >>> z, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> kd_loss(z, torch.tensor([0]), t, alpha=1.0, temperature=4.0)  # student = teacher
    tensor([0.])
    """
    if cuda.runner_for(logits) is None:
        return cuda_reference.kd_loss(logits, teacher, labels, alpha, temperature)
    if logits.dtype != teacher.dtype:  # the kernels take one; neither is rounded to the other's
        logits, teacher = logits.float(), teacher.float()
    arrays = logits.contiguous(), teacher.contiguous(), labels.contiguous()
    losses: Tensor = cuda_array_ops.kd_loss(*arrays, alpha, temperature)[0]
    return losses


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Logits of a teacher for some rows.

    Attributes:
        rows: int64 [K], ascending.
        logits: float16 [K, C].
    """

    rows: Tensor
    logits: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """float16 [B, C], in the order of `rows`.

        Raises:
            RunError: a row that the teacher was not asked about.
        """
        places = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        wrong = rows[self.rows[places] != rows]
        if len(wrong):
            raise RunError(
                f"the teacher's logits lack row {int(wrong[0])}; they were stored for "
                f"{len(self.rows)} rows: store them for all rows that are trained on"
            )
        return self.logits[places]


def teacher_logits(
    teacher: nn.Module,
    samples: Samples,
    task: Classification,
    *,
    rows: Tensor | None = None,
    path: Path | None = None,
) -> TeacherLogits:
    """The teacher's logits in eval mode, in half precision, so that it runs once a sample.

    Half precision changes logits below 65,504 by less than one part in 2,000.

    Args:
        rows: which samples; None: all.
        path: a file to keep them in; if it is there and of the same teacher, data and rows, the
            teacher is not run.

    Raises:
        RunError: the file is of another teacher, other data or other rows.
    """
    chosen = torch.arange(len(samples)) if rows is None else rows.sort().values
    signature = {
        "teacher": fingerprint(*teacher.state_dict().values()),
        "data": samples.fingerprint,
        "rows": fingerprint(chosen),
    }
    stored = None if path is None else checkpoint.load(path, signature=signature)
    if stored is None:
        logits, _ = predict(teacher, samples, task, rows=chosen)
        limit = torch.finfo(torch.float16).max
        stored = {"logits": logits.clamp(-limit, limit).half()}
        if path is not None:
            checkpoint.save(path, stored, signature=signature)
    return TeacherLogits(chosen, stored["logits"])


def kd_objective(
    *,
    alpha: float,
    temperature: float = TEMPERATURE,
    cached: TeacherLogits | None = None,
    teacher: nn.Module | None = None,
    task: Classification | None = None,
) -> Objective:
    """An objective for `train`: the mean of `kd_loss` over the batch's samples with a label.

    Args:
        alpha: weight of the teacher, in [0, 1].
        cached: the teacher's logits of the samples as they are; for training without
            augmentation.
        teacher: runs on each batch as the student sees it, which training with augmentation
            needs: logits of another view would not be the teacher's answer.
        task: how the teacher is called and where a batch has its labels; without it batches are
            those of ImageSamples or TokenSamples.

    Raises:
        RunError: α or τ out of range, not exactly one of `cached` and `teacher`, or, while
            training, another number of classes.
    """
    if not 0 <= alpha <= 1:
        raise RunError(f"alpha must be in [0, 1], got {alpha}")
    if not temperature > 0:
        raise RunError(f"temperature must be positive, got {temperature}")
    if (cached is None) == (teacher is None) or (teacher is not None and task is None):
        raise RunError("give either cached logits, or a teacher and its task")
    if teacher is not None:
        teacher.eval()

    def objective(logits: Tensor, batch: Any, rows: Tensor) -> Tensor:
        if cached is not None:
            answer = cached.of(rows.cpu()).to(logits.device)
        else:
            assert teacher is not None
            assert task is not None
            with torch.no_grad():
                answer = task.logits(teacher, batch)
        check_classes(logits.shape[1], answer.shape[1])
        labels = batch_labels(batch) if task is None else task.labels(batch)
        losses = kd_loss(logits, labels, answer, alpha=alpha, temperature=temperature)
        return losses.sum() / (labels != cuda_reference.IGNORED).sum().clamp(min=1)

    return objective


def check_classes(student: int, teacher: int) -> None:
    """Raise RunError unless both give as many logits."""
    if student != teacher:
        raise RunError(
            f"the teacher knows {teacher} classes and the student {student}; distillation needs "
            "one label set: train the teacher on these data"
        )


def batch_labels(batch: Any) -> Tensor:
    """The labels of a batch as samples of this package give it."""
    labels: Tensor = batch["labels"] if isinstance(batch, dict) else batch[1]
    return labels


@dataclass(frozen=True)
class AlphaPoint:
    """What training with one α came to on the held-out split."""

    alpha: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class AlphaChoice:
    """The α that was chosen, and the whole curve.

    Attributes:
        num_train, num_held_out: samples on the two sides of the split.
    """

    alpha: float
    curve: tuple[AlphaPoint, ...]
    num_train: int
    num_held_out: int


def choose_alpha(
    build: Callable[[int], nn.Module],
    samples: Samples,
    task: Classification,
    *,
    objective: Callable[[float], Objective],
    rows: Tensor | None = None,
    config: TrainingConfig,
    seed: int,
    alphas: Sequence[float] = ALPHAS,
    held_out: float = HELD_OUT,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> AlphaChoice:
    """Train with each α and take the most accurate on held-out samples of the training side.

    The split is drawn from all samples, class by class, so that it is as large for a small kept
    fraction as for a large one; models train on the kept rows outside of it. Every α has the
    same start and order. Equal accuracies: the lower loss, then the smaller α. The teacher may
    have seen the held-out samples, which flatters a large α a little; test data are not used.

    Args:
        build: seed -> an untrained student.
        objective: α -> an objective, as `kd_objective` makes it.
        rows: the kept rows; None: all.
        held_out: share of each class that is held out.

    Raises:
        RunError: no α, or so few samples that one side would be empty.
    """
    if not alphas:
        raise RunError("choose_alpha needs one alpha or more")
    left_out = held_out_rows(samples, share=held_out, seed=seed)
    kept = torch.arange(len(samples)) if rows is None else rows
    inside = kept[~torch.isin(kept, left_out)]
    if not len(inside) or not len(left_out):
        raise RunError(
            f"{len(kept)} kept samples are too few to hold some out; give alpha as a number"
        )
    curve = []
    for number, alpha in enumerate(alphas):
        model = build(seed)
        train(
            model, samples, task,
            config=config, seed=seed, rows=inside, objective=objective(alpha), device=device,
        )  # fmt: skip
        result = evaluate(model, samples, task, rows=left_out)
        curve.append(AlphaPoint(float(alpha), result.accuracy, result.loss))
        if progress is not None:
            progress(number + 1, len(alphas))
    best = min(curve, key=lambda point: (-point.accuracy, point.loss, point.alpha))
    return AlphaChoice(best.alpha, tuple(curve), len(inside), len(left_out))


def held_out_rows(samples: Samples, *, share: float, seed: int) -> Tensor:
    """A random share of each class, at least one sample of a class of two or more; ascending.

    Raises:
        RunError: samples without labels, or a share outside (0, 1).
    """
    if samples.labels is None:
        raise RunError("a held-out split by class needs labels; these samples have none")
    if not 0 < share < 1:
        raise RunError(f"the held-out share must be in (0, 1), got {share}")
    random = generator(stream_seed(seed, len(samples)))
    chosen = []
    for label in samples.labels.unique():
        members = (samples.labels == label).nonzero()[:, 0]
        count = max(round(share * len(members)), int(len(members) > 1))
        chosen.append(members[torch.randperm(len(members), generator=random)[:count]])
    return torch.cat(chosen).sort().values
