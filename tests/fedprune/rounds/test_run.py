"""Whole runs over Flower messages in one process: results, bytes, and every kind of trouble."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, run_inline, tiny
from flwr.app import ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS, ConfigError
from fedprune.exchange.messages import DESCRIBE, MODEL, Reply, Request
from fedprune.flower import client, wire
from fedprune.local import model as models
from fedprune.local.division import Division
from fedprune.local.site import open_data
from fedprune.local.training import growth_counts
from fedprune.methods import METHODS
from fedprune.reports.page import write_report
from fedprune.rounds import folder as folders
from fedprune.rounds import workspace
from fedprune.rounds.evaluation import Evaluator
from fedprune.rounds.folder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    SUMMARY,
    read_metrics,
    read_summary,
)
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.run import run
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import _opened, open_workspace
from prunelab.data.batches import Integers
from prunelab.data.given import forget
from prunelab.data.samples import ImageSamples, stored
from prunelab.data.tensors import prepare
from prunelab.errors import DataError, RunError
from prunelab.networks import float_state
from prunelab.runs.folder import locked
from sparsemodel.codec import decode_entries, decode_state, encode_entries, encode_state
from sparsemodel.errors import DensityError, SparseModelError
from sparsemodel.layers.from_state import load_state_
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

SUMMARY_KEYS = [
    "method",
    "dataset",
    "model",
    "seed",
    "rounds",
    "density_target",
    "density",
    "metric",
    "test_accuracy",
    "test_metric",
    "test_loss",
    "bytes_up",
    "bytes_down",
    "bytes_up_steady_round",
    "bytes_down_steady_round",
    "bytes_start_up",
    "bytes_start_down",
    "bytes_dense_round",
    "train_flops_ratio",
    "state_bytes",
    "state_bytes_dense",
    "peak_rss_bytes",
    "seconds",
    "client_seconds",
    "version",
]


DENSE = ("fedavg", "small-dense", "lotteryfl", "heterofl", "fjord")  # the global model


def skipped(out: Path) -> list[tuple[int, str]]:
    return [(s["client"], s["reason"]) for line in read_metrics(out) for s in line["skipped"]]


def model_of(file: Path) -> SparseState:
    """The state in a model file or a checkpoint."""
    return load_state(file)[0]


def active(pattern: Pattern) -> NDArray[np.bool_]:
    """A pattern as booleans of the layer's shape."""
    dense = np.zeros(pattern.num_weights, dtype=bool)
    dense[pattern.positions()] = True
    return dense.reshape(pattern.shape)


def action_of(message: Message) -> str:
    """What a message asks for."""
    return str(wire.read_record(message.content)[0]["a"])


def held_by(context: Context) -> wire.Held:
    """What a client holds, decoded anew."""
    held = context.state.config_records.get("held", {})
    return wire.Held({token: data for token, data in held.items() if isinstance(data, bytes)})


# --- results ------------------------------------------------------------------------------------


def test_summary_has_the_keys_of_the_contract_in_order(finished: Path) -> None:
    summary = read_summary(finished)
    assert list(summary) == SUMMARY_KEYS
    assert summary["rounds"] == 4
    assert summary["density"] == pytest.approx(0.2, rel=0.03)
    assert 0 < summary["train_flops_ratio"] < 1
    assert 0 < summary["state_bytes"] < summary["state_bytes_dense"]
    assert summary["client_seconds"] > 0


