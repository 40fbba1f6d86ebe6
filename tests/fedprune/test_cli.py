"""The command as a user meets it: real processes, exit codes, one clear line for an error."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from federation import TINY, digest, run_inline, tiny
from PIL import Image
from processes import Command
from typer.main import get_command

from fedprune.cli import _go_on, cli
from fedprune.config import read_toml
from fedprune.methods import METHODS
from fedprune.rounds.folder import (
    CHECKPOINT,
    CONFIG,
    SUMMARY,
    prepare,
    read_metrics,
    read_summary,
)
from prunelab.runs.settings import OR_ELSEWHERE
from sparsemodel.masks.registry import CRITERIA
from sparsemodel.storage.checkpoint import load_sparse
from sparsemodel.units.registry import UNIT_CRITERIA

FEDPRUNE = str(Path(sys.executable).parent / "fedprune")
OPTIONS = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]


def fedprune(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return Command("fedprune", *arguments, cwd=cwd).ended()


def test_run_twice_gives_two_folders_and_one_digest(finished: Path, tmp_path: Path) -> None:
    """A second run does not touch the first; both have the digest of the in-process run."""
    for _ in range(2):
        done = fedprune("run", "--engine", "inline", *OPTIONS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "round   4/4" in done.stdout
    assert "report.html" in done.stdout
    folders = sorted((tmp_path / "runs").iterdir())
    names = [folder.name for folder in folders]
    assert names == ["digits-fedtiny-d0.2-s7", "digits-fedtiny-d0.2-s7-2"]
    assert [digest(folder) for folder in folders] == [digest(finished)] * 2
    for folder in folders:
        files = {p.name for p in folder.iterdir()}
        assert {"config.toml", "metrics.jsonl", "summary.json", "report.html"} <= files


def test_kill_at_random_moments_then_resume_gives_the_same_bits(tmp_path: Path) -> None:
    """kill -9, again and again, wherever it hits: the digest is that of an undisturbed run."""
    config = tiny(training__rounds=40)
    expected = digest(run_inline(config, tmp_path / "undisturbed"))
    out = tmp_path / "killed run"
    command = ["run", "--engine", "inline", *OPTIONS]
    command += ["--rounds", "40", "--out", str(out)]
    moments = random.Random(0)
    kills = 0
    while not (out / SUMMARY).exists():
        assert kills < 30
        resume = ["--resume"] if (out / "config.toml").exists() else []
        before = len(read_metrics(out))
        process = Command("fedprune", *command, *resume, cwd=tmp_path)
        # Let it come a little further than the last one, then strike at any moment.
        while process.is_running() and len(read_metrics(out)) <= before + 2:
            time.sleep(0.01)
        if kills < 4:
            time.sleep(moments.uniform(0.0, 0.3))
            process.send(signal.SIGKILL)
            kills += 1
        process.ended()
    assert kills >= 3  # a loaded machine may let it finish before the last one
    assert digest(out) == expected
    assert [line.get("round") for line in read_metrics(out)] == [None, *range(1, 41)]


def test_an_interruption_names_resume_where_the_command_has_it() -> None:
    for name, command in get_command(cli).commands.items():  # type: ignore[attr-defined]
        has = any("--resume" in option.opts for option in command.params)
        assert ("--resume" in _go_on([name])) == has, name


def test_a_second_resume_does_not_take_a_folder_from_a_running_run(tmp_path: Path) -> None:
    """Before the first checkpoint, when the folder holds its configuration alone."""
    first = Command(
        *("fedprune", "run", "--engine", "inline", *OPTIONS, "--rounds", "1", "--out", "run"),
        *("--set", "server.pretrain_epochs=60"),
        cwd=tmp_path,
    )
    while not (tmp_path / "run" / CONFIG).exists():
        assert first.is_running()
        time.sleep(0.01)
    # Whoever comes second is refused, by a setting of its own or because the first is at work.
    for wrong in (["--seed", "8"], ["--clients", "5000"], ["--engine", "steam"]):
        second = fedprune(
            "run", "--engine", "inline", "--resume", "--out", "run", *wrong, cwd=tmp_path
        )
        assert second.returncode == 1, second.stdout
        assert (tmp_path / "run" / CONFIG).exists()
    assert first.ended().returncode == 0
    assert read_summary(tmp_path / "run")["rounds"] == 1


@pytest.mark.parametrize("engine", ["inline", "flower"])
def test_a_resume_that_cannot_go_on_leaves_the_folder(engine: str, tmp_path: Path) -> None:
    """The data cannot be read any more."""
    prepare(tmp_path / "run", tiny(data__dataset="no such set"), resume=False)
    done = fedprune("run", "--engine", engine, "--resume", "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "unknown data set 'no such set'" in done.stderr
    assert (tmp_path / "run" / CONFIG).exists()


def test_resume_compares_what_was_given_and_no_default(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    command = ["run", "--engine", "inline", "--resume", "--out", "run"]
    for given in ([], ["--rounds", "4"], ["--seed", "7", "--density", "0.2"]):
        done = fedprune(*command, *given, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "already complete" in done.stdout
    for given, difference in (
        (["--rounds", "9"], "training.rounds was 4, now 9"),
        (["--set", "training.lr=0.5"], "training.lr was 0.1, now 0.5"),
        (["--method", "fedprox"], "method.name was 'fedtiny', now 'fedprox'"),
        (["--set", 'method.settings={"pool_size": 3}'], "method.pool_size was 2, now 3"),
    ):
        done = fedprune(*command, *given, cwd=tmp_path)
        assert done.returncode == 1
        assert difference in done.stderr
        cure = f"; {OR_ELSEWHERE}\n"
        assert done.stderr.endswith(cure)
        assert ("; " in done.stderr.removesuffix(cure)) == (given[0] == "--method")
        assert "data.clients" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.ray
def test_kill_leaves_nothing_at_work_and_no_temporary_files(tmp_path: Path) -> None:
    """kill -9 of the command in the middle of a run on Flower's engine, as a user installed it."""
    place = Path(tempfile.mkdtemp(prefix="t"))  # short: Ray's sockets lie deep below it
    marked = {**os.environ, "TMPDIR": str(place), "FEDPRUNE_TEST": str(tmp_path)}
    command = [FEDPRUNE, "run", *OPTIONS, "--rounds", "500", "--out", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=marked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(read_metrics(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30  # on a busy machine; `flwr run` by itself took 40
    while at_work(f"FEDPRUNE_TEST={tmp_path}"):
        assert time.monotonic() < deadline, at_work(f"FEDPRUNE_TEST={tmp_path}")
        time.sleep(0.1)
    for lock in place.glob("fedprune-*/.lock"):  # as if some time had passed
        os.utime(lock, (0, 0))
    done = subprocess.run(
        [FEDPRUNE, "run", "--engine", "inline", "--dataset", "nope", "--out", "other"],
        cwd=tmp_path, env=marked, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert not list(place.glob("fedprune-*"))
    shutil.rmtree(place)


def at_work(mark: str) -> list[str]:
    """Command lines of the processes that have a setting in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if line]


@pytest.mark.ray
def test_flower_engine_gives_the_bits_of_inline(finished: Path, tmp_path: Path) -> None:
    """Through SuperLink, `flwr run` and Ray: same digest, same bytes, and nothing left running."""
    out = tmp_path / "flower run"
    (tmp_path / "sheet.py").write_text(
        "class Sheet:\n"
        "    def start(self, config, folder): self.rounds = []\n"
        "    def log(self, metrics, step): self.rounds.append(step)\n"
        "    def finish(self, summary): print(len(summary) > 9, self.rounds, file=open('s', 'w'))\n"
    )
    arguments = ["run", "--engine", "flower", *OPTIONS, "--tracker", "sheet:Sheet"]
    done = fedprune(*arguments, "--out", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "s").read_text() == "True [1, 2, 3, 4]\n"  # of a server in another process
    assert digest(out) == digest(finished)
    ours, theirs = read_summary(out), read_summary(finished)
    for key in ("bytes_up", "bytes_down", "test_accuracy", "train_flops_ratio"):
        assert ours[key] == theirs[key]


@pytest.mark.ray
def test_failure_inside_flower_is_reported_with_its_reason(tmp_path: Path) -> None:
    """`flwr run` itself exits 0 when the app raises; the command must not, and says what inline
    says, with the cure."""
    arguments = ["run", "--density", "0.00001", "--clients", "2", "--out", "r"]
    done = fedprune(*arguments, "--engine", "flower", cwd=tmp_path)
    assert done.returncode == 1
    assert "the lowest density possible for this model is 0.00" in done.stderr
    assert not (tmp_path / "r").exists()
    assert done.stderr == fedprune(*arguments, "--engine", "inline", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--dataset", "no such set"), "unknown data set 'no such set'; known: digits"),
        (("--model", "nowhere:net"), "cannot import 'nowhere'"),
        (("--model", "gpt"), "known models: resnet8"),
        (("--clients", "5000"), "5000 clients"),
        (("--set", "data.num_train=99999"), "asked for 99999 samples; there are 1437"),
    ],
)
def test_names_and_data_are_checked_before_flower_starts(
    option: tuple[str, str], message: str, tmp_path: Path
) -> None:
    done = fedprune("run", "--engine", "flower", *option, "--out", "r", cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "starting Flower" not in done.stdout
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "magic"], "known methods: fedavg"),
        (["run", "--model", "gpt"], "known models: resnet8"),
        (["run", "--engine", "steam"], "flower, inline"),
        (["run", "--engine", "inline", "--superlink", "x"], "give it without --superlink"),
        (["run", "--density", "0"], "0 < density <= 1"),
        (["run", "--engine", "inline", "--dataset", "nope"], "known: digits"),
        (["run", "--engine", "inline", "--clients", "5000"], "5000 clients"),
        (["run", "--engine", "inline", "--density", "0.00001"], "lowest"),
        (["run", "--set", "training.rouns=3"], "did you mean 'training.rounds'"),
        (["run", "--set", "training"], "section.key=value"),
        (["run", "--set", "method.densty=0.1"], "did you mean 'method.density'"),
        (["run", "--set", "method.settings={"], "method.settings: expected a JSON object"),
        (["run", "--config", "none.toml"], "no config file at none.toml"),
        (["run", "--resume", "--out", "nothing"], "nothing to resume"),
        (["run", "--device", "tpu"], "cpu, cuda"),
        (["report", "nowhere"], "nowhere"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors"),
        (["compare", "--methods", "fedavg,magic"], "unknown method 'magic'"),
    ],
)
def test_one_clear_line_and_exit_status(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = fedprune(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob(CHECKPOINT))


def test_version_methods_and_the_module(tmp_path: Path) -> None:
    for name in ("fedprune", "-m fedprune"):
        command = [FEDPRUNE] if name == "fedprune" else [sys.executable, "-m", "fedprune"]
        done = subprocess.run(
            [*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert re.fullmatch(r"fedprune \d\S*\n", done.stdout)
    done = Command("fedprune", "methods", cwd=tmp_path, columns=80).ended()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line.strip()]
    assert listed == ["method", *METHODS, "method", *METHODS, "fedprune"]
    assert lines[len(METHODS) + 2].split() == [
        "method",
        "when",
        "units",
        "looks",
        "at",
        "goes",
        "by",
    ]
    assert re.search(
        "^snip +before +weights +server's samples +loss, first order", done.stdout, re.M
    )
    assert all(kind.__doc__ and "(density" not in kind.__doc__ for kind in METHODS.values())
    done = Command("fedprune", "methods", "fedprox", cwd=tmp_path, columns=80).ended()
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "settings: density=1.0, distribution=uniform, mu=0.01" in done.stdout
    assert "mu: μ, the weight of the proximal term, >= 0." in done.stdout
    assert "when: before; units: weights; looks at: –; goes by: size;" in done.stdout
    done = Command("fedprune", "methods", "magic", cwd=tmp_path).ended()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_criteria_of_pruning_are_listed(tmp_path: Path) -> None:
    done = Command("fedprune", "methods", "--criteria", cwd=tmp_path, columns=80).ended()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if line]
    assert names == ["of", *CRITERIA, "of", *UNIT_CRITERIA, "fedprune"]
    assert "…" not in done.stdout
    done = Command("fedprune", "methods", "--criteria", "magnitude", cwd=tmp_path).ended()
    assert "|θ|, the absolute value of each weight." in done.stdout
    assert "The sum of the squares of a unit's weights" in done.stdout
    assert ">>>" not in done.stdout
    done = Command("fedprune", "methods", "--criteria", "wonda", cwd=tmp_path).ended()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "did you mean 'wanda'" in done.stderr


def test_a_run_is_never_silent_and_no_line_is_wider_than_80_columns(tmp_path: Path) -> None:
    """Before the first round it says what is being done."""
    arguments = ["run", "--engine", "inline", *OPTIONS, "--out", "r"]
    done = Command("fedprune", *arguments, cwd=tmp_path, columns=80).ended()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:8] == [
        "fedtiny on digits, resnet8, 4 clients, 4 rounds",
        *lines[1:3],
        "division: dirichlet, alpha=0.5; device: cpu; seed: 7",
        "folder: r",
        "setting up: samples, network, first weights",
        "starting: 4 clients join, fedtiny begins",
        lines[7],
    ]
    assert " ".join(lines[1:3]).startswith("method: density=0.2, pool_size=2, pool_limit=10,")
    said = r"4 clients, density 0\.\d+, (sparse|masked) execution, candidate [12] of 2 won"
    assert re.fullmatch(said, lines[7])
    assert max(map(len, lines)) <= 80
    done = fedprune("run", "--resume", "--out", "r", cwd=tmp_path)
    assert done.stdout.startswith("already complete: r\n")


def test_a_config_file_of_another_method_may_be_used(finished: Path, tmp_path: Path) -> None:
    """The page of a run says so: its own settings, less what the dense method does not know."""
    done = fedprune(
        *("run", "--config", str(finished / "config.toml"), "--method", "fedavg"),
        *("--rounds", "1", "--engine", "inline", "--out", "dense"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (read_toml(folder / "config.toml") for folder in (tmp_path / "dense", finished))
    changed = {key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key)}
    assert {key for key in changed if not key.startswith("method.")} == {"training.rounds"}
    typo = tmp_path / "typo.toml"
    typo.write_text('[method]\nname = "fedavg"\ndensty = 1\n')
    done = fedprune("run", "--config", str(typo), cwd=tmp_path)
    assert "'method.densty' of method 'fedavg'" in done.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'no module'", "error: noisy:net returned a str"),
        ("raise KeyError('weights')", "error: setting up failed: KeyError: 'weights'"),
    ],
)
def test_what_fails_in_the_process_that_sets_up_is_one_line(
    body: str, message: str, tmp_path: Path
) -> None:
    """A command that has no torch lets another process set up, whatever that one prints."""
    (tmp_path / "noisy.py").write_text(
        f"def net():\n    print('building ...', end='')\n    {body}\n", encoding="utf-8"
    )
    done = subprocess.run(
        [FEDPRUNE, "run", "--engine", "inline", "--model", "noisy:net"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(message.replace("noisy:net", "net"))
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*"))


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    command = [FEDPRUNE, "run", "--method", "magic", "--debug"]  # as it is installed
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_density_for_a_dense_method_is_a_note_not_an_error(tmp_path: Path) -> None:
    settings = [f"{key}={value}" for key, value in TINY.items() if not key.startswith("method.")]
    done = fedprune(
        *("run", "--engine", "inline", "--method", "fedavg", "--density", "0.1", "--rounds", "1"),
        *(part for setting in settings for part in ("--set", setting)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "note: --density has no effect: this method has no such setting"
    ]
    summary = read_summary(tmp_path / "runs" / "digits-fedavg-d1-s7")
    assert (summary["density_target"], summary["density"]) == (1.0, 1.0)


def test_settings_of_another_method_are_refused_with_a_hint(tmp_path: Path) -> None:
    for arguments, message in (
        (("magnitude", "method.pool_size=2"), "'method.pool_size' of method 'magnitude'"),
        (("fedprox", "method.nu=1"), "of method 'fedprox'; did you mean 'method.mu'"),
        (("fedavg", "method.density=0.1"), "'method.density' of method 'fedavg'"),
    ):
        done = fedprune("run", "--method", arguments[0], "--set", arguments[1], cwd=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_config_file_and_options_over_it(tmp_path: Path) -> None:
    (tmp_path / "my run.toml").write_text(tiny(training__rounds=2).toml())
    done = fedprune(
        "run", "--engine", "inline", "--config", "my run.toml", "--seed", "9", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "runs" / "digits-fedtiny-d0.2-s9")
    assert (summary["rounds"], summary["seed"]) == (2, 9)


def test_compare_prints_one_table_and_reuses_finished_runs(tmp_path: Path) -> None:
    arguments = ["compare", "--methods", "fedavg,magnitude", "--seeds", "0,1", *OPTIONS]
    arguments += ["--rounds", "1"]
    done = fedprune(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
    assert "1/4 runs/compare/fedavg-s0 ..." in done.stdout
    again = fedprune(*arguments, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    summaries = json.loads(again.stdout)
    assert [(s["method"], s["seed"]) for s in summaries] == [
        ("fedavg", 0),
        ("fedavg", 1),
        ("magnitude", 0),
        ("magnitude", 1),
    ]
    assert again.stderr.count("already complete") == 4
    # Dense runs came first, so that the others' pages have something to compare with.
    page = (tmp_path / "runs/compare/magnitude-s1/report.html").read_text(encoding="utf-8")
    assert "is in the folder fedavg-s1" in page


def test_a_baseline_is_run_beside_and_the_page_compares(tmp_path: Path) -> None:
    options = ["--clients", "2", "--set", "data.num_train=200", "--rounds", "1", "--seed", "3"]
    arguments = ["run", "--engine", "inline", "--method", "magnitude", *options, "--baseline"]
    done = Command("fedprune", *arguments, "--out", "r", cwd=tmp_path, columns=80).ended()
    assert done.returncode == 0, done.stderr
    assert "1/1 r-dense" in done.stdout
    assert read_summary(tmp_path / "r-dense")["method"] == "fedavg"
    assert done.stdout.index("accuracy") < done.stdout.index("1/1 r-dense")
    assert "is in the folder r-dense" in (tmp_path / "r/report.html").read_text(encoding="utf-8")
    # Here, and beside a folder that holds something else: told before anything is computed.
    here, taken = tmp_path / "other/here", tmp_path / "other/here-dense"
    here.mkdir(parents=True)
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    refused = Command("fedprune", *arguments, "--out", ".", cwd=here, columns=200).ended()
    assert refused.returncode == 1
    assert "here-dense is not empty and holds no run" in refused.stderr
    assert not list(here.iterdir())
    shutil.rmtree(taken)
    done = Command("fedprune", *arguments, "--out", ".", cwd=here, columns=200).ended()
    assert done.returncode == 0, done.stderr
    assert read_summary(taken)["method"] == "fedavg"


def test_how_the_data_were_taken_is_said_by_the_command_and_its_child(tmp_path: Path) -> None:
    """Laying out is a child's work where torch has not been imported; its warnings come along."""
    random_bytes = np.random.default_rng(0)
    for side, count in (("train", 60), ("test", 9)):
        cells = []
        for image in random_bytes.integers(0, 256, (count, 8, 8), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            cells.append(buffer.getvalue())
        labels, clients = [n % 3 for n in range(count)], [n % 4 for n in range(count)]
        table = pyarrow.table({"img": cells, "label": labels, "client": clients})
        pyarrow.parquet.write_table(table, tmp_path / f"{side}.parquet")
    (tmp_path / "train_old.parquet").write_bytes(b"")
    options = ["--dataset", ".", "--rounds", "1", "--clients", "2", "--set", "server.per_class=1"]
    command = [FEDPRUNE, "run", "--engine", "inline", "--method", "fedavg", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert len(lines) == 2
    assert "the train side is train.parquet; not read: train_old.parquet" in lines[0]
    assert "4 natural clients), but are divided among 2 by data.partition = 'dirichlet'" in lines[1]


def test_inspect_and_report(finished: Path) -> None:
    done = fedprune("inspect", str(finished / "model.safetensors"), cwd=finished)
    assert done.returncode == 0, done.stderr
    assert digest(finished) in done.stdout
    assert "method: fedtiny" in done.stdout
    stored = load_sparse(finished / "model.safetensors")
    assert stored.mask is not None
    sums = [stored.state[name].abs().flatten(1).sum(1) for name in stored.mask]
    silent = sum(int((values == 0).sum()) for values in sums)
    assert f"silent outputs: {silent} of {sum(map(len, sums))}" in done.stdout
    done = fedprune("report", str(finished), cwd=finished)
    assert done.returncode == 0, done.stderr
    assert (finished / "report.html").exists()
