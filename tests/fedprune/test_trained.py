"""A trained model in use: by hand-worked figures, and against the run's own evaluation."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from federation import tiny
from PIL import Image
from processes import Command
from safetensors.torch import load_file
from torch import nn

import fedprune
from fedprune import given
from fedprune.front import Result
from fedprune.local.data import split
from fedprune.local.site import split_seed
from fedprune.rounds.folder import prepare
from fedprune.rounds.workspace import open_workspace
from fedprune.trained.evaluation import ClientScore, class_scores, fairness
from fedprune.trained.inputs import Accepted, read_inputs
from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.data.samples import ImageSamples, TargetSamples, TokenSamples
from prunelab.data.sides import SampleSet
from prunelab.errors import DataError, DataWarning, ModelError, RunError
from prunelab.runs.folder import append_metrics, read_metrics
from sparsemodel.errors import CheckpointError, ExportError
from sparsemodel.layers.sparsify import densify, sparse_layers

CONFIG = tiny(method__name="magnitude", training__local_epochs=4)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return fedprune.run(CONFIG, tmp_path_factory.mktemp("trained") / "a run")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Of a network and of data that were given as objects; the data name their classes."""
    digits = load_dataset("digits", num_train=300, num_test=60)
    sides = digits.train_images, digits.train_labels, digits.test_images, digits.test_labels
    return fedprune.run(
        model=lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)),
        data=ImageSet("digits", *sides, class_names=NAMES),
        method="fedavg",
        rounds=2,
        clients=3,
        folder=tmp_path_factory.mktemp("named") / "run",
    )


def command(*arguments: object, cwd: Path, columns: int = 200) -> Any:
    return Command("fedprune", *map(str, arguments), cwd=cwd, columns=columns).ended()


def test_evaluation_is_the_runs_own(result: Result) -> None:
    found = result.evaluate()
    assert found.samples == 60
    assert found.accuracy == result.summary["test_accuracy"]
    assert found.loss == pytest.approx(result.summary["test_loss"], rel=1e-5)
    assert not found.to_dict().keys() & {"nan"}
    assert sum(score.count for score in found.classes) == 60
    hits = sum(score.count * score.recall for score in found.classes if score.recall is not None)
    assert hits == pytest.approx(60 * found.metric)
    json.dumps(found.to_dict(), allow_nan=False)


def test_clients_are_measured_on_what_they_set_aside(result: Result) -> None:
    """By a plain loop over the same division."""
    found, workspace = result.evaluate(), open_workspace(CONFIG)
    images, labels = workspace.dataset.train.images, workspace.dataset.train.labels
    expected, trained_on = [], set()
    for client, share in enumerate(workspace.shares):
        rows = split(share, seed=split_seed(CONFIG, client))
        trained_on |= set(rows.train.tolist())
        fed = torch.from_numpy(result.preprocessing.apply(images[rows.dev].numpy()))
        with torch.no_grad():
            hits = result.model(fed).argmax(1) == labels[rows.dev]
        expected.append(float(hits.double().mean()))
        assert not trained_on & set(rows.dev.tolist())
    assert [score.metric for score in found.clients] == expected
    assert found.clients_on == "development"
    assert found.fairness is not None
    assert found.fairness.worst == min(expected)
    assert found.fairness.worst_client == expected.index(min(expected))
    assert found.fairness.spread == pytest.approx(np.std(expected))
    assert found.fairness.percentile_10 == pytest.approx(np.percentile(expected, 10))


def test_scores_by_class_by_hand() -> None:
    """Class 2 is missing in the data, class 3 is never said; a prediction beyond the names."""
    labels, predicted = np.array([0, 0, 0, 1, 3, 3]), np.array([0, 0, 1, 1, 2, 9])
    scores = class_scores(labels, predicted, ["a", "b", "c", "d"])
    assert [(s.count, s.precision, s.recall) for s in scores] == [
        (3, 1.0, 2 / 3), (1, 0.5, 1.0), (0, 0.0, None), (2, None, 0.0),
    ]  # fmt: skip