def test_the_page_about_the_summary_has_its_keys() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "summary.md"
    told = re.findall(r"^\| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert told == SUMMARY_KEYS


def test_metrics_hold_a_line_a_round_and_sum_to_the_summary(finished: Path) -> None:
    start, *rounds = read_metrics(finished)
    assert start["event"] == "start"
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    summary = read_summary(finished)
    for direction in ("bytes_up", "bytes_down"):
        assert sum(line[direction] for line in (start, *rounds)) == summary[direction]
    assert rounds[-1]["test_accuracy"] == summary["test_accuracy"]
    assert any(line["adjusted"] for line in rounds)
    assert not skipped(finished)


def test_final_model_is_sparse_and_has_the_reported_accuracy(
    finished: Path, tmp_path: Path
) -> None:
    state = model_of(finished / "model.safetensors")
    work = open_workspace(tiny())
    model = work.model()
    assert state.patterns is not None
    assert set(state.patterns) == set(prunable_parameters(model))
    assert state.shapes() == work.shapes
    load_state_(model, state)
    model.eval()
    with torch.no_grad():
        images, labels = stored(work.dataset.test)
        found = model(prepare(torch.from_numpy(images))).argmax(1).numpy()
    accuracy = read_summary(finished)["test_accuracy"]
    assert int((found == labels).sum()) / 60 == accuracy
    work.lay_out(tmp_path / "setup", with_start=False)
    setup = Setup(tiny(), tmp_path / "setup")
    tested = Evaluator(setup, lambda request: iter(())).evaluate(state, round_index=1)
    assert tested.metric == accuracy


def test_same_seed_same_bits_other_seed_other_bits(finished: Path, tmp_path: Path) -> None:
    assert digest(run_inline(tiny(), tmp_path / "again")) == digest(finished)
    assert digest(run_inline(tiny(seed=8), tmp_path / "other")) != digest(finished)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fedtiny"])
def test_every_method_runs_to_its_end(method: str, tmp_path: Path) -> None:
    config = tiny(method__name=method, training__rounds=2, model__width=8)
    summary = read_summary(run_inline(config, tmp_path / method))
    own = ["tiers"] if method in ("heterofl", "fjord") else []
    assert list(summary) == [*SUMMARY_KEYS[:-1], *own, "version"]
    densities = {**dict.fromkeys(DENSE, 1.0), "fedpm": 0.5}
    assert summary["density"] == pytest.approx(densities.get(method, 0.2), rel=0.03)


def test_test_data_decide_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other test images and labels every bit of the model is the same."""
    work = open_workspace(tiny())
    test = work.dataset.test
    poisoned = ImageSamples(test.images.flip(0), (test.labels + 1) % 10)
    object.__setattr__(work.dataset, "test", poisoned)
    try:
        out = run_inline(tiny(), tmp_path / "poisoned")
    finally:
        _opened.cache_clear()
        forget()
    assert digest(out) == digest(finished)
    assert read_summary(out)["test_accuracy"] != read_summary(finished)["test_accuracy"]


def test_server_set_comes_from_the_training_side_and_no_client_has_it(tmp_path: Path) -> None:
    work = open_workspace(tiny())
    server = set(work.server_indices.tolist())
    assert len(server) == 50
    shares = [set(share.tolist()) for share in work.shares]
    assert set.union(*shares) | server == set(range(300))
    assert sum(map(len, shares)) + len(server) == 300
    work.lay_out(tmp_path, with_start=False)
    everything = stored(work.dataset.train)[0]
    for number, share in enumerate(shares):
        data = open_data(work.config, number, setup=str(tmp_path))
        assert len(data.dev) >= 1
        assert len(data.train) + len(data.dev) == len(share)
        own = sorted(image.tobytes() for image in [*data.train.inputs, *data.dev.inputs])
        assert own == sorted(everything[index].tobytes() for index in share)


def test_only_float_entries_travel() -> None:
    """Batch norm's integer counters are neither sent nor averaged."""
    work = open_workspace(tiny())
    assert not any("num_batches_tracked" in name for name in work.shapes)
    assert any("num_batches_tracked" in name for name in work.model().state_dict())


def test_a_round_is_the_weighted_mean_of_unequal_clients_and_their_gradients(
    tmp_path: Path,
) -> None:
    """Round 1, from the messages themselves, in float64: θ = Σ p_k θ_k over the clients' own
    sample counts, and the mask grows where |Σ p_k g_k| is largest. Round 2 starts from it."""
    asked: dict[int, dict[int, Request]] = {0: {}, 1: {}}
    replies: dict[int, Reply] = {}
    config = tiny(training__rounds=2, method__adjust_until=2, data__alpha=0.3)
    shapes = open_workspace(config).shapes

    def listening(message: Message, context: Context) -> Message:
        held = held_by(context)
        reply = client.app(message, context)
        if message.metadata.message_type == "train":
            who = int(context.node_config["partition-id"])
            request = wire.receive(message.content, held).request(shapes)
            asked[request.round_index][who] = request
            if request.round_index == 0:
                replies[who] = wire.decode_reply(reply.content, request, shapes=shapes)
        return reply

    out = run_inline(config, tmp_path / "run", clients=listening)
    counts = {c["client"]: c["num_train"] for c in read_metrics(out)[0]["clients"]}
    assert len(replies) == 4
    assert {who: reply.num_examples for who, reply in replies.items()} == counts
    assert max(counts.values()) > 1.5 * min(counts.values())
    share = {who: count / sum(counts.values()) for who, count in counts.items()}
    before, after = asked[0][0].states[MODEL], asked[1][0].states[MODEL]
    assert before.patterns is not None
    assert after.patterns is not None
    grow = growth_counts(asked[0][0])
    assert grow

    def mean(name: str) -> Any:
        values = {who: reply.states[MODEL].dense_layer(name) for who, reply in replies.items()}
        return sum(share[who] * value.astype(np.float64) for who, value in values.items())

    for name in shapes:
        expected = mean(name)
        if name.endswith("running_var"):  # of the union of the clients' batches
            mu = name.replace("running_var", "running_mean")
            for who, reply in replies.items():
                values = reply.states[MODEL].values[mu].astype(np.float64)
                expected += share[who] * (values - mean(mu)) ** 2
        kept = np.ones(shapes[name], dtype=bool)
        if name in before.patterns:
            kept = active(before.patterns[name]) & active(after.patterns[name])
        found = after.dense_layer(name)
        np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-5, atol=1e-6)
    for name, count in grow.items():
        gradient = np.zeros(before.patterns[name].num_weights)
        for who, reply in replies.items():
            indices, values = reply.entries[MODEL][name]
            assert len(indices) == count
            gradient[indices] += share[who] * values.astype(np.float64)
        grown = np.setdiff1d(after.patterns[name].positions(), before.patterns[name].positions())
        largest = np.argsort(-abs(gradient), kind="stable")[:count]
        assert grown.tolist() == sorted(largest.tolist())
        assert not after.dense_layer(name).reshape(-1)[grown].any()


