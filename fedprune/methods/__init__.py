"""Federated methods: one file (or folder) each, listed by name in METHODS.

An own method needs what is imported here, and nothing else: `Method` or one of its children,
`RunState` and `Start` for the server's half, `Request`, `Reply`, `Local` and `train` for the
client's.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from sparsemodel.taxonomy import BEFORE, CHANNELS, DURING, N_OF_M, NEVER, WEIGHTS, Traits

__all__ = [
    "BASELINES",
    "DEFAULT_METHOD",
    "GMP",
    "METHODS",
    "MODEL",
    "PERP",
    "SSFL",
    "TRAITS",
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


@dataclass(frozen=True, kw_only=True)
class FederatedTraits(Traits):
    """A federated method as a way of pruning.

    Attributes:
        data: whose samples its choice of a mask looks at.
    """

    data: tuple[str, ...] = ()


_SERVER, _CLIENTS = ("server's samples",), ("clients' samples",)
_FEDTINY = "Huang et al., ICDCS 2023"
_ALL: dict[type[Method], FederatedTraits] = {
    Method: FederatedTraits(
        when=NEVER, units=(), criterion="nothing", source="McMahan et al., AISTATS 2017"
    ),
    Magnitude: FederatedTraits(when=BEFORE, criterion="size", source="baseline"),
    FedTiny: FederatedTraits(
        when=DURING, criterion="size, gradients", data=_CLIENTS, source=_FEDTINY
    ),
    FedTinyVanillaSelection: FederatedTraits(
        when=DURING, criterion="size, gradients", data=_CLIENTS, source=_FEDTINY
    ),
    FedTinyFixedMask: FederatedTraits(
        when=BEFORE, criterion="size, losses", data=_CLIENTS, source=_FEDTINY
    ),
    FedTinyPlus: FederatedTraits(
        when=DURING, criterion="size, gradients", data=_CLIENTS, source=f"after {_FEDTINY}"
    ),
    RandomMask: FederatedTraits(when=BEFORE, criterion="chance", source="baseline"),
    Snip: FederatedTraits(
        when=BEFORE, criterion="loss, first order", data=_SERVER, source="Lee et al., ICLR 2019"
    ),
    Grasp: FederatedTraits(
        when=BEFORE, criterion="gradient flow", data=_SERVER, source="Wang et al., ICLR 2020"
    ),
    SynFlow: FederatedTraits(
        when=BEFORE, criterion="synaptic flow", source="Tanaka et al., NeurIPS 2020"
    ),
    SSFL: FederatedTraits(
        when=BEFORE, criterion="loss, first order", data=_CLIENTS, source="Ohib et al., TMLR 2025"
    ),
    Wanda: FederatedTraits(
        when=BEFORE, units=(WEIGHTS, N_OF_M), criterion="size × input norm", data=_CLIENTS,
        source="Sun et al., ICLR 2024",
    ),
    PERP: FederatedTraits(
        when=BEFORE, units=(WEIGHTS, N_OF_M), criterion="size × input norm", data=_CLIENTS,
        source="Zimmer et al., 2023",
    ),
    GMP: FederatedTraits(when=DURING, criterion="size", source="Zhu and Gupta, 2017"),
    GraNet: FederatedTraits(
        when=DURING, criterion="size, gradients", data=_CLIENTS, source="Liu et al., NeurIPS 2021"
    ),
    PruneFL: FederatedTraits(
        when=DURING, criterion="size, gradients", data=_CLIENTS, source="Jiang et al., TNNLS 2022"
    ),
    FedDST: FederatedTraits(
        when=DURING, criterion="size, gradients", data=_CLIENTS, source="Bibikar et al., AAAI 2022"
    ),
    FedSGC: FederatedTraits(
        when=DURING, criterion="size, gradients, signs", data=_CLIENTS,
        source="Tian et al., ICLR 2024 workshop",
    ),
    FedMef: FederatedTraits(
        when=DURING, criterion="size, gradients", data=_CLIENTS, source="Huang et al., CVPR 2024"
    ),
    FedRTS: FederatedTraits(
        when=DURING, criterion="beliefs, drawn", data=_CLIENTS, source="Huang et al., NeurIPS 2025"
    ),
    SparsyFed: FederatedTraits(
        when=DURING, criterion="size", data=_CLIENTS, source="Guastella et al., ICLR 2025"
    ),
    FedPM: FederatedTraits(
        when=DURING, criterion="learned scores", data=_CLIENTS, source="Isik et al., ICLR 2023"
    ),
    LotteryFL: FederatedTraits(
        when=DURING, criterion="size, accuracy", data=_CLIENTS, source="Li et al., SEC 2021"
    ),
    HeteroFL: FederatedTraits(
        when=BEFORE, units=(CHANNELS,), criterion="order", source="Diao et al., ICLR 2021"
    ),
    FjORD: FederatedTraits(
        when=DURING, units=(CHANNELS,), criterion="order, drawn widths",
        source="Horváth et al., NeurIPS 2021",
    ),
    SmallDense: FederatedTraits(
        when=BEFORE, units=(CHANNELS,), criterion="bytes", source="baseline"
    ),
    FedProx: FederatedTraits(
        when=BEFORE, criterion="size", source="Li et al., MLSys 2020"
    ),
}  # fmt: skip
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
TRAITS = {method.name: traits for method, traits in _ALL.items()}
"""What each is, in the terms of a survey of pruning: `fedprune methods` shows it."""
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
