"""Networks and data sets that a caller of this process has given, by the names they got.

A configuration holds names alone. Functions that can be imported keep "module:function", which
works everywhere; other objects are known in this process only. Networks and data are named by
their content, so that a run can be continued with equal ones; other functions by what they are
called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from prunelab.data.reading import Reading
    from prunelab.data.sides import SampleSet

_models: dict[str, Any] = {}
_datasets: dict[str, SampleSet] = {}
_objects: dict[str, Any] = {}


def name_model(model: str | nn.Module | Callable[..., nn.Module]) -> str:
    """The name of a network: a name as it is; else one under which `given_model` has it."""
    if isinstance(model, str):
        return model
    if name := importable_name(model):
        return name
    path = getattr(model, "__qualname__", type(model).__qualname__)
    is_network = hasattr(model, "state_dict") and not isinstance(model, type)
    name = f"{path}@{_content(model)}" if is_network else path
    if type(_models.get(name)) is type(model) and name != path:
        _models[name] = model  # the other may have been trained since
    return _enter(_models, name, model)


def importable_name(value: Any) -> str:
    """ "module:name" of a function or class that other processes can import; "" of others."""
    module, path = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    is_found = path and getattr(sys.modules.get(module), path, None) is value
    return f"{module}:{path}" if is_found and module != "__main__" else ""


def continue_as(name: str, stored: str) -> str:
    """The name of what was given, in a run that is continued, where it is called `stored`.

    The same function or object, made again, is another one, and would have a number of its own.
    """
    for table in (_models, _objects):
        if name in table and stored.partition("#")[0] == name.partition("#")[0]:
            table[stored] = table[name]
            return stored
    return name


def given_model(name: str) -> Any:
    """What `prunelab.networks.build_model` takes for a name."""
    return _models.get(name, name)


def name_object(value: Any) -> str:
    """The name of a task, an optimiser's rule or a schedule: one that is a name as it is.

    Others are called "module:name", which works everywhere where it can be imported.
    """
    if isinstance(value, str):
        return value
    if path := importable_name(value):
        return path
    is_named = hasattr(value, "__qualname__")
    named = value if is_named else type(value)
    # An object is not what its class would make: "()" is nothing that could be imported.
    name = f"{named.__module__}:{named.__qualname__}{'' if is_named else '()'}"
    return _enter(_objects, name, value)


def given_object(name: str) -> Any:
    """What was given under a name of `name_object`; None where it is to be imported."""
    return _objects.get(name)


def given_task(name: str) -> Any:
    """What `prunelab.training.task.make_task` takes for a name."""
    return _objects.get(name, name)


def name_dataset(data: Any, *, seed: int = 0, how: Reading | None = None) -> str:
    """A name as it is, a path whole; of other data a name under which `given_dataset` has them.

    A function that can be imported is called "module:function", which works everywhere.

    Args:
        data: a name, or what `prunelab.data.given.as_sample_set` takes.
        how: how it is taken.

    Raises:
        DataError: it is none of these.
    """
    if name := _name_of(data):
        return name
    return _enter(_datasets, *_called(data, seed, how))


def is_dataset(data: Any, name: str, *, seed: int = 0, how: Reading | None = None) -> bool:
    """Whether `name_dataset` would call the data so; others are not kept."""
    if own := _name_of(data):
        return name in {own, str(data)}
    if "@" not in name:  # of nothing that was given as an object
        return False
    called, found = _called(data, seed, how)
    return called == name and _enter(_datasets, called, found) == name


def given_dataset(name: str) -> SampleSet | None:
    """The data set of a name; None where nobody gave it."""
    return _datasets.get(name)


def is_given(name: str) -> bool:
    """Whether the name is that of something given, which this process alone knows."""
    return name in _models or name in _datasets or name in _objects


def _name_of(data: Any) -> str:
    """The name of data that every process can have by one; "" of others."""
    if isinstance(data, str | Path):
        from prunelab.data.datasets import DATASETS  # noqa: PLC0415

        name, path = str(data), Path(data)
        # A relative path would not mean the same to who reads the run from elsewhere.
        return str(path.resolve()) if name not in DATASETS and path.exists() else name
    return importable_name(data) if inspect.isfunction(data) else ""


def _called(data: Any, seed: int, how: Reading | None) -> tuple[str, SampleSet]:
    """What data are called by their content; the same that are known by their name there."""
    from prunelab.data.given import sample_set_of  # noqa: PLC0415
    from prunelab.data.reading import Reading  # noqa: PLC0415

    found = sample_set_of(data, how or Reading(), seed=seed)
    name = f"{found.name}@{found.fingerprint}"
    for known, other in _datasets.items():
        if known.partition("#")[0] == name and _are_same(found, other):
            return known, other
    return name, found


def _enter(table: dict[str, Any], name: str, value: Any) -> str:
    """A name under which the table has this very object."""
    number, free = 1, name
    while free in table and table[free] is not value:
        number += 1
        free = f"{name}#{number}"
    table[free] = value
    return free


def _are_same(one: SampleSet, other: SampleSet) -> bool:
    """Whether two data sets of one fingerprint are the same in the rest, too."""
    groups = [None if s.train_groups is None else s.train_groups.tolist() for s in (one, other)]
    are_called_alike = one.class_names == other.class_names
    return are_called_alike and one.num_classes == other.num_classes and groups[0] == groups[1]


def _content(model: Any) -> str:
    """16 hexadecimal digits of a network's modules and weights."""
    import hashlib  # noqa: PLC0415

    from prunelab.data.datasets import fingerprint  # noqa: PLC0415

    sha = hashlib.sha256(repr(model).encode())
    sha.update(fingerprint(*model.state_dict().values()).encode())
    return sha.hexdigest()[:16]
