"""Tables of scores and of kept samples, in parquet with their provenance."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datapruning.errors import ScoreError, SelectionError
from datapruning.selection.kept import kept_of
from datapruning.selection.policies import Policy
from prunelab.data.arrays import array_of
from prunelab.data.checked import checked_labels, whole_numbers
from prunelab.data.samples import Samples, checked_ids
from prunelab.errors import DataError, RunError
from prunelab.runs.folder import write_file
from sparsemodel.storage.sealed import BLANK, CHECKSUM, is_whole, seal

_META, PARQUET = b"datapruning", "parquet"
OR_FORCE = "name another --out, or overwrite it with --force"
VERSION = 2  # 1: without a checksum
_AGAIN = {"scores": "score the samples again", "subset": "select them again"}


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """One score for each sample of a data set; high means keep.

    Columns may be given as arrays or tensors of any type of number that fits.

    Attributes:
        ids: int64 [N], unique.
        scores: float64 [N]; NaN where a score could not be computed.
        method, dataset, model: names; model is "" for a method without one.
        fingerprint: of the samples that were scored.
        seed: decided every random choice.
        labels: int64 [N], or None.
        provenance: settings and versions, anything that JSON holds.
        confidence: float64 [N], mean probability of the label in training, or None.
    """

    ids: Tensor
    scores: Tensor
    method: str
    dataset: str
    fingerprint: str
    seed: int
    model: str = ""
    labels: Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        _settle(self, ScoreError, "scores", "confidence")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"<ScoreTable: {self.method} of {len(self):,} samples of {self.dataset}>"

    def select(
        self, *, keep: float | int, policy: str | Policy = "hardest", **options: Any
    ) -> Subset:
        """Choose exactly so many samples.

        Args:
            keep: a share in (0, 1] as a float, or a number of samples as an int.
            policy: a name in POLICIES, "auto", or a function like those in POLICIES.
            options: further arguments of `datapruning.selection.select.select`, such as `seed`,
                `class_balanced` and `groups`, and options of the policy.

        Raises:
            SelectionError: as `select`.
        """
        from datapruning.selection.select import select  # noqa: PLC0415

        return select(self, keep=keep, policy=policy, **options)

    def write(self, path: Path) -> None:
        """Write atomically: a reader finds the old file or the whole new one."""
        _write(path, self.content())

    def content(self) -> bytes:
        """The file that `write` leaves: the same for equal tables."""
        columns = {"id": self.ids, "score": self.scores}
        if self.labels is not None:
            columns["label"] = self.labels
        if self.confidence is not None:
            columns["confidence"] = self.confidence
        return _content("scores", columns, self._about())

    @classmethod
    def read(cls, path: Path) -> ScoreTable:
        """A table that `write` left.

        Raises:
            ScoreError: no such file, or not a table of scores.
        """
        columns, about = _read(path, "scores", ScoreError)
        return cls(
            columns["id"], columns["score"].double(),
            labels=columns.get("label"), confidence=columns.get("confidence"), **about,
        )  # fmt: skip

    def _about(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "model": self.model,
            "provenance": self.provenance,
        }


@dataclass(frozen=True, eq=False)
class Subset:
    """The samples that a selection kept.

    Attributes:
        ids: int64 [K], unique, ascending.
        num_samples: of the data set it was chosen from.
        policy: how it was chosen.
        method: the score it was chosen by; "" for none.
        labels: int64 [K], or None.
        num_classes: of the data set it was chosen from, or None.
    """

    ids: Tensor
    num_samples: int
    dataset: str
    fingerprint: str
    policy: str
    seed: int
    method: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        _settle(self, SelectionError)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        kept = f"{len(self):,} of {self.num_samples:,} samples of {self.dataset}"
        return f"<Subset: {kept}, {self.policy}{self.method and f' by {self.method}'}>"

    @property
    def indices(self) -> NDArray[np.int64]:
        """Row numbers of the kept samples, int64 [K], ascending: for anything that has rows.

        `images[kept.indices]`, `frame.iloc[kept.indices]`, `SubsetRandomSampler(kept.indices)`.

        Raises:
            SelectionError: the samples were scored under ids of their own; use `rows`.
        """
        if len(self) and int(self.ids.max()) >= self.num_samples:
            raise SelectionError(
                f"the id {int(self.ids.max())} is no row of {self.num_samples} samples: they have "
                "ids of their own; use rows(samples)"
            )
        indices: NDArray[np.int64] = self.ids.numpy()
        return indices

    def of(self, dataset: Any) -> Any:
        """The kept samples of the data set that was scored, as what it is.

        A Hugging Face data set gives one by `select` (columns, types and class names stay), a
        DatasetDict or a mapping with "train" the same with its training side cut, a frame of
        pandas its rows, an array or a tensor its rows, a streamed data set a streamed one. All else
        (torch data sets, pairs of images and labels, samples, names) gives a `KeptSamples`: a
        `torch.utils.data.Subset`, for training and for a DataLoader.

        Args:
            dataset: what was given to `score`, or the same samples in another dress: a torch data
                set with random transforms, for instance.

        Raises:
            SelectionError: other data.
        """
        return kept_of(dataset, self)

    def rows(self, samples: Samples) -> Tensor:
        """Row numbers of the kept samples, int64 [K], ascending.

        Raises:
            SelectionError: the samples are other data, or lack an id.
        """
        if samples.fingerprint != self.fingerprint:
            raise SelectionError(
                f"the subset was chosen from {self.dataset} (fingerprint {self.fingerprint}), but "
                f"these data have fingerprint {samples.fingerprint}; score and select them anew"
            )
        order = samples.ids.argsort()
        ids = samples.ids[order]
        place = torch.searchsorted(ids, self.ids).clamp(max=len(ids) - 1)
        missing = self.ids[ids[place] != self.ids]
        if len(missing):
            raise SelectionError(
                f"{len(missing)} of {len(self)} kept ids are not in the data, the first: "
                f"{int(missing[0])}"
            )
        return order[place].sort().values

    def write(self, path: Path) -> None:
        """Write atomically: a reader finds the old file or the whole new one."""
        _write(path, self.content())

    def content(self) -> bytes:
        """The file that `write` leaves: the same for equal subsets."""
        about = {
            "num_samples": self.num_samples,
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "policy": self.policy,
            "seed": self.seed,
            "method": self.method,
            "num_classes": self.num_classes,
            "provenance": self.provenance,
        }
        columns = {"id": self.ids}
        if self.labels is not None:
            columns["label"] = self.labels
        return _content("subset", columns, about)

    @classmethod
    def read(cls, path: Path) -> Subset:
        """A subset that `write` left.

        Raises:
            SelectionError: no such file, or not a subset.
        """
        columns, about = _read(path, "subset", SelectionError)
        return cls(columns["id"], labels=columns.get("label"), **about)


def write_once(table: ScoreTable | Subset, path: Path, *, force: bool = False) -> bool:
    """Write a table or a subset where there is none yet.

    Args:
        force: overwrite whatever is there.

    Returns:
        False where exactly this one is there already; then nothing is written.

    Raises:
        RunError: something else is there.
    """
    if path.exists() and not force:
        if path.is_file() and path.read_bytes() == table.content():
            return False
        raise RunError(f"{path} is there and holds something else; {OR_FORCE}")
    table.write(path)
    return True


def _settle(table: ScoreTable | Subset, error: type[ValueError], *numbers: str) -> None:
    """Columns of any whole type, or for `numbers` any number, of torch or numpy, as tensors."""
    try:
        ids = whole_numbers(table.ids, "ids")
        found = {"ids": checked_ids(ids, ids.numel())}
        if table.labels is not None:
            found["labels"] = checked_labels(table.labels)
        for name in numbers:
            if (values := getattr(table, name)) is not None:
                array = array_of(values, name)
                if array.dtype.kind == "c":
                    raise DataError(f"{name} are {array.dtype}; expected real numbers")
                found[name] = torch.from_numpy(array.astype(np.float64, copy=False))
        for name, column in found.items():
            if column.shape != ids.shape:
                raise DataError(f"{len(ids)} ids but {name} of shape {tuple(column.shape)}")
    except DataError as reason:
        raise error(str(reason)) from None
    for name, column in found.items():
        object.__setattr__(table, name, column)


def _content(kind: str, columns: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    arrays = {name: column.detach().cpu().numpy() for name, column in columns.items()}
    meta = json.dumps({CHECKSUM: BLANK, "kind": kind, "version": VERSION, **about}, sort_keys=True)
    table, file = pyarrow.table(arrays), pyarrow.BufferOutputStream()
    with pyarrow.parquet.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        # Not of Arrow's schema, which is stored encoded, where no seal could be put into it.
        writer.add_key_value_metadata({_META: meta})
    return seal(file.getvalue().to_pybytes(), PARQUET)


def _write(path: Path, content: bytes) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path.parent}: cannot be made ({error.strerror})") from None
    write_file(path, content)


def _read(
    path: Path, kind: str, error: type[ValueError]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror})") from None
    if not is_whole(data, PARQUET):
        raise error(
            f"{path} is not a {kind} file of datapruning, or it is damaged: its checksum is "
            f"missing or does not fit; {_AGAIN[kind]}"
        )
    stored = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
    # One thread: a worker that lets go of our bytes while Python ends aborts the process.
    table = stored.read(use_threads=False)
    about = json.loads(stored.metadata.metadata.get(_META, b"{}"))
    if about.pop("kind", None) != kind:
        raise error(
            f"{path} is not a {kind} file of datapruning; it has columns "
            f"{', '.join(table.column_names)}"
        )
    if about.pop("version") != VERSION:
        raise error(f"{path} was written by another release; {_AGAIN[kind]}")
    del about[CHECKSUM]
    columns = {
        name: torch.from_numpy(np.array(table[name].to_numpy())) for name in table.column_names
    }
    return columns, about
