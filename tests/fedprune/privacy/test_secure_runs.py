"""Whole runs through the real ClientApp and ServerApp whose server sees sums alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from federation import ClientApp, run_inline, tiny
from flwr.app import Context, Error, Message
from scipy import stats

from fedprune.errors import ConfigError
from fedprune.flower import client, wire
from fedprune.flower.batched import BatchedGrid
from fedprune.methods import Method, RunState, Start, train_request
from fedprune.privacy.randomness import packed, unpacked
from fedprune.rounds.folder import read_metrics, read_model, read_summary
from prunelab.errors import RunError

EIGHT = {"data__clients": 8, "training__rounds": 2, "data__num_train": 400}
SMALL = {"training__rounds": 2}

Drops = Callable[[str, str, int], bool]
"""(action, session, client) -> whether the client fails."""


def failing(drops: Drops) -> ClientApp:
    """The real ClientApp on nodes that are gone for some messages."""

    def app(message: Message, context: Context) -> Message:
        header, _ = wire.read_record(message.content)
        number = int(context.node_config["partition-id"])
        if drops(header["a"], header.get("s", "") if "." in header["a"] else "", number):
            return Message(Error(code=2, reason="the node is gone"), reply_to=message)
        return client.app(message, context)

    return app


def arrays(out: Path) -> dict[str, bytes]:
    """The model of a run, as bytes: what model.safetensors holds but for the run's name."""
    state, _ = read_model(out)
    assert state.patterns is not None
    values = {name: value.tobytes() for name, value in state.values.items()}
    return {**values, "mask": state.patterns.digest().encode()}


