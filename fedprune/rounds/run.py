"""The one way to run a configuration: for the command, simulations and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS, ConfigError
from fedprune.settings import FLOAT32
from sparsemodel.extras import need

if TYPE_CHECKING:
    from fedprune.reports.trackers import Tracker

ENGINES = ("flower", "inline", "batched")


def run(
    config: RunConfig,
    folder: Path,
    *,
    engine: str = "inline",
    resume: bool = False,
    progress: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    tracker: Tracker | None = None,
    superlink: str = "",
    wait: float = 600.0,
) -> dict[str, Any]:
    """Run or resume one run in `folder`, and leave the report beside it.

    Args:
        engine: "inline" (this process), "batched" (this process, the clients of a round trained
            together) or "flower" (Flower's simulation engine).
        resume: continue what the folder holds; a complete run is left as it is.
        progress: called a few times a second while metrics.jsonl grows.
        say: is told in a line what is being done before the first round.
        tracker: is shown each round.
        superlink: the name of a connection of Flower's: the run is submitted to that federation,
            and no engine is started here.
        wait: seconds without progress after which a federation that has gone is given up.

    Returns:
        The content of summary.json; nothing where the SuperLink is on a machine that does not see
        this folder: the run has one of the same path there.

    Raises:
        ConfigError, DataError, ModelError, RunError, SparseModelError: says what, where and
            what to do. A new folder in which nothing was computed is removed again.
    """
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415

    need("torch", "a run")
    folder = Path(folder)
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "batched" and config.training.execution == "sparse":
        raise ConfigError(
            "the batched engine trains stacked dense weights; use --execution masked, or "
            "--engine inline for sparse execution"
        )
    if engine == "batched" and config.training.precision != FLOAT32:
        raise ConfigError(
            f"the batched engine computes in {FLOAT32}; use --engine inline for "
            f"training.precision = {config.training.precision!r}"
        )
    if config.training.device != "cpu":
        from fedprune.rounds.workspace import compute_device  # noqa: PLC0415
        from sparsemodel.kernels.cuda.launch import in_use  # noqa: PLC0415

        say(in_use(compute_device(config.training.device)))
    runfolder.prepare(folder, config, resume=resume)
    if not (folder / runfolder.SUMMARY).exists():
        # Flower takes seconds to import: not before all that can be refused has been.
        from fedprune.flower.inline import run_inline  # noqa: PLC0415
        from fedprune.flower.simulation import run_flower  # noqa: PLC0415
        from fedprune.reports.page import write_report  # noqa: PLC0415

        starts: dict[str, Callable[..., None]] = {
            "flower": run_flower,
            "inline": run_inline,
            "batched": partial(run_inline, batched=True),
        }
        start = starts[engine]
        if superlink:
            from fedprune.fleet.submit import run_submitted  # noqa: PLC0415

            start = partial(run_submitted, superlink=superlink, wait=wait)
        try:
            with _followed(tracker, folder, config, progress) as look:
                start(config, folder, resume=resume, progress=look, say=say)
        except USER_ERRORS:
            if not resume:  # a run that was there before is not ours to remove
                runfolder.discard_unstarted(folder)
            raise
        if superlink and not (folder / runfolder.SUMMARY).exists():
            runfolder.discard_unstarted(folder)
            return {}
        write_report(folder)
    return runfolder.read_summary(folder)


@contextmanager
def _followed(
    tracker: Tracker | None, folder: Path, config: RunConfig, progress: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """What an engine calls now and then: progress, and the tracker if there is one."""
    if tracker is None:
        yield progress
        return
    from fedprune.reports.trackers import Following  # noqa: PLC0415

    with Following(tracker, folder, config) as follow:

        def look() -> None:
            progress()
            follow()

        yield look
