"""Training on the device alone: its own samples, a sparse model, a budget; nothing leaves it.

    python -m fedprune.device.alone JSON

is what `fedprune device run-local` turns into, so that nothing of the command line stays in memory.
An epoch is the unit: after each the checkpoint has values, momentum and what was said so far, and
what an epoch draws comes from the seed and its number. So a run that was killed and continued
ends with the bits of one that was not.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedprune.device.budget import choices, needed
from fedprune.device.home import parse_bytes
from fedprune.device.local_run import CHECKPOINT, Checkpoint, LocalRun
from fedprune.device.networks import DEFAULT, for_samples, open_program, random_state
from fedprune.errors import USER_ERRORS
from fedprune.local.data import ClientData
from fedprune.local.shares import open_client
from prunelab.data.batches import batches, num_batches
from prunelab.data.store import HEADER, IMAGE_TASK, SampleStore, open_store
from prunelab.errors import DataError, ModelError, RunError
from prunelab.pages.units import format_bytes
from prunelab.runs.children import ended_with_parent
from prunelab.runs.folder import LOCK, MODEL, SUMMARY, locked, write_file
from prunelab.runs.seeds import rng, stream_seed
from prunelab.runs.settings import OR_ELSEWHERE, differences
from sparsemodel.errors import SparseModelError
from sparsemodel.masks.schedule import cosine
from sparsemodel.runtime.memory import give_back
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.runtime.trainer import Trainer
from sparsemodel.storage.meter import peak_rss_bytes, rss_bytes
from sparsemodel.storage.sealed import sealed_json
from sparsemodel.storage.state_file import load_state, save_state

SAMPLES = "samples"  # of a run folder: the store that was made of the data
_SEED_SPLIT, _SEED_EPOCH = 1, 2


def run_local(
    given: dict[str, Any], out: Path, *, budget: int = 0, threads: int = 1, resume: bool = False
) -> dict[str, Any]:
    """Train to the end; the summary, which lies in `out` beside model.safetensors.

    Args:
        given: fields of `LocalRun`; with `resume` those that are given have to be the same.
        budget: bytes of the whole process; 0: no limit.
        resume: go on from the checkpoint in `out`.

    Raises:
        ConfigError, DataError, ModelError, RunError: it cannot be done as asked, or the budget is
            too small: says what it would need.
    """
    before = _before(out, resume=resume)
    run = LocalRun(**given) if before is None else _same(before.run, given, out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, wait=0):
        store = _samples(run, out)
        data = open_client(store.folder, 0, seed=stream_seed(_SEED_SPLIT, run.seed))
        name, program, state = _model(run, store)
        if before is not None:
            if before.data != store.digest:
                raise DataError(f"{run.data} has changed since the run began; give another --out")
            state = before.state.ordered(program.shapes())
        batch_size, recompute = _fitting(
            run if before is None else replace(run, batch_size=before.batch_size),
            data, program, state, budget=budget, threads=threads, fixed=before is not None,
        )  # fmt: skip
        mean, std = store.preprocessing.normalization(store.input_shape[0])
        trainer = Trainer(
            program, state,
            batch_size=_largest(len(data.train), batch_size), recompute=recompute,
            threads=threads, normalization=(mean.tolist(), std.tolist()),
        )  # fmt: skip
        epochs = [] if before is None else before.epochs
        if before is not None and before.momentum:
            trainer.load_momentum(before.momentum)
        del before
        for line in _train(trainer, run, data, batch_size, start=len(epochs)):
            epochs.append(line)
            print(
                f"epoch {len(epochs)}/{run.epochs}: loss {line['loss']:.4f}, accuracy "
                f"{line['accuracy']:.4f}, {line['seconds']:.1f} s", flush=True,
            )  # fmt: skip
            state, momentum = trainer.state(), trainer.momentum()
            trainer.release()  # what a file is made in takes no memory beside what a step takes
            Checkpoint(run, store.digest, batch_size, state, momentum, epochs).write(out)
        _save(out, name, run, store, state)
        from prunelab.runs.version import __version__  # noqa: PLC0415 - 4 MB, after the peak

        summary = {
            **asdict(run), "model": name, "batch_size": batch_size, "samples": len(store),
            **epochs[-1], "seconds": sum(line["seconds"] for line in epochs),
            "peak_rss_bytes": peak_rss_bytes(), "version": __version__,
        }  # fmt: skip
        write_file(out / SUMMARY, sealed_json("run-local", summary))
        (out / CHECKPOINT).unlink()
        return summary


def _before(out: Path, *, resume: bool) -> Checkpoint | None:
    """The checkpoint that is gone on from; None: a new run."""
    if (out / SUMMARY).exists():
        raise RunError(f"the run in {out} is complete: {out / MODEL}; give another --out")
    if (out / CHECKPOINT).exists():
        if resume:
            return Checkpoint.read(out)
        raise RunError(f"{out} holds a run; continue it with --resume, or give another --out")
    if resume:
        raise RunError(f"nothing to resume in {out}: it has no {CHECKPOINT}")
    others = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if others - {LOCK, SAMPLES, f"{SAMPLES}.lock"}:
        raise RunError(f"{out} is not empty and holds no run; give an empty or new folder")
    return None


def _same(run: LocalRun, given: dict[str, Any], out: Path) -> LocalRun:
    if found := differences({**asdict(run), **given}, asdict(run)):
        raise RunError(f"the run in {out} has other settings: {'; '.join(found)}; {OR_ELSEWHERE}")
    return run


def _samples(run: LocalRun, out: Path) -> SampleStore:
    """The device's samples as a store; made one in a process of its own where they are none."""
    folder = Path(run.data)
    if not (folder / HEADER).is_file():
        folder = out / SAMPLES
        if not (folder / HEADER).is_file():
            command = [sys.executable, "-m", "prunelab.data.own_store", "--", run.data, str(folder)]
            done = subprocess.run(
                ended_with_parent(*command), capture_output=True, text=True, check=False
            )
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
                raise DataError(last[0].removeprefix("error: "))
    store = open_store(folder)
    if store.task != IMAGE_TASK or store.num_classes is None or len(store.input_shape) != 3:
        raise DataError(f"{run.data}: run-local is for pictures with classes, not {store.task}")
    return store


