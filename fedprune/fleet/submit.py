"""A run on a federation that exists: submitted, followed, and submitted again where it died."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedprune.config import RunConfig
from fedprune.fleet.connections import connection
from fedprune.fleet.nodes import ONLINE, flwr
from fedprune.flower.launch import TICKET, Progress, Say, submit_values
from fedprune.flower.simulation import write_app
from fedprune.rounds import folder as runfolder
from prunelab.errors import RunError
from prunelab.runs.children import ended_with_parent
from prunelab.runs.temporary import temporary_folder

WAIT_SECONDS = 600.0
POLL_SECONDS = 2.0
COMPLETED, STOPPED = "finished:completed", "finished:stopped"
_RAISED = "ServerApp failed with exception: "
_STARTED = re.compile(r"started run (\d+)")
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def count_nodes(superlink: str) -> int:
    """How many nodes of a federation are online.

    Args:
        superlink: the name of its connection in Flower's configuration.

    Raises:
        RunError: no such connection, no answer, or no node.
    """
    connection(superlink)
    answer = flwr(["supernode", "list", superlink], _environment())
    count = [node["status"] for node in answer["nodes"]].count(ONLINE)
    if not count:
        raise RunError(
            f"no node of {superlink} is online, and as many clients as nodes were asked for; "
            "start the nodes first, or give --clients"
        )
    return count


def run_submitted(
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    progress: Progress,
    say: Say,
    superlink: str,
    wait: float = WAIT_SECONDS,
) -> None:
    """Run on an existing federation; the folder must have been prepared.

    The ServerApp works where the SuperLink is. Where that sees this folder, it is the run's;
    elsewhere the run has a folder of the same path there.

    Args:
        progress: called a few times a second while the run goes on.
        say: is told what is being done.
        superlink: the name of a connection in Flower's configuration.
        wait: seconds without any progress after which a federation that has gone is given up.

    Raises:
        RunError: the federation does not answer, the run failed, or it was stopped.
    """
    connection(superlink)
    with temporary_folder() as home, _ticket(out) as ticket:
        known = out.resolve() / runfolder.CHECKPOINT
        submissions = Submissions(superlink, home, progress)
        alive = time.monotonic()
        while True:
            mark = _stamp(known)
            try:
                values = submit_values(out, resume=resume, ticket=ticket)
                number = submissions.submit(config, out, values, say)
                alive = time.monotonic()
                status, details = submissions.follow(number)
            except UnreachedError as error:
                status, details = "", "its SuperLink does not answer"
                if not submissions.numbers:
                    raise RunError(f"{superlink} does not answer: {error}") from None
            if _stamp(known) != mark:
                alive = time.monotonic()
            if status == COMPLETED:
                return
            if status == STOPPED:
                raise RunError(f"run {number} was stopped; continue it with --resume")
            if details.startswith(_RAISED) and _stamp(known) == mark:
                raise RunError(details.removeprefix(_RAISED))
            if time.monotonic() > alive + wait:
                raise RunError(
                    f"{superlink} has not gone on for {wait:g} s ({details}); "
                    "the last checkpoint is kept, --resume continues from it"
                )
            say(f"the run broke off: {details}; it goes on from its last round as soon as it can")
            submissions.await_answer(until=alive + wait)
            resume = True


class UnreachedError(Exception):
    """A SuperLink that does not answer."""


class Submissions:
    """What this command has submitted to one federation.

    Args:
        home: an empty folder for apps and logs.
    """

    def __init__(self, superlink: str, home: Path, progress: Progress) -> None:
        self._superlink, self._home, self._progress = superlink, home, progress
        self._process: subprocess.Popen[bytes] | None = None
        self.numbers: list[str] = []

    def submit(self, config: RunConfig, out: Path, values: dict[str, object], say: Say) -> str:
        """Submit the app; Flower's number of the run.

        An earlier run that Flower still believes to go on is stopped first.

        Raises:
            UnreachedError: the SuperLink does not answer.
        """
        if self.numbers:
            with suppress(RunError):
                flwr(["stop", self.numbers[-1], self._superlink], _environment())
        place = len(self.numbers)
        app = self._home / f"app{place}"
        if not app.exists():
            write_app(app, config, values)
        log = self._home / f"run{place}.log"
        command = ended_with_parent("flwr", "run", str(app), self._superlink, "--stream")
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env={**os.environ, **_environment()}, stdout=file, stderr=file
            )
        while not (started := _STARTED.search(_read(log))):
            if self._process.poll() is not None:
                raise UnreachedError(" ".join(_read(log).split())[-500:] or "it said nothing")
            self._wait()
        self.numbers.append(started[1])
        say(f"run {started[1]}; flwr log {started[1]} {self._superlink} shows its log")
        return started[1]

    def follow(self, number: str) -> tuple[str, str]:
        """Wait until a run has ended; its status, and what Flower says of it.

        Raises:
            UnreachedError: the SuperLink does not answer any more.
        """
        assert self._process is not None
        try:
            while self._process.poll() is None:
                self._wait()
            while not (found := self._status(number))[0].startswith("finished"):
                for _ in range(int(POLL_SECONDS / 0.25)):
                    self._wait()
        except KeyboardInterrupt:
            with suppress(RunError):
                flwr(["stop", number, self._superlink], _environment())
            raise
        finally:
            self._process.kill()
            self._process.wait()
            self._progress()
        return found

    def await_answer(self, *, until: float) -> None:
        """Wait until the SuperLink answers, at most until a moment of `time.monotonic`."""
        while time.monotonic() < until:
            with suppress(RunError):
                flwr(["list", self._superlink, "--limit", "1"], _environment())
                return
            time.sleep(POLL_SECONDS)

    def _status(self, number: str) -> tuple[str, str]:
        try:
            found = flwr(["list", self._superlink, "--run-id", number], _environment())["runs"][0]
        except RunError as error:
            raise UnreachedError(str(error)) from None
        return str(found["status"]), str(found.get("details") or found["status"])

    def _wait(self) -> None:
        self._progress()
        time.sleep(0.25)


@contextmanager
def _ticket(out: Path) -> Iterator[str]:
    """A word in the folder by which the ServerApp knows that it sees the same folder."""
    file, word = out / TICKET, secrets.token_hex(16)
    file.write_text(word)
    try:
        yield word
    finally:
        file.unlink(missing_ok=True)


def _stamp(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _environment() -> dict[str, str]:
    """For Flower's commands as the user gives them, with the user's own connections."""
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**_QUIET, "PATH": commands}
