"""Pages on a phone and on a desk: nothing is cut, charts and pictures can be read.

Needs a Chromium; without one there is nothing to look with.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datapruning.reports.score_report import write_score_report
from datapruning.reports.training_report import write_run_report
from datapruning.selection.table import ScoreTable
from datapruning.students.runner import RunSettings
from fedprune.config import RunConfig, own_settings
from fedprune.reports.page import write_report
from fedprune.rounds.folder import save_model
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.runs.folder import prepare, write_metrics, write_summary
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

PHONE, DESK = 390, 1280

# What lies in one of these may be wider than its card: it is scrolled there.
FRAME = """<!DOCTYPE html><title>waiting</title>
<iframe id="page" src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument, out = [];
  for (const details of page.querySelectorAll("details")) details.open = true;
  const right = element => element.getBoundingClientRect().right;
  for (const card of page.querySelectorAll("section, .tiles div, header"))
    for (const part of card.querySelectorAll("*"))
      if (!part.parentElement.closest(".scroll, figure, pre") && right(part) > right(card) + 0.5)
        out.push(part.tagName + ": " + part.textContent.slice(0, 40));
  const charts = [...page.querySelectorAll("section > figure > svg, .pair figure > svg")];
  const width = element => element.getBoundingClientRect().width;
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    out,
    charts: Object.fromEntries(charts.map(chart => [chart.getAttribute("aria-label"), {{
      inside: right(chart) <= right(chart.parentElement) + 0.5,
      letters: Math.min(...[...chart.querySelectorAll("text")].map(
        text => parseFloat(getComputedStyle(text).fontSize) *
                Math.hypot(text.getCTM().a, text.getCTM().b))),
    }}])),
    pictures: [...page.querySelectorAll("img")].map(width),
  }});
}};
</script>"""


def look(page: Path, width: int) -> Any:
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.name, width=width), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--window-size=1400,1000", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    return json.loads(html.unescape(title[1]))


def check(page: Path, width: int, *, num_wide: int = 0) -> Any:
    """All that holds of any page; `num_wide` of its charts may be wider than a phone."""
    seen = look(page, width)
    assert seen["width"] <= width
    assert seen["out"] == []
    scrolled = [name for name, chart in seen["charts"].items() if not chart["inside"]]
    assert len(scrolled) == (num_wide if width == PHONE else 0), scrolled
    assert min(chart["letters"] for chart in seen["charts"].values()) >= 7.5
    assert all(picture >= 40 for picture in seen["pictures"])
    return seen


@pytest.fixture(scope="module", params=[10, 100], ids=["ten classes", "hundred classes"])
def run_page(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A finished run with what it is compared with beside it, long names, a client left out."""
    base = tmp_path_factory.mktemp("runs")
    classes = request.param
    long = "module.with.a.long.name.stage3.block2.downsample.conv"
    names = [f"{long}{number}.weight" for number in range(24)]
    for folder, method in (("tiny", "fedtiny"), ("dense", "fedavg"), ("rival", "magnitude")):
        values = {"method.name": method, "data.clients": 12, "data.dataset": f"/data/{'x' * 90}"}
        config = RunConfig.parse(own_settings(values))
        prepare(base / folder, config.toml())
        summary = {
            "method": method, "dataset": config.data.dataset, "model": "resnet8", "seed": 0,
            "rounds": 30, "density": 0.05, "density_target": 0.05, "test_accuracy": 0.9,
            "bytes_up": 10**9, "bytes_down": 10**9, "bytes_dense_round": 10**6,
            "bytes_up_steady_round": 10**5, "bytes_down_steady_round": 10**5, "seconds": 7500.0,
            "train_flops_ratio": 0.1, "state_bytes": 10**6, "state_bytes_dense": 10**7,
            "peak_rss_bytes": 10**9, "version": "1",
        }  # fmt: skip
        if folder != "tiny":
            write_summary(base / folder, summary)
    clients = [
        {
            "client": c,
            "num_train": 99,
            "num_dev": 9,
            "labels": [(c + k) % 7 for k in range(classes)],
        }
        for c in range(12)
    ]
    selection = {
        "winner": 1, "losses": [2.31, 2.2987, 2.4], "metrics": [0.1] * 3, "adaptive": True,
        "densities": [dict.fromkeys(names, 0.0123)] * 3, "clients": list(range(12)),
    }  # fmt: skip
    start = {
        "event": "start", "clients": clients, "density": 0.05, "bytes_up": 9999, "bytes_down": 99,
        "layer_densities": {name: 0.01 * (k + 1) for k, name in enumerate(names)},
        "selection": selection, "skipped": [{"client": 3, "reason": "no answer " + "y" * 200}],
    }  # fmt: skip
    rounds = [
        {"round": number, "test_accuracy": 0.03 * number, "test_loss": 1.234567, "train_loss": 0.1,
         "density": 0.050123, "bytes_up": 10**number % 10**9, "bytes_down": 1234567,
         "mask_bytes": 700, "adjusted": names[:2] if number % 2 else []}
        for number in range(1, 31)
    ]  # fmt: skip
    write_metrics(base / "tiny", [start, *rounds])
    patterns = Patterns(
        {name: Pattern.from_positions((100,), np.arange(3 + k)) for k, name in enumerate(names)}
    )
    values = {name: np.ones(patterns[name].num_active, np.float32) for name in names}
    save_model(base / "tiny", SparseState(values, patterns), metadata={})
    write_summary(base / "tiny", {**summary, "method": "fedtiny"})
    return write_report(base / "tiny"), int(classes == 100)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_of_a_run(run_page: tuple[Path, int], width: int) -> None:
    """Only a heat map of a hundred classes is too wide for a phone."""
    page, num_wide = run_page
    charts = check(page, width, num_wide=num_wide)["charts"]
    assert {name.partition(":")[0] for name in charts} == {
        "Accuracy by round", "Bytes by round", "Candidates", "Layer densities",
        "Labels of the clients",
    }  # fmt: skip


