"""What tables of pruned trainings share: a preset of their size and the page they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunelab.data.datasets import ImageSet
from prunelab.runs.provenance import commit
from simulations.command import Call
from simulations.page import page


@dataclass(frozen=True)
class Preset:
    """Size of an experiment.

    Attributes:
        dataset: a name, replaced by --data.
        num_train, num_test: a stratified subset; None: everything.
        settings: whatever the experiment reads.
    """

    dataset: str
    model: str
    epochs: int
    batch_size: int
    num_train: int | None
    num_test: int | None
    settings: Mapping[str, Any]


def accuracy_page(
    title: str, call: Call, preset: Preset, data: ImageSet, *, body: Sequence[str]
) -> str:
    """The page of an experiment whose accuracies on the test side are compared."""
    return page(
        title,
        command=call.command,
        at=commit(),
        notes=[
            f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test "
            f"samples, fingerprint {data.fingerprint}",
            "test accuracy in %, mean ± sample standard deviation over seeds "
            f"{', '.join(map(str, call.seeds))}; the seed decides scores, selection, initial "
            "weights and order; test data were read once a run, at its end, and decided nothing",
        ],
        body=body,
        settings={
            "model": preset.model,
            "epochs": preset.epochs,
            "batch_size": preset.batch_size,
            **preset.settings,
        },
    )
