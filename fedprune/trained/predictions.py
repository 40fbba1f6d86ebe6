"""What a model says of each sample, as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.errors import RunError
from prunelab.runs.folder import write_file

SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Predictions:
    """One for each sample, in their order.

    Attributes:
        ids: number of the sample, or name of its file.
        values: float32 [N, K]: probabilities of classes, or the numbers that were predicted.
        names: of the K columns.
        kind: "classes" (one of them each), "labels" (several, each with a probability of its own)
            or "values".
    """

    ids: Sequence[int | str]
    values: NDArray[np.float32]
    names: tuple[str, ...]
    kind: str

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"<Predictions: {len(self):,} samples, {len(self.names):,} {self.kind}>"

    @property
    def classes(self) -> list[str]:
        """The name of each sample's class; of several, all above a half, joined by a semicolon."""
        if self.kind == "classes":
            return [self.names[place] for place in self.values.argmax(1).tolist()]
        if self.kind == "labels":
            rows = (self.values > 0.5).tolist()
            return [";".join(n for n, is_on in zip(self.names, row, strict=True) if is_on)
                    for row in rows]  # fmt: skip
        return []

    def columns(self, *, all_classes: bool = False) -> dict[str, Sequence[Any]]:
        """The table by column: id, class and probability, or id and the values.

        Args:
            all_classes: with the probability of every class.
        """
        table: dict[str, Sequence[Any]] = {"id": list(self.ids)}
        every = {name: self.values[:, place] for place, name in enumerate(self.names)}
        if self.kind == "values":
            return table | {name: column.tolist() for name, column in every.items()}
        table["class"] = self.classes
        if self.kind == "classes":
            table["probability"] = self.values.max(1).tolist()
        if all_classes or self.kind == "labels":
            table |= {f"probability {name}": column.tolist() for name, column in every.items()}
        return table

    def write(self, path: str | Path, *, all_classes: bool = False, force: bool = False) -> None:
        """Write the table as .csv or .parquet, in one step.

        Raises:
            RunError: another ending, a file that is there, or one that cannot be written.
        """
        path = Path(path)
        check_table(path, force=force)
        columns = self.columns(all_classes=all_classes)
        write_file(path, _parquet(columns) if path.suffix == ".parquet" else _csv(columns))


def check_table(path: Path, *, force: bool) -> None:
    """Raise RunError unless a table can be written there."""
    if path.suffix not in SUFFIXES:
        raise RunError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if path.exists() and not force:
        raise RunError(f"{path} is there already; name another --out, or overwrite it with --force")
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}")


def _csv(columns: Mapping[str, Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def _parquet(columns: Mapping[str, Sequence[Any]]) -> bytes:
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), file)
    data: bytes = file.getvalue().to_pybytes()
    return data