def test_the_page_of_a_run_compares_it_with_both_that_lie_beside(
    run_page: tuple[Path, int],
) -> None:
    text = run_page[0].read_text(encoding="utf-8")
    assert "is in the folder dense" in text
    assert "is in the folder rival" in text


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "under way"])
def test_the_page_of_a_run_with_nothing_beside_it(is_finished: bool, tmp_path: Path) -> None:
    """With commands in it as long as its folder's name, or with nothing to show yet."""
    folder = tmp_path / ("a folder with a long name " * 6).strip()
    config = RunConfig.parse({"data.dataset": "given.module.of.mine:make_the_data_of_the_run"})
    prepare(folder, config.toml())
    rounds = [
        {"round": n, "test_accuracy": 0.1 * n, "bytes_up": 10**n, "bytes_down": 10**n}
        for n in range(1, 4)
    ]
    if is_finished:
        write_metrics(folder, rounds)
        write_summary(folder, {
            "method": "fedtiny", "dataset": config.data.dataset, "model": "resnet8", "seed": 0,
            "rounds": 3, "density": 0.05, "density_target": 0.05, "test_accuracy": 0.3,
        })  # fmt: skip
    seen = look(write_report(folder), PHONE)
    assert seen["width"] <= PHONE
    assert seen["out"] == []


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize(("classes", "num_wide"), [(10, 0), (100, 2)])
def test_the_page_of_a_training(classes: int, num_wide: int, width: int, tmp_path: Path) -> None:
    settings = RunSettings(subset=f"{'a' * 60}/kept.parquet", teacher="runs/teacher")
    prepare(tmp_path, settings.toml())
    summary = {
        "dataset": "digits", "num_kept": 700, "num_samples": 1400, "policy": "hardest",
        "method": "influence-sum-abs", "test_accuracy": 0.9, "test_loss": 0.3, "steps": 1234,
        "epochs": 20, "alpha": 0.5, "num_held_out": 140, "seconds": 7500.0,
        "alpha_curve": [{"alpha": a / 4, "accuracy": 0.8} for a in range(5)],
        "peak_rss_bytes": 10**9, "class_counts": [14] * classes,
        "class_counts_kept": [7] * classes, "test_accuracy_by_class": [0.9] * classes,
    }  # fmt: skip
    lines = [{"epoch": epoch + 1, "train_accuracy": epoch / 20} for epoch in range(20)]
    write_metrics(tmp_path, lines)
    write_summary(tmp_path, summary)
    page = write_run_report(tmp_path)
    assert len(check(page, width, num_wide=num_wide)["charts"]) == 4
    text = page.read_text(encoding="utf-8")
    for name, value in (("alpha", "0.5"), ("steps", "1234"), ("epochs", "20")):
        assert f"<td>{name}</td><td>{value}</td>" in text


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_of_scores(tmp_path: Path, width: int) -> None:
    samples = ImageSamples.of(load_dataset("digits"))
    paths = []
    for number, method in enumerate(("prototypes-supervised", "influence-sum-abs", "forgetting")):
        scores = torch.rand(len(samples), generator=torch.Generator().manual_seed(number)).double()
        if method == "forgetting":
            scores = (scores > 0.96).double()
        table = ScoreTable(
            samples.ids, scores, method, "digits", samples.fingerprint, 0, model="resnet8",
            labels=samples.labels,
            provenance={"source": "digits", "settings": {"options": {"window": 10}}},
        )  # fmt: skip
        paths.append(tmp_path / f"{method}.parquet")
        table.write(paths[-1])
    if width == PHONE:  # that of one method has other tiles and no agreement
        seen = check(write_score_report(paths[:1], tmp_path / "one.html"), width)
        assert len(seen["charts"]) == 2
    seen = check(write_score_report(paths, tmp_path / "page.html"), width)
    assert len(seen["pictures"]) == 300  # three methods, ten classes, two ends, five of each
    assert len(seen["charts"]) == 7  # two a method, and their agreement
