"""From a run's folder, or a model's file alone, to a model that is ready for use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from fedprune.config import RunConfig
from fedprune.given import given_task, name_model
from fedprune.local.network import TorchNetwork
from fedprune.methods.base import Method
from fedprune.rounds.folder import CONFIG, MODEL, read_model, stored_config
from fedprune.trained.inputs import accepted_inputs
from fedprune.trained.model import Trained
from prunelab.data.batches import Preprocessing
from prunelab.errors import ModelError, RunError
from prunelab.training.task import Task, make_task
from sparsemodel.layers.from_state import carried_tensors, load_state_, sparse_model
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

_NEEDED = ("model", "input_shape", "inputs", "num_classes", "preprocessing")


def load_trained(
    path: Path,
    *,
    model: str | nn.Module | Callable[..., nn.Module] | None = None,
    task: str | Task | Callable[[], Task] | None = None,
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
        task=make_task(task or given_task(metadata.get("task", "classification"))),
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
    accepted = accepted_inputs(metadata, ())
    widths = [config.model.width] if config else [0, int(metadata.get("width") or 0)]
    problem = ""
    for width in dict.fromkeys(widths):
        own = config or RunConfig.parse(
            {"method.name": Method.name, "seed": int(metadata.get("seed", 0)), "model.width": width}
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
        else "; it has to be what the run was given: go to the folder that it was started in, or "
        "name it by --model module:function"
    )
    raise ModelError(f"{path}: {problem}{cure}")


def _filled(built: nn.Module, state: SparseState) -> nn.Module:
    if state.patterns is not None:
        return sparse_model(built, state)
    load_state_(built, state)
    return built