def test_fairness_by_hand() -> None:
    """Of five clients one has no samples and two are the worst."""
    metrics = [0.75, 0.5, None, 0.5, 1.0]
    found = fairness([ClientScore(k, 4, 1.0, metric) for k, metric in enumerate(metrics)])
    assert found is not None
    assert (found.worst_client, found.worst, found.percentile_10) == (1, 0.5, 0.5)
    assert found.spread == pytest.approx(np.sqrt((0.0625 + 0.1875**2 * 2 + 0.3125**2) / 4), rel=0.2)
    assert found.spread == pytest.approx(np.std([0.75, 0.5, 0.5, 1.0]))
    assert fairness([ClientScore(0, 0, None, None)]) is None


def test_a_file_alone_is_enough(result: Result, tmp_path: Path) -> None:
    """It knows its network, preprocessing and classes; the run's folder is not needed."""
    shutil.copy(result.folder / "model.safetensors", tmp_path / "mine.safetensors")
    found = fedprune.load(tmp_path / "mine.safetensors")
    assert sparse_layers(found.model).keys() == sparse_layers(result.model).keys() != set()
    assert found.names == tuple("0123456789")
    digits = load_dataset("digits")  # more than the run had
    assert found.evaluate("digits") == result.evaluate(digits)
    with pytest.raises(RunError, match="name the data"):
        found.evaluate()


def test_a_narrow_network_is_built_again(tmp_path: Path) -> None:
    """Of the width that the method chose."""
    config = tiny(method__name="small-dense", training__rounds=1)
    narrow = fedprune.run(config, tmp_path / "run")
    shutil.copy(narrow.folder / "model.safetensors", tmp_path / "mine.safetensors")
    alone = fedprune.load(tmp_path / "mine.safetensors")
    assert alone.metadata["width"] not in ("", "4")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(alone.model(x), narrow.model(x))


