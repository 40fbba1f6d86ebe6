"""Federated pruning on Flower.

>>> import fedprune
>>> result = fedprune.run(
...     model="resnet8",
...     data="digits",
...     method=fedprune.Magnitude(density=0.05),
...     rounds=1,
...     folder=getfixture("tmp_path") / "run",
... )
>>> result.summary["rounds"], round(result.summary["density"], 2)
(1, 0.05)
"""

from typing import TYPE_CHECKING

from sparsemodel._lazy import lazy

if TYPE_CHECKING:
    from fedprune.config import RunConfig
    from fedprune.front import Result, load, run
    from fedprune.methods import METHODS
    from fedprune.methods.base import Method
    from fedprune.methods.feddst import FedDST
    from fedprune.methods.fedprox import FedProx
    from fedprune.methods.fedrts import FedRTS
    from fedprune.methods.fedsgc import FedSGC
    from fedprune.methods.fedtiny import FedTiny
    from fedprune.methods.magnitude import Magnitude
    from fedprune.methods.prunefl import PruneFL
    from fedprune.methods.small_dense import SmallDense
    from fedprune.methods.ssfl import SSFL
    from fedprune.reports.trackers import Tracker
    from fedprune.trained.model import Trained
    from prunelab.runs.version import __version__
    from prunelab.training.task import Supervised
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "fedprune.config": "RunConfig",
            "fedprune.front": "Result load run",
            "fedprune.methods": "METHODS",
            "fedprune.methods.base": "Method",
            "fedprune.methods.feddst": "FedDST",
            "fedprune.methods.fedprox": "FedProx",
            "fedprune.methods.fedrts": "FedRTS",
            "fedprune.methods.fedsgc": "FedSGC",
            "fedprune.methods.fedtiny": "FedTiny",
            "fedprune.methods.magnitude": "Magnitude",
            "fedprune.methods.prunefl": "PruneFL",
            "fedprune.methods.small_dense": "SmallDense",
            "fedprune.methods.ssfl": "SSFL",
            "fedprune.trained.model": "Trained",
            "fedprune.reports.trackers": "Tracker",
            "prunelab.runs.version": "__version__",
            "prunelab.training.task": "Supervised",
        },
    )

__all__ = [
    "METHODS",
    "SSFL",
    "FedDST",
    "FedProx",
    "FedRTS",
    "FedSGC",
    "FedTiny",
    "Magnitude",
    "Method",
    "PruneFL",
    "Result",
    "RunConfig",
    "SmallDense",
    "Supervised",
    "Tracker",
    "Trained",
    "__version__",
    "load",
    "run",
]