@pytest.fixture(scope="module")
def plain_without_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clients 2 and 5 never answer "train"; they do measure and score."""
    out = tmp_path_factory.mktemp("plain") / "run"
    gone = failing(lambda action, _, number: action == "train" and number in (2, 5))
    return run_inline(tiny(**EIGHT), out, clients=gone)


@pytest.fixture(scope="module")
def plain_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_inline(tiny(**SMALL), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("step", ["secure.keys", "secure.shares", "train"])
def test_two_of_eight_leave_and_the_model_has_the_bits_of_the_plain_run(
    step: str, plain_without_two: Path, tmp_path: Path
) -> None:
    """FedTiny from candidate selection to growth; two are gone from that step of training on."""

    def drops(action: str, session: str, number: int) -> bool:
        return number in (2, 5) and action == step and (step == "train" or "train" in session)

    config = tiny(**EIGHT, privacy__secure_aggregation=True)
    out = run_inline(config, tmp_path / "run", clients=failing(drops))
    assert arrays(out) == arrays(plain_without_two)
    ours, theirs = read_metrics(out), read_metrics(plain_without_two)
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        assert own["clients"] == other["clients"] == [0, 1, 3, 4, 6, 7]
        assert own["adjusted"] == other["adjusted"]
        assert {entry["client"] for entry in own["skipped"]} == {2, 5}
        assert own["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)
        assert own["test_loss"] == other["test_loss"]
    assert any(line["adjusted"] for line in ours[1:])
    assert ours[0]["selection"]["losses"] == theirs[0]["selection"]["losses"]


def test_who_leaves_before_the_masks_are_taken_away_is_in_the_sum(tmp_path: Path) -> None:
    """The shares of six are enough: the model is that of all eight."""
    plain = run_inline(tiny(**EIGHT), tmp_path / "plain")
    gone = failing(lambda action, _, number: action == "secure.unmask" and number in (0, 7))
    config = tiny(**EIGHT, privacy__secure_aggregation=True)
    out = run_inline(config, tmp_path / "run", clients=gone)
    assert arrays(out) == arrays(plain)
    assert all(line["clients"] == list(range(8)) for line in read_metrics(out)[1:])
    # The steps of a sum once lost the seconds that had been counted.
    assert min(read_summary(each)["client_seconds"] for each in (out, plain)) > 0


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("secure.keys", "2 of 4 clients sent keys, and 3 are needed"),
        ("train", "2 of 4 clients sent their vector, and 3 are needed"),
        ("secure.unmask", "2 of 3 shares to take masks away"),
    ],
)
def test_with_too_few_the_round_fails_and_the_run_goes_on_from_before(
    step: str, what: str, plain_of_four: Path, tmp_path: Path
) -> None:
    broken = {"on": True}

    def drops(action: str, session: str, number: int) -> bool:
        trains = step == "train" or session.startswith("train 1")
        return broken["on"] and number < 2 and action == step and trains

    config, out = tiny(**SMALL, privacy__secure_aggregation=True), tmp_path / "run"
    with pytest.raises(RunError, match=f"no client gave a usable answer.*{what}"):
        run_inline(config, out, clients=failing(drops))
    broken["on"] = False
    run_inline(config, out, resume=True)
    assert arrays(out) == arrays(plain_of_four)


def test_a_sum_below_the_quorum_is_not_unmasked_and_asked_again(
    plain_without_two: Path, tmp_path: Path
) -> None:
    """In the second round three leave at the first attempt, two at the second."""
    sessions: list[str] = []
    unmasked: set[str] = set()

    def drops(action: str, session: str, number: int) -> bool:
        if session.startswith("train 1") and session not in sessions:
            sessions.append(session)
        if action == "secure.unmask":
            unmasked.add(session)
        left = (1, 3, 4) if len(sessions) == 1 else (2, 5)
        return action == "train" and number in left

    config = tiny(**EIGHT, privacy__secure_aggregation=True, federation__quorum=6.0)
    out = run_inline(config, tmp_path / "run", clients=failing(drops))
    assert arrays(out) == arrays(plain_without_two)
    assert len(sessions) == 2
    assert sessions[0] not in unmasked
    (below,) = (line for line in read_metrics(out) if line.get("event") == "below-quorum")
    assert (below["round"], below["answered"], below["quorum"]) == (2, [], 6)


def test_a_private_draw_is_asked_again_as_it_is(tmp_path: Path) -> None:
    """Accounting is for one draw of all clients: another for the second attempt would favour
    those who answer."""
    asked: dict[str, set[int]] = {}

    def drops(action: str, session: str, number: int) -> bool:
        if action == "secure.keys":
            asked.setdefault(session, set()).add(number)
        return len(asked) == 1

    config = tiny(
        **{**EIGHT, "training__rounds": 1}, method__name="magnitude", privacy__dp="central",
        privacy__secure_aggregation=True, privacy__noise="system", federation__clients_per_round=4,
    )  # fmt: skip
    run_inline(config, tmp_path / "run", clients=failing(drops))
    first, second = asked.values()
    assert first == second


@pytest.mark.filterwarnings("ignore:.*test samples are left aside")
@pytest.mark.parametrize(
    "settings",
    [
        {"federation__evaluate": "clients"},
        {"method__name": "ssfl"},
        {"method__name": "fedprox", "method__density": 1.0},
        {"federation__clients_per_round": 3, "data__clients": 5},
    ],
)
def test_every_question_can_be_a_sum(settings: dict[str, Any], tmp_path: Path) -> None:
    """Tests by clients, saliency, a dense model, a draw of clients: bits of the plain run."""
    settings = {**SMALL, **settings}
    plain = run_inline(tiny(**settings), tmp_path / "plain")
    out = run_inline(tiny(**settings, privacy__secure_aggregation=True), tmp_path / "run")
    ours, theirs = read_model(out)[0], read_model(plain)[0]
    assert ours.patterns == theirs.patterns
    assert all(v.tobytes() == theirs.values[n].tobytes() for n, v in ours.values.items())
    for own, other in zip(read_metrics(out)[1:], read_metrics(plain)[1:], strict=True):
        assert own["test_loss"] == pytest.approx(other["test_loss"], rel=1e-12)
        assert "test_clients" not in own
        assert not own["skipped"]


@pytest.mark.slow
def test_clients_that_train_together_answer_under_masks(tmp_path: Path) -> None:
    class Together(BatchedGrid):
        def __init__(self, app: Any, **given: Any) -> None:
            super().__init__(app, size=3, **given)

    settings: dict[str, Any] = {
        "method__name": "magnitude", "training__rounds": 2, "data__num_train": 120,
        "training__execution": "masked",
    }  # fmt: skip
    plain = run_inline(tiny(**settings), tmp_path / "plain", grid=Together)
    private = tiny(**settings, privacy__secure_aggregation=True)
    out = run_inline(private, tmp_path / "run", grid=Together)
    assert arrays(out) == arrays(plain)


def test_nothing_of_a_client_is_sent_but_sums_and_sizes(tmp_path: Path) -> None:
    """Every message of a run is kept: what clients send besides keys and sealed shares is uniform
    bytes (chi-square), their number of samples, and nothing of their labels."""
    sent: list[tuple[str, dict[str, Any], dict[str, bytes]]] = []

    def watched(message: Message, context: Context) -> Message:
        header, _ = wire.read_record(message.content)
        reply = client.app(message, context)
        assert reply is not None
        sent.append((header["a"], *wire.read_record(reply.content)))
        return reply

    out = run_inline(tiny(privacy__secure_aggregation=True), tmp_path / "run", clients=watched)
    masked = {"measure": b"", "score": b"", "train": b""}  # of scores there are too few bytes
    for action, header, frames in sent:
        if action == "describe":
            assert header["f"]["labels"] == []
            assert set(header) == {"n", "f"}
        elif action in masked:
            assert set(header) - {"u"} == {"n", "x"}
            assert set(frames) == {"x"}
            masked[action] += frames["x"]
        else:
            assert not header
            assert set(frames) == {"k"}
    for action, data in masked.items():
        shown = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        assert action == "score" or stats.chisquare(shown).pvalue > 1e-9, action
    assert all(entry["labels"] == [] for entry in read_metrics(out)[0]["clients"])
    assert "Their classes stay with them." in _report(out)


def _report(out: Path) -> str:
    from fedprune.reports.page import write_report  # noqa: PLC0415

    return write_report(out).read_text(encoding="utf-8")


def test_secrets_are_gone_between_rounds(tmp_path: Path) -> None:
    """What a client keeps names only secrets, and at the end of a run nothing at all."""
    contexts: dict[int, Context] = {}
    names: set[str] = set()

    def watched(message: Message, context: Context) -> Message | None:
        reply = client.app(message, context)
        contexts[int(context.node_config["partition-id"])] = context
        names.update(context.state.config_records.get("kept", {}))
        return reply

    run_inline(tiny(**SMALL, privacy__secure_aggregation=True), tmp_path / "run", clients=watched)
    assert names
    assert all(name.startswith("secret:") for name in names)
    assert len(contexts) == 4
    assert not any(context.state.config_records["kept"] for context in contexts.values())


def test_questions_in_the_clear_are_not_answered(tmp_path: Path) -> None:
    """A server that leaves the masks out, or asks for them where the run has none."""

    def stripped(message: Message, context: Context) -> Message | None:
        header, frames = wire.read_record(message.content)
        if header["a"] == "train":
            fields = {k: v for k, v in header["f"].items() if k != "secure"}
            record = wire.build_record({**header, "f": fields}, frames)
            message.content = record
        return client.app(message, context)

    private = tiny(**SMALL, privacy__secure_aggregation=True)
    with pytest.raises(RunError, match="asked in the clear, and privacy"):
        run_inline(private, tmp_path / "run", clients=stripped)

    def stepped(message: Message, context: Context) -> Message | None:
        if wire.read_record(message.content)[0]["a"] == "train":
            step = {"a": "secure.keys", "s": "train", "n": 4}
            message.content = wire.build_record(step, {})
        return client.app(message, context)

    with pytest.raises(RunError, match="a step of a secure sum, which this run does not have"):
        run_inline(tiny(**SMALL), tmp_path / "other", clients=stepped)


@dataclass(frozen=True)
class Curious(Method):
    """It looks at each client's answer alone."""

    name: ClassVar[str] = "curious"

    def start(self, server: Start) -> RunState:
        state = RunState(0, server.state())
        list(server.ask(train_request(state)))
        return state


