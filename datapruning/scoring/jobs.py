"""The two kinds of jobs of a scoring run: train one model, observe one shard of samples.

A job takes a `Recipe` and a number, leaves its result in the parts folder, and does nothing that
is already there. Jobs of a kind do not depend on each other, so they may run anywhere that sees
the folder.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.scores.memorization import subsets
from datapruning.scores.recorder import Recorder
from datapruning.scoring.methods import NUM_MOMENTS, Method
from datapruning.scoring.parts import SETTINGS, Parts
from datapruning.scoring.steps import Shard, Whole
from prunelab.data.samples import Samples, sizes
from prunelab.errors import RunError
from prunelab.networks import Network, build_model
from prunelab.runs.seeds import stream_seed
from prunelab.runs.threads import computing
from prunelab.training.loop import Callback, TrainingConfig, epoch_rates, train
from prunelab.training.task import Task

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is)."""

OPEN_BYTES = 1 << 30
"""Models that stay in memory from one shard to the next."""

_MODEL, _DRAW, _METHOD = 0, 1, 2  # streams of the seed


@dataclass(frozen=True)
class Run:
    """A model to train: which of its epochs to keep, and whether a Recorder watches."""

    share: float
    number: int
    epochs: tuple[int, ...]
    records: bool

    @property
    def name(self) -> str:
        return f"run-{round(100 * self.share)}-{self.number:03d}"


@dataclass(frozen=True)
class Recipe:
    """All that a job has to know; it can be sent to another process.

    Attributes:
        model: a name or a function that makes an untrained model (see `build_model`), or a trained
            model to score with.
        methods: by name, in the order in which they were asked for.
        options: of each method.
        runs: models to train for each method that trains several, in place of its own number.
        early: epochs after which "early" models are kept.
    """

    parts: Parts
    samples: Samples
    task: Task
    model: Network
    training: TrainingConfig
    seed: int
    density: float | None
    device: str
    threads: int
    methods: Mapping[str, Method]
    options: Mapping[str, Mapping[str, Any]]
    runs: int | None
    early: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        return math.ceil(len(self.samples) / self.shard_size)

    def num_runs(self, method: Method) -> int:
        """Models that a method has trained."""
        if self.is_trained:
            return 1
        return method.runs if self.runs is None or method.runs < 2 else self.runs

    @property
    def is_trained(self) -> bool:
        return isinstance(self.model, nn.Module)

    def moments(self, method: Method) -> tuple[int, ...]:
        """Epochs after which the method wants a model."""
        last = self.training.epochs
        if method.moments == "early":
            return (min(self.early, last),)
        if method.moments == "spread":
            marks = {max(1, round(last * (k + 1) / NUM_MOMENTS)) for k in range(NUM_MOMENTS)}
            return tuple(sorted(marks))
        return (last,)

    def rates(self, method: Method) -> list[float]:
        """For each of the method's moments the mean learning rate of the steps since the last."""
        rates = epoch_rates(self.training, len(self.samples))
        bounds = pairwise([0, *self.moments(method)])
        return [sum(rates[start:end]) / (end - start) for start, end in bounds]

    @cached_property
    def all_runs(self) -> list[Run]:
        """The models to train, each once for all methods that can share it."""
        epochs: dict[tuple[float, int], set[int]] = {}
        recorded = set()
        for method in self.methods.values():
            for number in range(0 if self.is_trained else self.num_runs(method)):
                key = (method.share, number)
                # Methods that read the record alone need no model kept.
                epochs.setdefault(key, set()).update(() if method.records else self.moments(method))
                if method.records:
                    recorded.add(key)
        return [
            Run(share, number, tuple(sorted(kept)), (share, number) in recorded)
            for (share, number), kept in sorted(epochs.items(), key=lambda entry: entry[0])
        ]

    def rows_of(self, run: Run) -> Tensor | None:
        """What a model is trained on; None: everything."""
        return None if run.share == 1.0 else self.drawn(run.share)[run.number]

    def drawn(self, share: float) -> list[Tensor]:
        """The random subsets of all models that train on a share of the samples."""
        numbers = [self.num_runs(m) for m in self.methods.values() if m.share == share]
        return list(
            subsets(
                len(self.samples),
                share=share,
                num_models=max(numbers),
                seed=stream_seed(self.seed, _DRAW),
            )
        )

    def in_subset(self, method: Method) -> Tensor | None:
        """What each of the method's models is trained on, bool [M, N]; None: on everything."""
        if method.share == 1.0:
            return None
        table = torch.zeros(self.num_runs(method), len(self.samples), dtype=torch.bool)
        # Others that take the same share may have more models; the first are this method's.
        for row, inside in zip(table, self.drawn(method.share), strict=False):
            row[inside] = True
        return table

    def method_seed(self, name: str) -> int:
        """Seed of a method's own random choices."""
        return stream_seed(self.seed, _METHOD, *name.encode())

    def build(self, run_seed: int) -> nn.Module:
        """An untrained model, sparsified where a density is set."""
        num_classes, input_shape = sizes(self.samples)
        model = build_model(
            self.model, num_classes=num_classes, input_shape=input_shape, seed=run_seed
        )
        if self.density is None:
            return model
        from datapruning.scoring.proxy import sparse_proxy  # noqa: PLC0415

        return sparse_proxy(model, self.samples, self.task, density=self.density, seed=run_seed)

    def models(self, method: Method) -> Callable[[int], Sequence[nn.Module]]:
        """run -> the method's models of it, read from the parts folder when asked for."""

        def of_run(number: int) -> list[nn.Module]:
            if isinstance(self.model, nn.Module):
                return [self.model.to(self.device).eval()]
            run = Run(method.share, number, (), False)
            run_seed = self.run_seed(run)
            return [
                _filled(self.build(run_seed), self.parts, run, epoch).to(self.device).eval()
                for epoch in self.moments(method)
            ]

        return of_run

    def run_seed(self, run: Run) -> int:
        """Seed of a run: its start, and its order of samples."""
        return stream_seed(self.seed, _MODEL, round(1000 * run.share), run.number)