def test_predictions_are_those_of_the_model(result: Result, tmp_path: Path) -> None:
    data = load_dataset("digits")
    found = result.predict("digits")
    assert repr(found) == f"<Predictions: {len(found)} samples, 10 classes>"
    fed = torch.from_numpy(result.preprocessing.apply(data.test_images.numpy()))
    with torch.no_grad():
        expected = result.model(fed).softmax(1)
    assert np.abs(found.values - expected.numpy()).max() < 1e-6
    assert found.classes == [str(k) for k in expected.argmax(1).tolist()]
    same = result.predict(data.test_images)
    assert np.array_equal(same.values, found.values)
    found.write(tmp_path / "some.csv")
    found.write(tmp_path / "all.parquet", all_classes=True)
    with (tmp_path / "some.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "class", "probability"]
    assert [row["class"] for row in rows] == found.classes
    assert [float(row["probability"]) for row in rows] == found.values.max(1).tolist()
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pydict()
    assert list(table) == ["id", "class", "probability", *(f"probability {k}" for k in range(10))]
    assert table["probability 3"] == found.values[:, 3].tolist()
    with pytest.raises(RunError, match=r"all\.parquet is there already; .* --force"):
        found.write(tmp_path / "all.parquet")
    with pytest.raises(RunError, match=r"ends in \.csv or \.parquet"):
        found.write(tmp_path / "all.xlsx")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six test digits as files, one of them coloured and one four times as large."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(load_dataset("digits").test_images[:6, 0].numpy()):
        picture = Image.fromarray(image)
        if number == 4:
            picture = picture.convert("RGB")
        if number == 5:
            picture = picture.resize((32, 32), Image.Resampling.NEAREST)
        picture.save(folder / f"digit{number}.png")
    return folder


@pytest.mark.filterwarnings("ignore::prunelab.errors.DataWarning")
def test_pictures_by_file_name(result: Result, pictures: Path) -> None:
    """Gray or coloured, of any size: the model says what it takes."""
    expected = result.predict("digits").values[:6]
    found = result.predict(pictures)
    assert found.ids == [f"digit{k}.png" for k in range(6)]
    assert np.abs(found.values - expected)[:5].max() < 1e-6
    one = result.predict(pictures / "digit3.png")
    assert one.ids == ["digit3.png"]
    assert np.abs(one.values - expected[3]).max() < 1e-6
    with Image.open(pictures / "digit2.png") as opened:
        assert np.abs(result.predict(opened).values - expected[2]).max() < 1e-6


def test_names_of_classes_go_with_the_model(named: Result) -> None:
    """Data of other names' order, and without some of them, are told by name."""
    assert named.class_names == NAMES
    assert set(named.predict("digits").classes) <= set(NAMES)
    digits = load_dataset("digits")
    plain = named.evaluate("digits")
    order = [9, 3, 0, 1, 2, 4, 5, 6, 7, 8]
    numbers = torch.tensor([order.index(k) for k in range(10)])
    sides = digits.train_images, numbers[digits.train_labels]
    own = ImageSet(
        "own", *sides, digits.test_images, numbers[digits.test_labels],
        class_names=tuple(NAMES[k] for k in order),
    )  # fmt: skip
    assert named.evaluate(own).classes == plain.classes
    few = digits.test_labels < 2
    two = ImageSet("two", *(2 * (digits.test_images[few], digits.test_labels[few])), 3)
    scores = named.evaluate(two).classes
    assert [score.count > 0 for score in scores] == [True, True] + [False] * 8
    assert scores[5].recall is None
    strange = ImageSet("own", *sides, *sides, class_names=("ten", *NAMES[1:]))
    with pytest.raises(
        DataError, match="own has the class 'ten', which is none of the classes 'zero'"
    ):
        named.evaluate(strange)


def test_numbers_among_the_names_of_a_models_classes_are_names(tmp_path: Path) -> None:
    """The classes 1, 2 and a of a table are no places where a table to evaluate on lacks a."""
    accepted = Accepted("float32", (2,), ("1", "2", "a"), 3)
    (tmp_path / "own.csv").write_text("u,v,label\n1,2,2\n3,4,1\n", encoding="utf-8")
    found = read_inputs(tmp_path / "own.csv", accepted)
    assert found.targets is not None
    assert found.targets.tolist() == [1, 0]
    with pytest.raises(DataError, match="the label 1 could be the class '1' or the place 1"):
        read_inputs((np.zeros((1, 2), np.float32), [1]), accepted)
    strange = ImageSamples(np.zeros((1, 2), np.float32), [1])
    with pytest.raises(DataError, match="the label 1 could be the class '1' or the place 1"):
        read_inputs(strange, accepted)
    names = ("0", "10", "2")
    folders = ImageSamples(np.zeros((3, 2), np.float32), [1, 2, 0], class_names=names)
    counted = Accepted("float32", (2,), (), 11)
    both = SampleSet("own", folders, folders, class_names=names)
    targets = read_inputs(both, counted).targets
    assert targets is not None
    assert targets.tolist() == [10, 2, 0]


def test_inputs_of_another_kind_are_refused(result: Result) -> None:
    images = load_dataset("digits").test_images
    refused: list[tuple[Any, str]] = [
        (images / 255, "these are floats, and the model was trained on bytes .* own preprocessing"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "inputs are 3×8×8, and the model takes 1×8×8"),
        ("nowhere", "unknown data set 'nowhere'"),
        (np.zeros((3, 1, 8, 8), int), "expected bytes"),
    ]
    for data, text in refused:
        with pytest.raises(DataError, match=text):
            result.predict(data)
    with pytest.raises(DataError, match="no labels to compare with; use predict"):
        result.evaluate(images)


def test_training_samples_are_no_test(tmp_path: Path) -> None:
    """Data without a test side of their own: those that the run set aside, and no others."""
    digits = load_dataset("digits", num_train=200)
    pair = (digits.train_images, digits.train_labels)
    for label, image in zip(digits.train_labels.tolist(), digits.train_images[:, 0], strict=True):
        folder = tmp_path / "own digits" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / f"{len(list(folder.iterdir()))}.png")
    for number, data in enumerate([pair, str(tmp_path / "own digits")]):
        done = fedprune.run(
            model="resnet8", data=data, method="fedavg", rounds=1, clients=2,
            folder=tmp_path / f"run{number}", settings={"model.width": 4},
        )  # fmt: skip
        found = done.evaluate(data)
        assert found == done.evaluate()
        assert 0 < found.samples < 60
        assert found.accuracy == done.summary["test_accuracy"]
    assert done.class_names == tuple(sorted(NAMES))
    shutil.copy(done.folder / "model.safetensors", tmp_path / "mine.safetensors")
    with pytest.warns(DataWarning, match="training samples may be among them"):
        assert fedprune.load(tmp_path / "mine.safetensors").evaluate(data).samples == 200


