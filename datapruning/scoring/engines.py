"""Where the jobs of a scoring run are done: in this process, or on a Ray cluster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

from datapruning.scoring.jobs import Opened, Progress, Recipe, observe_shard, train_run
from prunelab.errors import RunError


class Engine(Protocol):
    """Does all jobs of a kind, inside a `with`; returns the processor seconds that they took."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def train(self, recipe: Recipe, progress: Progress | None) -> float: ...

    def observe(self, recipe: Recipe, progress: Progress | None) -> float: ...


class Inline:
    """One job after the other, in this process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(self, recipe: Recipe, progress: Progress | None) -> float:
        return sum(train_run(recipe, k, progress) for k in range(len(recipe.all_runs)))

    def observe(self, recipe: Recipe, progress: Progress | None) -> float:
        seconds, opened = 0.0, Opened(recipe)
        for number in range(recipe.num_shards):
            seconds += observe_shard(recipe, number, opened)
            if progress is not None:
                progress("scoring shards", number + 1, recipe.num_shards)
        return seconds


class Ray:
    """Jobs spread over a Ray cluster: that of RAY_ADDRESS, else one on this machine.

    All of its machines have to see the folder of `out`. A job is the same function as inline,
    with the same number of threads, so the bits are the same on processors of one kind.
    """

    def __enter__(self) -> Self:
        try:
            import ray  # noqa: PLC0415
        except ImportError:
            raise RunError("engine ray needs Ray: pip install 'fedprune[sim]'") from None
        self._ray = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            with warnings.catch_warnings():  # of what later versions of Ray will do
                warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
                ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_ours:
            self._ray.shutdown()

    def train(self, recipe: Recipe, progress: Progress | None) -> float:
        return self._all(train_run, recipe, len(recipe.all_runs), "training models", progress)

    def observe(self, recipe: Recipe, progress: Progress | None) -> float:
        return self._all(observe_shard, recipe, recipe.num_shards, "scoring shards", progress)

    def _all(
        self,
        job: Callable[[Recipe, int], float],
        recipe: Recipe,
        count: int,
        what: str,
        progress: Progress | None,
    ) -> float:
        ray = self._ray
        gpus = 1 if recipe.device.startswith("cuda") else 0
        remote = ray.remote(num_cpus=recipe.threads, num_gpus=gpus)(job)
        shared = ray.put(recipe)
        pending = [remote.remote(shared, number) for number in range(count)]
        seconds, done = 0.0, 0
        try:
            while pending:
                ready, pending = ray.wait(pending)
                seconds += sum(ray.get(ready))
                done += len(ready)
                if progress is not None:
                    progress(what, done, count)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ValueError) else error from None
        finally:
            self._wait_for_the_end(pending)
        return seconds

    def _wait_for_the_end(self, pending: Sequence[Any]) -> None:
        """Jobs that nobody needs any more must not write into a folder that may be removed."""
        for left in pending:
            self._ray.cancel(left)
        for left in pending:
            with suppress(self._ray.exceptions.RayError):
                self._ray.get(left)


ENGINES: dict[str, Callable[[], Engine]] = {"inline": Inline, "ray": Ray}


def engine_of(name: str | Engine) -> Engine:
    """An engine by name; an object is passed on.

    Raises:
        RunError: unknown; the message lists the known ones.
    """
    if not isinstance(name, str):
        return name
    if name not in ENGINES:
        raise RunError(f"unknown engine {name!r}; expected one of {', '.join(ENGINES)}")
    return ENGINES[name]()