def test_a_method_that_looks_at_single_answers_is_told_how_not_to(tmp_path: Path) -> None:
    settings = {"method__name": f"{__name__}:Curious", "training__rounds": 1}
    run_inline(tiny(**settings), tmp_path / "plain")
    with pytest.raises(RunError, match=r"a method that calls server\.pooled works with both"):
        run_inline(tiny(**settings, privacy__secure_aggregation=True), tmp_path / "run")


@pytest.mark.parametrize("place", [0, 32])
def test_a_client_whose_keys_are_none_is_left_out(place: int, tmp_path: Path) -> None:
    """Else every other client would refuse to agree with it."""

    def liar(message: Message, context: Context) -> Message | None:
        reply = client.app(message, context)
        asked = wire.read_record(message.content)[0]["a"]
        if asked == "secure.keys" and int(context.node_config["partition-id"]) == 3:
            assert reply is not None
            keys = bytearray(wire.read_record(reply.content)[1]["k"])
            keys[place : place + 32] = bytes(32)
            reply.content = wire.build_record({}, {"k": bytes(keys)})
        return reply

    config = tiny(**SMALL, privacy__secure_aggregation=True)
    out = run_inline(config, tmp_path / "run", clients=liar)
    for line in read_metrics(out)[1:]:
        assert line["clients"] == [0, 1, 2]
        reason = "secure sum: a public key that is none"
        assert line["skipped"] == [{"client": 3, "reason": reason}]


