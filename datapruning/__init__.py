"""Data pruning: score training samples, keep some of them, train on those.

>>> import datapruning
>>> table = datapruning.score("digits", method="random", seed=1)
>>> kept = table.select(keep=0.5, policy="hardest")
>>> len(kept), kept.of("digits")[0][0].shape
(719, torch.Size([1, 8, 8]))
"""

from typing import TYPE_CHECKING

from sparsemodel._lazy import lazy

if TYPE_CHECKING:
    from datapruning.loops.coreset_selector import CoresetSelector
    from datapruning.loops.dynamics_recorder import DynamicsRecorder
    from datapruning.loops.indexed import indexed
    from datapruning.scoring.methods import Method
    from datapruning.scoring.score import score
    from datapruning.selection.kept import KeptSamples
    from datapruning.selection.select import select
    from datapruning.selection.table import ScoreTable, Subset
    from datapruning.students.train import train
    from prunelab.data.samples import ImageSamples, TokenSamples
    from prunelab.data.streamed import stream
    from prunelab.data.text import tokenized
    from prunelab.training.loop import TrainingConfig, evaluate
    from prunelab.training.task import (
        CausalLM,
        ImageClassification,
        MultiLabel,
        Regression,
        Supervised,
        Task,
        TextClassification,
    )
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "datapruning.loops.coreset_selector": "CoresetSelector",
            "datapruning.loops.dynamics_recorder": "DynamicsRecorder",
            "datapruning.loops.indexed": "indexed",
            "datapruning.scoring.methods": "Method",
            "datapruning.scoring.score": "score",
            "datapruning.selection.kept": "KeptSamples",
            "datapruning.selection.select": "select",
            "datapruning.selection.table": "ScoreTable Subset",
            "datapruning.students.train": "train",
            "prunelab.data.samples": "ImageSamples TokenSamples",
            "prunelab.data.streamed": "stream",
            "prunelab.data.text": "tokenized",
            "prunelab.training.loop": "TrainingConfig evaluate",
            "prunelab.training.task": (
                "CausalLM ImageClassification MultiLabel Regression Supervised Task "
                "TextClassification"
            ),
        },
    )

__all__ = [
    "CausalLM",
    "CoresetSelector",
    "DynamicsRecorder",
    "ImageClassification",
    "ImageSamples",
    "KeptSamples",
    "Method",
    "MultiLabel",
    "Regression",
    "ScoreTable",
    "Subset",
    "Supervised",
    "Task",
    "TextClassification",
    "TokenSamples",
    "TrainingConfig",
    "evaluate",
    "indexed",
    "score",
    "select",
    "stream",
    "tokenized",
    "train",
]
