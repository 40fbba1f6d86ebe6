"""Rounds with clients that are absent, late, restarted or new, in a time of the grid's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from federation import run_inline, tiny
from flwr.app import Context, Error, Message, RecordDict

from fedprune.errors import ConfigError
from fedprune.exchange.messages import DESCRIBE
from fedprune.flower import wire
from fedprune.flower.inline import InlineGrid
from fedprune.flower.roster import LOST
from fedprune.privacy.accounting import epsilon
from fedprune.rounds.folder import has_checkpoint, read_metrics, read_model
from fedprune.settings import PrivacyConfig
from prunelab.errors import RunError

ROUNDS = 3
Delay = Callable[[str, int, int], float]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Timed(InlineGrid):
    """Answers come after a delay (action, round from 1, client), and nodes may come and go.

    A delay of infinity is an answer that never comes.
    """

    delay: Delay = staticmethod(lambda action, number, client: 0.0)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.clock = Clock()
        self.ready: dict[str, float] = {}
        self.asked: list[tuple[str, int, int]] = []
        self.absent: set[int] = set()
        self.set_up()

    def set_up(self) -> None:
        """For a test to say more."""

    def restart(self, client: int, *, keep_id: bool = False) -> None:
        """A node loses what it held, and its identity."""
        node, old = next(pair for pair in self.contexts.items() if place(pair[1]) == client)
        del self.contexts[node]
        new = node if keep_id else node + 100
        self.contexts[new] = Context(1, new, old.node_config, RecordDict(), old.run_config)

    def get_node_ids(self) -> Iterable[int]:
        return [n for n, context in self.contexts.items() if place(context) not in self.absent]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            header, _ = wire.read_record(message.content)
            client = place(self.contexts[message.metadata.dst_node_id])
            question = header["a"], header["r"] + 1, client
            self.asked.append(question)
            self.ready[message_id] = self.clock.now + self.delay(*question)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._messages.get(message_id)
            gone = message is not None and message.metadata.dst_node_id not in self.contexts
            if self.ready[message_id] <= self.clock.now and not gone:
                yield from super().pull_messages([message_id])


def place(context: Context) -> int:
    return int(context.node_config["partition-id"])


def run(
    out: Path, grid: type[Timed] = Timed, *, resume: bool = False, **settings: Any
) -> tuple[Path, Timed]:
    grids: list[Timed] = []

    class Kept(grid):  # type: ignore[valid-type, misc]
        def set_up(self) -> None:
            grids.append(self)
            super().set_up()

    config = tiny(training__rounds=ROUNDS, **{"federation__timeout": 30.0, **settings})
    return run_inline(config, out, grid=Kept, resume=resume), grids[0]


def digest(out: Path) -> str:
    """Of the model's values; the file also names the settings."""
    state, _ = read_model(out)
    return hashlib.sha256(b"".join(value.tobytes() for value in state.values.values())).hexdigest()


def events(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out) if line.get("event") == "below-quorum"]


def rounds(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out) if "event" not in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(run(tmp_path_factory.mktemp("surviving") / "run")[0])


def silent(action: str, number: int, *, who: set[int], times: int) -> type[Timed]:
    """Some clients do not answer a question so many times."""

    class Silent(Timed):
        def delay(self, asked: str, at: int, client: int) -> float:  # type: ignore[override]
            again = self.asked.count((asked, at, client))
            hit = asked == action and at == number and client in who and again <= times
            return float("inf") if hit else 0.0

    return Silent


@pytest.mark.parametrize(("action", "number"), [("train", 2), ("measure", 1), ("score", 1)])
def test_a_round_below_quorum_is_asked_again_of_those_who_did_not_answer(
    action: str, number: int, tmp_path: Path, undisturbed: str
) -> None:
    grid = silent(action, number, who={1, 3}, times=1)
    out, seen = run(tmp_path / "run", grid, federation__quorum=0.75)
    assert digest(out) == undisturbed  # as if they had answered at once
    (event,) = events(out)
    told = (event["round"], event["asked"], event["attempt"], event["answered"], event["quorum"])
    assert told == (number, action, 1, [0, 2], 3)
    times = [seen.asked.count((action, number, client)) for client in range(4)]
    assert times == [1, 2, 1, 2]