def test_a_vector_of_another_length_is_left_out(tmp_path: Path) -> None:
    """One client's is cut; another's is changed, which nobody can see but in the sum."""

    def liar(change: Callable[[bytes], bytes], *numbers: int) -> ClientApp:
        def app(message: Message, context: Context) -> Message | None:
            reply = client.app(message, context)
            number = int(context.node_config["partition-id"])
            if wire.read_record(message.content)[0]["a"] == "train" and number in numbers:
                assert reply is not None
                header, frames = wire.read_record(reply.content)
                reply.content = wire.build_record(header, {"x": change(frames["x"])})
            return reply

        return app

    config = tiny(**SMALL, privacy__secure_aggregation=True)
    out = run_inline(config, tmp_path / "cut", clients=liar(lambda data: data[:-1], 3))
    for line in read_metrics(out)[1:]:
        assert line["clients"] == [0, 1, 2]
        assert "bytes under masks" in line["skipped"][0]["reason"]

    def raised(data: bytes) -> bytes:
        words = unpacked(data, 6)
        return packed(words + np.uint64(2**46), 6)

    with pytest.raises(RunError, match=r"no client gave a usable answer.*(weights of norm|beyond)"):
        run_inline(config, tmp_path / "raised", clients=liar(raised, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"federation__value_dtype": "fp16"}, "federation.value_dtype: it changes what the client"),
        ({"federation__uplink_dtype": "int8"}, "federation.uplink_dtype: it changes what the"),
        ({"federation__uplink_topk": 0.1}, "federation.uplink_topk: it changes what the client"),
        ({"federation__aggregation": "median"}, "median compares single clients' values"),
        (
            {"federation__over_sample": 1, "federation__clients_per_round": 3},
            "federation.over_sample: everybody who is asked counts",
        ),
        ({"data__clients": 1}, "a sum over one client is that client's"),
        ({"federation__clients_per_round": 1}, "a sum over one client is that client's"),
        ({"privacy__threshold": 1.0}, "privacy.threshold: expected 0 < threshold < 1"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**settings, privacy__secure_aggregation=True)


def test_bytes_of_a_client(tmp_path: Path) -> None:
    """A steady round takes up three times the active values in fp32 (300 samples in all: words of
    6 bytes, two a value) and what the protocol adds: keys, shares of four clients and headers,
    less than 4 kB."""
    config = tiny(method__name="magnitude", training__rounds=2, privacy__secure_aggregation=True)
    out = run_inline(config, tmp_path / "run")
    summary = json.loads((out / "summary.json").read_text())
    state, _ = read_model(out)
    values = 4 * sum(value.size for value in state.values.values())
    assert 3 * values < summary["bytes_up_steady_round"] < 3 * values + 4096