def test_clients_that_test_are_measured_on_their_test_samples(tmp_path: Path) -> None:
    """What no training and no choice has seen; there is no other test side."""
    digits = load_dataset("digits", num_train=300)
    done = fedprune.run(
        model="resnet8", data=SampleSet("own", ImageSamples.of(digits), None), method="fedavg",
        rounds=2, clients=3, folder=tmp_path / "run",
        settings={"model.width": 4, "federation.evaluate": "clients"},
    )  # fmt: skip
    found = done.evaluate()
    assert found.clients_on == "test"
    (tested,) = [line["test_clients"] for line in done.metrics if line.get("round") == 2]
    assert [(own.samples, own.metric) for own in found.clients] == [
        (own["samples"], own["metric"]) for own in tested
    ]
    assert found.samples == sum(own["samples"] for own in tested)


def regressor(input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], 8), nn.ReLU(), nn.Linear(8, 1))


def test_numbers_are_predicted_and_exported(tmp_path: Path) -> None:
    """A table of features: no classes, one value each, its metric the mean absolute error."""
    random = np.random.default_rng(0)
    features = random.normal(size=(80, 3)).astype(np.float32)
    targets = features @ np.float32([1, -2, 0.5])
    sides = [TargetSamples(features[rows], targets[rows]) for rows in (slice(60), slice(60, 80))]
    done = fedprune.run(
        model=f"{__name__}:regressor",
        data=SampleSet("table", *sides),
        method="fedavg",
        rounds=2,
        clients=2,
        folder=tmp_path / "run",
        settings={"training.lr": 0.01, "data.partition": "iid"},
    )
    found = done.evaluate(SampleSet("table", *sides))
    predicted = done.predict(features[60:])
    assert predicted.columns().keys() == {"id", "value"}
    assert found.metric_name == "mae"
    assert found.metric == pytest.approx(np.abs(predicted.values[:, 0] - targets[60:]).mean())
    assert (found.classes, found.accuracy) == ((), None)
    mine = fedprune.load(done.folder)
    assert done.export(tmp_path / "model.pt2").difference < 1e-5
    assert done.evaluate().clients[1].samples > 0
    assert mine.names == ()


def test_tables_with_and_without_the_column_to_predict(tmp_path: Path) -> None:
    """By the columns of the run, in files that are read as the run's was."""
    random = np.random.default_rng(0)
    features = np.round(random.normal(size=(60, 2)), 3)
    header, prices = "a,b,price", features @ [1.0, -2.0]
    lines = [f"{a},{b},{price:.4f}" for (a, b), price in zip(features, prices, strict=True)]
    (tmp_path / "old.csv").write_text("\n".join([header, *lines[:40]]))
    (tmp_path / "new.csv").write_text("\n".join([header, *lines[40:]]))
    bare = [line.rpartition(",")[0] for line in ["a,b,", *lines[40:]]]
    (tmp_path / "bare.csv").write_text("\n".join(bare))
    done = fedprune.run(
        model=f"{__name__}:regressor", data=str(tmp_path / "old.csv"), method="fedavg", rounds=1,
        clients=2, folder=tmp_path / "run",
        settings={"data.columns": "label=price", "data.partition": "iid", "training.lr": 0.01},
    )  # fmt: skip
    predicted = done.predict(tmp_path / "bare.csv")
    assert len(predicted) == 20
    assert np.array_equal(done.predict(tmp_path / "new.csv").values, predicted.values)
    with pytest.warns(DataWarning, match="has no test side"):
        found = done.evaluate(tmp_path / "new.csv")
    assert found.metric == pytest.approx(np.abs(predicted.values[:, 0] - prices[40:]).mean(), 1e-3)


def bert() -> nn.Module:
    import transformers  # noqa: PLC0415

    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 30, "num_labels": 2}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return transformers.BertForSequenceClassification(config)


