"""Training runs in folders: teachers and subsets that do not fit, distillation, interruptions."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datapruning.errors import SelectionError, SubsetWarning
from datapruning.reports.training_report import write_run_report
from datapruning.selection.table import Subset
from datapruning.students import runner
from datapruning.students.runner import RunSettings, run
from datapruning.students.train import ALPHA_FILE, LOGITS
from prunelab.data.batches import Preprocessing
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.errors import DataError, RunError
from prunelab.runs import folder as runfolder
from prunelab.training.loop import TrainingConfig
from sparsemodel.storage.checkpoint import load_sparse

SHORT = TrainingConfig(epochs=2, batch_size=64, lr=0.05)


def subset_file(path: Path, rows: torch.Tensor, **changes: Any) -> str:
    samples = ImageSamples.of(load_dataset("digits"))
    about = {
        "num_samples": len(samples),
        "dataset": "digits",
        "fingerprint": samples.fingerprint,
        "policy": "random",
        "seed": 0,
    }
    Subset(ids=rows, **{**about, **changes}).write(path)
    return str(path)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    return subset_file(tmp_path_factory.mktemp("subset") / "few.parquet", torch.arange(150))


@pytest.fixture(scope="module")
def teacher(few: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "the teacher"
    run(RunSettings(subset=few, training=SHORT), folder)
    return folder


def test_distilled_run_chooses_alpha_and_reports_its_curve(
    few: str, teacher: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    settings = RunSettings(subset=few, teacher=str(teacher), training=SHORT)
    summary = run(settings, tmp_path / "r", progress=lines.append)
    assert [point["alpha"] for point in summary["alpha_curve"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    best = max(point["accuracy"] for point in summary["alpha_curve"])
    (chosen,) = [p for p in summary["alpha_curve"] if p["alpha"] == summary["alpha"]]
    assert chosen["accuracy"] == best
    assert any("held-out training samples" in line for line in lines)
    text = write_run_report(tmp_path / "r").read_text()
    assert "Choice of alpha" in text
    assert not (tmp_path / "r" / LOGITS).exists()


def test_augmented_distillation_runs(few: str, teacher: Path, tmp_path: Path) -> None:
    training = TrainingConfig(epochs=1, augment=True)
    settings = RunSettings(subset=few, teacher=str(teacher), alpha=0.5, training=training)
    assert run(settings, tmp_path / "r")["alpha"] == 0.5


def test_a_loaded_model_is_the_one_that_was_tested(teacher: Path) -> None:
    model = runner.load_model(teacher)
    data = load_dataset("digits")
    images, labels = ImageSamples(data.test_images, data.test_labels).batch(torch.arange(360))
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).double().mean())
    assert accuracy == runfolder.read_summary(teacher)["test_accuracy"]


def test_a_models_file_says_what_its_input_is(teacher: Path) -> None:
    metadata = load_sparse(teacher / runfolder.MODEL).metadata
    pictures = load_dataset("digits").test_images
    images = torch.from_numpy(Preprocessing.from_metadata(metadata).apply(pictures.numpy()))
    samples = ImageSamples(pictures, load_dataset("digits").test_labels)
    assert torch.equal(images, samples.batch(torch.arange(len(pictures)))[0])
    assert metadata["images"] == "uint8"


def folder_of_pictures(path: Path, num_classes: int) -> str:
    """A data set of 8×8 pictures as parquet."""
    import io  # noqa: PLC0415

    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    random = np.random.default_rng(0)
    for side, count in (("train", 40), ("test", 20)):
        cells = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(file, format="PNG")
            cells.append({"bytes": file.getvalue()})
        labels = [k % num_classes for k in range(count)]
        path.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.table({"img": cells, "label": labels}), path / f"{side}.parquet"
        )
    return str(path)


@pytest.mark.parametrize(
    ("num_classes", "message"),
    [(7, "teacher knows 10 classes and the student 7"), (10, "trained on other data")],
)
def test_a_teacher_of_other_labels_is_refused(
    num_classes: int, message: str, teacher: Path, tmp_path: Path
) -> None:
    data = folder_of_pictures(tmp_path / "my pictures", num_classes)
    settings = RunSettings(dataset=data, teacher=str(teacher), training=SHORT)
    with pytest.raises(RunError, match=message):
        run(settings, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_subsets_that_do_not_fit(tmp_path: Path) -> None:
    rows = torch.arange(100)
    for name, changes, message in (
        ("other data", {"fingerprint": "0" * 16}, "chosen from digits"),
        ("unknown ids", {"rows": torch.tensor([5, 5000])}, "the first: 5000"),
    ):
        chosen = changes.pop("rows", rows)
        path = subset_file(tmp_path / f"{name}.parquet", chosen, **changes)
        with pytest.raises(SelectionError, match=message):
            run(RunSettings(subset=path, training=SHORT), tmp_path / "r")
        assert not (tmp_path / "r").exists()


def test_an_absent_class_is_said(tmp_path: Path) -> None:
    labels = ImageSamples.of(load_dataset("digits")).labels
    rows = (labels < 8).nonzero()[:100, 0]
    path = subset_file(tmp_path / "k.parquet", rows)
    with pytest.warns(SubsetWarning, match="no sample of class 8, 9"):
        summary = run(RunSettings(subset=path, training=SHORT), tmp_path / "r")
    assert summary["class_counts_kept"][8:] == [0, 0]
    assert "Class balance" in write_run_report(tmp_path / "r").read_text()


class Cut(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("line", range(4))
def test_cut_off_at_any_line_then_resumed_gives_the_same_files(
    line: int, few: str, teacher: Path, tmp_path: Path
) -> None:
    """Lines are shown after each α and each epoch: 5 + 1 + 2 of them."""
    settings = RunSettings(subset=few, teacher=str(teacher), training=SHORT)
    run(settings, tmp_path / "whole")
    count = iter(range(100))

    def cutting(_: str) -> None:
        if next(count) == (0, 4, 6, 7)[line]:
            raise Cut

    with pytest.raises(Cut):
        run(settings, tmp_path / "cut", progress=cutting)
    assert "not finished" in write_run_report(tmp_path / "cut").read_text()
    run(settings, tmp_path / "cut", resume=True)
    for name in (runfolder.MODEL, runfolder.METRICS, ALPHA_FILE):
        whole, cut = (tmp_path / folder / name for folder in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


def test_a_changed_subset_under_the_same_name_is_refused(tmp_path: Path) -> None:
    path = subset_file(tmp_path / "k.parquet", torch.arange(100))
    settings = RunSettings(subset=path, training=SHORT)
    run(settings, tmp_path / "r")
    subset_file(tmp_path / "k.parquet", torch.arange(1, 101))
    with pytest.raises(RunError, match="kept was"):
        run(settings, tmp_path / "r", resume=True)


def test_settings_come_back_from_their_file(few: str, teacher: Path, tmp_path: Path) -> None:
    settings = RunSettings(
        subset=few, teacher=str(teacher), alpha=0.25, training=TrainingConfig(steps=3)
    )
    summary = run(settings, tmp_path / "a run")
    assert summary["steps"] == 3
    stored = RunSettings.read(tmp_path / "a run")
    assert (stored.alpha, stored.training, stored.subset) == (0.25, settings.training, few)
    assert runfolder.read_summary(tmp_path / "a run") == summary
    found = json.loads((tmp_path / "a run" / "summary.json").read_text())
    assert found == {**found, **summary}


@given(
    values=st.fixed_dictionaries(
        {
            "dataset": st.text(),
            "subset": st.text(),
            "teacher": st.text(),
            "seed": st.integers(0, 2**63 - 1),
            "alpha": st.floats(0, 1) | st.just("auto"),
            "temperature": st.floats(0.1, 1e300),
        }
    ),
    training=st.fixed_dictionaries(
        {
            "lr": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
            "augment": st.booleans(),
            "steps": st.none() | st.integers(1),
        }
    ),
)
def test_any_settings_survive_their_file(values: dict[str, Any], training: dict[str, Any]) -> None:
    """Whatever names hold: quotes, line breaks, characters beyond 16 bits."""
    settings = RunSettings(**values, training=TrainingConfig(**training))
    with tempfile.TemporaryDirectory() as folder:
        runfolder.prepare(Path(folder), settings.toml())
        assert RunSettings.read(Path(folder)) == settings


@pytest.mark.parametrize("resume", [False, True])
def test_who_does_not_hold_the_lock_discards_nothing(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = RunSettings(training=SHORT), tmp_path / "r"
    monkeypatch.setattr(runfolder.locked.__wrapped__, "__kwdefaults__", {"wait": 0.3})  # type: ignore[attr-defined]
    opened = runner._open
    with ExitStack() as stack:

        def held_by_another(*arguments: Any, **named: Any) -> None:
            opened(*arguments, **named)
            stack.enter_context(runfolder.locked(folder))

        if resume:
            opened(folder, settings, resume=False)
        monkeypatch.setattr(runner, "_open", held_by_another)
        with pytest.raises(RunError, match="another process is running in"):
            run(settings, folder, resume=resume)
        assert (folder / "config.toml").exists()


def test_files_of_another_run_are_refused(few: str, teacher: Path, tmp_path: Path) -> None:
    """Teacher, alpha and temperature leave no trace in data, seed or shapes."""
    folders = {}
    for temperature in (4.0, 2.0):
        settings = RunSettings(
            subset=few, teacher=str(teacher), temperature=temperature, training=SHORT
        )
        folders[temperature] = tmp_path / str(temperature)

        def cutting(line: str) -> None:
            if line.startswith("epoch   2"):
                raise Cut

        with pytest.raises(Cut):
            run(settings, folders[temperature], progress=cutting)
    for name, message in ((ALPHA_FILE, "found 'alpha of run"), (runner.CHECKPOINT, "run is '")):
        own = (folders[2.0] / name).read_bytes()
        shutil.copy(folders[4.0] / name, folders[2.0] / name)
        with pytest.raises(RunError, match=message):
            run(settings, folders[2.0], resume=True)
        (folders[2.0] / name).write_bytes(own)
    run(settings, folders[2.0], resume=True)
    shutil.copy(teacher / runfolder.MODEL, folders[2.0] / runfolder.MODEL)
    with pytest.raises(RunError, match=r"model\.safetensors belongs to another run"):
        runner.load_model(folders[2.0])


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="not empty and holds no run"):
        run(RunSettings(training=SHORT), tmp_path / "full")
    (tmp_path / "other").mkdir()
    runfolder.prepare(tmp_path / "other", "seed = 0\n[pruning]\ndensity = 0.1\n")
    with pytest.raises(RunError, match="is not of a run of `datapruning train`"):
        write_run_report(tmp_path / "other")
    with pytest.raises(DataError, match="unknown data set"):
        run(RunSettings(dataset="nope"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