def test_others_are_asked_where_there_are_others(tmp_path: Path) -> None:
    settings = {"federation__clients_per_round": 2, "federation__quorum": 2.0}
    usual, _ = run(tmp_path / "usual", **settings)
    drawn = set(rounds(usual)[1]["clients"])
    grid = silent("train", 2, who=drawn, times=99)
    out, _ = run(tmp_path / "run", grid, **settings)
    assert rounds(out)[1]["clients"] == sorted({0, 1, 2, 3} - drawn)
    assert len(events(out)) == 1


def test_a_quorum_that_is_met_waits_for_the_others_once(tmp_path: Path) -> None:
    grid = silent("train", 2, who={1, 3}, times=1)
    out, seen = run(tmp_path / "run", grid, federation__quorum=2.0)
    assert not events(out)
    assert [line["clients"] for line in rounds(out)] == [[0, 1, 2, 3], [0, 2], [0, 1, 2, 3]]
    assert seen.clock.now == pytest.approx(30, abs=1)


def test_a_quorum_that_is_never_met_ends_the_run_with_its_checkpoint(
    tmp_path: Path, undisturbed: str
) -> None:
    out = tmp_path / "run"
    grid = silent("train", 2, who={1, 3}, times=99)
    with pytest.raises(RunError, match=r"round 2: only 2 clients.*federation\.quorum.*--resume"):
        run(out, grid, federation__quorum=0.75, federation__attempts=2)
    assert [event["attempt"] for event in events(out)] == [1, 2]
    assert has_checkpoint(out)
    # What a user may do about it: ask for fewer.
    out, _ = run(out, resume=True, federation__quorum=0.5, federation__attempts=2)
    assert digest(out) == undisturbed


def test_a_start_below_quorum_ends_with_what_is_missing(tmp_path: Path) -> None:
    grid = silent("score", 1, who={0, 1, 2}, times=99)
    with pytest.raises(RunError, match=r"only 1 of 4 clients answered 'score'.*quorum.*client 0"):
        run(tmp_path / "run", grid, federation__quorum=0.5)


def test_over_sampling_takes_the_first_answers(tmp_path: Path) -> None:
    """Of all four asked the two fastest count; the others' late answers are never fetched."""

    class Racing(Timed):
        def delay(self, action: str, number: int, client: int) -> float:  # type: ignore[override]
            return float((client + number) % 4 + 1) if action == "train" else 0.0

    settings = {"federation__clients_per_round": 2, "federation__over_sample": 2}
    out, seen = run(tmp_path / "run", Racing, **settings)
    assert [line["clients"] for line in rounds(out)] == [[0, 3], [2, 3], [1, 2]]
    assert seen.clock.now < 3 * 2.5
    assert len([asked for asked in seen.asked if asked[0] == "train"]) == 12
    assert len(seen._messages) == 6
    assert all(line["skipped"] == [] for line in rounds(out))


def test_an_answer_after_the_deadline_is_dropped(tmp_path: Path) -> None:
    class Late(Timed):
        def delay(self, action: str, number: int, client: int) -> float:  # type: ignore[override]
            return 31.0 if (action, number, client) == ("train", 1, 2) else 0.0

    out, seen = run(tmp_path / "run", Late)
    assert [line["clients"] for line in rounds(out)] == [[0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert rounds(out)[0]["skipped"] == [{"client": 2, "reason": "no answer within 30 s"}]
    ((message,),) = [list(seen._messages.values())]
    assert message.metadata.ttl == 30.0


# --- nodes that come, go and come back ---------------------------------------------------------


def at_round(number: int, act: Callable[[Timed], None]) -> type[Timed]:
    """Something happens to the nodes when the server looks after them before a round."""

    class Acting(Timed):
        def get_node_ids(self) -> Iterable[int]:
            trained = max((at for action, at, _ in self.asked if action == "train"), default=0)
            if trained == number - 1 and not getattr(self, "acted", False) and trained:
                self.acted = True
                act(self)
            return super().get_node_ids()

    return Acting


@pytest.mark.parametrize("keep_id", [False, True])
def test_a_restarted_node_goes_on_in_the_same_run(
    keep_id: bool, tmp_path: Path, undisturbed: str
) -> None:
    grid = at_round(2, lambda grid: grid.restart(1, keep_id=keep_id))
    out, seen = run(tmp_path / "run", grid)
    assert digest(out) == undisturbed
    assert all(line["skipped"] == [] for line in rounds(out))
    assert seen.asked.count((DESCRIBE, 1, 1)) == (1 if keep_id else 2)


def test_with_registered_keys_another_node_does_not_take_a_place(tmp_path: Path) -> None:
    grid = at_round(2, lambda grid: grid.restart(1))
    out, _ = run(tmp_path / "run", grid, federation__node_keys=True)
    assert [line["clients"] for line in rounds(out)] == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3]]
    reasons = [skip["reason"] for line in rounds(out) for skip in line["skipped"]]
    assert "its node is not connected" in reasons
    assert sum("another key" in reason for reason in reasons) == 1


