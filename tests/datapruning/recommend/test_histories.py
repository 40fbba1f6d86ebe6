"""Reading histories: formats, divisions, and what is refused or counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from datapruning.recommend.histories import HistorySamples
from datapruning.recommend.ragged import Ragged
from datapruning.recommend.readers import read, read_hub
from prunelab.errors import DataError

DIVIDED = {
    "items.tsv": "item_id\ttitle\n10\tAlpha\n11\tBeta\n12\t\n13\tAlpha\n",
    "sequential_train.txt": "1 10 11 12\n2 13\n5 12 10\n",
    "sequential_valid.txt": "1 13 13\n2\n",
    "sequential_test.txt": "1\n2 11 10\n",
}
ROWS = "userId,movieId,rating,timestamp\n7,3,5,30\n7,1,4,10\n7,2,4,20\n7,9,3,20\n9,2,1,5\n"


def write(folder: Path, **changes: str) -> Path:
    for name, text in DIVIDED.items():
        (folder / name).write_text(changes.get(name.split(".")[0], text), encoding="utf-8")
    return folder


def test_a_divided_folder(tmp_path: Path) -> None:
    histories, report = read(str(write(tmp_path)))
    assert histories.users.tolist() == [1, 2, 5]
    assert histories.train.padded().tolist() == [[1, 2, 3], [4, 0, 0], [3, 1, 0]]
    assert histories.titles == ["Alpha", "Beta", "Item 3", "Alpha"]
    assert (report.users, report.items, report.interactions) == (3, 4, 10)
    notes = "\n".join(report.notes)
    assert '1 items have no title and are called "Item N", the first: 3' in notes
    assert "2 items share their title with another" in notes
    assert "1 users have fewer than two training items and give no sample, the first: 2" in notes


def test_questions_have_all_that_came_before(tmp_path: Path) -> None:
    histories, _ = read(str(write(tmp_path)))
    valid, test = histories.question("valid"), histories.question("test")
    assert valid.users.tolist() == [1]
    assert valid.targets.padded().tolist() == [[4]]  # named twice, counted once
    assert test.users.tolist() == [2]
    assert test.history.padded().tolist() == [[4]]
    assert test.targets[0].tolist() == [2, 1]  # in the order of time
    folder = tmp_path / "more"
    folder.mkdir()
    histories, _ = read(str(write(folder, sequential_test="1 12\n")))
    assert histories.question("test").history.padded().tolist() == [[1, 2, 3, 4, 4]]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sequential_train", "1 10 x\n", r"sequential_train.txt, line 1: expected numbers"),
        ("sequential_train", "1 10\n\n1 11\n", "line 3: user 1 has a line already"),
        ("sequential_train", "", "sequential_train.txt is empty"),
        ("sequential_train", "1 99\n", "no training interaction with an item"),
        ("items", "item_id\ttitle\n", "no item under its header"),
        ("items", "item_id\ttitle\nabc\tA\n", r"items.tsv, line 2: expected `item<TAB>title`"),
        ("items", "item_id\ttitle\n10\tA\n10\tB\n", "line 3: item 10 has a title already"),
    ],
)
def test_damaged_files_are_refused_with_their_place(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(str(write(tmp_path, **{file: text})))


def test_strangers_and_unknown_items_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, sequential_valid="1 99 13\n77 10\n")
    histories, report = read(str(folder))
    assert histories.valid[0].tolist() == [4]
    notes = "\n".join(report.notes)
    assert "1 users of valid or test have no training line and are skipped, the first: 77" in notes
    assert (
        "1 interactions with items that items.tsv does not have are skipped, the first: 99" in notes
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".inter", ".parquet"])
def test_a_table_is_divided_by_time(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ratings{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        header, *rows = [line.split(",") for line in ROWS.splitlines()]
        columns = {name: [int(row[i]) for row in rows] for i, name in enumerate(header)}
        parquet.write_table(pyarrow.table(columns), path)
    elif suffix == ".csv":
        path.write_text(ROWS)
    else:
        path.write_text(ROWS.replace(",", "\t").replace("userId", "user_id:token"))
    histories, report = read(str(path))
    # Items 1, 2, 3, 9 are numbers 1 to 4; equal times keep the order of rows.
    assert histories.users.tolist() == [7, 9]
    assert histories.train.padded().tolist() == [[1, 2], [2, 0]]
    assert (histories.valid[0].tolist(), histories.test[0].tolist()) == ([4], [3])
    assert histories.valid.lengths.tolist() == histories.test.lengths.tolist() == [1, 0]
    assert '4 items have no title and are called "Item N"' in report.notes[0]


def test_titles_of_a_table(tmp_path: Path) -> None:
    path, titles = tmp_path / "ratings.csv", tmp_path / "movies.csv"
    path.write_text(ROWS)
    titles.write_text('movieId,title\n1,"One, first"\n2,Two\n3,Three\n8,Eight\n')
    histories, report = read(str(path), titles=titles)
    assert histories.titles == ["One, first", "Two", "Three", "Eight"]
    assert "1 interactions with items that have no entry of a title are skipped" in report.notes[0]
    assert histories.train.padded().tolist() == [[1], [2]]


def test_a_hub_data_set_at_hand() -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "reviewerID": ["b", "a", "b", "b", None],
        "asin": ["y", "x", "x", "z", "x"],
        "title": ["Why", "Ex", "Ex", "Zed", "Ex"],
        "timestamp": [2, 1, 1, 3, 9],
    }
    histories, report = read_hub(datasets.Dataset.from_dict(rows))
    assert histories.titles == ["Ex", "Why", "Zed"]
    assert histories.train.padded().tolist() == [[1], [1]]
    assert histories.test.padded().tolist() == [[0], [3]]
    assert "1 rows have no user or no item and are skipped, the first: row 5" in report.notes
    assert any("users have names" in note for note in report.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\n1,2\n", r"none for time \(time, timestamp"),
        ("196,242,3\n1,2,3\n", "a first line with the names of its columns"),
        ("user,item,time\n1,2\n", "line 2: 2 values for 3 columns"),
        ("user,item,time\n1,2,soon\n", "no row with a user, an item and a time"),
        ("", "is empty"),
    ],
)
def test_damaged_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(str(path))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read(str(tmp_path / "none"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="known endings"):
        read(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"items\.tsv: no such file"):
        read(str(tmp_path))


def test_samples_are_the_last_training_item_and_what_came_before(tmp_path: Path) -> None:
    histories, _ = read(str(write(tmp_path)))
    samples = HistorySamples(histories, max_length=1)
    assert samples.ids.tolist() == [1, 5]
    history, targets = samples.batch(torch.tensor([1, 0]))
    assert history.tolist() == [[3], [2]]
    assert targets.tolist() == [1, 3]
    # Other test data are no other samples; other training data are.
    later = HistorySamples(histories.take(torch.tensor([0, 2])), max_length=1)
    assert later.fingerprint == samples.fingerprint
    assert HistorySamples(histories).fingerprint != samples.fingerprint


def test_nobody_has_a_sample(tmp_path: Path) -> None:
    histories, _ = read(str(write(tmp_path, sequential_train="1 10\n")))
    with pytest.raises(DataError, match="no user has two"):
        HistorySamples(histories)


def test_rows_of_different_lengths() -> None:
    rows = Ragged.of([[1, 2, 3], [], [4]])
    assert rows.last(2).padded(fill=9).tolist() == [[2, 3], [9, 9], [4, 9]]
    assert rows.without_last(2).lengths.tolist() == [1, 0, 0]
    assert rows.take(torch.tensor([2, 0, 2])).padded().tolist() == [[4, 0, 0], [1, 2, 3], [4, 0, 0]]
    assert rows.joined(Ragged.of([[7], [8, 9], []])).padded().tolist() == [
        [1, 2, 3, 7],
        [8, 9, 0, 0],
        [4, 0, 0, 0],
    ]
    assert Ragged.of([]).padded().shape == (0, 1)
