"""The report page, and the tables and units that the command line prints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from fedprune.config import RunConfig, own_settings
from fedprune.methods.base import RunState
from fedprune.reports.charts import candidate_chart, label_chart
from fedprune.reports.page import write_report
from fedprune.reports.results import comparison_table, summary_rows
from fedprune.rounds.folder import RunFolder, prepare, save_model
from prunelab.errors import RunError
from prunelab.runs.folder import append_metrics, write_metrics, write_summary
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

SETTINGS = {"training.rounds": 3, "data.clients": 4, "method.density": 0.1}
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Fails on tags that do not match; gathers what a reader and a browser would meet."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.row_classes: list[str] = []
        self.tiles: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
            self.row_classes.append(dict(attrs).get("class") or "")
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "dd":
            self.tiles.append("")
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        place = self.open[-1] if self.open else ""
        if place in ("td", "th"):
            self.rows[-1][-1] += data
        elif place == "dd":
            self.tiles[-1] += data
        elif place in ("h1", "h2"):
            self.headings[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def summary(**changes: Any) -> dict[str, Any]:
    """A summary.json with values that no other field shares."""
    values = {
        "method": "fedtiny",
        "dataset": "digits",
        "model": "resnet8",
        "seed": 7,
        "rounds": 3,
        "density_target": 0.05,
        "density": 0.05087,
        "test_accuracy": 0.87654,
        "bytes_up": 1_470_000,
        "bytes_down": 4_010_000,
        "bytes_up_steady_round": 21_900,
        "bytes_down_steady_round": 31_400,
        "bytes_dense_round": 314_000,
        "train_flops_ratio": 0.0708,
        "state_bytes": 365_000,
        "state_bytes_dense": 933_000,
        "peak_rss_bytes": 876_000_000,
        "seconds": 125.0,
        "version": "9.8.7",
    }
    return {**values, **changes}


def selection(losses: list[float], winner: int) -> dict[str, Any]:
    return {
        "adaptive": True,
        "winner": winner,
        "losses": losses,
        "metrics": [0.1 + 0.1 * c for c in range(len(losses))],
        "densities": [{"a.weight": 0.25, "b.weight": 0.75} for _ in losses],
        "clients": [0, 1, 2],
    }


def make_run(
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    num_rounds: int = 3,
    num_layers: int = 2,
    start: Mapping[str, Any] | None = None,
    last: Mapping[str, Any] | None = None,
    finished: Mapping[str, Any] | None = None,
    is_dense: bool = False,
) -> Path:
    """A run folder; `start` and `last` change the first and last line, `finished` is its summary.

    Layer l has 4 + l active weights of 40 in the end and 4 at the start.
    """
    config = RunConfig.parse(own_settings({**SETTINGS, **(settings or {})}))
    prepare(folder, config, resume=False)
    names = [f"layer{number}.conv.weight" for number in range(num_layers)]
    clients = [
        {"client": c, "num_train": 90 + c, "num_dev": 10, "labels": [40 + c, 0, 60]}
        for c in range(config.data.clients)
    ]
    lines: list[dict[str, Any]] = [
        {
            "event": "start",
            "clients": clients,
            "density": 1.0 if is_dense else 0.1,
            "layer_densities": None if is_dense else dict.fromkeys(names, 0.1),
            "bytes_up": 1_000,
            "bytes_down": 2_000,
            "skipped": [],
            **(start or {}),
        }
    ]
    for number in range(1, num_rounds + 1):
        lines.append(
            {
                "round": number,
                "test_accuracy": 0.5 + 0.1 * number,
                "test_loss": 1.0 / number,
                "train_loss": 0.5 / number,
                "density": 0.1,
                "clients": list(range(config.data.clients)),
                "bytes_up": 80_000,
                "bytes_down": 90_000,
                "mask_bytes": 700,
                "adjusted": names[:1] if number == 2 and not is_dense else [],
                "mask_change_entropy_bytes": 0.0,
                "skipped": [],
            }
        )
    if last is not None:
        lines[-1].update(last)
    write_metrics(folder, lines)
    patterns = {
        name: Pattern.from_positions((40,), np.arange(min(4 + n, 40)))
        for n, name in enumerate(names)
    }
    state = SparseState(
        {name: np.ones(pattern.num_active, np.float32) for name, pattern in patterns.items()},
        Patterns(patterns),
    )
    if is_dense:
        state = SparseState({name: np.ones(40, np.float32) for name in names})
    if finished is None:
        RunFolder(folder).save(RunState(num_rounds, state))
    else:
        save_model(folder, state, metadata={})
        write_summary(folder, finished)
    return folder


def read(folder: Path) -> Page:
    return Page(write_report(folder))


def test_page_shows_the_numbers_of_the_run(tmp_path: Path) -> None:
    """Shares by hand: 21.9/314 = 6.97 %, 31.4/314 = 10 %, 365/933 = 39.1 %."""
    folder = make_run(
        tmp_path / "run",
        finished=summary(),
        start={"selection": selection([2.5, 1.25, 1.5], winner=1)},
    )
    page = read(folder)
    assert page.headings[0] == "fedtiny on digits"
    assert "resnet8 · seed 7 · 4 clients · 3 rounds" in page.text
    assert page.tiles == [
        *("87.65 %", "after round 3"),
        *("0.05087", "target 0.05"),
        *("21.9 kB", "6.97 % of 314 kB dense"),
        *("31.4 kB", "10 % of 314 kB dense"),
        *("1.47 MB", "all clients"),
        *("4.01 MB", "all clients"),
        *("7.08 %", "of dense training"),
        *("365 kB", "39.1 % of 933 kB dense"),
        *("876 MB", "resident set"),
        *("2 min 05 s", ""),
    ]
    assert page.headings[1:] == [
        "Was pruning worth it?",
        "Accuracy by round",
        "Bytes by round",
        "Which candidate won, and why",
        "Layer densities",
        "What the clients hold",
        "Configuration",
    ]
    # Four clients of 314 kB; three rounds of 700 bytes.
    assert "Dense FedAvg would send 1.26 MB each way in a round" in page.text
    assert "Masks took 2.10 kB" in page.text
    assert "Round 0 is the candidate selection: up 1.00 kB, down 2.00 kB" in page.text
    assert "4 clients hold 366 training samples (90 to 93 each)" in page.text
    assert "adjusted after 1 of 3 rounds" in page.text
    assert ["2", "70.00 %", "0.5", "0.25", "0.1", "80.0 kB", "90.0 kB", "700 B", "1"] in page.rows
    assert ["dataset", "digits"] in page.rows
    assert "0.1 → 0.125" in page.texts  # the second layer: 4 of 40, then 5 of 40
    assert "layer1.conv" in page.texts
    assert "9.8.7" in page.text


def dense_beside(folder: Path, **changes: Any) -> Path:
    """A finished dense run of the same settings beside a run."""
    values: dict[str, Any] = {
        **summary(method="fedavg", density_target=1.0, density=1.0, test_accuracy=0.9),
        "bytes_up": 14_700_000, "bytes_down": 4_700_000, "train_flops_ratio": 1.0,
        "bytes_up_steady_round": 314_000, "bytes_down_steady_round": 314_000,
        "state_bytes": 730_000, "seconds": 500.0, **changes,
    }  # fmt: skip
    settings = {"method.name": "fedavg", "federation.timeout": 5.0}
    return make_run(folder, settings=settings, finished=values, is_dense=True)


def test_the_dense_run_beside_it_answers_whether_pruning_was_worth_it(tmp_path: Path) -> None:
    """By hand: 87.654 − 90 = −2.35 points; (1.47 + 4.01) / 19.4 = 28.2 %; 365/730 = 50 %."""
    folder = make_run(tmp_path / "tiny", finished=summary())
    dense_beside(tmp_path / "whole")
    page = read(folder)
    assert page.headings[1] == "Was pruning worth it?"
    assert (
        "At density 0.05087 the network's accuracy on the test data is 87.65 %, that of the dense "
        "one 90.00 % (2.35 points less). It sent 28.2 % of the dense run's bytes, took 7.08 % of "
        "its training FLOPs, and a client held 50 % of its training state."
    ) in page.text
    assert ["", "fedtiny", "dense (fedavg)", "difference"] in page.rows
    assert ["test accuracy", "87.65 %", "90.00 %", "2.35 points less"] in page.rows
    assert ["upload / client / round", "21.9 kB", "314 kB", "6.97 % of dense"] in page.rows
    assert ["upload, whole run", "1.47 MB", "14.7 MB", "10 % of dense"] in page.rows
    assert ["training FLOPs, of dense", "7.08 %", "100.00 %", "7.08 % of dense"] in page.rows
    assert ["time", "2 min 05 s", "8 min 20 s", "25 % of dense"] in page.rows
    assert "is in the folder whole" in page.text
    assert "fedprune run --config" not in page.text
    assert "Was pruning worth it?" not in read(tmp_path / "whole").headings


def test_magnitude_pruning_beside_it_is_compared_as_well(tmp_path: Path) -> None:
    """At the same density alone; its own page is compared with the dense run only."""
    folder = make_run(tmp_path / "tiny", finished=summary())
    others = {"own": SETTINGS["method.density"], "another": 0.5}
    for name, density in others.items():
        settings = {"method.name": "magnitude", "method.density": density}
        values = summary(method="magnitude", test_accuracy=0.9, bytes_up=2_940_000)
        make_run(tmp_path / name, settings=settings, finished=values)
    page = read(folder)
    assert page.headings.count("Was pruning worth it?") == 1
    assert "Method magnitude, at the same density, came to 90.00 %: fedtiny is 2.35 points" in (
        page.text
    )
    assert ["upload, whole run", "1.47 MB", "2.94 MB", "50 % of magnitude"] in page.rows
    assert "by method magnitude is in the folder own." in page.text
    assert "No dense run of the same settings" in page.text
    dense_beside(tmp_path / "whole")
    page = read(folder)
    assert ["", "fedtiny", "dense (fedavg)", "difference"] in page.rows
    assert ["", "fedtiny", "magnitude", "difference"] in page.rows
    assert "No dense run" not in page.text
    own = read(tmp_path / "own").rows
    assert ["", "magnitude", "dense (fedavg)", "difference"] in own
    assert ["", "magnitude", "magnitude", "difference"] not in own


@pytest.mark.parametrize(
    "other",
    [
        None,
        {"settings": {"method.name": "fedavg", "seed": 8}},
        {"settings": {"method.name": "fedavg", "training.rounds": 4}},
        {"settings": {"method.name": "small-dense"}},
        {"settings": {"method.name": "fedavg"}, "finished": None},
    ],
)
def test_without_such_a_run_the_page_says_how_to_get_it(
    other: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Other seeds, settings and methods, and runs that are not finished, are no baseline."""
    folder = make_run(tmp_path / "my run", finished=summary())
    if other is not None:
        make_run(tmp_path / "other", **{"finished": summary(method="fedavg"), **other})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.toml").write_text("= 3")
    (tmp_path / "damaged" / "summary.json").write_text("{")
    page = read(folder)
    assert (
        "fedprune run --config 'my run'/config.toml --method fedavg --engine inline "
        "--out 'my run-dense' fedprune report 'my run'"
    ) in page.text


