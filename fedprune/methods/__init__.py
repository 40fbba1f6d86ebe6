"""Federated methods: one file each, listed by name in METHODS."""

from __future__ import annotations

from fedprune.config import RunConfig
from fedprune.errors import ConfigError
from fedprune.methods.base import Method
from fedprune.methods.fedtiny import FedTiny, FedTinyFixedMask, FedTinyVanillaSelection
from fedprune.methods.magnitude import Magnitude
from fedprune.methods.small_dense import SmallDense
from prunelab.data.datasets import ImageSet

METHODS: dict[str, type[Method]] = {
    "fedavg": Method,
    "magnitude": Magnitude,
    "fedtiny": FedTiny,
    "fedtiny-vanilla": FedTinyVanillaSelection,
    "fedtiny-fixed": FedTinyFixedMask,
    "small-dense": SmallDense,
}


def build_method(config: RunConfig, dataset: ImageSet) -> Method:
    """The method that the configuration names.

    Raises:
        ConfigError: no such method; the message lists those there are.
    """
    check_method(config.pruning.method)
    return METHODS[config.pruning.method](config, dataset)


def check_method(name: str) -> None:
    """Raise ConfigError unless `name` is a known method."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
