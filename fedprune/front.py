"""The front door: `run`, `load`, and the object that holds what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune.config import RunConfig, continued
from fedprune.errors import ConfigError
from fedprune.given import continue_as, is_given, name_dataset, name_model, name_object
from fedprune.methods import is_given as is_given_method
from fedprune.methods import method_name
from fedprune.methods.base import Method
from sparsemodel.extras import need

if TYPE_CHECKING:
    from torch import nn

    from fedprune.local.optimizer import Rule
    from fedprune.reports.trackers import Tracker
    from fedprune.trained.evaluation import Evaluation
    from fedprune.trained.model import Trained
    from fedprune.trained.predictions import Predictions
    from prunelab.data.batches import Preprocessing
    from prunelab.training.task import Task
    from sparsemodel.runtime.state import SparseState
    from sparsemodel.storage.export import Exported


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: what the run left: model.safetensors, metrics.jsonl, summary.json, report.html.
        summary: the content of summary.json.
    """

    folder: Path
    summary: Mapping[str, Any]

    @property
    def report(self) -> Path:
        """The page report.html."""
        from fedprune.rounds.folder import REPORT  # noqa: PLC0415

        return self.folder / REPORT

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: the start, then one a round."""
        from fedprune.rounds.folder import read_metrics  # noqa: PLC0415

        return read_metrics(self.folder)

    @cached_property
    def state(self) -> SparseState:
        """The final model as arrays: active values and patterns."""
        from fedprune.rounds.folder import read_model  # noqa: PLC0415

        return read_model(self.folder)[0]

    @cached_property
    def trained(self) -> Trained:
        """The final model with its preprocessing and the names of its classes."""
        return load(self.folder)

    @property
    def model(self) -> nn.Module:
        """The final model in evaluation mode: of sparse layers where it was pruned, else dense.

        It takes inputs as `preprocessing` makes them.
        """
        return self.trained.model

    @property
    def preprocessing(self) -> Preprocessing:
        """What the final model's input is made of: `model(tensor of preprocessing.apply(images))`.

        Bytes become floats; images that are floats already pass as they are.
        """
        return self.trained.preprocessing

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, in the order of the model's outputs; empty where the data have none."""
        return self.trained.class_names

    def predict(self, data: Any) -> Predictions:
        """What the final model says of data; see `Trained.predict`."""
        return self.trained.predict(data)

    def evaluate(self, data: Any = None) -> Evaluation:
        """How good it is, by class and client, on the run's data or others: `Trained.evaluate`."""
        return self.trained.evaluate(data)

    def export(
        self, path: str | Path, *, format: str | None = None, force: bool = False
    ) -> Exported:
        """Write the final model for other programs, checked: `Trained.export`."""
        return self.trained.export(path, format=format, force=force)


def load(
    path: str | Path,
    *,
    model: str | nn.Module | Callable[..., nn.Module] | None = None,
    task: str | Task | Callable[[], Task] | None = None,
) -> Trained:
    """A model that a run left, with all that its use needs.

    Args:
        path: a run's folder, or its model.safetensors.
        model, task: the network and the task, where the run was given objects that this process
            does not have: what `run` takes.

    Raises:
        CheckpointError: no such file, or a damaged one.
        ModelError: a file of something else, a network that is not there, or another one.
    """
    need("torch", "fedprune.load")
    from fedprune.trained.loading import load_trained  # noqa: PLC0415

    return load_trained(Path(path), model=model, task=task)