def texts(count: int, seed: int) -> TokenSamples:
    """Of two classes with words of their own, some shorter than others."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    ids, mask = random.integers(3, 15, (count, 6)) + 12 * labels[:, None], np.ones((count, 6), int)
    mask[::3, 4:] = 0
    return TokenSamples(ids, mask, labels, class_names=("bad", "good"))


def test_texts_are_told_apart_and_the_model_goes_out(tmp_path: Path) -> None:
    data = SampleSet("texts", texts(60, 0), texts(40, 1), class_names=("bad", "good"))
    done = fedprune.run(
        model=bert, data=data, method=fedprune.Magnitude(density=0.5), rounds=1, clients=2,
        folder=tmp_path / "run", settings={"training.optimizer": "adam", "training.lr": 0.01},
    )  # fmt: skip
    found, predicted = done.evaluate(), done.predict(data)
    assert found.accuracy == done.summary["test_accuracy"]
    assert {score.name for score in found.classes} == set(predicted.classes) | {"bad", "good"}
    hits = np.array(predicted.classes) == np.array(["bad", "good"])[data.test.labels.numpy()]
    assert float(hits.mean()) == found.accuracy
    assert done.export(tmp_path / "model.pt2").difference < 1e-5


def test_a_network_that_was_an_object_is_named_again(
    named: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedprune.given._models", {})  # as in another process
    with pytest.raises(ModelError, match=r"given it as an object.* --model module:function"):
        fedprune.load(named.folder)
    wrong: Callable[..., nn.Module] = lambda: nn.Linear(3, 3)  # noqa: E731
    with pytest.raises(ModelError, match="other parameters than the file"):
        fedprune.load(named.folder, model=wrong)
    right = fedprune.load(
        named.folder, model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    )
    assert right.predict("digits").classes == named.predict("digits").classes
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    done = command("evaluate", named.folder, "digits", "--model", "mine:net", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("evaluate", named.folder, "--model", "mine:net", cwd=tmp_path)
    assert done.returncode == 1
    assert "given as an object" in done.stderr
    assert "name the data" in done.stderr


def test_files_of_something_else(tmp_path: Path) -> None:
    import sparsemodel  # noqa: PLC0415

    with pytest.raises(CheckpointError, match="check the path"):
        fedprune.load(tmp_path / "none.safetensors")
    with pytest.raises(RunError, match="no run in"):
        fedprune.load(tmp_path)
    prepare(tmp_path / "begun", CONFIG, resume=False)
    with pytest.raises(RunError, match="has no model yet; continue it with --resume"):
        fedprune.load(tmp_path / "begun")
    sparsemodel.save(nn.Linear(2, 2), tmp_path / "linear.safetensors")
    with pytest.raises(ModelError, match=r"does not say model, input_shape.*sparsemodel\.load"):
        fedprune.load(tmp_path / "linear.safetensors")


def test_evaluate_on_the_command_line(result: Result, tmp_path: Path) -> None:
    done = command(
        "evaluate", result.folder, "--per-class", "--per-client", cwd=tmp_path, columns=80
    )
    assert done.returncode == 0, done.stderr
    found = result.evaluate()
    assert f"{found.metric:.4f}" in done.stdout
    assert found.fairness is not None
    assert "worst client" in done.stdout
    assert f"{found.fairness.worst_client}: {found.fairness.worst:.4f}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = command("evaluate", result.folder, "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == json.loads(json.dumps(found.to_dict()))


def test_export_on_the_command_line(result: Result, tmp_path: Path) -> None:
    """Beside the model, never over it, and not twice without --force."""
    run = tmp_path / "run"
    shutil.copytree(result.folder, run)
    before = (run / "model.safetensors").read_bytes()
    done = command("export", "run", "--format", "onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"run{os.sep}exported.onnx" in done.stdout
    done = command("export", "run", "--format", "onnx", cwd=tmp_path)
    assert (done.returncode, "--force" in done.stderr) == (1, True)
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(
        run / "exported.onnx", providers=["CPUExecutionProvider"]
    )
    stored = session.get_modelmeta().custom_metadata_map
    assert stored["dataset"] == "digits"
    assert stored["preprocessing"] == json.dumps(result.preprocessing.to_dict())
    images = load_dataset("digits").test_images.numpy()
    (logits,) = session.run(None, {"x": result.preprocessing.apply(images)})
    named = np.array(result.predict("digits").classes)
    assert np.array_equal(logits.argmax(1).astype(str), named)
    done = command("export", "run", "--format", "dense", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run / "model.safetensors").read_bytes() == before
    assert (
        load_file(run / "exported.safetensors").keys() == densify(result.model).state_dict().keys()
    )


def test_predict_on_the_command_line(result: Result, pictures: Path, tmp_path: Path) -> None:
    done = command("predict", result.folder, pictures / "digit3.png", cwd=tmp_path, columns=80)
    assert done.returncode == 0, done.stderr
    assert "digit3.png" in done.stdout
    model = result.folder / "model.safetensors"
    done = command("predict", model, "digits", "--out", "p.csv", "--all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 361
    done = command("predict", model, "digits", "--out", "p.csv", cwd=tmp_path)
    assert (done.returncode, "--force" in done.stderr) == (1, True)
    done = command("export", model, "--format", "tflite", cwd=tmp_path)
    assert done.returncode == 1
    assert "expected one of dense, torch, onnx, program" in done.stderr


def test_an_export_over_the_model_itself_is_refused(result: Result) -> None:
    with pytest.raises(ExportError, match="there already"):
        result.export(result.folder / "model.safetensors")


def wide(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes + 40))


def flat(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_classes))


def test_own_data_are_known_however_they_were_read(tmp_path: Path) -> None:
    """Under a test share and a size of the run's own; other data are not kept."""
    digits = load_dataset("digits", num_train=120)
    pair = (digits.train_images, digits.train_labels)
    done = fedprune.run(
        model=f"{__name__}:wide", data=pair, method="fedavg", rounds=1, clients=2,
        folder=tmp_path / "run", settings={"data.test_share": 0.4, "data.resize": "8"},
    )  # fmt: skip
    found = done.evaluate(pair)
    assert found == done.evaluate()
    assert len(found.clients) == 2
    known = len(given._datasets)
    other = done.evaluate((digits.test_images, digits.test_labels))
    assert other.samples == len(digits.test_labels)
    assert len(given._datasets) == known