def test_a_run_of_objects_is_told_how_to_get_it_in_python(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=summary(dataset="given@0123"))
    assert 'The same call of fedprune.run with method="fedavg"' in read(folder).text


def test_settings_are_shown_as_they_were_used(tmp_path: Path) -> None:
    """What the file leaves to be worked out: max(1, round(.1/.03)) = 3 candidates, .6 · 20."""
    settings = {"method.density": 0.03, "training.rounds": 20, "data.clients": 6}
    folder = make_run(
        tmp_path / "run", settings=settings, finished=summary(), start={"execution": "masked"}
    )
    stored = {row[0]: row[1] for row in read(folder).rows if len(row) == 2}
    assert {key: stored[key] for key in (
        "pool_size", "adjust_until", "granularity", "execution", "clients_per_round", "num_train",
        "num_test", "alpha", "classes_per_client", "cohort", "width",
    )} == {
        "pool_size": "3", "adjust_until": "12", "granularity": "block", "execution": "masked",
        "clients_per_round": "6", "num_train": "all", "num_test": "all", "alpha": "0.5",
        "classes_per_client": "not used", "cohort": "at most 4 (batched engine)",
        "width": "the network's own",
    }  # fmt: skip
    assert ["name", "resnet8"] in read(folder).rows
    fixed = {"method.name": "fedtiny-fixed", "data.partition": "iid", "data.num_train": 90}
    rows = read(make_run(tmp_path / "fixed", settings=fixed, finished=summary())).rows
    assert all([key, "not used"] in rows for key in ("adjust_every", "adjust_until", "alpha"))
    assert ["num_train", "90"] in rows


