"""Interaction histories from files: divided text files, tables of interactions, hub data sets."""

from __future__ import annotations

import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import torch

from datapruning.recommend.histories import Histories, ReadReport, leave_last_out
from datapruning.recommend.ragged import Ragged
from prunelab.data.tables import Table, read_lines, read_table
from prunelab.errors import DataError

SPLITS = ("train", "valid", "test")
TABLES = (".csv", ".tsv", ".inter", ".data", ".parquet")
HUB = "hf:"
COLUMNS: Mapping[str, Sequence[str]] = {
    "user": ("user", "user_id", "userid", "reviewerid"),
    "item": ("item", "item_id", "itemid", "movieid", "movie_id", "asin", "parent_asin"),
    "time": ("time", "timestamp", "unixreviewtime", "date"),
    "title": ("title", "item_title", "name"),
}
"""What a table's columns may be called, in lower case and without a ":type" suffix."""

_LARGEST_ID = 2**63 - 1
_NUMBER = re.compile(r"-?[0-9]{1,19}")
_WHOLE = re.compile(r"(-?[0-9]{1,19})\.0*")


def read(source: str, *, titles: Path | None = None) -> tuple[Histories, ReadReport]:
    """Histories by name or path, with what was skipped.

    Args:
        source: a folder with sequential_train.txt, sequential_valid.txt, sequential_test.txt
            and items.tsv (`read_divided`); a .csv, .tsv, .inter, .data or .parquet table with a
            row for each interaction; or hf:NAME, a data set of the hub with such rows.
        titles: of a table without a title column: a file with columns item and title.

    Raises:
        DataError: nothing of the kind there, or damaged.
    """
    if source.startswith(HUB):
        return read_hub(source.removeprefix(HUB), titles=titles)
    path = Path(source)
    if path.is_dir():
        return read_divided(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix not in TABLES:
        raise DataError(
            f"{path} is no table of interactions; known endings: {', '.join(TABLES)} (or name a "
            "folder with sequential_train.txt)"
        )
    return _from_columns(path.stem, read_table(path), titles=titles)


def read_divided(folder: Path) -> tuple[Histories, ReadReport]:
    """A folder of histories that are already divided.

    sequential_{train,valid,test}.txt have a line a user, `user item item ...` in the order of
    time; a user may be missing from valid and test. items.tsv has a header line and then
    `item<TAB>title`. Items without an entry there are skipped and counted.

    Raises:
        DataError: a missing or empty file, a token that is no number, a user on two lines.
    """
    report = ReadReport()
    names = _titles_by_number(folder / "items.tsv")
    rows = {split: _sequences(folder / f"sequential_{split}.txt") for split in SPLITS}
    users = list(rows["train"])
    strangers = [user for split in SPLITS[1:] for user in rows[split] if user not in rows["train"]]
    report.count("users of valid or test have no training line and are skipped", strangers)
    number_of = {item: number for number, item in enumerate(sorted(names), start=1)}
    unknown = [
        item
        for split in SPLITS
        for items in rows[split].values()
        for item in items
        if item not in number_of
    ]
    report.count("interactions with items that items.tsv does not have are skipped", unknown)
    parts = {
        split: Ragged.of(
            [number_of[i] for i in rows[split].get(user, ()) if i in number_of] for user in users
        )
        for split in SPLITS
    }
    if len(parts["train"].values) == 0:
        raise DataError(f"{folder}: no training interaction with an item of items.tsv")
    titles = _checked_titles({number_of[item]: title for item, title in names.items()}, report)
    histories = Histories(folder.name, torch.tensor(users), **parts, titles=titles)
    return histories, _finished(report, histories)


def read_hub(
    name: str | Any, *, split: str = "train", titles: Path | None = None
) -> tuple[Histories, ReadReport]:
    """Interactions of a data set of the hub, or of a `datasets.Dataset` at hand.

    Args:
        name: as `datasets.load_dataset` takes it (NAME:CONFIG where there are
            several configurations), or a Dataset.

    Raises:
        DataError: it cannot be loaded, or lacks a column.
    """
    if not isinstance(name, str):
        return _from_columns("dataset", name, titles=titles)
    from datasets import load_dataset  # noqa: PLC0415

    path, _, config = name.partition(":")
    try:
        dataset = load_dataset(path, config or None, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{HUB}{name} cannot be loaded: {error}") from None
    return _from_columns(path.rsplit("/", 1)[-1], dataset, titles=titles)


def _from_columns(name: str, table: Table, *, titles: Path | None) -> tuple[Histories, ReadReport]:
    """Rows (user, item, time), sorted by time, equal times in the order of rows."""
    found = _columns(name, table, needed=("user", "item", "time"))
    report = ReadReport()
    rows, missing, wrong = [], [], []
    users, items = _ids(found["user"], f"{name}: user"), _ids(found["item"], f"{name}: item")
    for place, (user, item, when) in enumerate(zip(users, items, found["time"], strict=True)):
        if user is None or item is None:
            missing.append(f"row {place + 1}")
        elif (moment := _moment(when)) is None:
            wrong.append(f"row {place + 1}: {when!r}")
        else:
            rows.append((moment, place, user, item))
    report.count(
        "rows have a line break inside quotes, which a quote too few looks like",
        [f"line {line}" for line in getattr(table, "long_rows", ())],
    )
    report.count("rows have no user or no item and are skipped", missing)
    report.count("rows have a time that is no number or date and are skipped", wrong)
    if not rows:
        raise DataError(
            f"{name}: no row with a user, an item and a time that is a number or a date"
        )
    rows.sort()
    called = _called(found, titles)
    if called:
        unknown = [item for _, _, _, item in rows if item not in called]
        report.count("interactions with items that have no entry of a title are skipped", unknown)
        rows = [row for row in rows if row[3] in called]
        if not rows:
            raise DataError(
                f"{name}: none of its items has an entry in {titles}, whose items are called "
                f"{', '.join(list(called)[:3])} and so on, here {', '.join(unknown[:3])}"
            )
    return _divided_by_user(name, rows, called, report)


def _divided_by_user(
    name: str,
    rows: Sequence[tuple[float, int, str, str]],
    called: Mapping[str, str],
    report: ReadReport,
) -> tuple[Histories, ReadReport]:
    items = sorted(called or {item for _, _, _, item in rows}, key=_natural)
    number_of = {item: number for number, item in enumerate(items, start=1)}
    by_user: dict[str, list[int]] = {}
    for _, _, user, item in rows:
        by_user.setdefault(user, []).append(number_of[item])
    users = sorted(by_user, key=_natural)
    ids = _numbers(users)
    if ids is None:
        report.notes.append("users have names: their ids here are their places in sorted order")
    train, valid, test = leave_last_out(Ragged.of(by_user[user] for user in users))
    titles = _checked_titles({n: called.get(item, "") for item, n in number_of.items()}, report)
    histories = Histories(
        name,
        torch.arange(len(users)) if ids is None else torch.tensor(ids),
        train,
        valid,
        test,
        titles,
    )
    return histories, _finished(report, histories)


def _finished(report: ReadReport, histories: Histories) -> ReadReport:
    report.users, report.items = len(histories.users), histories.num_items
    report.interactions = sum(
        len(part.values) for part in (histories.train, histories.valid, histories.test)
    )
    short = histories.users[histories.train.lengths < 2].tolist()
    report.count("users have fewer than two training items and give no sample", short)
    return report


def _checked_titles(titles: Mapping[int, str], report: ReadReport) -> list[str]:
    """Titles in the order of item numbers; a missing one becomes "Item N"."""
    ordered = [" ".join(titles[number].split()) for number in sorted(titles)]
    missing = [number for number, title in enumerate(ordered, start=1) if not title]
    report.count('items have no title and are called "Item N"', missing)
    named = [title or f"Item {number}" for number, title in enumerate(ordered, start=1)]
    counts = Counter(named)
    shared = [title for title in named if counts[title] > 1]
    report.count(
        "items share their title with another, so that text cannot tell them apart", shared
    )
    return named


def _sequences(path: Path) -> dict[int, list[int]]:
    """User -> items, in the order of lines."""
    rows: dict[int, list[int]] = {}
    for place, line in enumerate(read_lines(path), start=1):
        tokens = line.split()
        if not tokens:
            continue
        if not all(map(_NUMBER.fullmatch, tokens)):
            raise DataError(
                f"{path}, line {place}: expected numbers, `user item item ...`, got {line[:60]!r}"
            )
        user, *items = map(int, tokens)
        if abs(user) > _LARGEST_ID:
            raise DataError(f"{path}, line {place}: user {user} lies beyond {_LARGEST_ID}")
        if user in rows:
            raise DataError(f"{path}, line {place}: user {user} has a line already")
        rows[user] = items
    if not rows:
        raise DataError(f"{path} is empty")
    return rows


def _titles_by_number(path: Path) -> dict[int, str]:
    titles: dict[int, str] = {}
    for place, line in enumerate(read_lines(path)[1:], start=2):
        item, _, title = line.partition("\t")
        if not line.strip():
            continue
        if not _NUMBER.fullmatch(item.strip()):
            raise DataError(f"{path}, line {place}: expected `item<TAB>title`, got {line[:60]!r}")
        if int(item) in titles:
            raise DataError(f"{path}, line {place}: item {int(item)} has a title already")
        titles[int(item)] = title
    if not titles:
        raise DataError(f"{path} has no item under its header line")
    return titles


def _columns(name: str, table: Table, *, needed: Iterable[str]) -> dict[str, Sequence[Any]]:
    """The columns by what they mean."""
    plain: dict[str, str] = {}
    for column in table.column_names:
        # The first of a name counts, as "user_id:token" before "User_ID".
        plain.setdefault(column.split(":")[0].strip().lower(), column)
    chosen = {
        kind: next(plain[alias] for alias in aliases if alias in plain)
        for kind, aliases in COLUMNS.items()
        if any(alias in plain for alias in aliases)
    }
    missing = [kind for kind in needed if kind not in chosen]
    if missing:
        raise DataError(
            f"{name} has columns {', '.join(table.column_names)}; none for "
            + ", none for ".join(f"{kind} ({', '.join(COLUMNS[kind])})" for kind in missing)
        )
    return {kind: table[column] for kind, column in chosen.items()}


def _called(found: Mapping[str, Sequence[Any]], titles: Path | None) -> dict[str, str]:
    """Item -> title, from a file of its own or from the table; empty if there is neither."""
    if titles is not None:
        found = _columns(titles.name, read_table(titles), needed=("item", "title"))
    if "title" not in found:
        return {}
    called: dict[str, str] = {}
    for item, title in zip(_ids(found["item"], "item"), found["title"], strict=True):
        if item is not None:
            text = "" if _is_missing(title) else str(title)
            called[item] = text or called.get(item, "")
    if titles is not None and not called:
        raise DataError(f"{titles} has no row with an item")
    return called


def _ids(values: Iterable[Any], what: str) -> list[str | None]:
    """What users or items are called; None for an empty cell.

    Spaces around a name do not count, and a whole number is the same however it is written: a
    column with an empty cell makes floats of 1, 2, 3 where others have whole numbers.
    """
    names: list[str | None] = []
    for place, value in enumerate(values, start=1):
        if isinstance(value, list | tuple | dict):
            raise DataError(
                f"{what} of row {place} is a {type(value).__name__}; expected a name or a number, "
                "one interaction a row"
            )
        if _is_missing(value):
            names.append(None)
        elif isinstance(value, numbers.Integral):
            names.append(str(int(value)))
        elif isinstance(value, numbers.Real) and float(value).is_integer():
            names.append(str(int(float(value))))
        else:
            text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
            whole = _WHOLE.fullmatch(text.strip())
            text = str(int(whole[1])) if whole else text.strip()
            names.append(None if text in ("nan", "NaN") else text)
    return names


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN (of numbers and of times), or blank text."""
    is_nan = isinstance(value, numbers.Real) and math.isnan(value)
    return value is None or is_nan or str(value).strip() in ("", "NaT")


def _moment(value: Any) -> float | None:
    """Seconds, or whatever number orders the rows; of dates without a zone UTC is taken."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                return None
    if isinstance(value, date):
        value = value if isinstance(value, datetime) else datetime.combine(value, time())
        return float((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
    try:
        moment = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return moment if math.isfinite(moment) else None


def _numbers(names: Sequence[str]) -> list[int] | None:
    """The names as distinct int64 numbers, if they are that."""
    if not all(_NUMBER.fullmatch(name) for name in names):
        return None
    values = list(map(int, names))
    fits = all(abs(number) <= _LARGEST_ID for number in values)
    return values if fits and len(set(values)) == len(values) else None


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers by size, and before names."""
    return (0, int(name), "") if _NUMBER.fullmatch(name) else (1, 0, name)
