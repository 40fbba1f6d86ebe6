"""Data pruning: score training samples, select a subset and train on it.

>>> import datapruning
>>> table = datapruning.score("digits", method="random", seed=1)
>>> subset = datapruning.selection.select(table, keep=0.5)
>>> len(subset)
719
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datapruning.scoring.score import score
    from datapruning.selection.select import select
    from datapruning.selection.table import ScoreTable, Subset
    from prunelab.data.samples import ImageSamples, TokenSamples
    from prunelab.training.loop import TrainingConfig, evaluate, train
    from prunelab.training.task import CausalLM, ImageClassification, Task, TextClassification

_HOMES = {
    "CausalLM": "prunelab.training.task",
    "ImageClassification": "prunelab.training.task",
    "ImageSamples": "prunelab.data.samples",
    "ScoreTable": "datapruning.selection.table",
    "Subset": "datapruning.selection.table",
    "Task": "prunelab.training.task",
    "TextClassification": "prunelab.training.task",
    "TokenSamples": "prunelab.data.samples",
    "TrainingConfig": "prunelab.training.loop",
    "evaluate": "prunelab.training.loop",
    "score": "datapruning.scoring.score",
    "select": "datapruning.selection.select",
    "train": "prunelab.training.loop",
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
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
