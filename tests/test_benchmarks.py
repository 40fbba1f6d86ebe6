"""The benchmarks of the sparse core run and print what they promise; nothing here is timed."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import in_a_process
from torch import nn

from benchmarks import (
    calibration,
    choice_fit,
    client_memory,
    dense_steps,
    fleet,
    network_support,
    privacy_cost,
    process_memory,
    robust_sums,
    round_process,
    scale,
    scale_process,
    sparse_layers,
    sparse_memory,
    sparse_step,
    stream_memory,
    timing,
    training_precision,
)
from benchmarks import round as whole_rounds
from benchmarks.gpu_simulation import write_images
from benchmarks.rows import Row, add_arguments, show
from prunelab.data.datasets import load_dataset
from prunelab.training.loop import TrainingConfig
from sparsemodel.kernels.choice import TRAINING, Costs, dense_cost, sparse_cost, work_of
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.kernels.geometry import ConvGeometry

needs_kernels = pytest.mark.skipif(cpu.isa() is None, reason="no native kernels here")
KEYS = ["bench", "case", "density", "ours", "peer", "peer_name", "unit", "ratio"]
PNG = b"\x89PNG"


@pytest.fixture
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(density: float = 0.1, ours: float = 2.0, peer: float = 5.0) -> Row:
    return Row("some", "a case", density, ours, peer, "dense", "ms")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser, quick="")
    return parser.parse_args(words)


def checked(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with positive finite numbers and the ratio that they give."""
    for entry in rows:
        numbers = json.loads(entry.as_json())
        assert list(numbers) == KEYS
        assert 0 < entry.density <= 1
        assert 0 < entry.ours < math.inf
        assert 0 < entry.peer < math.inf
        assert numbers["ratio"] == entry.peer / entry.ours
    return list(rows)


def ratios(rows: Sequence[Row], case: str, density: float, peer: str) -> list[float]:
    return [
        r.ratio
        for r in rows
        if r.case.startswith(case) and r.density == density and r.peer_name.startswith(peer)
    ]


def test_interleaved_gives_turns_and_takes_medians() -> None:
    now, order = 0.0, ""
    slow_calls = iter([0.02, 0.02, 0.5, 0.03, 0.04])

    def slow() -> None:
        nonlocal now, order
        order += "S"
        now += next(slow_calls)

    def fast() -> None:
        nonlocal now, order
        order += "f"
        now += 0.005

    seconds = timing.interleaved({"slow": slow, "fast": fast}, rounds=3, clock=lambda: now)
    # Two calls each beforehand; then a slow call, a fast one that does not count and two that do.
    assert order == "SSff" + 3 * "Sfff"
    assert seconds == pytest.approx({"slow": 0.04, "fast": 0.005})


def test_processor_time_is_for_one_thread(single_thread: None) -> None:
    assert timing.clock(processor_time=False) is time.perf_counter
    assert timing.clock(processor_time=True) is time.process_time
    torch.set_num_threads(2)
    with pytest.raises(SystemExit, match="--threads 1"):
        timing.clock(processor_time=True)


def test_neighbours_share_is_a_share() -> None:
    neighbours = timing.Neighbours()
    sum(range(10**6))
    share = neighbours.share()
    assert math.isnan(share) or 0 <= share <= 1


def test_show_prints_json_lines_alone_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if cpu.isa() is None:
        pytest.skip("no native kernels here")
    path = tmp_path / "ratios.png"
    show([row(0.1), row(0.01, 1.0)], parsed("--json", "--plot", str(path)))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["ratio"] for line in lines] == [2.5, 5.0]
    assert path.read_bytes().startswith(PNG)


@needs_kernels
def test_show_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show([row()], parsed())
    machine, line, neighbours = capsys.readouterr().out.splitlines()
    assert machine.startswith("# ")
    assert line.split() == [
        "a",
        "case",
        "d=0.1",
        "2.000",
        "ms",
        "2.50",
        "x",
        "dense",
        "(5.000",
        "ms)",
    ]
    assert "other processes" in neighbours


def test_the_peer_of_torch_takes_the_gradient_of_active_weights_alone() -> None:
    """Not a dense one: a side that says so is compared value by value."""
    shape = sparse_layers.linear(24, 16, 8)
    mask = torch.arange(16 * 24).reshape(16, 24) % 7 == 0
    masked = sparse_layers._copy(shape.layer(), mask)
    x, dy = torch.randn(8, 24), torch.randn(8, 16)
    side = sparse_layers._csr(masked, x, dy)
    assert side.at_mask
    assert side.grad()[1].shape == (int(mask.sum()),)
    sparse_layers.check("torch", sparse_layers._dense(masked, x, dy).grad(), {"csr": side}, mask)


