"""`DynamicsRecorder`: scores of samples from the user's own training run, with no other trained."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datapruning.errors import ScoreError
from datapruning.loops.indexed import ID
from datapruning.scores.recorder import Recorder
from datapruning.scoring.methods import METHODS, Method, checked_options, named_methods
from datapruning.scoring.score import notes_on
from datapruning.scoring.steps import mean_confidence
from datapruning.selection.kept import has_items
from datapruning.selection.table import ScoreTable
from prunelab.data.columns import LABEL_NAMES
from prunelab.data.datasets import fingerprint
from prunelab.data.objects import as_samples
from prunelab.runs.version import __version__
from sparsemodel.loops.events import LoopCallback

_ROWS = 8192  # samples of an epoch that are taken at once
_UNKNOWN = -1


class DynamicsRecorder(LoopCallback):
    """Watches a training by transformers' Trainer, Lightning or a loop of your own, and scores.

    Batches have to say which samples they hold: train on `datapruning.indexed(data)`.

    - transformers: `Trainer(train_dataset=indexed(data), callbacks=[recorder])`, with
      `remove_unused_columns=False` in its arguments. The model never sees the ids.
    - Lightning: `training_step` takes (inputs, labels, ids) or a mapping with `id`, and returns
      {"loss": loss, "logits": logits}.
    - a loop of your own: `record` after each forward pass, `close_epoch` after each epoch.

    What is recorded is the forward pass that a sample was trained on; evaluation is not. Of a
    sample that comes twice in an epoch, as a sampler pads the shares of several processes, the
    first counts. With torch.distributed each process records its own batches, and at the end of an
    epoch all get those of all: the table is that of one process that trained on the same samples
    with the same weights, to rounding. A run that is resumed from a checkpoint is gone on with.

    Memory: 4 · num_classes bytes a sample for the epoch in progress, beside those of `Recorder`.

    Args:
        data: what is trained on, as given to `indexed`.

    Raises:
        ScoreError: when training begins, or in the first step: batches without ids, logits or
            labels, or epochs that do not follow on those recorded.
    """

    def __init__(self, data: Any) -> None:
        self._dataset = data if isinstance(data, str) else type(data).__name__
        self._fingerprint = ""
        if has_items(data):
            self._ids = torch.arange(len(data))
            self._labels = torch.full((len(data),), _UNKNOWN)
        else:
            samples = as_samples(data)
            self._ids, self._fingerprint = samples.ids, samples.fingerprint
            if samples.labels is None:
                raise ScoreError("training dynamics are for samples with classes; these have none")
            self._labels = samples.labels
        self._order = self._ids.argsort()
        self._record = Recorder(len(self._ids))
        self._epoch: int | None = None  # the one in progress
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []  # of it: rows, logits, labels
        self._model = ""
        self._given: dict[int, Tensor | None] = {}  # thread -> ids of the batch in its model
        self._hooks: list[Any] = []
        self._without_ids: nn.Module | None = None  # the model that ids are kept from

    @property
    def recorders(self) -> Sequence[Recorder]:
        """One of each run: what scores of training dynamics read."""
        return [self._record]

    @property
    def num_epochs(self) -> int:
        """Epochs that were recorded to their end."""
        return self._record.num_epochs

    def table(
        self, method: str | Method = "aum", *, options: Mapping[str, Any] | None = None
    ) -> ScoreTable:
        """The scores by a method that reads the record alone, as `datapruning.score` returns them.

        Args:
            method: forgetting, aum, dyn-unc, dual or tdds.
            options: of the method, such as {"window": 5}.

        Raises:
            ScoreError: another method or option, or too few epochs.

        Warns:
            ScoreWarning: scores that are NaN (samples that were never trained on) or all equal.
        """
        ((name, chosen),) = named_methods(method).items()
        if not chosen.records or chosen.finish is None:
            raise ScoreError(
                f"method {name!r} needs more than a record of the training; of that alone: "
                + ", ".join(n for n, m in METHODS.items() if m.records)
            )
        settings = checked_options(name, chosen, options or {})
        scores = chosen.finish(self, **settings)
        is_known = bool((self._labels != _UNKNOWN).all())
        return ScoreTable(
            ids=self._ids,
            scores=scores,
            method=name,
            dataset=self._dataset,
            fingerprint=self._fingerprint or fingerprint(self._ids, self._labels),
            seed=0,
            model=self._model,
            labels=self._labels if is_known else None,
            provenance={
                "settings": {"method": name, "options": settings, "epochs": self.num_epochs},
                "source": "",
                "notes": notes_on(name, self._ids, scores, stacklevel=3),
                "version": __version__,
            },
            confidence=mean_confidence(self.recorders, **settings),
        )

    def record(self, ids: Tensor, logits: Tensor, labels: Tensor | None = None) -> None:
        """Note a batch of the epoch in progress.

        Args:
            ids: whole numbers [B].
            logits: [B, C], C >= 2, before softmax.
            labels: int64 [B]; None: those of the data, where they are in memory.

        Raises:
            ScoreError: unknown ids, no labels, or shapes that do not fit.
        """
        rows = self._rows_of(ids)
        if labels is None:
            labels = self._labels[rows]
            if bool((labels == _UNKNOWN).any()):
                raise ScoreError(
                    f"the batch holds no labels ({', '.join(LABEL_NAMES[:2])}), and the data tell "
                    "none without being read: give DynamicsRecorder (images, labels) or samples"
                )
        self._record.check(rows, logits, labels)
        if self._epoch is None:
            self._epoch = self.num_epochs
        kept = logits.detach().to(torch.float32, copy=True)  # before a loss changes it in place
        self._batches.append((rows, kept, labels.detach().long()))

    def close_epoch(self) -> None:
        """The epoch is over; with torch.distributed all processes call it together."""
        if self._epoch is None:
            return
        own = [tuple(part.cpu() for part in batch) for batch in self._batches]
        batches = [batch for part in _from_all(own) for batch in part]
        self._batches, epoch, self._epoch = [], self._epoch, None
        if not batches:
            return
        rows, logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        first = torch.from_numpy(np.unique(rows.numpy(), return_index=True)[1])
        for some in first.split(_ROWS):
            self._record.record(epoch, rows[some], logits[some], labels[some])
        self._labels = self._labels.index_put((rows[first],), labels[first])
        self._record.on_epoch(epoch, nn.Identity())

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded; of several processes each its own part of the open epoch."""
        return {
            "record": self._record.state_dict(),
            "labels": self._labels,
            "epoch": self._epoch,
            "batches": [tuple(part.cpu() for part in batch) for batch in self._batches],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ScoreError: it is of other samples.
        """
        self._record.load_state_dict(state["record"])
        self._labels, self._epoch = state["labels"], state["epoch"]
        self._batches = list(state["batches"])

    def begin(self, model: nn.Module, optimizers: Iterable[Optimizer], *, resumed: bool) -> None:
        self._model = type(model).__name__
        if not resumed:  # what is open is of a run that was broken off
            self._batches, self._epoch = [], None

    def end(self, model: nn.Module) -> None:
        self._unhook()
        self.close_epoch()

    def _open(self, epoch: int) -> None:
        if self._epoch is not None and self._epoch < epoch:
            self.close_epoch()
        if epoch != (self.num_epochs if self._epoch is None else self._epoch):
            raise ScoreError(
                f"epoch {epoch} begins, and the recorder has seen {self.num_epochs}; give each run "
                "a DynamicsRecorder of its own, and a resumed run what it recorded before: "
                "load_state_dict"
            )
        self._epoch = epoch

    def _rows_of(self, ids: Tensor) -> Tensor:
        """Row numbers of ids, int64 on the CPU."""
        ids = ids.detach().cpu().long()
        place = torch.searchsorted(self._ids[self._order], ids).clamp(max=len(self._ids) - 1)
        rows = self._order[place]
        wrong = ids[self._ids[rows] != ids]
        if len(wrong):
            raise ScoreError(
                f"the batch holds the id {int(wrong[0])}, which none of the {len(self._ids)} "
                "samples has; give DynamicsRecorder the data set that is trained on"
            )
        return rows

    # --- transformers --------------------------------------------------------------------------

    def on_init_end(self, args: Any, *_: Any, model: nn.Module, **__: Any) -> None:
        if args.remove_unused_columns and ID not in inspect.signature(model.forward).parameters:
            raise ScoreError(
                f"the Trainer would drop the column {ID!r} by which samples are known: give "
                "TrainingArguments(remove_unused_columns=False)"
            )
        self._keep_ids_from(model)

    def on_train_begin(self, args: Any, state: Any, *given: Any, **named: Any) -> None:
        super().on_train_begin(args, state, *given, **named)
        model = named["model"]
        if state.global_step > 0 and not self.num_epochs and self._epoch is None:
            path = _kept_at(args, state)
            if not path.exists():
                raise ScoreError(
                    f"the run goes on at step {state.global_step}, and {path} is missing: what "
                    "was recorded before; load_state_dict it, or record a run from its start"
                )
            self.load_state_dict(torch.load(path))
        self._unhook()
        self._keep_ids_from(model)
        # torch.compile would compile the hooks anew for each batch.
        on_inputs, on_outputs = map(torch.compiler.disable, (self._on_inputs, self._on_outputs))
        self._hooks = [
            model.register_forward_pre_hook(on_inputs, with_kwargs=True, prepend=True),
            model.register_forward_hook(on_outputs, with_kwargs=True),
        ]

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._open(math.floor(state.epoch or 0))

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.close_epoch()

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        path = _kept_at(args, state)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), path)

    def _keep_ids_from(self, model: nn.Module) -> None:
        """For good: what has ids may be evaluated too, before and after."""
        if self._without_ids is not model and ID not in inspect.signature(model.forward).parameters:
            model.register_forward_pre_hook(_drop_ids, with_kwargs=True)
            self._without_ids = model

    def _on_inputs(self, model: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        self._given[threading.get_ident()] = named.get(ID)

    def _on_outputs(
        self, model: nn.Module, inputs: Any, named: dict[str, Any], output: Any
    ) -> None:
        ids = self._given.pop(threading.get_ident())
        if not model.training or not torch.is_grad_enabled():
            return
        if ids is None:
            raise ScoreError(
                f"the batch holds no {ID!r}: give Trainer(train_dataset=datapruning.indexed(data)) "
                "and a collator that keeps it"
            )
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise ScoreError(f"{type(model).__name__} gives {type(output).__name__}, no logits")
        self.record(ids, logits, named.get("labels"))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # --- Lightning -----------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, module: nn.Module) -> None:
        self._open(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, number: int
    ) -> None:
        if outputs is None:
            return  # the step was skipped
        if not isinstance(outputs, Mapping) or "logits" not in outputs:
            raise ScoreError(
                f"training_step of {type(module).__name__} has to return "
                '{"loss": loss, "logits": logits}'
            )
        self.record(*_parts_of(batch, outputs["logits"]))

    def on_train_epoch_end(self, trainer: Any, module: nn.Module) -> None:
        self.close_epoch()

    def on_exception(self, trainer: Any, module: nn.Module, error: BaseException) -> None:
        """Not `end`, where other processes would be waited for."""


def _drop_ids(model: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model's arguments without the ids."""
    return inputs, {name: value for name, value in named.items() if name != ID}


def _parts_of(batch: Any, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, logits and labels of a batch of Lightning."""
    if isinstance(batch, Mapping) and ID in batch:
        return batch[ID], logits, next((batch[n] for n in LABEL_NAMES if n in batch), None)
    if isinstance(batch, tuple | list) and len(batch) > 2:
        return batch[-1], logits, batch[1]
    raise ScoreError(
        f"the batch holds no ids: train on datapruning.indexed(data), whose batches are (inputs, "
        f"labels, ids) or a mapping with {ID!r}"
    )


def _kept_at(args: Any, state: Any) -> Path:
    """Where a checkpoint of transformers' Trainer has the record."""
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return folder / f"dynamics-{args.process_index}.pt"


def _from_all(own: list[Any]) -> list[list[Any]]:
    """What each process gives, in order of their ranks."""
    from torch import distributed  # noqa: PLC0415

    if not distributed.is_available() or not distributed.is_initialized():
        return [own]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, own)
    return parts
