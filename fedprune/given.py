"""Networks and data sets that a caller of this process has given, by the names they got.

A configuration holds names alone. Functions that can be imported keep "module:function", which
works everywhere; other objects are known in this process only. Networks and data are named by
their content, so that a run can be continued with equal ones; other functions by what they are
called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from prunelab.data.datasets import ImageSet

_models: dict[str, Any] = {}
_datasets: dict[str, ImageSet] = {}

TEST_SHARE = 0.2


def name_model(model: str | nn.Module | Callable[..., nn.Module]) -> str:
    """The name of a network: a name as it is; else one under which `given_model` has it."""
    if isinstance(model, str):
        return model
    module = getattr(model, "__module__", "")
    path = getattr(model, "__qualname__", type(model).__qualname__)
    if getattr(sys.modules.get(module), path, None) is model and module != "__main__":
        return f"{module}:{path}"
    is_network = hasattr(model, "state_dict") and not isinstance(model, type)
    name = f"{path}@{_content(model)}" if is_network else path
    if type(_models.get(name)) is type(model) and name != path:
        _models[name] = model  # the other may have been trained since
    return _enter(_models, name, model)


def continue_as(name: str, stored: str) -> str:
    """The name of a given function in a run that is continued, where it is called `stored`.

    The same function, defined again, is another object, and would have a number of its own.
    """
    if name not in _models or stored.partition("#")[0] != name.partition("#")[0]:
        return name
    _models[stored] = _models[name]
    return stored


def given_model(name: str) -> Any:
    """What `prunelab.networks.build_model` takes for a name."""
    return _models.get(name, name)


def name_dataset(data: Any, *, seed: int = 0) -> str:
    """A name or folder as it is; of other data a name under which `given_dataset` has them.

    Args:
        data: a name or folder; an ImageSet; a mapping with "train" and "test" (or "validation");
            or anything that `prunelab.data.objects.as_samples` takes, of which a seeded fifth of
            every class is set aside for the test.

    Raises:
        DataError: it is none of these, or no images.
    """
    if isinstance(data, str | Path):
        return str(data)
    found = _image_set(data, seed)
    name = f"{found.name}@{found.fingerprint}"
    for known, other in _datasets.items():
        if known.partition("#")[0] == name and _are_same(found, other):
            return known
    return _enter(_datasets, name, found)


def given_dataset(name: str) -> ImageSet | None:
    """The data set of a name, or what the function of a "module:function" returns; else None.

    Raises:
        DataError: there is no such function, or what it returns is no data set of images.
    """
    from prunelab.errors import DataError  # noqa: PLC0415
    from prunelab.runs.imported import IMPORTED, imported  # noqa: PLC0415

    if name in _datasets or not IMPORTED.fullmatch(name):
        return _datasets.get(name)
    try:
        make = imported(name)
    except ImportError as error:
        raise DataError(f"data set {name!r}: {error}") from None
    return _image_set(make(), seed=0)


def is_given(name: str) -> bool:
    """Whether this process knows the name of a given network or data set."""
    return name in _models or name in _datasets


def _enter(table: dict[str, Any], name: str, value: Any) -> str:
    """A name under which the table has this very object."""
    number, free = 1, name
    while free in table and table[free] is not value:
        number += 1
        free = f"{name}#{number}"
    table[free] = value
    return free


def _are_same(one: ImageSet, other: ImageSet) -> bool:
    """Whether two data sets of one fingerprint are the same in the rest, too."""
    groups = [None if s.train_groups is None else s.train_groups.tolist() for s in (one, other)]
    return one.num_classes == other.num_classes and groups[0] == groups[1]


def _content(model: Any) -> str:
    """16 hexadecimal digits of a network's modules and weights."""
    import hashlib  # noqa: PLC0415

    from prunelab.data.datasets import fingerprint  # noqa: PLC0415

    sha = hashlib.sha256(repr(model).encode())
    sha.update(fingerprint(*model.state_dict().values()).encode())
    return sha.hexdigest()[:16]


def _image_set(data: Any, seed: int) -> ImageSet:
    import numpy as np  # noqa: PLC0415

    from prunelab.data.datasets import ImageSet  # noqa: PLC0415
    from prunelab.data.objects import as_samples  # noqa: PLC0415
    from prunelab.data.samples import ImageSamples  # noqa: PLC0415
    from prunelab.errors import DataError  # noqa: PLC0415
    from prunelab.runs.seeds import rng  # noqa: PLC0415

    if isinstance(data, ImageSet):
        return data

    def side(part: Any) -> ImageSamples:
        samples = as_samples(part)
        if not isinstance(samples, ImageSamples):
            raise DataError("clients train on images with a label each, not on other samples")
        return samples

    if isinstance(data, Mapping):
        test = "test" if "test" in data else "validation"
        if "train" not in data or test not in data:
            raise DataError(f"expected the sides train and test, got {', '.join(map(str, data))}")
        sides = [(s.images, s.labels) for s in (side(data["train"]), side(data[test]))]
    else:
        samples = side(data)
        labels = samples.labels.numpy()
        held = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels).tolist():
            members = rng(seed, label).permutation(np.flatnonzero(labels == label))
            held[members[: int(TEST_SHARE * len(members))]] = True
        if not held.any():
            raise DataError("too few samples to set a fifth of every class aside for the test")
        sides = [(samples.images[rows], samples.labels[rows]) for rows in (~held, held)]
    return ImageSet("given", *sides[0], *sides[1])