@needs_kernels
def test_sparse_layers_rows() -> None:
    shapes = [
        sparse_layers.conv(8, 6, batch=4),
        sparse_layers.conv(16, 3, batch=4),
        sparse_layers.conv(8, 6, batch=4, groups=8),
        sparse_layers.linear(24, 16, 8),
    ]
    rows = checked(list(sparse_layers.rows(shapes, (0.1, 1.0), rounds=1, clock=time.perf_counter)))
    for shape in shapes:
        assert len(ratios(rows, shape.name, 0.1, "dense")) == 2  # both layouts
        assert len(ratios(rows, shape.name, 1.0, "dense")) == 3  # and the sparse kernels
    assert len(ratios(rows, shapes[-1].name, 0.1, "torch CSR")) == 1
    first, second = (ratios(rows, shape.name, 0.1, "dense")[0] for shape in shapes[:2])
    (median,) = ratios(rows, "median of 2", 0.1, "dense")
    assert median == pytest.approx((first + second) / 2)
    own = [r for shape in shapes for r in rows if r.case == shape.name and "dense" in r.peer_name]
    (lowest, _) = [r for r in rows if r.case.startswith("lowest")]
    assert lowest.ratio == pytest.approx(min(r.ratio for r in own))


@needs_kernels
def test_sparse_layers_refuses_wrong_gradients() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    right = (torch.ones(3, 2), torch.ones(2, 2))
    wrong = sparse_layers.Side(lambda: (torch.ones(3, 2), torch.tensor([1, 1, 1.1])), at_mask=True)
    with pytest.raises(RuntimeError, match=r"a layer, ours: gradient for weights off by 1\.00e-01"):
        sparse_layers.check("a layer", right, {"ours": wrong}, mask)


@needs_kernels
def test_dense_steps_rows() -> None:
    (row,) = checked(
        list(
            dense_steps.rows(
                [("resnet8", 4)], rounds=1, clock=time.process_time, threads=1,
                input_shape=(1, 8, 8),
            )
        )
    )  # fmt: skip
    assert (row.case, row.density) == ("resnet8, width 4", 1.0)


@pytest.mark.slow
def test_calibration_rows() -> None:
    rows = checked(list(calibration.rows(1, 1, rounds=1, by=time.process_time)))
    assert [row.case for row in rows[:3]] == [
        "inputs of all layers", "inputs, block by block", "4 kinds, in one pass",
    ]  # fmt: skip
    assert all(row.ours > 0 for row in rows)
    if sys.platform == "linux":
        assert {row.unit for row in rows[3:]} == {"MiB"}
        assert len(rows) == 5


def test_training_precision_rows() -> None:
    """A row for each seed and their mean; no wrong answer at all has no ratio."""
    data = load_dataset("digits", num_train=100)
    config = TrainingConfig(epochs=2, lr=0.05)
    rows = list(training_precision.rows(data, "resnet8", config, [0, 1]))
    ways = ["seed 0", "seed 1", "mean"]
    for measure in ("epoch", "test error"):
        found = [row for row in rows if row.case.startswith(measure)]
        assert [row.case for row in found] == [f"{measure}, resnet8 digits, {way}" for way in ways]
        assert found[2].ours == pytest.approx((found[0].ours + found[1].ours) / 2)
        assert found[2].peer == pytest.approx((found[0].peer + found[1].peer) / 2)
        assert all(0 < row.ours < 100 for row in found)
    assert math.isnan(replace(rows[0], ours=0.0).ratio)


@needs_kernels
def test_sparse_step_rows() -> None:
    rows = checked(
        list(
            sparse_step.rows(
                ["resnet8"], [2], [0.1, 0.5], rounds=lambda batch: 1, clock=time.process_time
            )
        )
    )
    cases = [f"resnet8 b2, {way}" for way in ("plan", "recompute", "modules")]
    assert [(r.case, r.density) for r in rows] == [(c, d) for d in (0.1, 0.5) for c in cases]


def test_random_mask_keeps_the_stem_dense() -> None:
    model = sparse_step.build_model("resnet8", num_classes=10, input_shape=(3, 32, 32), seed=0)
    mask = sparse_step.random_mask(model, 0.1)
    assert "conv1.weight" not in mask
    for name, density in mask.densities().items():
        assert density == pytest.approx(0.1, abs=1 / mask[name].numel())


