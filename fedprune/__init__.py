"""Federated pruning on Flower.

>>> import fedprune
>>> config = fedprune.RunConfig.parse({"method.name": "magnitude", "training.rounds": 1})
>>> summary = fedprune.run(config, getfixture("tmp_path") / "run")
>>> summary["rounds"], round(summary["density"], 2)
(1, 0.05)
"""

from fedprune.config import RunConfig
from fedprune.rounds.run import run
from prunelab.runs.version import __version__

__all__ = ["RunConfig", "__version__", "run"]