def test_winner_is_marked_and_explained(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run",
        finished=summary(),
        start={"selection": selection([2.5, math.nan, 1.25, 1.5], winner=2)},
    )
    page = read(folder)
    assert (
        "Candidate 3 of 4 had the smallest weighted loss on the clients' development data: "
        "1.25 against 1.5 of the next."
    ) in page.text
    marked = [row for row, kind in zip(page.rows, page.row_classes, strict=True) if kind]
    assert marked == [["3 (winner)", "1.25", "30.00 %", "0.25 – 0.75"]]
    assert ["2", "–", "20.00 %", "0.25 – 0.75"] in page.rows
    assert "1.25, winner" in page.texts


def test_selection_is_absent_where_there_was_none(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run", finished=summary()))
    assert not any("candidate" in heading.lower() for heading in page.headings)


def test_single_candidate(tmp_path: Path) -> None:
    account = {**selection([1.5], winner=0), "adaptive": False}
    folder = make_run(tmp_path / "run", finished=summary(), start={"selection": account})
    text = read(folder).text
    assert "The pool held one candidate; its weighted loss was 1.5." in text
    assert "statistics were not adapted" in text


def test_text_of_the_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "/data/my set/<script>alert(1)</script> & \"quotes\" 'x' $a_b$"
    layer = "<b>&$x^2$.weight"
    folder = make_run(
        tmp_path / "a folder & <more>",
        settings={"data.dataset": evil},
        finished=summary(dataset=evil),
        start={"layer_densities": {layer: 0.5}},
        last={"skipped": [{"client": 3, "reason": "no <answer> & more\ud800"}]},
    )
    page = read(folder)
    assert page.headings[0] == f"fedtiny on {evil}"
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert ["dataset", evil] in page.rows
    assert layer.removesuffix(".weight") in page.texts
    assert ["3", "3", "no <answer> & more?"] in page.rows


def test_page_is_self_contained_and_named_for_screen_readers(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run",
        finished=summary(),
        start={"selection": selection([2.5, 1.25], winner=1)},
    )
    page = read(folder)
    assert not re.search(r"https?://", page.source)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    targets = [v for _, name, v in page.attributes if name in ("href", "xlink:href", "src")]
    assert all(target.startswith("#") for target in targets)
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    used = {target[1:] for target in targets} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert used <= set(names)
    labels = [v for tag, name, v in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert page.tags.count("svg") == len(labels) == 5
    assert "Full colour: 60 % of a client's samples" in page.text  # 60 of 100, of client 0
    assert all(labels)
    # Every colour of a chart is a variable of the page, which knows light and dark.
    assert not re.search(r"(fill|stroke): #", page.source)
    assert "prefers-color-scheme: dark" in page.source


def test_same_folder_gives_same_bytes_whatever_the_user_set(tmp_path: Path) -> None:
    start = {"selection": selection([2.5, 1.25], winner=1)}
    folder = make_run(tmp_path / "run", finished=summary(), start=start)
    first = write_report(folder).read_bytes()
    with mpl.rc_context({"font.size": 30, "axes.prop_cycle": "cycler('color', ['r'])"}):
        backend = mpl.rcParams["backend"]
        assert write_report(folder).read_bytes() == first
        assert mpl.rcParams["font.size"] == 30
        assert mpl.rcParams["backend"] == backend
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
        "summary.json",
    ]


def test_dense_run_has_no_layer_densities(tmp_path: Path) -> None:
    dense = summary(method="fedavg", density=1.0, density_target=1.0)
    page = read(make_run(tmp_path / "run", finished=dense, is_dense=True))
    assert page.headings[0] == "fedavg on digits"
    assert "Layer densities" not in page.headings
    assert page.tiles[2:4] == ["1", "dense"]


def test_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    """80 weights in the checkpoint are 320 bytes; round 2 of 3 is the last one."""
    page = read(make_run(tmp_path / "run", num_rounds=2))
    assert "Run not finished: round 2 of 3." in page.text
    assert page.tiles[:4] == ["70.00 %", "after round 2", "0.1", "target 0.1"]
    assert page.tiles[4] == "–"
    assert page.tiles[8] == "161 kB"
    assert "after round 2" in page.texts  # the legend of the layer densities
    assert "Dense FedAvg would send 1.28 kB each way" in page.text


def test_bytes_that_a_round_does_not_tell_are_no_sum(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run", last={"bytes_up": None}))
    assert page.tiles[8] == "–"
    assert page.tiles[9] == ""
    assert page.tiles[10] == "272 kB"  # 2 + 3 · 90


@pytest.mark.parametrize("num_lines", [0, 1])
def test_run_that_has_just_begun(tmp_path: Path, num_lines: int) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "checkpoint.safetensors").unlink()
    metrics = folder / "metrics.jsonl"
    kept = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:num_lines]
    metrics.write_text("".join(kept), encoding="utf-8")
    page = read(folder)
    assert "Run not finished: round 0 of 3." in page.text
    assert page.tiles[0] == "–"
    assert "What the clients hold" in page.headings[-2:] or num_lines == 0