def test_choice_fit_finds_the_costs_that_made_the_measurements() -> None:
    """Times made by other constants than those in force, without noise: predicted to 3 %."""
    true = Costs(*(cost * factor for cost, factor in zip(TRAINING, [1.4, 0.7] * 8, strict=False)))
    geometries = [ConvGeometry(64, 32, 3, 3, 1, 1, 1, 1), ConvGeometry(512, 256, 1, 1)]
    geometries += [ConvGeometry(64, 64, 3, 3, 1, 1, 1, 1, groups=64), ConvGeometry(9, 9, 1, 1)]
    measured = []
    for geometry, batch, size, density, in_layout in itertools.product(
        geometries, (1, 8, 64), (1, 16), (0.05, 0.5), (False, True)
    ):
        nnz = int(density * geometry.out_channels * geometry.row_length)
        work = work_of(geometry, nnz, batch, (size, size), in_layout=in_layout)
        seconds = sparse_cost(work, true), dense_cost(work, true)
        measured.append(choice_fit.Case("made", work, *seconds, training=True))
    found = choice_fit.fit(measured, TRAINING)
    for case in measured:
        assert case.predicted(found) == pytest.approx((case.sparse, case.dense), rel=0.03)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sparse_memory_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself measures the plan; the others in fresh processes with torch there."""
    commanded = sparse_memory.measured

    def measured(way: str, *case: Any, **named: Any) -> dict[str, int]:
        if way == "plan":
            return commanded(way, *case, **named)
        return in_a_process(sparse_memory.measure, way, *case)

    monkeypatch.setattr(sparse_memory, "measured", measured)
    ways = ("plan", "recompute bfloat16", "modules")
    rows = checked(list(sparse_memory.rows("resnet8", 8, [0.1], threads=1, ways=ways)))
    model = sparse_step.build_model("resnet8", num_classes=10, input_shape=(3, 32, 32), seed=0)
    weights = sum(p.numel() for p in model.parameters())
    found = {r.case.removeprefix("resnet8 b8 "): r for r in rows}
    for way in ways:
        state = found[f"state, {way}"]
        assert (
            state.peer * 2**20 == 12 * weights
        )  # weights, gradients and momentum, four bytes each
        assert state.ratio > 2
    kept, halved = (found[f"activations, {way}"].ours for way in ways[:2])
    assert halved < 0.6 * kept


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_client_memory_rows() -> None:
    rows = checked(
        list(
            client_memory.rows("resnet8", [0.1], executions=["runtime"], samples=40, deployed=False)
        )
    )
    found = {r.case.partition(",")[0].removeprefix("resnet8 b16 "): r for r in rows}
    phases = ["measure", "score", "train", "train with growth"]
    assert list(found) == ["join", *phases, "all", "start", "alone"]
    assert found["alone"].ours < 70  # no Flower
    for phase in phases:
        assert found[phase].ours < 150
        assert found[phase].peer > 400  # torch's import alone
    assert found["all"].ours == max(found[phase].ours for phase in ("join", *phases))
    assert {r.unit for r in rows} == {"MiB", "ms"}


def test_privacy_cost_rows() -> None:
    """Masked values of 14 bytes against four in the clear, and against the dense model's eight."""
    rows = checked(list(privacy_cost.rows(["resnet8"], [0.1])))
    clear, peer, seconds, growth = rows
    assert 0.25 < clear.ratio < 4 / 14
    assert peer.ratio > 3
    assert seconds.unit == "s"
    assert growth.ours > clear.ours


@needs_kernels
def test_round_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sides run in fresh processes with torch there, where their memory means nothing."""

    def measured(side: str, values: Any, *, processor_time: bool) -> dict[str, Any]:
        assert processor_time
        own = {"ours": round_process.ours, "plain": round_process.plain}[side]
        found = in_a_process(own, values, time.perf_counter)
        return {**found, "peak": 1, "children": 2}

    monkeypatch.setattr(whole_rounds, "measured", measured)
    write_images(tmp_path, num_train=130, num_test=20)
    values = whole_rounds.settings(tmp_path, quick=True)
    rows = checked(list(whole_rounds.rows(values, [0.1], repeats=1, processor_time=True)))
    found = {r.case.removeprefix("resnet8 2 clients").strip(" ,"): r for r in rows}
    assert {"magnitude", "fedavg", "start, fedtiny", "peak, magnitude"} <= found.keys()
    sent = found["start bytes, fedtiny"]
    assert sent.peer < sent.ours < 3 * sent.peer  # places travel beside the values
    assert found["peak, magnitude"].ours * 2 == found["peak laying out, magnitude"].ours


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stream_memory_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sides run in fresh processes with torch there."""

    def measured(*case: Any, **named: Any) -> dict[str, float]:
        return in_a_process(stream_memory.measure, *case, **named)

    monkeypatch.setattr(stream_memory, "measured", measured)
    rows = checked(list(stream_memory.rows((100, 300), threads=1, workers=[0])))
    found = {r.case: r for r in rows}
    for kind in ("parquet", "tar"):
        peak, above = (found[f"{kind} 300 images, peak{x}"] for x in ("", " above imports"))
        assert above.ours < peak.ours
        assert above.peer < peak.peer
        assert found[f"{kind} 300 images, an image"].peer_name == "DataLoader, 0 workers"
    assert {r.unit for r in rows} == {"MiB", "ms"}


