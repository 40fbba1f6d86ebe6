"""Work in pieces that are done once: over cores, GPUs or a Ray cluster, by one command or several.

A piece leaves its outcome in a file. Who works on a piece holds its lock, which the system lets go
of when that process dies, so that commands on one folder share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from prunelab.runs.provenance import commit
from sparsemodel.storage.files import write_atomically

FINISHED, DID_DIVERGE, FAILED = "finished", "diverged", "failed"
BUSY_SECONDS = 2.0  # that a worker waits for a piece which another command has


@dataclass(frozen=True)
class Outcome:
    """What became of a piece.

    Attributes:
        status: FINISHED, DID_DIVERGE (as it would again), or FAILED (which is tried again).
        reason: why it did not finish.
        values: its result.
        commit: of the code that made it.
    """

    status: str
    reason: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""

    @property
    def is_final(self) -> bool:
        """Whether nothing would change if it was run again."""
        return self.status != FAILED


class Job(Protocol):
    """A piece of work that can be pickled."""

    @property
    def name(self) -> str:
        """Of its outcome's file."""
        ...

    def run(self, out: Path) -> Outcome:
        """Do it, or the rest of it."""
        ...


Submit = Callable[[Job, Path], "Future[Outcome | None]"]


@dataclass(frozen=True)
class Workers:
    """Whoever does pieces: `width` at a time."""

    width: int
    submit: Submit


def run_jobs(
    jobs: Sequence[Job], out: Path, workers: Workers, *, say: Callable[[str], None] = print
) -> dict[str, Outcome]:
    """Every piece's outcome by its name; what is final is not done again."""
    found = {job.name: outcome for job in jobs if (outcome := read_outcome(job.name, out))}
    waiting = deque(job for job in jobs if job.name not in found or not found[job.name].is_final)
    total, done, started = len(waiting), 0, time.monotonic()
    running: dict[Future[Outcome | None], Job] = {}
    while waiting or running:
        while waiting and len(running) < workers.width:
            job = waiting.popleft()
            running[workers.submit(job, out)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, outcome = running.pop(future), future.result()
            if outcome is None:  # another command has it
                waiting.append(job)
                continue
            found[job.name] = outcome
            done += 1
            left = (time.monotonic() - started) / done * (total - done)
            say(f"{done}/{total} {job.name}: {_told(outcome)}, about {left / 60:.0f} min left")
    return {job.name: found[job.name] for job in jobs}


def attempt(job: Job, out: Path) -> Outcome | None:
    """Do a piece and leave its outcome, or find it done; None: another process is at it."""
    lock = _made(out / "locks" / f"{job.name}.lock")
    try:
        with FileLock(lock).acquire(timeout=BUSY_SECONDS, poll_interval=0.2):
            before = read_outcome(job.name, out)
            if before is not None and before.is_final:
                return before
            try:
                outcome = job.run(out)
            except Exception:  # one piece must not end the others
                outcome = Outcome(FAILED, reason=traceback.format_exc())
            outcome = replace(outcome, commit=commit())
            write_outcome(job.name, out, outcome)
            return outcome
    except Timeout:
        return None


def read_outcome(name: str, out: Path) -> Outcome | None:
    """What became of a piece; None: nothing yet."""
    try:
        return Outcome(**json.loads(_file(name, out).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_outcome(name: str, out: Path, outcome: Outcome) -> None:
    """Note what became of a piece."""
    text = json.dumps(asdict(outcome), indent=1)
    write_atomically(_made(_file(name, out)), text.encode())


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Note in a folder what its pieces share.

    Raises:
        ValueError: it has pieces of other settings.
    """
    file, text = out / "settings.json", json.dumps(settings, sort_keys=True, indent=1)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds runs of other settings; give another folder with --out")
    write_atomically(_made(file), text.encode())


def parsed(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """A command line with what `workers_of` reads.

    Raises:
        SystemExit: it asks for what cannot be.
    """
    parser.add_argument("--jobs", type=int, default=0, help="at a time; default cores, or GPUs")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; local starts one here")
    given = parser.parse_args(words)
    if given.jobs < 0:
        parser.error(f"--jobs {given.jobs}: how many at a time; 0: cores, or GPUs")
    return given


@contextmanager
def workers_of(given: argparse.Namespace, *, on_gpus: bool) -> Iterator[Workers]:
    """Whoever does the work that a command asks for.

    Raises:
        SystemExit: there is no GPU, or the work was interrupted; it can go on another time.
    """
    try:
        if given.ray:
            with ray_cluster(given.ray, jobs=given.jobs, gpus=on_gpus) as workers:
                yield workers
            return
        gpus = 0
        if on_gpus:
            import torch  # noqa: PLC0415

            gpus = torch.cuda.device_count()
            if gpus == 0:
                raise SystemExit("the runs are for cuda and there is no GPU; give another device")
        with processes(given.jobs or gpus or os.cpu_count() or 1, gpus=gpus) as workers:
            yield workers
    except BrokenProcessPool:
        raise SystemExit(
            "a process was killed, for want of memory perhaps; with fewer --jobs, the same "
            "command goes on"
        ) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from where it was") from None


@contextmanager
def processes(count: int, *, gpus: int = 0, context: Any = None) -> Iterator[Workers]:
    """Processes of this machine, of one thread each; each sees one GPU, the next in turn."""
    context = context or get_context("spawn")
    devices = context.SimpleQueue()
    for place in range(count if gpus else 0):
        devices.put(str(place % gpus))
    others = active_children()
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin, initargs=(devices, gpus > 0)
    ) as pool:
        try:
            yield Workers(count, lambda job, out: pool.submit(attempt, job, out))
        except BaseException:  # an interrupt, say: runs go on another time, from their last round
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                if child not in others:
                    child.kill()
            raise


@contextmanager
def ray_cluster(address: str, *, jobs: int = 0, gpus: bool = False) -> Iterator[Workers]:
    """Tasks of a Ray cluster, of a core or a GPU each; `out` must be a folder that all share.

    Args:
        address: as of `ray.init`; "local" starts a Ray of this machine.
        jobs: at a time; 0: as many as there are cores, or GPUs.
    """
    import ray  # noqa: PLC0415

    ray.init(address=address, log_to_driver=False)
    try:
        width = jobs or int(
            ray.cluster_resources().get(  # type: ignore[no-untyped-call]
                "GPU" if gpus else "CPU", 1
            )
        )
        task = ray.remote(num_cpus=1, num_gpus=int(gpus), max_calls=1)(attempt)
        yield Workers(width, lambda job, out: task.remote(job, out.resolve()).future())
    finally:
        ray.shutdown()


def _begin(devices: Any, with_gpu: bool) -> None:
    """In a new process: an end with the command's, one thread, and a GPU of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command sees to it
    threading.Thread(target=_end_with_command, daemon=True).start()
    if with_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)


def _end_with_command() -> None:
    """Wait for the command's end, however that comes, and end: its run can go on later."""
    command = parent_process()
    if command is not None:
        command.join()
        os._exit(1)


def _told(outcome: Outcome) -> str:
    accuracy = outcome.values.get("test_accuracy")
    if accuracy is not None:
        return f"{100 * accuracy:.2f} %"
    return " ".join([outcome.status, *outcome.reason.strip().splitlines()[-1:]])


def _file(name: str, out: Path) -> Path:
    return out / "outcomes" / f"{name}.json"


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