def test_a_second_node_waits_until_the_first_is_gone(tmp_path: Path, undisturbed: str) -> None:
    """Killed and started again, while Flower still takes the old one for connected."""

    def twin(grid: Timed) -> None:
        node, old = list(grid.contexts.items())[2]
        grid.contexts[node + 500] = Context(
            1, node + 500, old.node_config, RecordDict(), old.run_config
        )

    class Twins(at_round(2, twin)):  # type: ignore[misc]
        def get_node_ids(self) -> Iterable[int]:
            if ("train", 2, 0) in self.asked and 1002 in self.contexts:
                del self.contexts[1002]
            return super().get_node_ids()

    out, _ = run(tmp_path / "run", Twins)
    assert digest(out) == undisturbed
    reasons = [skip["reason"] for line in rounds(out) for skip in line["skipped"]]
    assert reasons == ["node 1502: it says that it is client 2, which node 1002 is"]


def test_a_client_that_comes_late_is_taken_in(tmp_path: Path) -> None:
    class Late(at_round(3, lambda grid: grid.absent.clear())):  # type: ignore[misc]
        def set_up(self) -> None:
            super().set_up()
            self.absent.add(3)

    out, seen = run(tmp_path / "run", Late)
    assert [line["clients"] for line in rounds(out)] == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert seen.clock.now < 130  # two minutes at the join


def test_privacy_is_accounted_for_a_draw_of_all_clients_those_that_have_not_come_yet_too(
    tmp_path: Path,
) -> None:
    """Two of four are asked, and one comes in the last round: with three there, two of three would
    be drawn, and accounting by those of the end would tell less than was spent."""

    class Late(at_round(3, lambda grid: grid.absent.clear())):  # type: ignore[misc]
        def set_up(self) -> None:
            super().set_up()
            self.absent.add(3)

    private: dict[str, Any] = {
        "method__name": "magnitude", "privacy__dp": "central", "privacy__noise_multiplier": 6.0,
        "federation__clients_per_round": 2,
    }  # fmt: skip
    usual, _ = run(tmp_path / "usual", **private)
    out, _ = run(tmp_path / "run", Late, **private)
    drawn = [set(line["clients"]) for line in rounds(usual)]
    assert any(3 in some for some in drawn[:2])
    found = [set(line["clients"]) for line in rounds(out)]
    assert found == [drawn[0] - {3}, drawn[1] - {3}, drawn[2]]
    settings = PrivacyConfig(dp="central", noise_multiplier=6.0)
    assert [line["epsilon"] for line in rounds(out)] == [
        epsilon(settings, releases=n, asked=2, clients=4) for n in (1, 2, 3)
    ]


def test_a_run_that_finds_nobody_waits(tmp_path: Path, undisturbed: str) -> None:
    class Gone(at_round(2, lambda grid: grid.absent.update(range(4)))):  # type: ignore[misc]
        def get_node_ids(self) -> Iterable[int]:
            if self.clock.now > 100:
                self.absent.clear()
            return super().get_node_ids()

    out, seen = run(tmp_path / "run", Gone)
    assert digest(out) == undisturbed
    assert 100 < seen.clock.now < 110
    assert not events(out)


def test_a_node_that_does_not_say_who_it_is_holds_nobody_up(tmp_path: Path) -> None:
    class Mute(at_round(2, lambda grid: grid.restart(1))):  # type: ignore[misc]
        def delay(self, action: str, number: int, client: int) -> float:
            again = self.asked.count((DESCRIBE, 1, 1)) > 1
            return float("inf") if action == DESCRIBE and client == 1 and again else 0.0

    out, seen = run(tmp_path / "run", Mute)
    assert [line["clients"] for line in rounds(out)] == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3]]
    assert seen.clock.now < 1


