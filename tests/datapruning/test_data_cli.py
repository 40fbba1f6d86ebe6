"""The `datapruning` command as a user meets it: real processes, files, kills, one clear line."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Command
from sharded import images, write_shards

from datapruning.cli import main
from datapruning.scoring.methods import METHODS
from datapruning.selection.table import ScoreTable, Subset
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.runs.settings import OR_ELSEWHERE
from sparsemodel.storage.checkpoint import load_sparse

DATAPRUNING = Path(sys.executable).parent / "datapruning"
FEW = ["--epochs", "2", "--batch-size", "128"]


def datapruning(*arguments: str, cwd: Path, columns: int = 200) -> subprocess.CompletedProcess[str]:
    """The command's own entry point with its arguments, in this process: imports take seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", ["datapruning", *arguments])
        try:
            main()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores, a subset and a run, made by the three commands in a folder with a space."""
    path = tmp_path_factory.mktemp("a folder")
    for command in (
        ["score", "digits", "--method", "el2n,random", "--out", "my scores.parquet", *FEW],
        ["select", "my scores-el2n.parquet", "--keep", "0.5", "--out", "kept half.parquet"],
        ["train", "digits", "--subset", "kept half.parquet", "--out", "my run", *FEW],
    ):
        done = datapruning(*command, cwd=path)
        assert done.returncode == 0, done.stderr
    return path


def test_score_select_train(folder: Path) -> None:
    table = ScoreTable.read(folder / "my scores-el2n.parquet")
    kept = Subset.read(folder / "kept half.parquet")
    hardest = table.ids[table.scores.argsort(descending=True)[:719]].sort().values
    assert torch.equal(kept.ids, hardest)
    run = folder / "my run"
    assert {p.name for p in run.iterdir()} >= {
        "config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "report.html",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["num_kept"], summary["num_samples"]) == (719, 1437)
    assert (summary["epochs"], summary["steps"]) == (2, 12)
    assert sum(summary["class_counts_kept"]) == 719
    assert 0.1 < summary["test_accuracy"] <= 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["samples"] for line in lines] == [719, 719]
    assert tomllib.loads((run / "config.toml").read_text())["training"]["epochs"] == 2
    assert load_sparse(run / "model.safetensors").metadata["dataset"] == "digits"


def test_pages_load_nothing_and_hold_pictures(folder: Path) -> None:
    for name in ("my scores.html", "kept half.html", "my run/report.html"):
        text = (folder / name).read_text()
        assert "<script" not in text
        assert 'src="http' not in text
        assert "default-src 'none'" in text
    assert (folder / "kept half.html").read_text().count("data:image/png") == 200


def test_a_selection_is_overwritten_by_force_alone(folder: Path, tmp_path: Path) -> None:
    """The same command again finds what is there."""
    scores = str(folder / "my scores-el2n.parquet")
    (tmp_path / "page.html").write_text("mine")
    for out, keep, more, message in (
        ("k.parquet", "0.2", [], ""),
        ("k.parquet", "0.2", [], ""),
        ("k.parquet", "100", [], "k.parquet is there and holds something else; name another"),
        (scores, "0.2", [], "is there and holds something else"),
        ("page.parquet", "0.2", [], "page.html is there and would be overwritten"),
        ("page.parquet", "0.2", ["--force"], ""),
        ("k.parquet", "100", ["--force"], ""),
    ):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        done = datapruning("select", scores, "--keep", keep, "--out", out, *more, cwd=tmp_path)
        assert done.returncode == bool(message), done.stderr
        assert message in done.stderr
        if message:
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(Subset.read(tmp_path / "k.parquet")) == 100
    assert len(ScoreTable.read(Path(scores))) == 1437
    assert (tmp_path / "page.html").read_text() != "mine"


def test_scores_are_overwritten_by_force_alone(tmp_path: Path) -> None:
    command = ["score", "digits", "--out", "s.parquet", "--method"]
    (tmp_path / "s.html").write_text("mine")
    for method, more, message in (
        ("random", [], "s.html is there and would be overwritten; name another --out, or"),
        ("random", ["--force"], ""),
        ("random", [], ""),
        ("random", ["--seed", "1"], "seed was 0, now 1; name another --out, or overwrite it"),
        ("nonsense", ["--force"], "unknown method"),
        ("random", ["--seed", "1", "--force"], ""),
    ):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        done = datapruning(*command, method, *more, cwd=tmp_path)
        assert done.returncode == bool(message), done.stderr
        assert message in done.stderr
        if message or not more:
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert ScoreTable.read(tmp_path / "s.parquet").seed == 1
    assert not list(tmp_path.glob("*.parts"))


def test_dual_scores_are_drawn_with_their_confidence(tmp_path: Path) -> None:
    """The command passes on what the policy needs; other tables lack it."""
    for method, status in (("dual", 0), ("random", 1)):
        done = datapruning(
            *("score", "digits", "--method", method, "--out", f"{method}.parquet"),
            *("--epochs", "3", "--set", "window=2")[: 2 if method == "random" else 4],
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        command = ["select", f"{method}.parquet", "--keep", "100", "--policy", "dual-beta"]
        done = datapruning(*command, "--out", f"kept-{method}.parquet", cwd=tmp_path)
        assert done.returncode == status, done.stderr
        assert ("score with dual" in done.stderr) == bool(status)
    table = ScoreTable.read(tmp_path / "dual.parquet")
    assert table.confidence is not None
    kept = Subset.read(tmp_path / "kept-dual.parquet")
    expected = table.select(keep=100, policy="dual-beta", confidence=table.confidence)
    assert torch.equal(kept.ids, expected.ids)


def test_labels_that_look_wrong_are_counted_and_dropped(tmp_path: Path) -> None:
    """`score` says how many to keep; `select` then keeps those that it did not name."""
    digits = load_dataset("digits", num_train=60)
    np.savez(
        tmp_path / "d.npz", inputs=digits.train_images.numpy(), targets=digits.train_labels.numpy()
    )
    method = ("--method", "confident-learning", "--runs", "4", "--epochs", "1")
    done = datapruning("score", "d.npz", *method, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = re.search(r"(\d+) labels look wrong; select (.*) drops them", done.stdout)
    assert said is not None, done.stdout
    done = datapruning("select", "scores.parquet", *said[2].split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = ScoreTable.read(tmp_path / "scores.parquet")
    assert int(said[1]) == int((table.scores > 1).sum()) > 0
    kept = Subset.read(tmp_path / "kept.parquet")
    assert torch.equal(kept.ids, table.ids[table.scores <= 1])


def test_keep_one_is_one_sample_and_a_share_has_a_dot_or_percent(
    folder: Path, tmp_path: Path
) -> None:
    scores = str(folder / "my scores-el2n.parquet")
    for keep, count in (("1", 1), ("1.0", 1437), ("100%", 1437), ("20%", 287), ("3", 3)):
        done = datapruning("select", scores, "--keep", keep, "--force", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"kept: {count:,} of 1,437 samples" in done.stdout
        assert len(Subset.read(tmp_path / "kept.parquet")) == count


def test_what_chance_decided_is_said(folder: Path, tmp_path: Path) -> None:
    table = ScoreTable.read(folder / "my scores-el2n.parquet")
    ties = replace(table, scores=(table.scores > table.scores.median()).double())
    ties.write(tmp_path / "ties.parquet")
    done = datapruning("select", "ties.parquet", "--keep", "100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: 100 of the 100 kept samples were drawn by chance")
    assert Subset.read(tmp_path / "kept.parquet").provenance["drawn"] == 100
    done = datapruning("select", "ties.parquet", "--keep", "718", "--force", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_score_that_is_no_number_is_refused_with_the_ids(folder: Path, tmp_path: Path) -> None:
    table = ScoreTable.read(folder / "my scores-el2n.parquet")
    table.scores[[3, 77]] = torch.nan
    table.write(tmp_path / "nan.parquet")
    done = datapruning("select", "nan.parquet", "--keep", "0.5", cwd=tmp_path)
    assert done.returncode == 1
    assert "2 of 1437 scores are NaN or infinite, the first of ids 3, 77;" in done.stderr


def test_version_methods_and_the_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "datapruning", "--version"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.fullmatch(r"datapruning \d\S*\n", done.stdout)
    done = datapruning("methods", cwd=tmp_path, columns=80)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:-1]] == list(METHODS)
    done = datapruning("methods", "dual", cwd=tmp_path)
    assert "source: Cho et al." in done.stdout
    assert "options: window=10, epochs=30" in done.stdout
    done = datapruning("methods", "magic", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_terminal_without_a_letter_shows_another(tmp_path: Path) -> None:
    """Minus signs, dashes and frames are no ASCII."""
    done = subprocess.run(
        [sys.executable, "-m", "datapruning", "methods"], cwd=tmp_path, capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "softmax ? onehot" in done.stdout


def test_balance_keeps_every_class(folder: Path, tmp_path: Path) -> None:
    scores = str(folder / "my scores-el2n.parquet")
    done = datapruning("select", scores, "--keep", "0.1", "--balance", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    labels = ImageSamples.of(load_dataset("digits")).labels
    counts = labels[Subset.read(tmp_path / "kept.parquet").ids].bincount(minlength=10)
    assert int(counts.min()) >= 6  # half of the fair share: ⌊.5 · .1 · 139⌋
    assert "│ 9 " in done.stdout


def test_second_score_finds_the_first(folder: Path) -> None:
    before = (folder / "my scores-el2n.parquet").stat().st_mtime_ns
    command = ["score", "digits", "--method", "el2n,random", "--out", "my scores.parquet"]
    done = datapruning(*command, *FEW, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "my scores-el2n.parquet").stat().st_mtime_ns == before
    done = datapruning(*command, *FEW, "--seed", "1", cwd=folder)
    assert done.returncode == 1
    assert "seed was 0, now 1" in done.stderr


def test_resume_of_a_complete_run_and_second_run_over_it(folder: Path) -> None:
    command = ["train", "digits", "--subset", "kept half.parquet", "--out", "my run", *FEW]
    before = (folder / "my run" / "model.safetensors").read_bytes()
    done = datapruning(*command, cwd=folder)
    assert done.returncode == 1
    assert "--resume or use another --out" in done.stderr
    assert datapruning(*command, "--resume", cwd=folder).returncode == 0
    done = datapruning(*command, "--resume", "--lr", "0.2", cwd=folder)
    assert done.returncode == 1
    assert "training.lr was 0.1, now 0.2" in done.stderr
    # What is not given is what it was, not a default: 2 epochs of 128, not 20 of 64.
    done = datapruning("train", "digits", "--out", "my run", "--resume", cwd=folder)
    assert done.returncode == 0, done.stderr
    for given, message in (
        (["--epochs", "20"], f"training.epochs was 2, now 20; {OR_ELSEWHERE}\n"),
        (["--augment"], f"training.augment was False, now True; {OR_ELSEWHERE}\n"),
        (["--subset", "other.parquet"], "other.parquet: no such file\n"),
        (["--epochs", "2", "--seed", "1"], f"seed was 0, now 1; {OR_ELSEWHERE}\n"),
    ):
        done = datapruning("train", "digits", "--out", "my run", "--resume", *given, cwd=folder)
        assert done.returncode == 1
        assert done.stderr.endswith(message)
    assert (folder / "my run" / "model.safetensors").read_bytes() == before


def strike(command: list[str], cwd: Path, *, watched: str, seed: int, kills: int = 3) -> None:
    """Run a command and kill -9 it a random while after it has left something new; then let it."""
    moments = random.Random(seed)

    def left() -> int:
        return sum(path.stat().st_mtime_ns for path in cwd.glob(watched) if path.exists())

    for number in range(kills + 1):
        resume = ["--resume"] if number and command[0] == "train" else []
        before = left()
        process = Command("datapruning", *command, *resume, cwd=cwd)
        while number < kills and process.is_running() and left() == before:
            time.sleep(0.01)
        if number < kills:
            time.sleep(moments.uniform(0, 0.2))
            process.send(signal.SIGKILL)
        done = process.ended()
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0, done.stderr
            return


def test_scoring_killed_at_random_gives_the_same_bytes(tmp_path: Path) -> None:
    command = ["score", "digits", "--method", "el2n-20,aum", "--runs", "3", "--epochs", "4"]
    command += ["--batch-size", "128", "--shard-size", "200"]
    done = datapruning(*command, "--out", "whole.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    strike([*command, "--out", "k.parquet"], tmp_path, watched="k.parquet.parts/*/*.pt", seed=0)
    for name in ("el2n-20", "aum"):
        whole, killed = tmp_path / f"whole-{name}.parquet", tmp_path / f"k-{name}.parquet"
        assert whole.read_bytes() == killed.read_bytes()


def test_training_killed_at_random_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    command = ["train", "digits", "--subset", str(folder / "kept half.parquet"), "--epochs", "12"]
    command += ["--teacher", str(folder / "my run"), "--alpha", "0.5"]
    done = datapruning(*command, "--out", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    strike([*command, "--out", "run"], tmp_path, watched="run/*.pt", seed=1)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1]
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "run")]
    assert metrics[0] == metrics[1]


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    command = ["score", "digits", "--method", "ddd", "--out", "s.parquet"]
    process = Command("datapruning", *command, cwd=tmp_path)
    while not list(tmp_path.glob("s.parquet.parts/run-*")):
        assert process.is_running()
        time.sleep(0.05)
    process.send(signal.SIGINT)
    done = process.ended(timeout=60)
    assert done.returncode == 130
    assert "go on with: datapruning score digits --method ddd --out s.parquet" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_two_ray_workers_write_the_same_bytes(tmp_path: Path) -> None:
    command = ["score", "digits", "--method", "el2n-20,loss", "--runs", "2", *FEW]
    command += ["--shard-size", "400"]
    done = datapruning(*command, "--out", "inline.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = [*command, "--out", "ray.parquet", "--engine", "ray"]
    done = Command("datapruning", *ours, cwd=tmp_path).ended()
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("el2n-20", "loss"):
        inline, spread = tmp_path / f"inline-{name}.parquet", tmp_path / f"ray-{name}.parquet"
        assert inline.read_bytes() == spread.read_bytes()
    command = ["score", "digits", "--method", "d2", "--layer", "nowhere", "--engine", "ray", *FEW]
    done = Command("datapruning", *command, cwd=tmp_path).ended()
    assert done.returncode == 1
    assert "has no layer 'nowhere'" in done.stderr


def test_a_sparse_proxy_shows_its_agreement_and_time(tmp_path: Path) -> None:
    command = ["score", "digits", "--method", "el2n", "--density", "0.2", "--out", "s.parquet"]
    done = datapruning(*command, *FEW, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with the dense model's scores" in done.stdout
    assert "% of its processor time" in done.stdout
    title = "Sparse proxy (density 0.2) against the dense model"
    assert title in (tmp_path / "s.html").read_text()
    # The dense model later: the page comes to show it.
    command[-1] = "t.parquet"
    assert datapruning(*command, *FEW, "--no-check", cwd=tmp_path).returncode == 0
    assert title not in (tmp_path / "t.html").read_text()
    assert datapruning(*command, *FEW, cwd=tmp_path).returncode == 0
    assert title in (tmp_path / "t.html").read_text()


def test_compare_tables(folder: Path) -> None:
    names = ["my scores-el2n.parquet", "my scores-random.parquet"]
    done = datapruning("compare", *names, "--keep", "0.5", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    a, b = (ScoreTable.read(folder / name).scores for name in names)
    both = torch.isin(a.argsort(descending=True)[:718], b.argsort(descending=True)[:718])
    assert record["overlap"]["0.5"] == pytest.approx(float(both.double().mean()), abs=0.01)
    assert abs(record["spearman"]) < 0.1


def test_compare_trainings_once(tmp_path: Path) -> None:
    command = ["compare", "--methods", "el2n,random", "--keep", "0.3", "--seeds", "0"]
    command += ["--epochs", "1", "--out", "cells"]
    done = datapruning(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "at equal epochs" in done.stdout
    assert "at equal steps" in done.stdout
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").rglob("*.*")}
    done = datapruning(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)
    assert {(c["method"], c["budget"]) for c in cells} == {
        ("all data", "epochs"), ("el2n", "epochs"), ("el2n", "steps"),
        ("random", "epochs"), ("random", "steps"),
    }  # fmt: skip
    steps = {(c["method"], c["budget"]): c["steps"] for c in cells}
    assert steps["all data", "epochs"] == steps["el2n", "steps"] == 23
    assert steps["el2n", "epochs"] == 7
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").rglob("*.*")} == stamps


def test_precision(tmp_path: Path) -> None:
    for command in (
        ["score", "digits", "--method", "random"],
        ["train", "digits", "--steps", "3", "--out", "run"],
    ):
        done = datapruning(*command, "--precision", "bfloat16", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    table = ScoreTable.read(tmp_path / "scores.parquet")
    assert table.provenance["settings"]["training"]["precision"] == "bfloat16"
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["training"]["precision"] == "bfloat16"
    resumed = ["train", "digits", "--resume", "--out", "run", "--precision"]
    assert datapruning(*resumed, "bfloat16", cwd=tmp_path).returncode == 0
    done = datapruning(*resumed, "float32", cwd=tmp_path)
    assert "training.precision was 'bfloat16', now 'float32'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "digits", "--method", "magic"], "known methods: el2n"),
        (["score", "nope", "--method", "el2n"], "known: digits"),
        (["score", "digits", "--method", "el2n", "--model", "gpt"], "known models: resnet8"),
        (["score", "digits", "--method", "el2n", "--engine", "steam"], "inline, ray"),
        (["score", "digits", "--method", "el2n", "--density", "0"], "density must be in"),
        (["score", "digits", "--method", "el2n", "--out", "scores"], "a parquet file"),
        (["score", "digits", "--method", "el2n", "--set", "window=3"], "no option 'window'"),
        (["score", "digits", "--method", "dual", "--set", "window"], "expected name=value"),
        (["score", "digits", "--method", "d2", "--layer", "x", "--epochs", "1"], "no layer 'x'"),
        (["select", "none.parquet", "--keep", "0.5"], "none.parquet: no such file"),
        (["select", "{scores}", "--keep", "0"], "keep"),
        (["select", "{scores}", "--keep", "9999"], "1437"),
        (["select", "{scores}", "--keep", "0.5", "--policy", "magic"], "hardest"),
        (["select", "{kept}", "--keep", "0.5"], "is not a scores file"),
        (["train", "digits", "--subset", "{scores}"], "is not a subset file"),
        (["train", "digits", "--subset", "none.parquet"], "no such file"),
        (["train", "digits", "--alpha", "much"], "a number in [0, 1] or auto"),
        (["train", "digits", "--teacher", "nowhere"], "no summary.json in nowhere"),
        (["train", "digits", "--resume", "--out", "nothing"], "no run in nothing"),
        (["train", "digits", "--lr", "-1"], "lr must be positive"),
        (["train", "digits", "--precision", "half"], "one of float32, bfloat16, got 'half'"),
        (
            ["score", "digits", "--method", "el2n", "--density", "0.1", "--precision", "bfloat16"],
            "a sparse proxy is trained in float32",
        ),
        (["compare", "{scores}"], "two or more files"),
        (["compare", "--methods", "el2n,magic"], "unknown method 'magic'"),
        (["compare", "{scores}", "{scores}", "--keep", "2"], "a share between 0 and 1"),
        (["report", "nowhere"], "nowhere: no such file"),
    ],
)
def test_one_clear_line_and_exit_status(
    arguments: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    places = {"scores": folder / "my scores-el2n.parquet", "kept": folder / "kept half.parquet"}
    done = datapruning(*(a.format(**places) for a in arguments), cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.rglob("*.parquet"))


def test_real_process_fails_with_one_line_and_with_debug_with_a_trace(tmp_path: Path) -> None:
    command = ["score", "digits", "--method", "magic"]
    done = subprocess.run(
        [DATAPRUNING, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    done = Command("datapruning", *command, "--debug", cwd=tmp_path).ended()
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_score_streams_a_folder_of_shards(tmp_path: Path) -> None:
    names = [("ant", "bee", "cow")[number % 3] for number in range(60)]
    write_shards(tmp_path / "shards", "tar", images(60, (1, 8, 8)), names, [25, 60])
    arguments = ["--method", "el2n", "--stream", "--epochs", "1"]
    done = datapruning("score", "shards", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = ScoreTable.read(tmp_path / "scores.parquet")
    assert len(table) == 60
    assert table.dataset == "shards"
    page = (tmp_path / "scores.html").read_text(encoding="utf-8")
    assert "class 2 (cow)" in page
    assert "data:image/png" in page
    done = datapruning("score", "digits", *arguments, "--out", "d.parquet", cwd=tmp_path)
    assert done.returncode != 0
    assert "digits: no such folder, file or pattern of files" in done.stderr