def test_sparse_execution_gives_the_rounds_of_masked_execution(tmp_path: Path) -> None:
    """Same masks, losses and weights round by round; only rounding differs, and what is held."""
    runs = {}
    for execution in ("sparse", "masked"):
        config = tiny(training__execution=execution, training__lr=0.02)
        runs[execution] = run_inline(config, tmp_path / execution)
    sparse, masked = (read_metrics(runs[kind])[1:] for kind in ("sparse", "masked"))
    for ours, theirs in zip(sparse, masked, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)
        assert ours["bytes_up"] == pytest.approx(theirs["bytes_up"], rel=1e-3)
    ours, theirs = (model_of(runs[kind] / CHECKPOINT) for kind in ("sparse", "masked"))
    assert ours.patterns == theirs.patterns
    for name, value in theirs.values.items():
        np.testing.assert_allclose(ours.values[name], value, rtol=1e-2, atol=1e-3)


def test_training_plans_of_torch_give_the_bits_of_the_runtime(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selection, training, growth and adjustments, with clients that hold torch modules."""
    monkeypatch.setattr(models, "uses_runtime", lambda *_: False)
    out = run_inline(tiny(), tmp_path / "run")
    assert digest(out) == digest(finished)
    ours, theirs = read_metrics(out), read_metrics(finished)
    losses = [lines[0]["selection"]["losses"] for lines in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert [line["train_loss"] for line in ours[1:]] == [line["train_loss"] for line in theirs[1:]]


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.1])
def test_steady_round_bytes_are_those_of_the_active_weights(density: float, tmp_path: Path) -> None:
    """≤ 1.05 × density × dense prunable weights + everything that is not pruned, both ways."""
    config = tiny(
        method__density=density, model__width=16, training__rounds=6, method__adjust_until=2
    )
    out = run_inline(config, tmp_path / "run")
    summary = read_summary(out)
    model = open_workspace(config).model()
    prunable = sum(p.numel() for p in prunable_parameters(model).values())
    dense = sum(value.numel() for value in float_state(model).values())
    bound = 4 * (1.05 * density * prunable + dense - prunable)
    assert summary["bytes_up_steady_round"] <= bound
    assert summary["bytes_down_steady_round"] <= bound
    assert summary["bytes_dense_round"] == 4 * dense


def test_mask_changes_cost_about_their_entropy(tmp_path: Path) -> None:
    config = tiny(model__width=16, training__rounds=5, method__density=0.1)
    lines = read_metrics(run_inline(config, tmp_path / "run"))[1:]
    bound = sum(line["mask_change_entropy_bytes"] for line in lines[:-1])
    # Each change travels in the next round, once to each of the four clients.
    sent = sum(line["mask_bytes"] for line in lines[1:]) / 4
    assert bound > 500
    assert sent <= 1.15 * bound


def test_counted_bytes_are_those_of_the_records(tmp_path: Path) -> None:
    """The counter equals what a client app sees arrive and sends, message by message."""
    sizes: dict[str, list[int]] = {"down": [], "up": []}

    def listening(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if action_of(message) != DESCRIBE:
            sizes["down"].append(wire.record_bytes(message.content))
            sizes["up"].append(wire.record_bytes(reply.content))
        return reply

    summary = read_summary(run_inline(tiny(), tmp_path / "run", clients=listening))
    assert summary["bytes_down"] == sum(sizes["down"])
    assert summary["bytes_up"] == sum(sizes["up"])


# --- clients in trouble ------------------------------------------------------------------------


def faulty(kind: str, *, who: int = 1, action: str = "train") -> Any:
    """The real client app, but client `who` goes wrong in one way whenever it trains."""

    def app(message: Message, context: Context) -> Message | None:
        reply = client.app(message, context)
        mine = context.node_config["partition-id"] == who
        if not mine or action_of(message) != action:
            return reply
        if kind == "raises":
            raise OSError("battery empty")
        if kind == "silent":
            return None
        if kind == "garbage":
            return Message(RecordDict({"x": ConfigRecord({"y": 1})}), reply_to=message)
        header, frames = wire.read_record(reply.content)
        _spoil(kind, header, frames, _patterns(message, context))
        if kind == "no header":
            record = RecordDict({"c": ConfigRecord({"h": "{", **frames})})
        else:
            record = wire.build_record(header, frames)
        return Message(record, reply_to=message)

    return app


def _patterns(message: Message, context: Context) -> Patterns:
    """The patterns of the first state of a message that the client has read."""
    header, _ = wire.read_record(message.content)
    return held_by(context).mask(f"m:{header['s'][0]['m']}")


def _spoil(kind: str, header: dict[str, Any], frames: wire.Frames, patterns: Patterns) -> None:
    """Change an answer in one way."""
    if kind == "bits":
        frame = bytearray(frames["w0"])
        frame[len(frame) // 2] ^= 1
        frames["w0"] = bytes(frame)
    elif kind in {"growth", "other growth"}:
        entries = dict(decode_entries(frames["e0"], patterns=patterns))
        if kind == "growth":
            for _, gradients in entries.values():
                gradients[0] = 1e9
        else:
            name = next(name for name in patterns if name not in entries)
            pruned = np.flatnonzero(~active(patterns[name]))[:1]
            entries[name] = pruned, np.ones(1, np.float32)
        frames["e0"] = encode_entries(entries, patterns=patterns)
    elif kind == "no weight":
        header["n"] = 0
    elif kind == "heavy":
        header["n"] = 2**60
    elif kind == "no loss":
        header["f"] = {}
    elif kind == "loss of text":
        header["f"] = {"loss": "low"}
    elif kind == "other state":
        header["s"] = ["pool"]
    elif kind == "frame lost":
        del frames["w0"]
    elif kind != "no header":
        frames["w0"] = _changed_frame(kind, frames["w0"], patterns)


def _changed_frame(kind: str, frame: bytes, patterns: Patterns) -> bytes:
    state = decode_state(frame, shapes=open_workspace(tiny()).shapes, patterns=patterns)
    bias = state.values["fc.bias"]
    if kind == "nan":
        bias[0] = float("nan")
    elif kind == "huge":
        bias[0] = 1e9
    elif kind == "shapes":
        state = state.replace({"fc.bias": np.zeros(11, dtype=np.float32)})
    elif kind == "stale":
        name, pattern = next(iter(patterns.items()))
        pruned = np.flatnonzero(~active(pattern))[0]
        moved = np.sort([*pattern.positions()[1:], pruned])
        stale = patterns.replace({name: Pattern.from_positions(pattern.shape, moved)})
        state = SparseState(state.values, stale)
    return encode_state(state)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "NaN"),
        ("huge", "diverged"),
        ("growth", "diverged"),
        ("shapes", "shape"),
        ("stale", "mask"),
        ("bits", "checksum"),
        ("garbage", "expected records"),
        ("raises", "battery empty"),
        ("silent", "no answer"),
        ("no header", "not JSON"),
        ("no weight", "for 0 samples"),
        ("heavy", "expected 0 or more"),
        ("no loss", "loss"),
        ("loss of text", "loss"),
        ("other state", "not asked for"),
        ("other growth", "not asked for"),
        ("frame lost", "without its frame"),
    ],
)
def test_client_in_trouble_is_left_out_and_the_run_goes_on(
    kind: str, reason: str, tmp_path: Path
) -> None:
    config = tiny(training__rounds=2, federation__timeout=4.0 if kind == "silent" else 600.0)
    out = run_inline(config, tmp_path / "run", clients=faulty(kind))
    lines = skipped(out)
    assert [who for who, _ in lines] == [1, 1]
    assert all(reason.lower() in text.lower() for _, text in lines)
    assert [line["clients"] for line in read_metrics(out)[1:]] == [[0, 2, 3]] * 2
    values = model_of(out / "model.safetensors").values
    assert all(np.isfinite(value).all() for value in values.values())


def test_all_clients_in_trouble_end_the_run_and_lose_nothing(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    count = 0

    def failing(message: Message, context: Context) -> Message:
        nonlocal count
        count += message.metadata.message_type == "train"
        if count > 4 * 2:
            raise OSError("network down")
        return client.app(message, context)

    with pytest.raises(RunError, match=r"round 3.*network down.*--resume"):
        run_inline(tiny(), out, clients=failing)
    assert read_metrics(out)[-1]["event"] == "no-reply"
    assert not (out / SUMMARY).exists()
    assert digest(run_inline(tiny(), out, resume=True)) == digest(finished)


def test_client_that_lost_its_mask_is_sent_it_again(finished: Path, tmp_path: Path) -> None:
    """A restarted node has an empty state; the result is the same, only bytes differ."""
    restarts = []

    def forgetful(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2 and message.metadata.message_type == "train":
            restarts.append(1)
            context.state.clear()
        return client.app(message, context)

    out = run_inline(tiny(), tmp_path / "run", clients=forgetful)
    assert len(restarts) == 8  # asked, and asked again after the re-sync
    assert digest(out) == digest(finished)
    assert not skipped(out)


def test_resync_after_a_missed_mask_change(finished: Path, tmp_path: Path) -> None:
    """A client that kept an older mask does not train on it: it is brought up to date."""
    old: list[ConfigRecord] = []

    def stale(message: Message, context: Context) -> Message:
        mine = context.node_config["partition-id"] == 2
        if mine and message.metadata.message_type == "train":
            old.append(context.state.config_records["held"])
            if "d0" in wire.read_record(message.content)[1]:
                context.state["held"] = old[0]
        return client.app(message, context)

    out = run_inline(tiny(), tmp_path / "run", clients=stale)
    assert not skipped(out)
    assert digest(out) == digest(finished)
    more = sum(line["bytes_up"] for line in read_metrics(out)) > sum(
        line["bytes_up"] for line in read_metrics(finished)
    )
    assert more  # the requests for a re-sync are counted
    assert len(old) > 4  # asked again


def test_client_that_lost_the_pool_is_sent_it_again(finished: Path, tmp_path: Path) -> None:
    """Restarted between the two questions of candidate selection."""

    def forgetful(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2 and action_of(message) == "score":
            context.state.clear()
        return client.app(message, context)

    out = run_inline(tiny(), tmp_path / "run", clients=forgetful)
    assert digest(out) == digest(finished)
    assert not skipped(out)
    assert read_metrics(out)[0]["bytes_down"] > read_metrics(finished)[0]["bytes_down"]


@pytest.mark.parametrize("action", ["measure", "score"])
def test_fault_in_candidate_selection_is_left_out(action: str, tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0 and action_of(message) == action:
            raise OSError("no power")
        return client.app(message, context)

    out = run_inline(tiny(training__rounds=1), tmp_path / "run", clients=app)
    assert skipped(out) == [(0, "the client failed: OSError: no power")]
    scored = [1, 2, 3] if action == "score" else [0, 1, 2, 3]
    assert read_metrics(out)[0]["selection"]["clients"] == scored


def _poison(header: dict[str, Any], frames: wire.Frames) -> None:
    shapes = open_workspace(tiny()).shapes
    wanted = {name: shapes[name] for name in header["k"][0]}
    state = decode_state(frames["t0"], shapes=wanted, patterns=None)
    next(iter(state.values.values()))[0] = np.nan
    frames["t0"] = encode_state(state)


@pytest.mark.parametrize(
    ("action", "spoil", "reason"),
    [
        ("measure", lambda header, frames: header["t"].pop(), "expected tensors|does not name"),
        ("measure", lambda header, frames: header["k"][0].pop(), "shape"),
        ("measure", lambda header, frames: header["k"][0].append("fc.what"), "names"),
        ("measure", _poison, "NaN"),
        ("score", lambda header, frames: header["f"]["losses"].pop(), "list of 2"),
        ("score", lambda header, frames: header["f"].pop("losses"), "expected fields"),
        ("score", lambda header, frames: header["f"].update(metrics=[99, 99]), "99 hits among"),
        ("score", lambda header, frames: header.update(n=0), "for 0 samples"),
    ],
)
def test_answers_of_candidate_selection_are_checked(
    action: str, spoil: Any, reason: str, tmp_path: Path
) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if context.node_config["partition-id"] != 1 or action_of(message) != action:
            return reply
        header, frames = wire.read_record(reply.content)
        spoil(header, frames)
        return Message(wire.build_record(header, frames), reply_to=message)

    out = run_inline(tiny(training__rounds=1), tmp_path / "run", clients=app)
    ((who, why),) = skipped(out)
    assert who == 1
    assert re.search(reason, why)
    assert np.isfinite(read_metrics(out)[0]["selection"]["losses"]).all()


# --- small and skewed clients ---------------------------------------------------------------------


def test_client_with_one_sample_or_one_class(tmp_path: Path, monkeypatch: Any) -> None:
    """Client 0 has one sample: it cannot take part. Client 1 has a single class: it can."""

    def skewed(labels: Integers, **_: Any) -> Division:
        zeros, rest = np.flatnonzero(labels == 0), np.flatnonzero(labels)
        return Division.of([rest[:1], zeros, rest[1:100], rest[100:]])

    monkeypatch.setattr(workspace, "partition", skewed)
    _opened.cache_clear()
    out = run_inline(tiny(training__rounds=2), tmp_path / "run")
    _opened.cache_clear()
    reasons = skipped(out)
    assert {who for who, _ in reasons} == {0}
    assert any("at least 2" in text for _, text in reasons)
    assert read_metrics(out)[-1]["clients"] == [1, 2, 3]


def test_more_clients_than_samples() -> None:
    with pytest.raises(DataError, match="300 clients"):
        open_workspace(tiny(data__clients=300))


def test_density_too_low_for_one_weight_a_layer(tmp_path: Path) -> None:
    with pytest.raises(DensityError):
        run_inline(tiny(method__density=0.0001), tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data__dataset", "digitz", "unknown data set 'digitz'"),
        ("model__name", "resnet9000", "unknown model"),
        ("method__name", "magic", "unknown method"),
    ],
)
def test_unknown_names_are_listed(key: str, value: str, message: str) -> None:
    with pytest.raises(USER_ERRORS, match=message):
        open_workspace(tiny(**{key: value}))


# --- the folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["measure", "score", "1", "2", "4"])
def test_resume_continues_to_the_same_bits(stop: str, finished: Path, tmp_path: Path) -> None:
    """Stopped in candidate selection and in rounds, with a half-written metrics line."""
    out = tmp_path / f"stopped in {stop}"

    def stopping(message: Message, context: Context) -> Message:
        if message.metadata.group_id == stop:
            raise KeyboardInterrupt
        return client.app(message, context)

    with pytest.raises(KeyboardInterrupt):
        run_inline(tiny(), out, clients=stopping)
    assert (out / CHECKPOINT).exists() == stop.isdigit()
    with (out / METRICS).open("a") as file:
        file.write('{"round": 9, "half wr')
    run_inline(tiny(), out, resume=True)
    assert digest(out) == digest(finished)
    expected = [line.get("test_accuracy") for line in read_metrics(finished)]
    assert [line.get("test_accuracy") for line in read_metrics(out)] == expected


@pytest.mark.parametrize("resume", [False, True])
def test_who_does_not_hold_the_lock_discards_nothing(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process waits for the first, in vain, and leaves it its folder."""
    opened, prepared = folders.open_run.__wrapped__, folders.prepare  # type: ignore[attr-defined]
    monkeypatch.setattr(opened, "__kwdefaults__", {"wait": 0.3})
    with ExitStack() as stack:

        def held_by_another(path: Path, config: RunConfig, *, resume: bool) -> None:
            prepared(path, config, resume=resume)
            stack.enter_context(locked(path))

        if resume:
            prepared(tmp_path / "run", tiny(), resume=False)
        monkeypatch.setattr(folders, "prepare", held_by_another)
        with pytest.raises(RunError, match="another process is running in"):
            run(tiny(), tmp_path / "run", resume=resume)
        assert (tmp_path / "run" / CONFIG).exists()


def test_folder_that_cannot_be_used(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="already holds a run"):
        run_inline(tiny(), finished)
    with pytest.raises(RunError, match="nothing to resume"):
        run_inline(tiny(), tmp_path / "none", resume=True)
    with pytest.raises(RunError, match=r"seed was 7, now 8"):
        run_inline(tiny(seed=8), finished, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        run_inline(tiny(), tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        run_inline(tiny(), tmp_path / "file")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_corrupt_checkpoint_is_named(finished: Path, tmp_path: Path) -> None:
    out = run_inline(tiny(training__rounds=1), tmp_path / "run")
    (out / SUMMARY).unlink()
    data = bytearray((out / CHECKPOINT).read_bytes())
    (out / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(SparseModelError, match="checkpoint"):
        run_inline(tiny(training__rounds=1), out, resume=True)


def test_checkpoint_of_something_else_is_named(tmp_path: Path) -> None:
    out = run_inline(tiny(training__rounds=1), tmp_path / "run")
    (out / SUMMARY).unlink()
    save_file({"w": np.zeros(3, np.float32)}, out / CHECKPOINT)
    with pytest.raises(USER_ERRORS, match=r"checkpoint\.safetensors"):
        run_inline(tiny(training__rounds=1), out, resume=True)


@pytest.mark.parametrize("other", [{"seed": 8}, {"method__name": "magnitude"}])
def test_a_checkpoint_of_another_run_is_refused(
    other: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    """Another seed's or another method's of the same network would continue silently."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / SUMMARY).unlink()
    foreign = run_inline(tiny(**other), tmp_path / "other")
    shutil.copy(foreign / CHECKPOINT, out / CHECKPOINT)
    with pytest.raises(RunError, match=r"checkpoint\.safetensors belongs to another run than"):
        run(tiny(), out, resume=True)
    with pytest.raises(RunError, match="belongs to another run"), folders.open_run(out):
        pytest.fail("another run's checkpoint was opened")
    shutil.copy(finished / CHECKPOINT, out / CHECKPOINT)
    shutil.copy(foreign / METRICS, out / METRICS)
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
        run(tiny(), out, resume=True)


@pytest.mark.parametrize("name", [CONFIG, METRICS, CHECKPOINT, SUMMARY, MODEL_FILE])
def test_a_folder_in_the_place_of_a_file_is_one_clear_error(
    name: str, finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    if name in (CHECKPOINT, METRICS):
        (out / SUMMARY).unlink()
    (out / name).unlink()
    (out / name).mkdir()
    with pytest.raises(USER_ERRORS, match=re.escape(name)):
        write_report(out) if name == MODEL_FILE else run(tiny(), out, resume=True)


def test_a_run_s_own_file_is_a_configuration_like_any_other(finished: Path, tmp_path: Path) -> None:
    assert RunConfig.read(finished / CONFIG) == folders.stored_config(finished) == tiny()
    edited = tmp_path / "mine.toml"
    edited.write_text((finished / CONFIG).read_text().replace("rounds = 4", "rounds = 5"))
    assert RunConfig.read(edited) == tiny(training__rounds=5)


def test_a_finished_run_needs_its_checkpoint_no_more(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    (out / CHECKPOINT).write_bytes(b"damaged")
    assert run(tiny(), out, resume=True) == read_summary(finished)
    write_report(out)


def test_what_a_run_starts_from_is_of_its_configuration(tmp_path: Path) -> None:
    """Weights, samples and network that were laid out with another seed are refused, one by one."""
    for seed in (7, 8):
        open_workspace(tiny(seed=seed)).lay_out(tmp_path / str(seed), with_start=True)
    setup, other = tmp_path / "7", tmp_path / "8"

    def read() -> None:
        found = Setup(tiny(), setup)
        assert found.start_state().shapes() == found.shapes
        assert len(found.test) == 60
        open_data(tiny(), 0, setup=str(setup))

    read()
    for name in ("network.json", "start.safetensors", "train", "test"):
        (setup / name).rename(tmp_path / "aside")
        (other / name).rename(setup / name)
        with pytest.raises(USER_ERRORS, match=rf"{name}.*(of another run|other settings|found)"):
            read()
        (setup / name).rename(other / name)
        (tmp_path / "aside").rename(setup / name)
    read()


def test_clients_per_round_are_sampled_by_the_seed(tmp_path: Path) -> None:
    config = tiny(federation__clients_per_round=2, training__rounds=4)
    chosen = [line["clients"] for line in read_metrics(run_inline(config, tmp_path / "a"))[1:]]
    assert all(len(clients) == 2 for clients in chosen)
    assert len({tuple(clients) for clients in chosen}) > 1
    again = [line["clients"] for line in read_metrics(run_inline(config, tmp_path / "b"))[1:]]
    assert again == chosen


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_values_in_fewer_bits(dtype: str, finished: Path, tmp_path: Path) -> None:
    out = run_inline(tiny(federation__value_dtype=dtype), tmp_path / dtype)
    small, full = read_summary(out), read_summary(finished)
    assert small["bytes_up_steady_round"] is None or (
        small["bytes_up_steady_round"] < full["bytes_dense_round"]
    )
    assert small["bytes_up"] < full["bytes_up"]


def test_wrong_config_on_a_client_is_a_skip_not_a_crash(tmp_path: Path) -> None:
    """A node that does not know a key (an older version, say) says so."""

    def older(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            context = Context(
                run_id=context.run_id,
                node_id=context.node_id,
                node_config=context.node_config,
                state=context.state,
                run_config={**context.run_config, "pruning.from_the_future": 1},
            )
        return client.app(message, context)

    out = run_inline(tiny(training__rounds=1), tmp_path / "run", clients=older)
    assert json.loads((out / METRICS).read_text().splitlines()[0])["skipped"][0]["client"] == -1
    assert read_metrics(out)[-1]["clients"] == [0, 1, 2]


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="density"):
        tiny(method__density=3)
    assert issubclass(ConfigError, ValueError)


def test_what_computes_on_a_gpu_is_said_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        raise RunError("far enough")

    monkeypatch.setenv("SPARSEMODEL_CUDA", "off")
    monkeypatch.setattr(workspace, "compute_device", lambda name: torch.device("cuda", 0))
    with pytest.raises(RunError, match="far enough"):
        run(tiny(training__device="cuda"), tmp_path / "run", say=say)
    assert said == ["plain torch on cuda:0 (SPARSEMODEL_CUDA=off)"]
    assert not (tmp_path / "run").exists()