def test_round_without_a_usable_answer_is_listed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", num_rounds=1)
    line = {
        "event": "no-reply",
        "round": 2,
        "skipped": [{"client": 1, "reason": "timeout"}, {"client": -1, "reason": "node 5: away"}],
    }
    append_metrics(folder, line)
    page = read(folder)
    assert "Run not finished: round 1 of 3." in page.text
    assert "Clients left out" in page.headings
    assert ["2", "1", "timeout"] in page.rows
    assert ["2", "unknown", "node 5: away"] in page.rows


def test_missing_numbers_are_dashes(tmp_path: Path) -> None:
    odd = summary(test_accuracy=math.nan, bytes_up_steady_round=None, seconds=math.inf)
    page = read(
        make_run(
            tmp_path / "run",
            num_rounds=1,
            finished=odd,
            last={"test_accuracy": math.nan, "test_loss": None, "train_loss": math.inf},
        )
    )
    assert [page.tiles[place] for place in (0, 4, 18)] == ["–", "–", "–"]
    assert ["1", "–", "–", "–", "0.1", "80.0 kB", "90.0 kB", "700 B", "0"] in page.rows
    assert "nan" not in page.text.lower().split()
    assert "inf" not in page.text.lower().split()


def test_many_clients_layers_and_rounds(tmp_path: Path) -> None:
    labels = [[(7 * c + k) % 5 for k in range(100)] for c in range(100)]
    clients = [
        {"client": c, "num_train": sum(row), "num_dev": 1, "labels": row}
        for c, row in enumerate(labels)
    ]
    page = read(
        make_run(
            tmp_path / "run",
            settings={"data.clients": 100, "training.rounds": 200},
            num_rounds=200,
            num_layers=60,
            start={"clients": clients},
            finished=summary(rounds=200),
        )
    )
    assert "layer59.conv" in page.texts
    assert "100 clients hold 20,000 training samples (200 to 200 each)" in page.text
    assert len(page.source) < 2_000_000


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run in .*missing: it has no config\.toml"):
        write_report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
        write_report(folder)


