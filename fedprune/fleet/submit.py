"""A run on a federation that exists: submitted, followed, and submitted again where it died."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedprune.config import RunConfig
from fedprune.fleet.connections import connection
from fedprune.fleet.nodes import ONLINE, UnreachedError, flwr
from fedprune.flower.launch import TICKET, Progress, Say, submit_values
from fedprune.flower.simulation import write_app
from fedprune.rounds import folder as runfolder
from prunelab.errors import RunError
from prunelab.runs.children import ended_with_parent
from prunelab.runs.folder import locked
from prunelab.runs.temporary import temporary_folder

WAIT_SECONDS = 600.0
POLL_SECONDS, PROGRESS_SECONDS = 2.0, 0.25
COMPLETED, STOPPED = "finished:completed", "finished:stopped"
_RAISED = "ServerApp failed with exception: "
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def count_nodes(superlink: str) -> int:
    """How many nodes of a federation are online.

    Args:
        superlink: the name of its connection in Flower's configuration.

    Raises:
        RunError: no such connection, no answer, or no node.
    """
    connection(superlink)
    try:
        answer = flwr(["supernode", "list", superlink], _environment())
    except UnreachedError as error:
        raise _not_running(error) from None
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
        submissions = Submissions(superlink, home, out, progress)
        number, alive = "", time.monotonic()
        while True:
            mark, began = _stamp(out), time.monotonic()
            try:
                if not number:
                    values = submit_values(out, resume=resume, ticket=ticket)
                    number = submissions.submit(config, values)
                    say(f"run {number}; flwr log {number} {superlink} shows its log")
                status, details = submissions.follow(number)
            except UnreachedError as error:
                if not submissions.numbers:
                    raise _not_running(error) from None
                status, details = "", str(error)
            if status == COMPLETED:
                return
            if status == STOPPED:
                raise RunError(f"run {number} was stopped; continue it with --resume")
            # A folder on another machine shows nothing: there a run that lasted had gone on.
            if _stamp(out) != mark or time.monotonic() > began + wait:
                alive = time.monotonic()
            elif details.startswith(_RAISED):
                raise RunError(details.removeprefix(_RAISED))
            if time.monotonic() > alive + wait:
                raise RunError(
                    f"nothing has gone on for {wait:g} s: {details}; the last checkpoint is kept, "
                    "--resume continues from it"
                )
            if status:
                say(f"run {number} broke off: {details}; it is submitted again, to go on")
                number, resume = "", True
            else:
                say(f"{details}; waiting until it does")
                submissions.await_answer(until=alive + wait)


class Submissions:
    """What this command has submitted to one federation.

    Args:
        home: an empty folder for apps and logs.
        out: the run folder.
    """

    def __init__(self, superlink: str, home: Path, out: Path, progress: Progress) -> None:
        self._superlink, self._home, self._out = superlink, home, out
        self._progress = progress
        self.numbers: list[str] = []

    def submit(self, config: RunConfig, values: dict[str, object]) -> str:
        """Submit the app; Flower's number of the run.

        An earlier run that Flower still believes to go on is stopped first.

        Raises:
            UnreachedError: the SuperLink does not answer.
            RunError: it does not take the run.
        """
        if self.numbers:
            self._stop(self.numbers[-1])
        app = self._home / f"app{len(self.numbers)}"
        if not app.exists():
            write_app(app, config, values)
        number = str(flwr(["run", str(app), self._superlink], _environment())["run-id"])
        self.numbers.append(number)
        return number

    def follow(self, number: str) -> tuple[str, str]:
        """Wait until a run has ended; its status, and what Flower says of it.

        Raises:
            UnreachedError: the SuperLink does not answer any more.
        """
        try:
            while True:
                self._await_end_of_log(number)
                status, details = self._status(number)
                if status.startswith("finished"):
                    return status, details
                if self._nobody_works():
                    return "gone", "its ServerApp has gone"
        except KeyboardInterrupt:
            self._stop(number)
            raise

    def await_answer(self, *, until: float) -> None:
        """Wait until the SuperLink answers, at most until a moment of `time.monotonic`."""
        while time.monotonic() < until:
            with suppress(RunError):
                flwr(["list", self._superlink, "--limit", "1"], _environment())
                return
            time.sleep(POLL_SECONDS)

    def _await_end_of_log(self, number: str) -> None:
        """Wait until a run's log ends: with the run, or with the connection."""
        command = ended_with_parent("flwr", "log", number, self._superlink, "--stream")
        with (self._home / f"{number}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **_environment()}, stdout=log, stderr=log
            )
        try:
            while process.poll() is None:
                self._progress()
                time.sleep(PROGRESS_SECONDS)
        finally:
            process.kill()
            process.wait()
            self._progress()

    def _nobody_works(self) -> bool:
        try:
            with locked(self._out, wait=0):
                return True
        except RunError:
            return False

    def _status(self, number: str) -> tuple[str, str]:
        found = flwr(["list", self._superlink, "--run-id", number], _environment())["runs"][0]
        return str(found["status"]), str(found.get("status-details") or found["status"])

    def _stop(self, number: str) -> None:
        with suppress(RunError):
            flwr(["stop", number, self._superlink], _environment())


@contextmanager
def _ticket(out: Path) -> Iterator[str]:
    """A word in the folder by which the ServerApp knows that it sees the same folder."""
    file, word = out / TICKET, secrets.token_hex(16)
    file.write_text(word)
    try:
        yield word
    finally:
        file.unlink(missing_ok=True)


def _not_running(error: UnreachedError) -> UnreachedError:
    return UnreachedError(
        f"{error}; start it with `fedprune server start`, or `fedprune fleet up`, and its folder"
    )


def _stamp(out: Path) -> float:
    """When the last checkpoint was written."""
    file = out / runfolder.CHECKPOINT
    return file.stat().st_mtime if file.exists() else 0.0


def _environment() -> dict[str, str]:
    """For Flower's commands as the user gives them, with the user's own connections."""
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**_QUIET, "PATH": commands}