def test_own_data_are_known_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is stored whole."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    rows = [f"{a:.3f},{b:.3f},{int(a > b)}" for a, b in random.normal(size=(60, 2))]
    Path("t.csv").write_text("\n".join(["a,b,label", *rows]))
    fedprune.run(
        model=f"{__name__}:flat", data="t.csv", method="fedavg", rounds=1, clients=2, folder="run",
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    mine = fedprune.load("../run")
    assert mine.evaluate("../t.csv") == mine.evaluate()
    shutil.copy("../t.csv", "copy.csv")
    with pytest.warns(DataWarning, match="training samples may be among them"):
        assert mine.evaluate("copy.csv").samples == 60


def test_the_runs_own_name_is_the_runs_own_data(result: Result) -> None:
    assert result.evaluate("digits") == result.evaluate()


def test_outputs_beyond_the_classes_count_nowhere(tmp_path: Path) -> None:
    """Predictions and evaluation go by one rule, and the loss is of the classes there are."""
    done = fedprune.run(
        model=f"{__name__}:wide", data="digits", method="fedavg", rounds=1, clients=2,
        folder=tmp_path / "run",
        settings={"data.num_train": 100, "data.num_test": 60, "server.pretrain_epochs": 0},
    )  # fmt: skip
    test = load_dataset("digits", num_train=100, num_test=60)
    images, labels = test.test_images, test.test_labels
    predicted = done.predict(images)
    found = done.evaluate(SampleSet("test", ImageSamples(images, labels), None))
    hits = np.array(list(map(int, predicted.classes))) == labels.numpy()
    assert found.accuracy == hits.mean()
    chosen = predicted.values[np.arange(60), labels.numpy()]
    assert found.loss == pytest.approx(-np.log(chosen).mean(), rel=1e-5)


def test_several_labels_go_by_their_names(tmp_path: Path) -> None:
    """Other orders and missing names are brought to the model's; unknown names are refused."""
    random = np.random.default_rng(0)

    def table(names: tuple[str, ...], features: Any) -> list[dict[str, Any]]:
        return [
            {
                **dict(zip("abc", row, strict=True)),
                "label": [n for n, v in zip(names, row, strict=True) if v > 0],
            }
            for row in features.tolist()
        ]

    done = fedprune.run(
        model=f"{__name__}:three", data=table(("ant", "bee", "cat"), random.normal(size=(200, 3))),
        task="multi-label", method="fedavg", rounds=3, clients=2, folder=tmp_path / "run",
        settings={"data.partition": "iid", "training.local_epochs": 3},
    )  # fmt: skip
    features = random.normal(size=(50, 3))
    rows = table(("ant", "bee", "cat"), features)
    expected = done.evaluate(rows)
    two = [{**row, "label": [n for n in row["label"] if n != "ant"]} for row in rows]
    predicted = done.predict(rows).values > 0.5
    truth = features > 0
    assert expected.metric == pytest.approx((predicted == truth).mean())
    truth[:, 0] = False
    assert done.evaluate(two).metric == pytest.approx((predicted == truth).mean())
    with pytest.raises(DataError, match="label 'zebra', which is none of the classes"):
        done.evaluate(table(("zebra", "bee", "cat"), features))


def three(input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], 3))


