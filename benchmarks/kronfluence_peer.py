"""kronfluence's pairwise scores of a batch for one query, its factors fitted beforehand."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from typing import Any

import kronfluence
import torch
from kronfluence.arguments import ScoreArguments
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from prunelab.training.task import Task


class Peer:
    """A context in which `pairwise` can be called."""

    def __init__(self, task: Task, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        self.samples, self.query = TensorDataset(*batch), TensorDataset(*(x[:1] for x in batch))
        self.folder = contextlib.ExitStack()
        own = _wrapped(task)
        self.arguments: dict[str, Any] = {
            "model": kronfluence.prepare_model(copy.deepcopy(model), own),
            "task": own,
        }

    def __enter__(self) -> Peer:
        self.folder.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        place = self.folder.enter_context(tempfile.TemporaryDirectory())
        self.analyzer = kronfluence.Analyzer(
            "peer", cpu=True, disable_tqdm=True, log_level=logging.ERROR, output_dir=place,
            **self.arguments,
        )  # fmt: skip
        self.analyzer.fit_all_factors(
            "factors", self.samples, per_device_batch_size=len(self.samples)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.folder.close()

    def pairwise(self) -> Tensor:
        """Scores of all samples for the query, [samples]."""
        self.analyzer.compute_pairwise_scores(
            "scores", "factors", query_dataset=self.query, train_dataset=self.samples,
            per_device_query_batch_size=1, per_device_train_batch_size=len(self.samples),
            score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True,
        )  # fmt: skip
        scores: Tensor = self.analyzer.load_pairwise_scores("scores")["all_modules"][0]
        return scores


def _wrapped(task: Task) -> kronfluence.Task:
    class Wrapped(kronfluence.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if sample:  # labels drawn from the model
                logits = model(batch[0])
                batch = batch[0], torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
            return task.loss(model, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return task.loss(model, batch).sum()

    return Wrapped()
