"""What a training run shows of each sample, epoch by epoch: the table behind dynamics scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.errors import ScoreError

QUANTITIES = ("probability", "margin_probability", "margin_logit", "correct", "el2n")


class Recorder:
    """A table of epochs × samples, filled by a training run (a callback of `training.train`).

    Of each sample and epoch it keeps, from the forward pass that the sample was trained on:

    - probability: p_y, the softmax probability of the label;
    - margin_probability: p_y − max_{j≠y} p_j, in [−1, 1];
    - margin_logit: z_y − max_{j≠y} z_j;
    - correct: whether the label has the largest logit (of equal ones the first counts);
    - el2n: ‖p − onehot(y)‖₂, in [0, √2];
    - change: Σ_c |p'_c (log p'_c − log p_c)| from the epoch before (p) to this one (p').

    Memory: 21 bytes a sample and epoch on the CPU. On the device of the logits, one epoch's
    column (21 bytes a sample), moved when the epoch ends; and with `changes` the last
    log-probabilities, 4 · num_classes bytes a sample: never epochs × samples × classes.

    Args:
        num_samples: rows are 0 ... num_samples − 1; a run may train on some of them only.
        changes: whether to keep what `tdds` needs.

    >>> recorder = Recorder(2)
    >>> recorder.record(0, torch.tensor([1]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    >>> recorder.table("probability")
    tensor([[   nan, 0.5000]])
    """

    def __init__(self, num_samples: int, *, changes: bool = True) -> None:
        if num_samples < 1:
            raise ScoreError(f"a recorder needs one sample or more, got {num_samples}")
        self.num_samples = num_samples
        self._names = (*QUANTITIES, "change") if changes else QUANTITIES
        self._columns: dict[str, list[Tensor]] = {name: [] for name in self._names}
        self._open: dict[str, Tensor] = {}  # the epoch in progress, on the device of the logits
        self._log_p: Tensor | None = None  # [num_samples, C], each row as of when it was last seen
        self._seen: list[Tensor] = []

    @property
    def num_epochs(self) -> int:
        """Epochs recorded, the one in progress among them."""
        return len(self._seen) + bool(self._open)

    def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`record`, as training calls it."""
        self.record(epoch, rows, logits, labels)

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        """Close the epoch: its column moves to the CPU."""
        self._close()

    @torch.no_grad()
    def record(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Note a batch; epochs come in order from 0, and each sample at most once in one.

        Args:
            epoch: the one in progress, or the next.
            rows: int64 [B], row numbers.
            logits: [B, C], C >= 2, before softmax; probabilities would give wrong scores.
            labels: int64 [B].

        Raises:
            ScoreError: another epoch, a sample seen twice in one, or shapes that do not fit.
        """
        self.check(rows, logits, labels)
        if self._open and epoch == self.num_epochs:
            self._close()
        if epoch != len(self._seen):
            raise ScoreError(
                f"epoch {epoch} follows after {self.num_epochs} recorded ones; record epochs in "
                "order, and make a new Recorder for another run"
            )
        if not self._open:
            self._open = self._empty(logits)
        # Rows and what was seen stay on the CPU: a check on a GPU would make each step wait.
        rows = rows.cpu()
        if bool(self._open["seen"][rows].any()) or len(rows.unique()) != len(rows):
            raise ScoreError(f"a sample was recorded twice in epoch {epoch}; rows must not repeat")
        self._open["seen"][rows] = True
        rows, labels = rows.to(logits.device), labels.to(logits.device)
        log_p = functional.log_softmax(logits.float(), dim=1)
        for name, values in _quantities(logits.float(), log_p, labels).items():
            self._open[name][rows] = values
        if "change" in self._names:
            self._note_change(rows, log_p)

    def table(self, name: str) -> Tensor:
        """One quantity, [epochs, num_samples] on the CPU.

        float32 with NaN where a sample was not seen; `correct` is bool, False there.

        Raises:
            ScoreError: no such quantity, or nothing recorded.
        """
        self._close()
        if name not in self._names:
            raise ScoreError(
                f"the recorder has no {name!r}; it has {', '.join(self._names)}"
                + ("" if "change" in self._names else " (change needs Recorder(changes=True))")
            )
        return self._stacked(self._columns[name])

    def seen(self) -> Tensor:
        """Whether a sample was seen in an epoch, bool [epochs, num_samples] on the CPU."""
        self._close()
        return self._stacked(self._seen)

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, for checkpoints; call it between epochs."""
        self._close()
        return {
            "num_samples": self.num_samples,
            "columns": {name: list(columns) for name, columns in self._columns.items()},
            "seen": list(self._seen),
            "log_p": self._log_p,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ScoreError: the state of a recorder of other samples or quantities.
        """
        if state["num_samples"] != self.num_samples or set(state["columns"]) != set(self._names):
            raise ScoreError(
                f"the state is of {state['num_samples']} samples with "
                f"{', '.join(state['columns'])}; this recorder has {self.num_samples} with "
                f"{', '.join(self._names)}"
            )
        self._columns = {name: list(state["columns"][name]) for name in self._names}
        self._seen, self._log_p, self._open = list(state["seen"]), state["log_p"], {}

    def check(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        shape = tuple(logits.shape)
        is_class = labels.dim() == 1 and not labels.is_floating_point()
        if (
            logits.dim() != 2
            or shape[1] < 2
            or not is_class
            or not len(rows) == len(labels) == shape[0]
        ):
            raise ScoreError(
                f"expected logits [B, C] of two classes or more, with B rows and labels; got "
                f"{shape}, {len(rows)} and {labels.dtype} {list(labels.shape)}"
            )
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self.num_samples):
            raise ScoreError(
                f"rows run from {int(rows.min())} to {int(rows.max())}; the recorder has "
                f"{self.num_samples} samples"
            )

    def _empty(self, logits: Tensor) -> dict[str, Tensor]:
        n, device = self.num_samples, logits.device
        column = {name: torch.full((n,), torch.nan, device=device) for name in self._names}
        column["correct"] = torch.zeros(n, dtype=torch.bool, device=device)
        column["seen"] = torch.zeros(n, dtype=torch.bool)
        return column

    def _note_change(self, rows: Tensor, log_p: Tensor) -> None:
        if self._log_p is None:
            shape = (self.num_samples, log_p.shape[1])
            self._log_p = torch.full(shape, torch.nan, device=log_p.device)
        self._log_p = self._log_p.to(log_p.device)  # a loaded state comes from the CPU
        before = self._log_p[rows]
        self._open["change"][rows] = (log_p.exp() * (log_p - before)).abs().sum(1)
        self._log_p[rows] = log_p

    def _close(self) -> None:
        if self._open:
            column, self._open = {name: c.cpu() for name, c in self._open.items()}, {}
            self._seen.append(column.pop("seen"))
            for name, values in column.items():
                self._columns[name].append(values)

    def _stacked(self, columns: list[Tensor]) -> Tensor:
        if not columns:
            raise ScoreError(
                "nothing has been recorded; pass the recorder to train(callbacks=[...]) of a "
                "Classification task"
            )
        return torch.stack(columns)


def _quantities(logits: Tensor, log_p: Tensor, labels: Tensor) -> dict[str, Tensor]:
    label = labels[:, None]
    p = log_p.exp()
    p_y, z_y = p.gather(1, label)[:, 0], logits.gather(1, label)[:, 0]
    other_p = p.scatter(1, label, -torch.inf).amax(1)
    other_z = logits.scatter(1, label, -torch.inf).amax(1)
    return {
        "probability": p_y,
        "margin_probability": p_y - other_p,
        "margin_logit": z_y - other_z,
        "correct": logits.argmax(1) == labels,
        "el2n": p.scatter_add(1, label, -torch.ones_like(p[:, :1])).norm(dim=1),
    }
