"""What the grids are: data, network, length, densities, and what is tried in tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulations.comparison.cells import Point


@dataclass(frozen=True)
class Preset:
    """A grid.

    Attributes:
        title: of its page.
        settings: of every run, of methods those that know them.
        alphas: Dirichlet concentrations; None: IID.
        rates: learning rates that are tried for every method and density.
        own: of methods that are tried with other settings too: as many points as there are rates.
        tuning_seeds: none of them a seed of the table.
        note: what a reader should know of the choice.
    """

    title: str
    settings: Mapping[str, Any]
    densities: Sequence[float]
    rates: Sequence[float]
    alphas: Sequence[float | None] = (0.5,)
    seeds: Sequence[int] = (0, 1, 2)
    tuning_seeds: Sequence[int] = (1000,)
    own: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    note: str = ""

    @property
    def clients(self) -> int:
        """Of a run."""
        return int(self.settings["data.clients"])

    def points(self, method: str) -> Sequence[Point]:
        """What is tried for a method, the smallest learning rate first.

        Raises:
            ValueError: a method has more, or fewer, points than the others.
        """
        common = [(("training.lr", rate),) for rate in sorted(self.rates)]
        own = list(self.own.get(method, common))
        if len(own) != len(common):
            raise ValueError(f"{method}: {len(own)} points are tried, of others {len(common)}")
        return sorted(own)


TUNING_ALPHA = 0.5
# For clients' memory, which is the same in every round of a kind: two rounds have all kinds.
SHORT: dict[str, Any] = {
    "training.rounds": 2,
    "training.local_epochs": 1,
    "method.adjust_every": 1,
    "method.adjust_until": 3,
    "federation.clients_per_round": 0,
}

ADJUSTING = ("fedtiny", "fedtiny-vanilla", "fedtiny-plus", "prunefl", "feddst", "fedmef", "fedrts")
"""Methods that move their mask as often as a setting says; `fedsgc` needs a round between."""


def _own(*points: tuple[float, int, int]) -> dict[str, Sequence[Point]]:
    """Of every adjusting method the same points: learning rate, adjust_every, adjust_until."""
    keys = ("training.lr", "method.adjust_every", "method.adjust_until")
    found = tuple(tuple(zip(keys, point, strict=True)) for point in points)
    return {name: found for name in ADJUSTING}  # noqa: C420 - a tuple, which nobody changes


_SMALL: dict[str, Any] = {
    "data.num_train": 5000,
    "data.num_test": 2000,
    "data.clients": 10,
    "training.rounds": 12,
    "training.local_epochs": 1,
    "training.batch_size": 32,
    "method.adjust_every": 2,
    "method.adjust_until": 7,
}

PRESETS = {
    "digits": Preset(
        "Federated pruning on digits",
        {
            "data.dataset": "digits",
            "data.num_train": 700,
            "data.clients": 6,
            "model.name": "resnet8",
            "training.rounds": 14,
            "method.adjust_every": 2,
            "method.adjust_until": 9,
        },
        densities=(0.01, 0.03, 0.1),
        rates=(0.03, 0.1, 0.3, 0.6),
        own=_own((0.03, 1, 11), (0.3, 1, 11), (0.3, 2, 9), (0.6, 1, 11)),
        tuning_seeds=(1000, 1001),
        note="density 0.005 is left out: it leaves resnet8 fewer than 400 weights, less than one "
        "for each output of its layers",
    ),
    "small": Preset(
        "Federated pruning on CIFAR-10, small",
        {**_SMALL, "data.dataset": "cifar10", "data.augment": True, "model.name": "resnet18"},
        densities=(0.01, 0.03),
        rates=(0.025, 0.05, 0.1),
        own=_own((0.025, 1, 10), (0.05, 1, 10), (0.05, 2, 7)),
    ),
    "fashion": Preset(
        "Federated pruning on Fashion-MNIST",
        {**_SMALL, "data.dataset": "fashion-mnist", "model.name": "resnet8", "model.width": 32},
        densities=(0.01, 0.03),
        rates=(0.05, 0.1, 0.2, 0.4),
        own=_own((0.05, 1, 10), (0.1, 1, 10), (0.1, 2, 7), (0.2, 1, 10)),
    ),
    "resnet8": Preset(
        "Federated pruning on CIFAR-10 with a narrow network",
        {
            "data.dataset": "cifar10",
            "data.num_train": 5000,
            "data.num_test": 2000,
            "data.clients": 10,
            "data.augment": True,
            "model.name": "resnet8",
            "training.rounds": 20,
            "training.local_epochs": 1,
            "training.batch_size": 32,
            "method.adjust_every": 2,
            "method.adjust_until": 14,
        },
        densities=(0.01, 0.05, 0.1),
        rates=(0.03, 0.1, 0.3),
    ),
    "full": Preset(
        "Federated pruning on CIFAR-10",
        {
            "data.dataset": "cifar10",
            "data.clients": 10,
            "data.augment": True,
            "model.name": "resnet18",
            "training.rounds": 300,
            "training.local_epochs": 5,
            "training.batch_size": 64,
            "training.device": "cuda",
            "method.adjust_every": 10,
            "method.adjust_until": 100,
        },
        densities=(0.005, 0.01, 0.03, 0.1),
        alphas=(0.1, 0.5, None),
        rates=(0.03, 0.1, 0.3),
    ),
}