def test_charts_follow_their_numbers() -> None:
    """The winner's bar alone is in the accent colour; shades are shares of the largest share."""
    chart = candidate_chart([3.0, 1.0, 2.0], 1, label="Candidates: x")
    assert len(re.findall(r"fill: var\(--accent\)", chart)) == 1
    assert len(re.findall(r'fill: var\(--line\)"', chart)) == 2
    # Shares .5, .5 and 1: two cells of half a shade in one path, one full cell, no empty cell.
    cells = re.findall(
        r'<path d="([^"]*)"[^>]*style="fill: var\(--accent\)(; fill-opacity: 0\.5)?[^"]*"',
        label_chart([0, 1], [[5, 5, 0], [0, 0, 9]], label="Labels: x"),
    )
    num_corners = [path.count("L") for path, _ in cells]
    assert num_corners[:2] == [2 * num_corners[1], num_corners[1]]
    assert [bool(half) for _, half in cells[:2]] == [True, False]


@pytest.mark.parametrize(
    ("density", "target", "shown"),
    [(0.05, 0.05, "0.05, target 0.05"), (1.0, 1.0, "1, dense"), (1.0, 0.05, "1, dense"),
     (0.4992, 1.0, "0.4992")],
)  # fmt: skip
def test_a_density_is_called_dense_where_it_is(density: float, target: float, shown: str) -> None:
    """A narrower network is dense, and masks that a method learns have no target."""
    assert ("density", shown) in summary_rows(summary(density=density, density_target=target))


