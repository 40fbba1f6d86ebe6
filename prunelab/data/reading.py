"""How data are to be taken, where they can be taken in several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunelab.errors import DataError

ROLES = ("image", "text", "features", "label", "client")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val")
"""What sides are called, as folders, files and keys; of several the first is meant."""

TEST_SHARE = 0.2  # of data without a test side
KINDS = ("classification", "regression", "multi-label")


@dataclass(frozen=True)
class Reading:
    """What a user says of data, beside the data.

    Attributes:
        resize: (height, width) that pictures are brought to; None: they are of one size.
        columns: (role, column) of those that are not called as usual; roles are ROLES.
        task: one of KINDS; "" (and any other): as the targets look.
        test_share: of every class (of samples without classes: of all), set aside for the test
            where there is no test side; 0: there is none then.
        tokenizer, max_length: for texts, as `tokenized` takes them.
        class_names: of another side, whose numbers the names of classes get; None: there is none.
        lists: whether another side gives several classes a sample as lists of classes, or as rows
            of 0 and 1; None: as they look.
        feature_names: columns that are the features, in this order, whatever `columns` says; empty:
            it is not known.

    Raises:
        DataError: an unknown role, or a share that is none.
    """

    resize: tuple[int, int] | None = None
    columns: tuple[tuple[str, str], ...] = ()
    task: str = ""
    test_share: float = TEST_SHARE
    tokenizer: Callable[..., Any] | None = None
    max_length: int = 128
    class_names: tuple[str, ...] | None = None
    lists: bool | None = None
    feature_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [role for role, _ in self.columns if role not in ROLES]
        if unknown:
            raise DataError(f"columns: unknown role {unknown[0]!r}; expected {', '.join(ROLES)}")
        if not 0 <= self.test_share < 1:
            raise DataError(f"test share: expected 0 <= share < 1, got {self.test_share}")

    def column(self, role: str) -> str | None:
        """The column that was named for a role."""
        return dict(self.columns).get(role)

    @property
    def features(self) -> tuple[str, ...]:
        """The columns that were named as features; empty where none were."""
        named = self.column("features")
        return self.feature_names or (tuple(named.split("+")) if named else ())

    def to_dict(self) -> dict[str, Any]:
        """What `reading` makes the same of, as JSON has it; a tokenizer is left out."""
        return {
            "resize": None if self.resize is None else list(self.resize),
            "columns": dict(self.columns),
            "task": self.task,
            "test_share": self.test_share,
        }

    @property
    def kind(self) -> str:
        """The task where it says what targets are; "" for one that does not."""
        return self.task if self.task in KINDS else ""


def reading(
    *,
    resize: int | str | tuple[int, int] | None = None,
    columns: Mapping[str, str | Sequence[str]] | str | None = None,
    task: str | None = None,
    test_share: float = TEST_SHARE,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int = 128,
) -> Reading:
    """The same, of what a user writes.

    Args:
        resize: 32 or "32" (both sides), "HxW" such as "32x48", or (height, width); "" for none.
        columns: {"image": "picture", "label": "kind"}, or "image=picture,label=kind". Several
            features are a list, or joined by "+": "features=age+height".

    Raises:
        DataError: as `Reading`, or a text that is no such thing.

    >>> reading(resize="32x48", columns="label=kind").resize
    (32, 48)
    """
    return Reading(_size(resize), _pairs(columns), task or "", test_share, tokenizer, max_length)


def with_target(columns: str, target: str) -> str:
    """Columns as a setting has them, with the one that is to be predicted.

    >>> with_target("image=picture", "kind")
    'image=picture,label=kind'
    """
    return ",".join(part for part in (columns, f"label={target}" if target else "") if part)


def _size(resize: int | str | tuple[int, int] | None) -> tuple[int, int] | None:
    if resize is None or resize == "":
        return None
    parts: list[Any] = str(resize).lower().split("x")
    if isinstance(resize, tuple | list):
        parts = list(resize)
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise DataError(f"resize {resize!r}: expected N or HxW in pixels, such as 32 or 32x48")
    return sides[0], sides[-1]


def _pairs(columns: Mapping[str, str | Sequence[str]] | str | None) -> tuple[tuple[str, str], ...]:
    if not columns:
        return ()
    if isinstance(columns, Mapping):
        # A column may be called by a number, and several are given in a list.
        lists = {r: n if isinstance(n, list | tuple) else [n] for r, n in columns.items()}
        return tuple((role, "+".join(map(str, names))) for role, names in lists.items())
    pairs = [part.partition("=") for part in columns.split(",")]
    if not all(equals and name.strip() for _, equals, name in pairs):
        raise DataError(f"columns {columns!r}: expected role=column, such as image=picture")
    return tuple((role.strip(), name.strip()) for role, _, name in pairs)
