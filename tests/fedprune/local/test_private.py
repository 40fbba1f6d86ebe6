"""A node's own data: whatever they are, the run's classes keep their numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from light import run_light
from PIL import Image

from fedprune.config import RunConfig
from fedprune.local.private import REFUSAL, private_store, samples_of_run
from prunelab.data.datasets import ImageSet
from prunelab.data.own_store import RunSamples, main, write_own_store
from prunelab.data.reading import reading
from prunelab.data.store import open_store, write_store
from prunelab.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
RUN = RunSamples("classification", 3, ("zebra", "ant", "dog"), (1, 8, 8))


def pictures(root: Path, names: list[str]) -> str:
    for row, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row]).save(root / name / f"{row}.png")
    return str(root)


def test_classes_are_numbered_as_the_run_has_them_and_one_may_be_missing(tmp_path: Path) -> None:
    path = pictures(tmp_path / "own", ["dog", "dog", "zebra"])
    store = write_own_store(path, tmp_path / "store", expected=RUN)
    assert store.targets.tolist() == [2, 2, 0]
    assert (store.num_classes, store.class_names) == (3, RUN.class_names)
    assert np.array_equal(store.inputs[:, 0], PIXELS[:3])
    assert RunSamples.of(samples_of_run(store)) == RUN
    assert RunSamples.of(RUN.to_dict()) == RUN
    table = tmp_path / "own.csv"
    table.write_text("a,b,label\n1,2,ant\n3,4,zebra\n", encoding="utf-8")
    run = RunSamples("classification", 3, RUN.class_names, (2,))
    store = write_own_store(str(table), tmp_path / "second", expected=run)
    assert (store.targets.tolist(), store.inputs.tolist()) == ([1, 0], [[1, 2], [3, 4]])
    run = RunSamples("classification", 3, RUN.class_names, (2,), ("b", "a"))
    store = write_own_store(str(table), tmp_path / "third", expected=run)
    assert (store.inputs.tolist(), store.feature_names) == ([[2, 1], [4, 3]], ("b", "a"))
    assert RunSamples.of(samples_of_run(store)) == run
    run = RunSamples("classification", 3, RUN.class_names, (2,), ("b", "c"))
    with pytest.raises(DataError, match="'c'"):
        write_own_store(str(table), tmp_path / "fourth", expected=run)


def test_classes_with_names_of_their_own_go_by_name(tmp_path: Path) -> None:
    """In a file's metadata, and in what a function of the node's gives."""
    order = ("dog", "zebra")
    data = datasets.Dataset.from_dict({"img": PIXELS[:2].tolist(), "label": [0, 1]})
    data = data.cast_column("label", datasets.ClassLabel(names=list(order)))
    data.select_columns("label").add_column("a", [0.5, 1.5]).to_parquet(tmp_path / "t.parquet")
    run = RunSamples(class_names=RUN.class_names)
    store = write_own_store(str(tmp_path / "t.parquet"), tmp_path / "store", expected=run)
    assert (store.targets.tolist(), store.num_classes) == ([2, 0], 3)
    own = ImageSet("own", PIXELS[:2], [0, 1], PIXELS[:2], [0, 1], class_names=order)  # type: ignore[arg-type]
    node_data.append(own)
    store = write_own_store(f"{__name__}:node_data.pop", tmp_path / "second", expected=RUN)
    assert (store.targets.tolist(), store.class_names) == ([2, 0], RUN.class_names)


node_data: list[ImageSet] = []


def test_folders_called_by_numbers_are_those_classes(tmp_path: Path) -> None:
    path = pictures(tmp_path / "own", ["2", "0"])
    run = RunSamples("classification", 5, (), (1, 8, 8))
    store = write_own_store(path, tmp_path / "store", expected=run)
    assert (store.targets.tolist(), store.num_classes, store.class_names) == ([0, 2], 5, ())


@pytest.mark.parametrize(
    ("names", "expected", "words"),
    [
        (["owl"], RUN, "the class 'owl', which is none of 'zebra', 'ant', 'dog'"),
        (["dog"], RunSamples("regression", None, (), (8,)), "those of the run for regression"),
        (["dog"], RunSamples("classification", 3, RUN.class_names, (1, 9, 9)), "by data.resize"),
        (
            ["dog"],
            RunSamples("classification", 3, (), (1, 8, 8)),
            "class 'dog', which is none of '0', '1', '2'",
        ),
        (
            ["7"],
            RunSamples("classification", 3, (), (1, 8, 8)),
            "class '7', which is none of '0', '1', '2'",
        ),
    ],
)
def test_data_that_are_not_the_runs_are_refused(
    names: list[str], expected: RunSamples, words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        write_own_store(pictures(tmp_path / "own", names), tmp_path / "store", expected=expected)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_node_makes_its_store_when_it_joins_and_again_for_other_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, cache, config = pictures(tmp_path / "own", ["dog", "ant"]), tmp_path, RunConfig()
    with pytest.raises(DataError, match="the node has to join the run first"):
        private_store(config, path, cache)
    folder = private_store(config, path, cache, expected=RUN.to_dict())
    assert private_store(config, path, cache) == folder
    before = (folder / "store.json").stat().st_mtime_ns
    private_store(config, path, cache, expected=RUN.to_dict())
    assert (folder / "store.json").stat().st_mtime_ns == before
    pictures(tmp_path / "own", ["owl"])
    with pytest.raises(DataError) as refused:
        private_store(config, path, cache, expected=RUN.to_dict())
    assert str(refused.value) == REFUSAL
    assert "own has the class 'owl', which is none of 'zebra'" in caplog.text


@pytest.mark.slow
def test_a_function_of_a_node_is_asked_again_when_it_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file says that its data are others; what it crashes with stays on the node."""
    monkeypatch.chdir(tmp_path)
    code = "import numpy\ndef two(): return numpy.full((3, 8, 8), {}, 'uint8'), ['ant'] * 3\n"
    for value in (1, 20):  # Python tells a changed module by its second and its size
        Path("node_data_here.py").write_text(code.format(value), encoding="utf-8")
        folder = private_store(RunConfig(), "node_data_here:two", tmp_path, expected=RUN.to_dict())
        assert open_store(folder).inputs.max() == value
    Path("node_data_here.py").write_text("def two(): raise ValueError('Alice Smith')\n")
    with pytest.raises(DataError) as refused:
        private_store(RunConfig(), "node_data_here:two", tmp_path, expected=RUN.to_dict())
    assert str(refused.value) == REFUSAL