def test_summary_rows() -> None:
    assert summary_rows(summary(peak_rss_bytes=None)) == [
        ("test accuracy", "87.65 %, after round 3"),
        ("density", "0.05087, target 0.05"),
        ("upload / client / round", "21.9 kB, 6.97 % of 314 kB dense"),
        ("download / client / round", "31.4 kB, 10 % of 314 kB dense"),
        ("upload, whole run", "1.47 MB, all clients"),
        ("download, whole run", "4.01 MB, all clients"),
        ("training FLOPs", "7.08 %, of dense training"),
        ("training state", "365 kB, 39.1 % of 933 kB dense"),
        ("peak memory", "–"),
        ("time", "2 min 05 s"),
    ]


def test_comparison_table() -> None:
    """By hand: accuracies 80, 84, 85 have mean 83 and variance (9 + 1 + 4) / 2 = 7."""
    runs = [
        summary(method="fedavg", density_target=1.0, density=1.0, train_flops_ratio=1.0),
        summary(test_accuracy=0.80, seconds=100, bytes_up_steady_round=10_000, density=0.05),
        summary(test_accuracy=0.84, seconds=110, bytes_up_steady_round=20_000, density=0.05),
        summary(test_accuracy=0.85, seconds=150, bytes_up_steady_round=30_000, density=0.05),
        summary(density_target=0.1, density=0.1, bytes_up_steady_round=None),
        summary(density_target=0.1, density=0.1, test_accuracy=math.nan),
        summary(method="small-dense", density_target=0.1, density=1.0, train_flops_ratio=0.2),
    ]
    header, rows = comparison_table(runs)
    assert header == [
        *("method", "density", "seeds", "accuracy, %", "up / client / round"),
        *("down / client / round", "FLOPs of dense", "training state", "time"),
    ]
    rest, two_minutes = ["365 kB", "2 min 05 s"], ["365 kB", "2 min 00 s"]
    assert rows == [
        ["fedavg", "1", "1", "87.65", "21.9 kB", "31.4 kB", "1.000", *rest],
        ["fedtiny", "0.05", "3", "83.00 ± 2.65", "20.0 kB", "31.4 kB", "0.071", *two_minutes],
        ["fedtiny", "0.1", "2", "–", "–", "31.4 kB", "0.071", *rest],
        ["small-dense", "1", "1", "87.65", "21.9 kB", "31.4 kB", "0.200", *rest],
    ]
    assert comparison_table([]) == (header, [])