@pytest.mark.parametrize("benchmark", [sparse_layers, sparse_step, sparse_memory])
def test_commands_refuse_without_native_kernels(
    benchmark: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, "off")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets, and this takes back
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    main: Callable[[], None] = benchmark.main  # type: ignore[attr-defined]
    cpu.library.cache_clear()
    try:
        with pytest.raises(SystemExit, match="no native kernels"):
            main()
    finally:
        cpu.library.cache_clear()


def test_support_of_networks_is_what_it_says() -> None:
    """A program, sparse modules that compute the same, timm's own linear class, and a refusal."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    found = {row.name: row for row in network_support.rows(["Llama", "timm/test_nfnet", "GPT-2"])}
    assert {name: row.way for name, row in found.items()} == {
        "Llama": "modules",
        "timm/test_nfnet": "refused",
        "GPT-2": "refused",
    }
    assert found["Llama"].layers == 15
    assert found["Llama"].error < 1e-4
    assert "Conv1D" in found["GPT-2"].why

    class Net(nn.Sequential):
        def __init__(self) -> None:
            from timm.layers.linear import Linear  # noqa: PLC0415

            super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), Linear(4 * 62 * 62, 3))

    def build() -> tuple[nn.Module, Any]:
        return Net(), torch.randn(2, *network_support.SHAPE)

    row = network_support.support("net", build)
    assert (row.way, row.layers) in {("program", 1), ("modules", 1)}
    assert row.error < 1e-4


def test_sums_of_every_kind_are_beside_flower_s() -> None:
    found = checked(list(robust_sums.rows("resnet8", [0.05], 5, by=time.perf_counter)))
    peers = {entry.case.rpartition(", ")[2]: entry.peer_name for entry in found}
    assert peers["median"] == "Flower's FedMedian"
    assert peers["multi-krum"] == "Flower's MultiKrum"
    assert len(found) == 6
    assert found[-1].ratio > 10  # bytes


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scale_rows(single_thread: None, tmp_path: Path) -> None:
    """Runs in fresh processes with torch there; sums of answers are Flower's own."""
    states = robust_sums.answers("resnet8", 0.05, 3)
    ours = scale.ours(states)
    sums, messages = (ours[name]().values for name in ("sums", "messages"))  # type: ignore[attr-defined]
    _, peer = robust_sums.flowers("mean", states, active=True)
    arrays = peer()[0]  # type: ignore[index]
    for name, value in sums.items():
        assert np.array_equal(value, messages[name])
        if not name.endswith("running_var"):  # pooled, not averaged
            np.testing.assert_allclose(value, arrays[name].numpy(), rtol=1e-5, atol=1e-7)
    found = checked(list(scale.aggregation_rows("resnet8", 0.05, 2, rounds=1)))
    assert [entry.case for entry in found[::2]] == [
        f"resnet8, 2 answers, {what}" for what in ("sums", "messages")
    ]

    @functools.cache
    def once() -> dict[str, float]:
        scale.write_pictures(tmp_path / "pictures.npz", 300)
        values = scale.settings(tmp_path / "pictures.npz", 300, per_round=2, density=0.05)
        return in_a_process(scale_process.measure, values)

    found = checked(list(scale.run_rows([4, 300], [2], measured=lambda values: once())))
    kinds = [entry.case.rpartition(", ")[2] for entry in found]
    assert kinds == 2 * ["round", "start", "peak"] + ["peak"]


def test_what_a_look_at_a_fleet_sees() -> None:
    """Whole sessions are looked at; a round with growth, the first and the last do not count."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    leader = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        while len(parts := dict(process_memory.session_of(leader.pid))) < 2:
            assert leader.poll() is None
        assert leader.pid in parts
        sizes, peak = fleet.memory_of(leader.pid)
        assert set(sizes) == {"node"}
        assert 2**20 < peak < 2**28
        assert sizes["node"] < 2 * peak
        assert process_memory.proportional(leader.pid) <= process_memory.resident(
            "VmRSS", process=leader.pid
        )
    finally:
        leader.communicate(b"\n")
    looked = fleet.Looked()
    grown = {4: ["layer"]}
    looked.lines = [(0.0, {"event": "start", "adjusted": []})] + [
        (10.0 * number, {"adjusted": grown.get(number, [])}) for number in range(1, 8)
    ]
    looked.lines[4] = (43.0, looked.lines[4][1])
    assert looked.round_seconds() == [10.0, 10.0, 7.0, 10.0]