def test_nodes_whose_answers_are_always_lost_hold_nobody_up(tmp_path: Path) -> None:
    """Two that take turns, so that one of them is always being asked."""

    class Losing(Timed):
        def delay(self, action: str, number: int, client: int) -> float:  # type: ignore[override]
            if action != DESCRIBE or client > 1:
                return 0.0
            return 1.0 if client == 1 and self.clock.now < 1 else 2.0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            assert self.clock.now < 1000
            for message_id in message_ids:
                asked = self._messages.get(message_id)
                for reply in super().pull_messages([message_id]):
                    assert asked is not None
                    lost = place(self.contexts[asked.metadata.dst_node_id]) < 2
                    error = Error(code=LOST[0], reason="a part is missing")
                    yield Message(error, reply_to=asked) if lost else reply

    out, _ = run(
        tmp_path / "run", Losing, federation__quorum=0.2,
        method__name="magnitude",
    )  # fmt: skip
    assert len(rounds(out)) == ROUNDS


def test_those_who_are_not_there_give_way_to_the_next_of_the_draw(tmp_path: Path) -> None:
    settings = {"federation__clients_per_round": 2}
    usual, _ = run(tmp_path / "usual", **settings)
    drawn = [set(line["clients"]) for line in rounds(usual)]
    away = next(iter(drawn[1]))
    grid = at_round(2, lambda grid: grid.absent.add(away))
    out, _ = run(tmp_path / "run", grid, **settings)
    found = [set(line["clients"]) for line in rounds(out)]
    assert found[0] == drawn[0]
    assert len(found[1]) == 2
    assert drawn[1] - {away} < found[1]


@pytest.mark.parametrize("method", ["ssfl", "fedavg", "fedprox"])
def test_methods_know_nothing_of_how_answers_become_one(method: str, tmp_path: Path) -> None:
    settings = {"method__name": method, "federation__byzantine": 0.25}
    kinds = ("mean", "trimmed-mean")
    outs = [run(tmp_path / k, federation__aggregation=k, **settings)[0] for k in kinds]
    assert [len(rounds(out)) for out in outs] == [ROUNDS] * 2
    assert digest(outs[0]) != digest(outs[1])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"federation__quorum": 0.0}, "quorum: expected a share below 1"),
        ({"federation__quorum": 1.5}, "quorum: expected a share below 1"),
        ({"federation__quorum": 5.0}, "quorum: 5 answers of 4 clients"),
        ({"federation__attempts": 0}, "attempts: expected at least 1"),
        ({"federation__over_sample": 1}, "over_sample: everybody is asked already"),
        ({"federation__byzantine": 0.5}, "byzantine: expected 0 <= byzantine < 0.5"),
        ({"federation__aggregation": "krum"}, "aggregation: expected one of mean, clipped"),
        ({"federation__clip": -1.0}, "clip: expected 0 or more"),
        ({"federation__aggregation": "median"}, "byzantine: 0.2 of 4 clients a round is nobody"),
        (
            {
                "federation__aggregation": "multi-krum",
                "federation__clients_per_round": 3,
                "federation__byzantine": 0.33,
            },
            "byzantine: 0.33 of 3 clients a round is nobody",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny(**settings)


def test_clients_gone_before_they_are_asked_of_the_rounds_model_are_told(tmp_path: Path) -> None:
    """What nobody could be asked costs no bytes, and stands in the round's line all the same."""

    class Gone(Timed):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            header, _ = wire.read_record(messages[0].content)
            return [] if header["a"] == "grow" else super().push_messages(messages)

    settings = {"name": "fedtiny-plus", "growth_at": "fresh", "adjust_every": 1, "adjust_until": 2}
    out, _ = run(tmp_path / "run", Gone, **{f"method__{key}": v for key, v in settings.items()})
    first, *later = rounds(out)
    assert [skip["client"] for skip in first["skipped"]] == [0, 1, 2, 3]
    assert {skip["reason"] for skip in first["skipped"]} == {"its node is not connected"}
    assert first["adjusted"] == []
    assert not any(line.get("skipped") for line in later)
