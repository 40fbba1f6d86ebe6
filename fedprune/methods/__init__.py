"""Federated methods: one file (or folder) each, listed by name in METHODS.

An own method needs what is imported here, and nothing else: `Method` or one of its children,
`RunState` and `Start` for the server's half, `Request`, `Reply`, `Local` and `train` for the
client's.
"""

from __future__ import annotations

from fedprune.errors import ConfigError
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.site import Local
from fedprune.local.training import train
from fedprune.methods.base import Collector, Method, RunState, Start, train_request
from fedprune.methods.calibrated import Wanda
from fedprune.methods.feddst import FedDST
from fedprune.methods.fedmef import FedMef
from fedprune.methods.fedpm import FedPM
from fedprune.methods.fedprox import FedProx
from fedprune.methods.fedrts import FedRTS
from fedprune.methods.fedsgc import FedSGC
from fedprune.methods.fedtiny import FedTiny, FedTinyFixedMask, FedTinyVanillaSelection
from fedprune.methods.fedtiny.plus import FedTinyPlus
from fedprune.methods.fjord import FjORD
from fedprune.methods.gmp import GMP, GraNet
from fedprune.methods.grasp import Grasp
from fedprune.methods.heterofl import HeteroFL
from fedprune.methods.lotteryfl import LotteryFL
from fedprune.methods.magnitude import Magnitude
from fedprune.methods.perp import PERP
from fedprune.methods.prunefl import PruneFL
from fedprune.methods.random_mask import RandomMask
from fedprune.methods.small_dense import SmallDense
from fedprune.methods.snip import Snip
from fedprune.methods.sparsyfed import SparsyFed
from fedprune.methods.ssfl import SSFL
from fedprune.methods.synflow import SynFlow
from prunelab.errors import close_names
from prunelab.runs.imported import imported

__all__ = [
    "BASELINES",
    "DEFAULT_METHOD",
    "GMP",
    "METHODS",
    "MODEL",
    "PERP",
    "SSFL",
    "Collector",
    "Expected",
    "FedDST",
    "FedMef",
    "FedPM",
    "FedProx",
    "FedRTS",
    "FedSGC",
    "FedTiny",
    "FedTinyFixedMask",
    "FedTinyPlus",
    "FedTinyVanillaSelection",
    "FjORD",
    "GraNet",
    "Grasp",
    "HeteroFL",
    "Local",
    "LotteryFL",
    "Magnitude",
    "Method",
    "Pooled",
    "PruneFL",
    "RandomMask",
    "Reply",
    "Request",
    "RunState",
    "SmallDense",
    "Snip",
    "SparsyFed",
    "Start",
    "SynFlow",
    "Wanda",
    "is_given",
    "method_class",
    "method_name",
    "train",
    "train_request",
]

_ALL: tuple[type[Method], ...] = (
    Method,
    Magnitude,
    FedTiny,
    FedTinyVanillaSelection,
    FedTinyFixedMask,
    FedTinyPlus,
    RandomMask,
    Snip,
    Grasp,
    SynFlow,
    SSFL,
    Wanda,
    PERP,
    GMP,
    GraNet,
    PruneFL,
    FedDST,
    FedSGC,
    FedMef,
    FedRTS,
    SparsyFed,
    FedPM,
    LotteryFL,
    HeteroFL,
    FjORD,
    SmallDense,
    FedProx,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
DEFAULT_METHOD = FedTiny.name
BASELINES = (Method.name, Magnitude.name)
"""What others are compared with: nothing is pruned, and what is pruned costs nothing to choose."""


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
    if ":" not in name:
        raise ConfigError(
            f"unknown method {name!r}; known methods: {', '.join(METHODS)}; or give module:Class"
            f"{close_names(name, METHODS)}"
        )
    try:
        found = imported(name)
    except ImportError as error:
        raise ConfigError(f"method {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method {name!r} is no class derived from fedprune.Method")
    return _checked(found)


def is_given(name: str) -> bool:
    """Whether the class of that name is known in this process alone."""
    module, _, path = name.partition(":")
    return name in _given and (module == "__main__" or "<locals>" in path)


def method_name(method: Method) -> str:
    """The name by which `method_class` finds a method's class, in this process at least.

    Raises:
        ConfigError: it is no method.
    """
    if not isinstance(method, Method):
        what = (
            f"the class {method.__name__}: call it" if isinstance(method, type) else f"{method!r}"
        )
        raise ConfigError(
            "method: expected a name, or an object such as fedprune.FedTiny(density=0.05); "
            f"got {what}"
        )
    kind = _checked(type(method))
    if METHODS.get(kind.name) is kind:
        return kind.name
    name = f"{kind.__module__}:{kind.__qualname__}"
    _given[name] = kind
    return name


def _checked(kind: type[Method]) -> type[Method]:
    """A method's class, once it is known that its settings are fields and its name its own."""
    if "__dataclass_params__" not in vars(kind):
        raise ConfigError(
            f"method {kind.__qualname__}: its settings are no fields yet; write "
            "@dataclass(frozen=True) above the class"
        )
    if METHODS.get(kind.name, kind) is not kind:
        raise ConfigError(
            f"method {kind.__qualname__} is called {kind.name!r}, as one that there is; give it "
            'a name: ClassVar[str] = "..." of its own'
        )
    return kind
