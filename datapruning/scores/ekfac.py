"""Influence by EK-FAC, through the optional package kronfluence.

EK-FAC takes the Gauss–Newton matrix for block diagonal over layers, each block for a Kronecker
product whose eigenvalues are then corrected.
Source: Grosse et al., Studying Large Language Model Generalization with Influence Functions
(2023); George et al., Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis (NeurIPS 2018).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.errors import ScoreError
from datapruning.scores.gradient import check_eval, on_device
from prunelab.data.samples import Samples
from prunelab.runs.temporary import temporary_folder
from prunelab.training.task import Classification, Task
from sparsemodel.layers.base import SparseLayer

BATCH = 64
EVERYTHING = "all_modules"  # kronfluence's name for the sum over layers


def ekfac(
    task: Task,
    model: nn.Module,
    samples: Samples,
    *,
    target: Samples | None = None,
    layers: Sequence[str] | None = None,
    damping: float | None = None,
    seed: int = 0,
    chunk: int = BATCH,
) -> Tensor:
    """⟨G⁻¹v, ∇ℓ_i⟩ of every sample, G the EK-FAC of the training samples, v the target's gradient.

    Linear and Conv2d layers alone count, their weights and biases. Labels for G are drawn from
    the model (the true Fisher) for a task with classes, the data's own for others.

    Args:
        model: trained, in eval mode; a copy is worked on.
        target: a held-out split of the training side; None: the samples themselves.
        layers: names of the layers that count; None: all Linear and Conv2d.
        damping: added to the eigenvalues of every layer; None: a tenth of the layer's mean.
        seed: of the drawn labels.
        chunk: samples of a batch.

    Returns:
        float64 [N] on the CPU; high means keep.

    Raises:
        ScoreError: kronfluence is not installed, the model is in train mode or sparse, or it has
            no such layers.
    """
    try:
        import kronfluence  # noqa: PLC0415
    except ImportError:
        raise ScoreError(
            "EK-FAC needs kronfluence; pip install 'fedprune[influence]', or take solver \"cg\""
        ) from None
    check_eval(model)
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise ScoreError("EK-FAC knows no sparse layers; take densify(model), or tracin")
    own = _kronfluence_task(task, layers)
    device = next(model.parameters()).device
    with torch.random.fork_rng(), temporary_folder() as folder:
        torch.manual_seed(seed)
        try:
            prepared = kronfluence.prepare_model(copy.deepcopy(model), own)
        except Exception as error:  # its errors have no common class
            raise ScoreError(f"kronfluence cannot take this model: {error}") from error
        analyzer = kronfluence.Analyzer(
            "ekfac", prepared, own, cpu=device.type == "cpu", disable_tqdm=True,
            log_level=logging.ERROR, output_dir=str(folder),
        )  # fmt: skip
        scores = _scores(analyzer, samples, samples if target is None else target, damping, chunk)
    return scores / len(samples if target is None else target)


def _scores(
    analyzer: Any, samples: Samples, target: Samples, damping: float | None, chunk: int
) -> Tensor:
    """Products with the summed gradient of the target, float64 [N]."""
    from kronfluence.arguments import FactorArguments, ScoreArguments  # noqa: PLC0415
    from kronfluence.utils.dataset import DataLoaderKwargs  # noqa: PLC0415

    train, query = _RowNumbers(samples), _RowNumbers(target)
    factors = FactorArguments(
        strategy="ekfac", use_empirical_fisher=not isinstance(analyzer.task.task, Classification)
    )
    analyzer.fit_all_factors(
        "factors", train, per_device_batch_size=chunk, factor_args=factors,
        dataloader_kwargs=DataLoaderKwargs(collate_fn=train.collate),
    )  # fmt: skip
    # One collate function serves both sides: a row number says which side it is of.
    both = _Sides(train, query)
    analyzer.compute_pairwise_scores(
        "scores", "factors", query_dataset=both.query, train_dataset=both.train,
        per_device_query_batch_size=chunk, per_device_train_batch_size=chunk,
        score_args=ScoreArguments(damping_factor=damping, aggregate_query_gradients=True),
        dataloader_kwargs=DataLoaderKwargs(collate_fn=both.collate),
    )  # fmt: skip
    found: Tensor = analyzer.load_pairwise_scores("scores")[EVERYTHING]
    return found[0].double()


class _RowNumbers(torch.utils.data.Dataset[int]):
    """Samples as a data set of row numbers, which `collate` turns into a batch."""

    def __init__(self, samples: Samples, *, offset: int = 0) -> None:
        self.samples, self.offset = samples, offset

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> int:
        return row + self.offset

    def collate(self, rows: Sequence[int]) -> Any:
        return self.samples.batch(torch.tensor(rows) - self.offset)


class _Sides:
    """Both data sets under one numbering, as kronfluence takes a single collate function."""

    def __init__(self, train: _RowNumbers, query: _RowNumbers) -> None:
        self.train = train
        self.query = _RowNumbers(query.samples, offset=len(train))

    def collate(self, rows: Sequence[int]) -> Any:
        side = self.query if rows[0] >= self.query.offset else self.train
        return side.collate(rows)


def _kronfluence_task(task: Task, layers: Sequence[str] | None) -> Any:
    import kronfluence  # noqa: PLC0415

    class Wrapped(kronfluence.Task):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            self.task = task

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            batch = on_device(model, batch)
            if not sample:
                return task.loss(model, batch).sum()
            assert isinstance(task, Classification)
            logits = task.logits(model, batch)
            drawn = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
            return functional.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return task.loss(model, on_device(model, batch)).sum()

        def get_influence_tracked_modules(self) -> list[str] | None:
            return None if layers is None else list(layers)

    return Wrapped()
