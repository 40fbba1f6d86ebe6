"""Data pruning: score training samples, select a subset and train on it.

>>> import datapruning
>>> table = datapruning.score("digits", method="random", seed=1)
>>> subset = datapruning.select(table, keep=0.5)
>>> len(subset)
719
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datapruning.samples import ImageSamples, TokenSamples
    from datapruning.scoring import score
    from datapruning.select import select
    from datapruning.table import ScoreTable, Subset
    from datapruning.task import CausalLM, ImageClassification, Task, TextClassification
    from datapruning.training import TrainingConfig, evaluate, train

_HOMES = {
    "CausalLM": "task",
    "ImageClassification": "task",
    "ImageSamples": "samples",
    "ScoreTable": "table",
    "Subset": "table",
    "Task": "task",
    "TextClassification": "task",
    "TokenSamples": "samples",
    "TrainingConfig": "training",
    "evaluate": "training",
    "score": "scoring",
    "train": "training",
}

__all__ = [
    "CausalLM",
    "ImageClassification",
    "ImageSamples",
    "ScoreTable",
    "Subset",
    "Task",
    "TextClassification",
    "TokenSamples",
    "TrainingConfig",
    "evaluate",
    "score",
    "select",
    "train",
]


def __getattr__(name: str) -> Any:
    # Importing the package must not import torch, so each name is fetched when first used.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This package, whose `select` is the function even once the module select.py is imported."""

    @property
    def select(self) -> Any:
        return importlib.import_module(f"{__name__}.select").select

    @select.setter
    def select(self, module: ModuleType) -> None:
        """The import system puts every imported submodule here; it stays in sys.modules."""


sys.modules[__name__].__class__ = _Package
