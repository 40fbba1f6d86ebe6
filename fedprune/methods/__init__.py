"""Federated methods: one file (or folder) each, listed by name in METHODS."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter

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


_given: dict[str, type[Method]] = {}  # classes of this process that no import finds


def method_class(name: str) -> type[Method]:
    """The method of a name: one of METHODS, or "module:Class", which is imported.

    Raises:
        ConfigError: no such method; the message lists those there are.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _given:
        return _given[name]
    module, colon, path = name.partition(":")
    found: object = None
    if colon:
        try:
            found = attrgetter(path)(import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"method {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(
            f"unknown method {name!r}; known methods: {', '.join(METHODS)}; or give module:Class"
        )
    return found


def method_name(method: Method) -> str:
    """The name by which `method_class` finds a method's class, in this process at least."""
    kind = type(method)
    if METHODS.get(kind.name) is kind:
        return kind.name
    name = f"{kind.__module__}:{kind.__qualname__}"
    _given[name] = kind
    return name