def _model(run: LocalRun, store: SampleStore) -> tuple[str, Program, SparseState]:
    """The network for these samples: its name, its program, and what it starts from."""
    assert store.num_classes is not None, "they have classes"
    name = run.model or DEFAULT
    try:
        if not run.start:
            program = for_samples(open_program(name), store.input_shape, store.num_classes)
            return name, program, random_state(program, density=run.density, seed=run.seed)
        state, metadata = load_state(run.start)
        name = run.model or metadata.get("model", "")
        program = open_program(name)
        if program.shapes().keys() != state.values.keys():
            raise ModelError(f"{run.start} is of another network; name it by --model")
        shapes = state.shapes()  # in the file's order, and of its width
        tensors = tuple((tensor, shapes[tensor]) for tensor in program.shapes())
        program = replace(program, input_shape=store.input_shape, tensors=tensors)
    except SparseModelError as error:
        raise ModelError(f"{run.start or name}, for {run.data}: {error}") from None
    if state.patterns is None:
        raise ModelError(f"{run.start} is a dense model; run-local trains sparse ones")
    if program.classes != store.num_classes:
        raise ModelError(
            f"{run.start} tells {program.classes} classes, {run.data} has {store.num_classes}"
        )
    return name, program, state.ordered(program.shapes())


def _fitting(
    run: LocalRun,
    data: ClientData,
    program: Program,
    state: SparseState,
    *,
    budget: int,
    threads: int,
    fixed: bool,
) -> tuple[int, bool]:
    """Batch size and whether to recompute, under the budget.

    Args:
        fixed: whether the batch size has to stay: a run goes on.
    """
    if len(data.train) < 2:
        raise DataError(f"{run.data}: {len(data.train)} training sample(s); batch norm needs two")
    give_back()
    held, needs = rss_bytes(), {}
    for choice in choices(run.batch_size, recompute=False):
        if fixed and choice.batch_size != run.batch_size:
            break
        needs[choice] = need = held + needed(
            program, state,
            batch=_largest(len(data.train), choice.batch_size), recompute=choice.recompute,
            sample_bytes=data.train.inputs[:1].nbytes, threads=threads,
        )  # fmt: skip
        if not budget or need <= budget:
            print(
                f"batches of {choice.batch_size}"
                f"{', activations computed again' if choice.recompute else ''}: "
                f"{format_bytes(need)} at most", flush=True,
            )  # fmt: skip
            return choice.batch_size, choice.recompute
    least, figure = min(needs, key=lambda choice: needs[choice]), min(needs.values())
    raise RunError(
        f"the budget of {format_bytes(budget)} is too small: batches of {least.batch_size} need "
        f"{format_bytes(figure)}, {format_bytes(held)} of them before training begins"
    )


def _largest(samples: int, batch_size: int) -> int:
    """Of the batches of an epoch (`prunelab.data.batches`)."""
    count = num_batches(samples, batch_size=batch_size)
    return max(min(samples, batch_size), samples - (count - 1) * batch_size)


def _train(
    trainer: Trainer, run: LocalRun, data: ClientData, batch_size: int, *, start: int
) -> Iterator[dict[str, float]]:
    own, held_out = data.train, data.dev
    for epoch in range(start, run.epochs):
        began, loss = time.monotonic(), 0.0
        rate = run.lr * cosine(epoch, value=1.0, end=run.epochs)
        order = rng(_SEED_EPOCH, run.seed, epoch)
        for index in batches(len(own), batch_size=batch_size, rng=order):
            mean, _ = trainer.step(
                own.inputs[index], own.targets[index],
                lr=rate, momentum=run.momentum, weight_decay=run.weight_decay,
            )  # fmt: skip
            loss += mean * len(index)
        right = trainer.evaluate(held_out.inputs, held_out.targets)[1] if len(held_out) else 0
        if not math.isfinite(loss):
            raise RunError(f"epoch {epoch + 1}: training has diverged; is --lr {run.lr} too high?")
        yield {
            "loss": loss / len(own),
            "accuracy": right / max(1, len(held_out)),
            "seconds": time.monotonic() - began,
        }


def _save(out: Path, name: str, run: LocalRun, store: SampleStore, state: SparseState) -> None:
    """The model, with all that `fedprune predict` asks of its file."""
    save_state(
        out / MODEL, state,
        metadata={
            "dataset": store.name, "method": "run-local", "model": name, "seed": str(run.seed),
            "task": store.task, "num_classes": str(store.num_classes),
            "class_names": json.dumps(store.class_names),
            "input_shape": "x".join(map(str, store.input_shape)),
            "inputs": str(store.inputs.dtype), **store.preprocessing.to_metadata(),
        },
    )  # fmt: skip


def main() -> None:
    """The command; a refusal is one line."""
    asked = json.loads(sys.argv[1])
    try:
        summary = run_local(
            asked["given"], Path(asked["out"]), budget=parse_bytes(asked["budget"]),
            threads=asked["threads"], resume=asked["resume"],
        )  # fmt: skip
    except USER_ERRORS as error:
        if asked["debug"]:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"peak of its memory: {format_bytes(summary['peak_rss_bytes'])}")
    print(f"model: {Path(asked['out']) / MODEL}")


if __name__ == "__main__":
    main()