def train_run(recipe: Recipe, number: int, progress: Progress | None = None) -> float:
    """Train the number-th model and keep what methods want of it; returns processor seconds."""
    _check_folder(recipe)
    run = recipe.all_runs[number]
    done = recipe.parts.load(f"{run.name}/done.pt")
    if done is None:
        with computing(recipe.threads):
            done = {"seconds": _train(recipe, run, progress)}
        recipe.parts.save(f"{run.name}/done.pt", done)
        (recipe.parts.path / run.name / "training.pt").unlink(missing_ok=True)
    return float(done["seconds"])


class Opened:
    """What the shards of a recipe have in common, read from its folder once for many of them.

    Models used last stay on the device, OPEN_BYTES of them; those in use stay in any case.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._models: OrderedDict[tuple[object, ...], Sequence[nn.Module]] = OrderedDict()
        self._prepared: dict[str, Any] = {}

    def models(self, method: Method) -> Callable[[int], Sequence[nn.Module]]:
        """As `Recipe.models`."""
        read, moments = self._recipe.models(method), self._recipe.moments(method)

        def of_run(number: int) -> Sequence[nn.Module]:
            key = method.share, number, moments
            if key not in self._models:
                self._models[key] = read(number)
                while len(self._models) > 1 and self._num_bytes() > OPEN_BYTES:
                    self._models.popitem(last=False)
            self._models.move_to_end(key)
            return self._models[key]

        return of_run

    def prepared(self, name: str) -> Any:
        """What a method prepared; None for one that prepares nothing."""
        if self._recipe.methods[name].prepare is None:
            return None
        if name not in self._prepared:
            self._prepared[name] = (self._recipe.parts.load(f"{name}.pt") or {"value": None})[
                "value"
            ]
        return self._prepared[name]

    def _num_bytes(self) -> int:
        models = chain.from_iterable(self._models.values())
        tensors = chain.from_iterable(model.state_dict().values() for model in models)
        return sum(tensor.nbytes for tensor in tensors)


def observe_shard(recipe: Recipe, number: int, opened: Opened | None = None) -> float:
    """Observe the number-th shard for all methods; returns processor seconds.

    Args:
        opened: of the same recipe; shards that are given one read models once.
    """
    opened = Opened(recipe) if opened is None else opened
    _check_folder(recipe)
    if recipe.parts.has_shard(number):
        return 0.0
    started = time.process_time()
    start = number * recipe.shard_size
    rows = torch.arange(start, min(start + recipe.shard_size, len(recipe.samples)))
    columns = {"id": recipe.samples.ids[rows]}
    with computing(recipe.threads):
        for name, method in recipe.methods.items():
            if method.observe is None:
                continue
            shard = Shard(
                samples=recipe.samples,
                task=recipe.task,
                rows=rows,
                device=torch.device(recipe.device),
                num_runs=recipe.num_runs(method),
                models=opened.models(method),
                in_subset=partial(_in_subset, recipe, method, rows),
                prepared=opened.prepared(name),
            )
            wanted = (
                recipe.options[name] if method.finish is None and method.prepare is None else {}
            )
            columns[name] = method.observe(shard, **wanted).detach().cpu()
    recipe.parts.save_shard(number, columns)
    return time.process_time() - started


def whole(recipe: Recipe, name: str, *, observed: Tensor | None = None) -> Whole:
    """What a method's prepare and finish get to see."""
    method = recipe.methods[name]
    recorders = []
    for number in range(recipe.num_runs(method) if method.records else 0):
        run = Run(method.share, number, (), True)
        state = recipe.parts.load(f"{run.name}/recorder.pt")
        assert state is not None
        recorder = Recorder(len(recipe.samples))
        recorder.load_state_dict(state)
        recorders.append(recorder)
    return Whole(
        samples=recipe.samples,
        task=recipe.task,
        seed=recipe.method_seed(name),
        device=torch.device(recipe.device),
        observed=observed,
        recorders=recorders,
        in_subset=recipe.in_subset(method),
        models=recipe.models(method) if method.runs else None,
        rates=recipe.rates(method),
        prepared=(recipe.parts.load(f"{name}.pt") or {"value": None})["value"],
        folder=recipe.parts.path,
    )


