"""Federated methods: one file (or folder) each, listed by name in METHODS."""

from __future__ import annotations

from fedprune.errors import ConfigError
from fedprune.methods.base import Method
from fedprune.methods.fedprox import FedProx
from fedprune.methods.fedtiny import FedTiny, FedTinyFixedMask, FedTinyVanillaSelection
from fedprune.methods.magnitude import Magnitude
from fedprune.methods.small_dense import SmallDense
from fedprune.methods.ssfl import SSFL

_ALL: tuple[type[Method], ...] = (
    Method,
    Magnitude,
    FedTiny,
    FedTinyVanillaSelection,
    FedTinyFixedMask,
    SmallDense,
    FedProx,
    SSFL,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
DEFAULT_METHOD = FedTiny.name


def check_method(name: str) -> None:
    """Raise ConfigError unless `name` is a known method."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