def test_clients_with_data_of_their_own_are_left_out(result: Result, tmp_path: Path) -> None:
    """Whose counts are not those of the division: they never had these samples."""
    folder = shutil.copytree(result.folder, tmp_path / "run")
    lines = read_metrics(folder)
    lines[0]["clients"][1]["num_train"] += 1
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").unlink()
    for line in lines:
        append_metrics(folder, line)
    found = fedprune.load(folder).evaluate()
    assert (found.clients, found.fairness) == ((), None)
    assert found.accuracy == result.evaluate().accuracy


def test_a_picture_that_is_not_there(result: Result) -> None:
    with pytest.raises(DataError, match=r"nothere\.png: no such file"):
        result.predict("nothere.png")


def test_features_go_by_their_names(tmp_path: Path) -> None:
    """Whatever the order of the columns, with others beside them; a missing one is named."""
    pandas = pytest.importorskip("pandas")
    values = np.random.default_rng(0).normal(size=(300, 2))
    frame = pandas.DataFrame({"a+": values[:, 0], "b": values[:, 1], "label": values @ [1, -1] > 0})
    frame["label"] = frame["label"].astype(int)
    for number, data in enumerate([frame[:200], (frame[["a+", "b"]][:200], frame["label"][:200])]):
        done = fedprune.run(
            model=f"{__name__}:flat", data=data, method="fedavg", rounds=3, clients=2,
            folder=tmp_path / f"run{number}", settings={"training.local_epochs": 3},
        )  # fmt: skip
        new = frame[200:]
        other = new.assign(more=1.0)[["label", "b", "more", "a+"]]
        expected = done.evaluate(new)
        assert expected.accuracy is not None
        assert expected.accuracy > 0.9
        assert done.evaluate(other) == expected
        pair = (other.drop(columns="label"), other["label"])
        assert done.evaluate(pair).accuracy == expected.accuracy
        assert done.evaluate({"train": frame, "test": other}).accuracy == expected.accuracy
        predicted = done.predict(new[["a+", "b"]])
        assert np.array_equal(done.predict(other.drop(columns="label")).values, predicted.values)
        assert np.array_equal(done.predict(other).values, predicted.values)
        assert np.array_equal(
            done.predict(new[["a+", "b"]].to_numpy(np.float32)).values, predicted.values
        )
        for wrong in (new.rename(columns={"b": "q"}), new[["a+"]]):
            with pytest.raises(DataError, match="no column 'b' for the features"):
                done.predict(wrong)
    other[:40].to_csv(tmp_path / "new.csv", index=False)
    with pytest.warns(DataWarning, match="has no test side"):
        assert done.evaluate(tmp_path / "new.csv").accuracy == done.evaluate(new[:40]).accuracy