class _Enough(Exception):  # noqa: N818 - not an error: nothing later is wanted of this run
    """Raised out of training once the last model that anybody wants has been kept."""


class _Keeper:
    """A callback that keeps models at some epochs and counts processor time."""

    def __init__(self, recipe: Recipe, run: Run, progress: Progress | None) -> None:
        self.recipe, self.run, self.progress = recipe, run, progress
        self.seconds = 0.0
        self._started = time.process_time()

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        last = self.recipe.training.epochs if self.run.records else max(self.run.epochs)
        done = epoch + 1
        if done in self.run.epochs:
            self.recipe.parts.save(_kept(self.run, done), model.state_dict())
        now = time.process_time()
        self.seconds += now - self._started
        self._started = now
        if self.progress is not None:
            self.progress(f"training {self.run.name}", done, last)
        if done == last < self.recipe.training.epochs:
            raise _Enough

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.seconds = state["seconds"]


def _train(recipe: Recipe, run: Run, progress: Progress | None) -> float:
    run_seed = recipe.run_seed(run)
    # The first optimiser of a process imports for seconds, which are no time of this training.
    torch.optim.SGD([torch.zeros(1)], lr=0.0)
    keeper = _Keeper(recipe, run, progress)
    recorder = Recorder(len(recipe.samples)) if run.records else None
    watchers: list[Callback] = [keeper] if recorder is None else [recorder, keeper]
    with suppress(_Enough):
        train(
            recipe.build(run_seed),
            recipe.samples,
            recipe.task,
            config=recipe.training,
            seed=run_seed,
            rows=recipe.rows_of(run),
            callbacks=watchers,
            checkpoint=recipe.parts.path / run.name / "training.pt",
            run=f"{recipe.parts.digest} {run.name}",
            device=recipe.device,
        )
    if recorder is not None:
        recipe.parts.save(f"{run.name}/recorder.pt", recorder.state_dict())
    return keeper.seconds


def _in_subset(recipe: Recipe, method: Method, rows: Tensor) -> Tensor:
    table = recipe.in_subset(method)
    assert table is not None, "a method that asks what models saw has a share below 1"
    return table[:, rows]


def _kept(run: Run, epoch: int) -> str:
    return f"{run.name}/epoch-{epoch:04d}.pt"


def _filled(model: nn.Module, parts: Parts, run: Run, epoch: int) -> nn.Module:
    state = parts.load(_kept(run, epoch))
    if state is None:
        raise RunError(f"{parts.path / _kept(run, epoch)} is missing; delete {parts.path}")
    model.load_state_dict(state)
    return model


def _check_folder(recipe: Recipe) -> None:
    if not (recipe.parts.path / SETTINGS).exists():
        raise RunError(
            f"this process does not see {recipe.parts.path}; with several machines, --out has to "
            "lie in a folder that all of them share"
        )