def run(
    config: RunConfig | None = None,
    folder: str | Path | None = None,
    *,
    model: str | nn.Module | Callable[..., nn.Module] | None = None,
    data: Any = None,
    method: str | Method | None = None,
    task: str | Task | Callable[[], Task] | None = None,
    optimizer: str | Callable[[], Rule] | None = None,
    schedule: str | Callable[[int, int], float] | None = None,
    partition: str | Callable[..., Sequence[Any]] | None = None,
    rounds: int | None = None,
    clients: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    engine: str = "inline",
    resume: bool = False,
    progress: Callable[[], None] = lambda: None,
    tracker: str | Tracker | None = None,
) -> Result:
    """Run a federation in this process, or on Flower's engine, and leave it in a folder.

    Args:
        config: a whole configuration; what is named besides is put in its place.
        folder: the run folder; by default a new one under runs/.
        model: a name, "module:function", a function that builds the network, or a network.
        data: a name; a folder of class folders or of parquet; a table (.csv, .tsv, .parquet);
            "module:function", or a function, that gives data; a mapping of train and test sides;
            or one data set (torch, Hugging Face, pandas, arrays, flwr-datasets' partitions), of
            which `data.test_share` is kept for the test. See `prunelab.data.given.as_sample_set`.
        method: a name, or an object such as `fedprune.FedTiny(density=0.01)`.
        task: loss and metric: a name such as "regression", an object such as
            `fedprune.Supervised(loss, metric)` (losses of 0 or more), or what makes one; None: what
            the data are for.
        optimizer: of clients: "sgd", "adam", "adamw", or what makes a rule (local/optimizer.py).
        schedule: of the learning rate: "cosine", "linear", "constant", or a function of (rounds
            done, rounds) -> factor.
        partition: how clients share the data: a name, or a function of (labels, num_clients, seed)
            -> each client's indices.
        rounds, clients, seed: as in the configuration.
        settings: any other setting as "section.key" -> value.
        engine: "inline" (this process), "batched" (this process, the clients of a round trained
            together) or "flower" (Flower's simulation engine, which needs networks and data by
            name).
        resume: continue what the folder holds, with its own settings where none are given here;
            a complete run is left as it is.
        progress: called a few times a second while metrics.jsonl grows.
        tracker: "tensorboard", "wandb", "mlflow", "module:Class", or an object with the methods
            of `fedprune.Tracker`: is shown each round.

    Raises:
        ConfigError, DataError, ModelError, RunError, SparseModelError: says what, where and
            what to do. A new folder in which nothing was computed is removed again.
    """
    need("torch", "fedprune.run")
    from fedprune.reports.trackers import tracker_of  # noqa: PLC0415
    from fedprune.rounds.folder import CONFIG, default_folder, stored_settings  # noqa: PLC0415
    from fedprune.rounds.run import run as run_config  # noqa: PLC0415

    values: dict[str, Any] = dict(config.flat()) if config is not None else {}
    if method is not None:
        values = {key: value for key, value in values.items() if not key.startswith("method.")}
        values["method.name"] = method if isinstance(method, str) else method_name(method)
        if isinstance(method, Method):
            values |= {f"method.{key}": value for key, value in method.settings().items()}
    named = {
        "model.name": None if model is None else name_model(model),
        "training.task": None if task is None else name_object(task),
        "training.optimizer": None if optimizer is None else name_object(optimizer),
        "training.schedule": None if schedule is None else name_object(schedule),
        "data.partition": None if partition is None else name_object(partition),
        "training.rounds": rounds,
        "data.clients": clients,
        "seed": seed,
    }
    values |= {key: value for key, value in named.items() if value is not None}
    values |= settings or {}
    path = None if folder is None else Path(folder)
    if path is None or not (resume and (path / CONFIG).exists()):
        made = _with_data(RunConfig.parse(values), data)
        path = path or default_folder(made, resume=resume)
    if resume and (path / CONFIG).exists():  # what was not given is what it was
        stored = stored_settings(path)
        for key in _MAY_BE_OBJECTS & values.keys():
            values[key] = continue_as(values[key], str(stored.get(key, "")))
        made = _with_data(RunConfig.parse(continued(stored, values)), data)
    if is_given(made.data.dataset) and (made.data.num_train or made.data.num_test):
        raise ConfigError(
            "data.num_train and data.num_test are for data sets by name; cut these data yourself"
        )
    training = made.training
    objects = {
        "model": is_given(made.model_name),
        "data": is_given(made.data.dataset),
        "method": is_given_method(method_name(made.method)),
        "task": is_given(training.task),
        "optimizer": is_given(training.optimizer),
        "schedule": is_given(training.schedule),
        "partition": is_given(made.data.partition),
    }
    if engine == "flower" and any(objects.values()):
        raise ConfigError(
            f"the flower engine runs in other processes, which do not have this run's "
            f"{', '.join(name for name, given in objects.items() if given)}: give a name, "
            "module:function, module:Class or a folder, or use engine='inline'"
        )
    follower = None if tracker is None else tracker_of(tracker)
    summary = run_config(
        made, path, engine=engine, resume=resume, progress=progress, tracker=follower
    )
    return Result(path, summary)


_MAY_BE_OBJECTS = {
    "model.name",
    "training.task",
    "training.optimizer",
    "training.schedule",
    "data.partition",
}


def _with_data(config: RunConfig, data: Any) -> RunConfig:
    """The configuration with the name of the data that were given, if any were."""
    if data is None:
        return config
    dataset = name_dataset(data, seed=config.seed, how=config.reading)
    return replace(config, data=replace(config.data, dataset=dataset))