def test_a_store_is_taken_as_it_is_if_it_is_what_the_runs_samples_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def store(name: str, classes: tuple[str, ...], **others: Any) -> str:
        given: dict[str, Any] = {
            "inputs": PIXELS[:3, None], "targets": np.arange(3), "num_classes": 3, **others
        }  # fmt: skip
        write_store(tmp_path / name, name=name, class_names=classes, **given)
        return str(tmp_path / name)

    config, order = RunConfig(), ("zebra", "ant", "dog")
    good = store("good", order)
    assert private_store(config, good, tmp_path, expected=RUN.to_dict()) == Path(good)
    prices = np.zeros(3, np.float32)
    for bad, words in (
        (store("order", ("ant", "dog", "zebra")), "write the store again in the run's order"),
        (store("many", (*order, "owl"), num_classes=4), "numbers the classes zebra, ant, dog, owl"),
        (store("count", (), num_classes=4), "its num_classes is 4, the run's 3"),
        (store("size", order, inputs=PIXELS[:3, None, :4]), r"its input_shape is [1, 4, 8]"),
        (
            store("prices", (), targets=prices, num_classes=None, task="regression"),
            "its task is regression, the run's classification",
        ),
    ):
        with pytest.raises(DataError) as refused:
            private_store(config, bad, tmp_path, expected=RUN.to_dict())
        assert str(refused.value) == REFUSAL
        assert words in caplog.text


def test_the_command_makes_a_store_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pictures(tmp_path / "own", ["dog", "ant"])
    main([path, str(tmp_path / "store"), "--classes", "zebra,ant,dog", "--resize", "4"])
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'store'}: 2 samples"
    expected = RunSamples(class_names=RUN.class_names)
    same = write_own_store(path, tmp_path / "same", how=reading(resize=4), expected=expected)
    assert open_store(tmp_path / "store").digest == same.digest
    with pytest.raises(SystemExit, match="3"):
        main([path, str(tmp_path / "no"), "--classes", "cat"])
    assert "the class 'ant', which is none of 'cat'" in capsys.readouterr().err


def test_a_node_without_torch_makes_its_store_as_one_with_it(tmp_path: Path) -> None:
    path = pictures(tmp_path / "own", ["dog", "ant"])
    code = f"""
from pathlib import Path
from fedprune.config import RunConfig
from fedprune.local.private import private_store
print(private_store(RunConfig(), {path!r}, Path("."), expected={RUN.to_dict()!r}))
"""
    done = run_light("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store = write_own_store(path, tmp_path / "store", expected=RUN)
    made = open_store(tmp_path / done.stdout.strip(), verify=True)
    assert np.array_equal(made.inputs, store.inputs)
    assert np.array_equal(made.targets, store.targets)


def test_stores_of_runs_that_are_over_do_not_fill_the_disk(tmp_path: Path) -> None:
    path, asked = pictures(tmp_path / "own", ["dog", "ant"]), RUN.to_dict()
    first, second, third = (
        RunConfig.parse({"seed": seed, "data.dataset": "digits"}) for seed in range(3)
    )
    old, used = (private_store(each, path, tmp_path, expected=asked) for each in (first, second))
    for folder in (old, used):
        os.utime(folder, (0, 0))
    assert private_store(second, path, tmp_path) == used
    private_store(third, path, tmp_path, expected=asked)
    assert used.exists()
    assert not old.exists()
