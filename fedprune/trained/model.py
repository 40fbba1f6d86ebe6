"""A trained model with all that its use needs: preprocessing, names of classes, how to call it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedprune.given import is_dataset, is_given
from fedprune.local.data import Rows, split
from fedprune.local.site import split_seed
from fedprune.rounds.folder import read_metrics, stored_config
from fedprune.rounds.population import had
from fedprune.trained.evaluation import (
    ClassScore,
    Evaluation,
    class_scores,
    client_scores,
    fairness,
)
from fedprune.trained.inputs import Accepted, Inputs, accepted_inputs, of_sample_set, read_inputs
from fedprune.trained.predictions import Predictions
from prunelab.data.arrays import note
from prunelab.data.batches import Preprocessing
from prunelab.data.tensors import batch_of, prepare, tensor_of
from prunelab.errors import DataError, ModelError, RunError
from prunelab.training.task import CausalLM, Classification, MultiLabel, Task, forward
from sparsemodel.storage.export import Exported, export

BATCH = 256  # samples at a time


@dataclass(frozen=True, eq=False)
class Trained:
    """A model that a run left, ready for use; `fedprune.load` makes one.

    Attributes:
        model: in evaluation mode, of sparse layers where it was pruned; takes what
            `preprocessing` makes.
        preprocessing: of the inputs.
        class_names: of its classes or outputs, in order; empty where the data named none.
        metadata: what its file says beside the weights.
        folder: of the run; None where the file alone is known.
        task: what it was trained for.
    """

    model: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    metadata: Mapping[str, str]
    folder: Path | None
    task: Task

    @cached_property
    def accepted(self) -> Accepted:
        """The inputs that it takes."""
        return accepted_inputs(self.metadata, self.class_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its classes: their numbers where nobody named them."""
        count = self.accepted.num_classes or 0
        return self.class_names or tuple(map(str, range(count)))

    def predict(self, data: Any) -> Predictions:
        """What the model says of each sample; preprocessing is applied here.

        Args:
            data: a picture's file or a folder of pictures, pictures, an array of inputs [N, ...],
                or any data set, labelled or not, of which the test side is taken where it has one.

        Raises:
            DataError: data that cannot be read, or that the model cannot take.
            ModelError: a model whose predictions are no classes or numbers, such as a language
                model's.
        """
        inputs = read_inputs(data, self.accepted)
        kind: str = "values"
        finished: nn.Module = nn.Identity()
        if isinstance(self.task, Classification):
            kind, finished = "classes", nn.Softmax(1)
        elif isinstance(self.task, MultiLabel):
            kind, finished = "labels", nn.Sigmoid()
        found = []
        with torch.no_grad():
            for rows in _batches(len(inputs)):
                outputs = self._outputs(self._batch(inputs, rows)).float().reshape(len(rows), -1)
                found.append(finished(outputs))
        values = torch.cat(found).numpy()
        return Predictions(inputs.ids, values, self._columns(values.shape[1]), kind)

    def evaluate(self, data: Any = None) -> Evaluation:
        """Loss and metric, precision and recall of each class, and how clients are served.

        Args:
            data: anything labelled that `predict` takes; None, or the run's own data: their test
                side, which no training has touched, and each client's own samples that were set
                aside from training.

        Raises:
            DataError: as `predict`, or data without labels.
            RunError: no data were given, and the run's own cannot be had.
        """
        if data is None or self._is_own(data):
            return self._on_own_data()
        inputs = read_inputs(data, self.accepted)
        if isinstance(data, str | Path) and not inputs.has_side:
            note(
                f"{data} has no test side: all samples are evaluated, and training samples may be "
                "among them"
            )
        return self._evaluated(inputs)

    def _is_own(self, data: Any) -> bool:
        """Whether data are those of the run, whose training samples are no test of it."""
        if self.folder is None:
            return False
        config = stored_config(self.folder)
        with suppress(DataError):
            return is_dataset(data, config.data.dataset, seed=config.seed, how=config.reading)
        return False

    def export(
        self, path: str | Path, *, format: str | None = None, force: bool = False
    ) -> Exported:
        """Write it for other programs (`sparsemodel.export`), checked on random inputs.

        Preprocessing and class names go along where the format has room; a network is fed what
        `preprocessing` makes.
        """
        return export(
            self.model,
            path,
            example=self._example(),
            format=format,
            metadata=dict(self.metadata),
            force=force,
        )

    def _columns(self, count: int) -> tuple[str, ...]:
        """What so many outputs are called."""
        if len(self.names) == count:
            return self.names
        return ("value",) if count == 1 else tuple(f"value {k}" for k in range(count))

    def _batch(self, inputs: Inputs, rows: np.ndarray[Any, Any]) -> Any:
        """A batch as the task takes it; samples without targets get zeros, which nobody reads."""
        values = inputs.inputs[rows]
        if values.dtype == np.uint8:
            values = prepare(tensor_of(values), preprocessing=self.preprocessing).numpy()
        targets = np.zeros(len(rows), np.int64) if inputs.targets is None else inputs.targets[rows]
        return batch_of(values, targets)

    def _outputs(self, batch: Any) -> Tensor:
        if isinstance(self.task, Classification):
            return self.task.logits(self.model, batch)[:, : self.accepted.num_classes]
        outputs = forward(self.model, batch)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"the model gives a {type(outputs).__name__}, no tensor of predictions; call "
                "`.model` itself, such as by its generate"
            )
        return outputs

    def _evaluated(self, inputs: Inputs) -> Evaluation:
        losses, metrics, predicted = self._measured(inputs)
        classes: tuple[ClassScore, ...] = ()
        if predicted is not None:
            assert inputs.targets is not None, "they were measured"
            classes = class_scores(inputs.targets, predicted, self.names)
        return Evaluation(
            data=inputs.name,
            samples=len(inputs),
            loss=float(losses.mean()),
            metric_name=self.task.metric_name,
            metric=None if metrics is None else float(metrics.mean()),
            classes=classes,
        )

    def _measured(self, inputs: Inputs) -> tuple[Any, Any, Any]:
        """Losses, metrics (or None) and predicted classes (or None) of the samples, [N]."""
        if inputs.targets is None:
            raise DataError(f"{inputs.name} has no labels to compare with; use predict")
        logits: list[Tensor] = []
        task = self.task
        if isinstance(task, Classification):
            task = _listening(task, logits, self.accepted.num_classes)
        losses, metrics, predicted = [], [], []
        with torch.no_grad():
            for rows in _batches(len(inputs)):
                loss, metric = task.measure(self.model, self._batch(inputs, rows))
                losses.append(loss.double().cpu())
                metrics += [] if metric is None else [metric.double().cpu()]
                predicted += [part.argmax(1).cpu() for part in logits[-1:]]
        return (
            torch.cat(losses).numpy(),
            torch.cat(metrics).numpy() if metrics else None,
            torch.cat(predicted).numpy() if predicted else None,
        )

    def _on_own_data(self) -> Evaluation:
        if self.folder is None:
            raise RunError("name the data: a model's file alone does not know those of its run")
        config = stored_config(self.folder)
        dataset = config.data.dataset
        if "@" in dataset and not Path(dataset).exists() and not is_given(dataset):
            raise RunError(
                f"the data of {self.folder} were given as an object ({dataset}), which this "
                "process does not have; name the data to evaluate on"
            )
        from fedprune.rounds.workspace import open_workspace  # noqa: PLC0415

        workspace, with_test = open_workspace(config), config.federation.clients_test
        data = workspace.dataset
        shares = [
            split(share, with_test=with_test, seed=split_seed(config, client))
            for client, share in enumerate(workspace.shares)
        ]
        rows = [own.test if with_test else own.dev for own in shares]
        train = of_sample_set(data, self.accepted, side="train")
        joined = np.concatenate(rows)
        assert train.targets is not None, "training samples have targets"
        held = Inputs(train.name, joined.tolist(), train.inputs[joined], train.targets[joined])
        test = held if data.test is None else of_sample_set(data, self.accepted, side="test")
        if not _had(self.folder, shares):
            return self._evaluated(test)
        owners = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
        losses, metrics, _ = self._measured(held)
        clients = client_scores(owners, losses, metrics, num_clients=len(rows))
        return replace(
            self._evaluated(test),
            clients=clients,
            clients_on="test" if with_test else "development",
            fairness=fairness(clients) if self.task.metric_name == "accuracy" else None,
        )

    def _example(self) -> Any:
        """Inputs to trace the model by, and to check it on."""
        accepted, random = self.accepted, torch.Generator().manual_seed(0)
        if accepted.dtype == "int64":
            ids = torch.randint(1, 8, (2, *accepted.shape), generator=random)
            texts: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return texts | ({"use_cache": False} if isinstance(self.task, CausalLM) else {})
        first = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        return torch.randn(2, *accepted.shape, generator=random).to(first.dtype)


def _had(folder: Path, shares: Sequence[Rows]) -> bool:
    """Whether the clients of a run had so many samples each: they may have brought their own."""
    start: dict[str, Any] = next(iter(read_metrics(folder)), {})
    return had(start, ((k, len(own.train), len(own.dev)) for k, own in enumerate(shares)))


def _listening(task: Classification, seen: list[Tensor], num_classes: int | None) -> Classification:
    """The task, which notes the logits that it makes: those of the classes there are."""
    noted = copy.copy(task)

    def logits(model: nn.Module, batch: Any) -> Tensor:
        seen[:] = [task.logits(model, batch)[:, :num_classes]]
        return seen[0]

    noted.logits = logits  # type: ignore[method-assign]
    return noted


def _batches(num_samples: int) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, num_samples, BATCH):
        yield np.arange(start, min(start + BATCH, num_samples))
