"""A trained model with all that its use needs: preprocessing, names of classes, how to call it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedprune.config import RunConfig
from fedprune.given import given_task, is_given, name_model
from fedprune.local.data import split
from fedprune.local.network import TorchNetwork
from fedprune.local.site import split_seed
from fedprune.rounds.folder import CONFIG, MODEL, read_model, stored_config
from fedprune.trained.evaluation import (
    ClassScore,
    Evaluation,
    class_scores,
    client_scores,
    fairness,
)
from fedprune.trained.inputs import Accepted, Inputs, of_sample_set, read_inputs
from fedprune.trained.predictions import Predictions
from prunelab.data.batches import Preprocessing
from prunelab.data.tensors import batch_of, prepare, tensor_of
from prunelab.errors import DataError, ModelError, RunError
from prunelab.training.task import Classification, MultiLabel, Task, forward, make_task
from sparsemodel.layers.from_state import carried_tensors, load_state_, sparse_model
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.export import Exported, export
from sparsemodel.storage.state_file import load_state

BATCH = 256  # samples at a time
_NEEDED = ("model", "input_shape", "inputs", "num_classes", "preprocessing")


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
        return _accepted(self.metadata, self.class_names)

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
        found = []
        with torch.no_grad():
            for rows in _batches(len(inputs)):
                outputs = self._outputs(self._batch(inputs, rows))
                if isinstance(self.task, Classification):
                    outputs = outputs[:, : self.accepted.num_classes].softmax(1)
                elif isinstance(self.task, MultiLabel):
                    outputs = outputs.sigmoid()
                found.append(outputs.float().reshape(len(rows), -1))
        values = torch.cat(found).numpy()
        kind = "values"
        if isinstance(self.task, Classification):
            kind = "classes"
        elif isinstance(self.task, MultiLabel):
            kind = "labels"
        names = self.names
        if len(names) != values.shape[1]:
            count = values.shape[1]
            names = ("value",) if count == 1 else tuple(f"value {k}" for k in range(count))
        return Predictions(inputs.ids, values, names, kind)

    def evaluate(self, data: Any = None) -> Evaluation:
        """Loss and metric, precision and recall of each class, and how clients are served.

        Args:
            data: anything labelled that `predict` takes; None: the run's own data, its test side,
                which no training has touched, and each client's own samples that were set aside
                from training.

        Raises:
            DataError: as `predict`, or data without labels.
            RunError: no data were given, and the run's own cannot be had.
        """
        if data is not None:
            return self._evaluated(read_inputs(data, self.accepted))
        return self._on_own_data()

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

    def _batch(self, inputs: Inputs, rows: np.ndarray[Any, Any]) -> Any:
        """A batch as the task takes it; samples without targets get zeros, which nobody reads."""
        values = inputs.inputs[rows]
        if values.dtype == np.uint8:
            values = prepare(tensor_of(values), preprocessing=self.preprocessing).numpy()
        targets = np.zeros(len(rows), np.int64) if inputs.targets is None else inputs.targets[rows]
        return batch_of(values, targets)

    def _outputs(self, batch: Any) -> Tensor:
        if isinstance(self.task, Classification):
            return self.task.logits(self.model, batch)
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
        task = _listening(self.task, logits) if isinstance(self.task, Classification) else self.task
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
        data, rows = workspace.dataset, []
        for client, share in enumerate(workspace.shares):
            own = split(share, with_test=with_test, seed=split_seed(config, client))
            rows.append(own.test if with_test else own.dev)
        train = of_sample_set(data, self.accepted, side="train")
        joined = np.concatenate(rows)
        assert train.targets is not None, "training samples have targets"
        held = Inputs(train.name, joined.tolist(), train.inputs[joined], train.targets[joined])
        test = held if data.test is None else of_sample_set(data, self.accepted, side="test")
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
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        first = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        return torch.randn(2, *accepted.shape, generator=random).to(first.dtype)


def load_trained(
    path: Path, *, model: str | nn.Module | Callable[..., nn.Module] | None = None
) -> Trained:
    """What `fedprune.load` gives."""
    folder, config = _folder_of(path), None
    if folder is not None:
        config = stored_config(folder)
        if not (folder / MODEL).exists():
            raise RunError(f"the run in {folder} has no model yet; continue it with --resume")
    state, metadata = load_state(path) if folder is None else read_model(folder)
    missing = [key for key in _NEEDED if key not in metadata]
    if missing:
        raise ModelError(
            f"{path} does not say {', '.join(missing)}: it was not written by a run of this "
            "release; read it by sparsemodel.load(path, model)"
        )
    name = metadata["model"] if model is None else name_model(model)
    class_names = tuple(map(str, json.loads(metadata.get("class_names", "[]"))))
    return Trained(
        model=_network(path, state, metadata, name, config),
        preprocessing=Preprocessing.from_metadata(metadata),
        class_names=class_names,
        metadata=metadata,
        folder=folder,
        task=make_task(given_task(metadata.get("task", "classification"))),
    )


def _folder_of(path: Path) -> Path | None:
    """The run's folder that was named, or whose model file was; None of a file by itself."""
    if path.is_dir():
        return path
    return path.parent if path.name == MODEL and (path.parent / CONFIG).exists() else None


def _network(
    path: Path, state: SparseState, metadata: Mapping[str, str], name: str, config: RunConfig | None
) -> nn.Module:
    """The network that a state is of, in evaluation mode."""
    accepted = _accepted(metadata, ())
    widths = [config.model.width] if config else [0, int(metadata.get("width") or 0)]
    problem = ""
    for width in dict.fromkeys(widths):
        own = config or RunConfig.parse(
            {"method.name": "fedavg", "seed": int(metadata.get("seed", 0)), "model.width": width}
        )
        own = replace(own, model=replace(own.model, name=name))
        network = TorchNetwork(
            own, accepted.num_classes, accepted.shape, metadata.get("task", "classification")
        )
        try:
            built = network.empty_model()
        except ModelError as error:
            problem = str(error)
            continue
        shapes = {key: tuple(value.shape) for key, value in carried_tensors(built).items()}
        if shapes == state.shapes():
            return _filled(built, state.ordered(shapes)).eval()
        problem = f"{name!r} has other parameters than the file"
    cure = (
        "; the run was given it as an object: name what builds it, --model module:function "
        "(in Python: load(path, model=...))"
        if ":" not in name
        else "; it is not the network of the run any more"
    )
    raise ModelError(f"{path}: {problem}{cure}")


def _filled(built: nn.Module, state: SparseState) -> nn.Module:
    if state.patterns is not None:
        return sparse_model(built, state)
    load_state_(built, state)
    return built


def _accepted(metadata: Mapping[str, str], class_names: tuple[str, ...]) -> Accepted:
    shape = tuple(int(size) for size in metadata["input_shape"].split("x") if size)
    count = metadata["num_classes"]
    return Accepted(metadata["inputs"], shape, class_names, int(count) if count else None)


def _listening(task: Classification, seen: list[Tensor]) -> Classification:
    """The task, which notes the logits that it makes."""
    noted = copy.copy(task)

    def logits(model: nn.Module, batch: Any) -> Tensor:
        seen[:] = [task.logits(model, batch)]
        return seen[0]

    noted.logits = logits  # type: ignore[method-assign]
    return noted


def _batches(num_samples: int) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, num_samples, BATCH):
        yield np.arange(start, min(start + BATCH, num_samples))
