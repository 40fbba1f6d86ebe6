"""Reading histories: formats, divisions, and what is refused or counted."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datapruning.recommend.histories import HistorySamples
from datapruning.recommend.ragged import Ragged
from datapruning.recommend.readers import read, read_hub
from prunelab.data.tables import Table
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


def rows_of(path: Path, rows: list[tuple[object, object, object]], **more: list[object]) -> Path:
    """A parquet table of users, items and times."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    user, item, time = (list(column) for column in zip(*rows, strict=True))
    parquet.write_table(pyarrow.table({"user": user, "item": item, "time": time, **more}), path)
    return path


def test_users_without_a_name_are_nobody(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [(1.0, 5, 1), (nan, 6, 2), (1.0, 7, 3), (nan, 5, 4), (None, 5, 5)]
    histories, report = read(str(rows_of(tmp_path / "t.parquet", rows)))
    assert histories.users.tolist() == [1]
    assert "3 rows have no user or no item and are skipped, the first: row 2" in report.notes
    text = "user,item,time\n1,5,1\nnan,6,2\n 1,7,3\nNaN,5,4\n ,5,5\n"
    (tmp_path / "t.csv").write_text(text)
    again, _ = read(str(tmp_path / "t.csv"))
    assert again.users.tolist() == [1]
    assert again.train.padded().tolist() == histories.train.padded().tolist()


def test_a_whole_number_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    rows = [("a", item, time) for time, item in enumerate([1.0, 2.0, 3.0, 1.0])]
    titles = tmp_path / "titles.csv"
    titles.write_text("item,title\n1,One\n2,Two\n 3 ,Three\n1e5,Many\n")
    table = rows_of(tmp_path / "t.parquet", rows)
    histories, report = read(str(table), titles=titles)
    assert histories.titles == ["One", "Two", "Three", "Many"]
    assert report.interactions == 4
    text = "user,item,time\na,1.0,0\na,2.,1\na,3.00,2\na, 1,3\n"
    (tmp_path / "t.csv").write_text(text)
    again, _ = read(str(tmp_path / "t.csv"), titles=titles)
    for one, other in zip(
        (histories.train, histories.valid, histories.test),
        (again.train, again.valid, again.test),
        strict=True,
    ):
        assert one.padded().tolist() == other.padded().tolist()


def test_spaces_around_an_id_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("user,item,time\n1, 1,1\n1 ,1,2\n 1,1 ,3\n1,1.5,4\n")
    _, report = read(str(tmp_path / "t.csv"))
    assert (report.users, report.items, report.interactions) == (1, 2, 4)


@pytest.mark.parametrize(
    ("users", "ids"),
    [
        ([2**63 - 1, 7], [7, 2**63 - 1]),
        ([2**63 + 5, 7], [0, 1]),
        (["-4", "7"], [-4, 7]),
        (["7", "07"], [0, 1]),
        (["9" * 5000, "7"], [0, 1]),
        (["9" * 5000 + ".0", "7"], [0, 1]),
        (["-0.0", "7.0"], [0, 7]),
    ],
)
def test_ids_of_users(tmp_path: Path, users: list[object], ids: list[int]) -> None:
    """Numbers of 64 bits are kept; of other names the places in sorted order are."""
    text = "".join(f"{user},{item},{item}\n" for user in users for item in (1, 2, 3))
    (tmp_path / "t.csv").write_text("user,item,time\n" + text)
    histories, report = read(str(tmp_path / "t.csv"))
    assert histories.users.tolist() == ids
    assert any("users have names" in note for note in report.notes) == (ids == [0, 1])


@pytest.mark.parametrize(
    ("times", "order"),
    [
        (["30", "10", "20"], [2, 3, 1]),
        (["3e1", "10.5", " 20 "], [2, 3, 1]),
        (["2024-03-01", "2024-01-01", "2024-02-01 10:00:00"], [2, 3, 1]),
        (["2024-01-01T02:00:00+02:00", "2023-12-31T23:00:00Z", "2024-01-01"], [2, 1, 3]),
    ],
)
def test_times_are_numbers_or_dates(tmp_path: Path, times: list[str], order: list[int]) -> None:
    text = "".join(f"1,{item},{time}\n" for item, time in enumerate(times, start=1))
    (tmp_path / "t.csv").write_text("user,item,time\n" + text)
    histories, _ = read(str(tmp_path / "t.csv"))
    parts = (histories.train, histories.valid, histories.test)
    assert [part[0].item() for part in parts] == order


def test_dates_of_parquet(tmp_path: Path) -> None:
    days = [datetime.date(2024, month, 1) for month in (3, 1, 2)]
    rows = [("a", item, day) for item, day in enumerate(days)]
    histories, _ = read(str(rows_of(tmp_path / "t.parquet", rows, unused=[[1], [2], [3]])))
    assert histories.train[0].tolist() == [2]


@pytest.mark.parametrize(
    ("text", "titles", "message"),
    [
        ("user,item,time\n", None, "no row with a user, an item and a time"),
        ("user,item,time\n,1,1\nnan,2,2\n", None, "no row with a user, an item and a time"),
        ("user,item,time\n1,2,inf\n1,2,nan\n", None, "no row with a user, an item and a time"),
        ("user,item,time\n1,2,3\n", "item,title\n9,Nine\n", r"none of its items .* called 9"),
        ("user,item,time\n1,2,3\n", "item,title\n,Nine\n", r"titles\.csv has no row with an"),
        ("user,item,time\n1,2,3\n", "item,title\n", r"titles\.csv has no row with an item"),
        ("user,user,item,time\n1,1,2,3\n", None, "has two columns called 'user'"),
    ],
)
def test_tables_without_a_usable_row(
    tmp_path: Path, text: str, titles: str | None, message: str
) -> None:
    path, names = tmp_path / "t.csv", tmp_path / "titles.csv"
    path.write_text(text)
    names.write_text(titles or "")
    with pytest.raises(DataError, match=message):
        read(str(path), titles=names if titles else None)


def test_rows_that_quotes_may_have_swallowed_are_counted(tmp_path: Path) -> None:
    """A quote that opens in line 2 and closes in line 4 is good CSV, and perhaps not meant."""
    path = tmp_path / "t.csv"
    path.write_text('user,item,time,title\n1,1,1,"7 inch\n1,2,2,x\n1,3,3,12"\n1,4,4,y\n')
    _, report = read(str(path))
    assert report.interactions == 2
    words = "1 rows have a line break inside quotes, which a quote too few looks like, the first: l"
    assert any(note.startswith(words + "ine 4") for note in report.notes)


def test_a_list_is_no_id(tmp_path: Path) -> None:
    rows = [("a", [1, 2], 1), ("b", [3], 2)]
    with pytest.raises(DataError, match="t: item of row 1 is a list; expected a name or a number"):
        read(str(rows_of(tmp_path / "t.parquet", rows)))


def test_titles_are_text_whatever_they_say(tmp_path: Path) -> None:
    """Quotes of a tab file, the word nan, a mark at the beginning; an empty cell hides none."""
    (tmp_path / "t.inter").write_bytes(
        b"\xef\xbb\xbfuser_id:token\titem_id:token\ttimestamp:float\ttitle:token_seq\n"
        + "".join(
            f"1\t{n}\t{n}\t{title}\n"
            for n, title in enumerate(['"7 inch single', 'a "b" c"', "nan", "1.0", "Kept", ""])
        ).encode()
        + b"1\t4\t9\t\n"
    )
    histories, _ = read(str(tmp_path / "t.inter"))
    assert histories.titles == ['"7 inch single', 'a "b" c"', "nan", "1.0", "Kept", "Item 6"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sequential_train", f"{2**63 + 5} 10 11\n", f"line 1: user {2**63 + 5} lies beyond"),
        ("sequential_train", "1_0 10\n", "line 1: expected numbers"),
        ("sequential_train", "1 " + "9" * 5000 + "\n", "line 1: expected numbers"),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, file: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(str(write(tmp_path, **{file: text})))


def test_a_divided_folder_with_marks_and_odd_line_ends(tmp_path: Path) -> None:
    plain, _ = read(str(write(tmp_path)))
    folder = tmp_path / "marked"
    folder.mkdir()
    for name, text in DIVIDED.items():
        odd = ("\ufeff" + text).replace("Beta", "Be\x85ta").replace("\n", "\r\n")
        (folder / name).write_bytes(odd.encode())
    marked, _ = read(str(folder))
    assert marked.train.padded().tolist() == plain.train.padded().tolist()
    assert marked.titles == ["Alpha", "Be ta", "Item 3", "Alpha"]


CELLS = st.one_of(
    st.none(), st.floats(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=3),
    st.sampled_from(["nan", " 1", "1.0", "1", "", "2024-01-01", "1e400"]),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=8))
def test_any_rows_are_read_or_refused(rows: list[tuple[object, object, object]]) -> None:
    table = {name: list(column) for name, column in zip(
        ("user", "item", "time"), zip(*rows, strict=True), strict=True
    )}  # fmt: skip
    given_rows = Table(Path("t"), list(table), table.__getitem__)
    try:
        histories, report = read_hub(given_rows)
    except DataError:
        return
    assert report.interactions > 0
    assert len(histories.users) == report.users > 0
    assert all(title.strip() for title in histories.titles)


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
