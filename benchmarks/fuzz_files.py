"""Fuzz the files that runs leave: a damaged one must be refused, or say exactly what was written.

    python -m benchmarks.fuzz_files [--damages 10000] [--seed 0] [--quick] [--json]

Two small federated runs, set-ups, scorings, trainings and DEALRec folders that differ in their
seeds are made. Every kind of file is damaged so many times, and its folder read as the commands
read it. Anything but equal content or an error for users that names the file is a crash: it is
printed, and the exit status is 1. The damages depend on the seed alone.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prunelab
import sparsemodel
from datapruning.recommend import steps as recommend
from datapruning.recommend.histories import Histories, HistorySamples, leave_last_out
from datapruning.recommend.ragged import Ragged
from datapruning.recommend.surrogate import SurrogateConfig, train_surrogate
from datapruning.scoring.parts import SETTINGS, open_parts
from datapruning.scoring.score import _finished, processor_seconds, score, times_path
from datapruning.selection.table import ScoreTable, Subset
from datapruning.students import comparison, runner
from datapruning.students.train import ALPHA_FILE, LOGITS, _read_choice
from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS
from fedprune.local.shares import open_client
from fedprune.rounds import folder as folders
from fedprune.rounds.run import run
from fedprune.rounds.setup import NETWORK, START, TEST, TRAIN, Setup, lay_out
from prunelab.data.datasets import fingerprint, load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.pretrained import MASK_FILE
from prunelab.runs import folder as runfolder
from prunelab.training import checkpoint
from prunelab.training.loop import TrainingConfig

DAMAGES, QUICK_DAMAGES, CHUNK = 10_000, 100, 500
NUM_ITEMS = 12
SHORT = TrainingConfig(epochs=2, batch_size=32, lr=0.05)

Reader = Callable[[Path], Any]
Tally = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of file: where it lies in a world, and how it is read, from the world's folder."""

    file: str
    read: Reader


# --- two worlds of files ------------------------------------------------------------------------


def make_world(folder: Path, seed: int) -> None:
    """Every kind of file; the same seed gives the same bytes, but for times."""
    folder.mkdir(parents=True)
    config = config_of(seed)
    run(config, folder / "finished")
    shutil.copytree(folder / "finished", folder / "unfinished")
    for name in (folders.SUMMARY, folders.MODEL):
        (folder / "unfinished" / name).unlink()
    lay_out(config, folder / "setup", with_start=True)
    make_scores(folder, seed)
    make_trainings(folder, seed)
    comparison.write_cell(folder / "cell.json", f"settings {seed}", {"test_accuracy": 0.5 + seed})
    make_recommender(folder / "recommend", seed)
    make_pretrained(folder / "pretrained", seed)


@functools.cache
def config_of(seed: int) -> RunConfig:
    """A federated run of a second."""
    return RunConfig.parse(
        {
            "seed": seed,
            "data.num_train": 120,
            "data.num_test": 20,
            "data.clients": 2,
            "model.width": 4,
            "training.rounds": 2,
            "training.local_epochs": 1,
            "method.density": 0.2,
            "method.pool_size": 2,
        }
    )


def some_samples() -> ImageSamples:
    data = load_dataset("digits")
    return ImageSamples(data.train_images[:60], data.train_labels[:60])


def make_scores(folder: Path, seed: int) -> None:
    """A table with its times, a subset, and the parts of a scoring just before its end."""
    parts, kept = folder / "s.parquet.parts", folder / "parts"
    held = folder / "training.pt"

    def progress(what: str, done: int, total: int) -> None:
        if what == "training run-100-000" and done == 2:
            shutil.copy(parts / "run-100-000" / "training.pt", held)
        if what == "scoring shards" and done == total:
            shutil.copytree(parts, kept)
            shutil.move(held, kept / "run-100-000" / "training.pt")

    options = {"window": 2}
    score(
        some_samples(), method=["dual", "tracin"], out=folder / "s.parquet", seed=seed,
        training=SHORT, options=options, shard_size=40, progress=progress,
    )  # fmt: skip
    table = ScoreTable.read(folder / "s-dual.parquet")
    table.select(keep=30, policy="random", seed=seed).write(folder / "kept.parquet")


def make_trainings(folder: Path, seed: int) -> None:
    """A finished training run, and a distillation that was cut off in its last epoch."""
    data = ImageSamples.of(load_dataset("digits"))
    Subset(
        ids=data.ids[seed : seed + 100], num_samples=len(data), dataset="digits",
        fingerprint=data.fingerprint, policy="random", seed=seed,
    ).write(folder / "few.parquet")  # fmt: skip
    plain = runner.RunSettings(subset=str(folder / "few.parquet"), seed=seed, training=SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner.run(plain, folder / "trained")
        taught = dataclasses.replace(plain, teacher=str(folder / "trained"))

        def say(line: str) -> None:
            if line.startswith("epoch   2"):
                shutil.copytree(folder / "taught", folder / "training")

        runner.run(taught, folder / "taught", progress=say)


@functools.cache
def histories_of(seed: int) -> Histories:
    chance = np.random.default_rng(seed)
    rows = [chance.integers(1, NUM_ITEMS + 1, 6).tolist() for _ in range(20)]
    titles = [f"title {number} of {seed}" for number in range(NUM_ITEMS)]
    return Histories("made", torch.arange(20), *leave_last_out(Ragged.of(rows)), titles=titles)


@functools.cache
def history_samples_of(seed: int) -> HistorySamples:
    return HistorySamples(histories_of(seed))


def make_recommender(folder: Path, seed: int) -> None:
    """What `datapruning recommend` leaves."""
    histories = histories_of(seed)
    train_surrogate(histories, **surrogate_of(seed), checkpoint=folder / "surrogate.ckpt")
    influence_of(folder, seed, scores=torch.rand(len(history_samples_of(seed))).double())
    recommend.load_language("scratch:tiny", histories, base=folder / "base")


def make_pretrained(folder: Path, seed: int) -> None:
    """A pruned model of transformers; masks differ in their seeds."""
    import transformers  # noqa: PLC0415

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=12,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.BertModel(config)
    mask = sparsemodel.prune(model, density=0.5)
    mask.apply(model)
    prunelab.save_pretrained(model, folder, mask=mask)


def surrogate_of(seed: int) -> dict[str, Any]:
    return {"config": SurrogateConfig(epochs=1, negatives=None), "seed": seed}


def influence_of(folder: Path, seed: int, *, scores: torch.Tensor | None = None) -> ScoreTable:
    """The table of influence, which the second time is read."""
    histories = histories_of(seed)

    def compute() -> tuple[torch.Tensor, dict[str, Any]]:
        assert scores is not None, "the table is there, and must be read or refused"
        return scores, {}

    return recommend._once(
        folder / "influence.parquet", compute, history_samples_of(seed), histories.name,
        seed=seed, method="dealrec-influence", model="sasrec", about={"depth": 1},
    )  # fmt: skip


# --- how they are read --------------------------------------------------------------------------


def unfinished(world: Path) -> Any:
    folder = world / "unfinished"
    found = folders.read_checkpoint(folder)
    assert found is not None
    model = found.state.model
    return (
        folders.stored_config(folder).flat(), folders.read_metrics(folder), found.totals,
        found.state.memory, found.state.notes, found.metrics_bytes, model.values, model.patterns,
    )  # fmt: skip


def finished(world: Path) -> Any:
    folder = world / "finished"
    (model, metadata), summary = folders.read_model(folder), folders.read_summary(folder)
    config = folders.stored_config(folder).flat()
    metrics = folders.read_metrics(folder)
    return config, metrics, summary, dict(metadata), model.values, model.patterns


def setup_facts(world: Path) -> Any:
    return setup(world)._facts


def setup_start(world: Path) -> Any:
    return setup(world).start_state().values


def setup_test(world: Path) -> Any:
    store = setup(world).test
    assert store is not None, "of a run whose server tests"
    about = store.name, store.num_classes, store.class_names, store.task, store.preprocessing
    return store.inputs, store.targets, about


def setup_train(world: Path) -> Any:
    folder, digest = world / "setup" / TRAIN, own_config(world).digest
    return [open_client(folder, client, seed=0, made_for=digest) for client in (0, 1)]


def setup(world: Path) -> Setup:
    return Setup(own_config(world), world / "setup")


def own_config(world: Path) -> RunConfig:
    return config_of(seed_of(world))


def seed_of(world: Path) -> int:
    return int(world.name)


def table(world: Path) -> Any:
    path, own = world / "s-dual.parquet", read_notes(world)["settings"]
    (found,) = _finished({"dual": path}, own).values()
    return dataclasses.asdict(found)


def times(world: Path) -> Any:
    return processor_seconds(world / "s-dual.parquet")


def subset(world: Path) -> Any:
    """As a run that was trained on it reads it."""
    found = Subset.read(world / "few.parquet")
    stored = runner.RunSettings.read(world / "trained")
    now = dataclasses.replace(stored, kept=fingerprint(found.ids))
    runner._open(world / "trained", now, resume=True)
    return dataclasses.asdict(found)


def part(name: str) -> Reader:
    def read(world: Path) -> Any:
        return open_parts(world / "parts", read_notes(world)["parts"]).load(name)

    return read


def part_settings(world: Path) -> Any:
    return open_parts(world / "parts", read_notes(world)["parts"]).digest


def plain_checkpoint(file: str) -> Reader:
    def read(world: Path) -> Any:
        return checkpoint.load(world / file, signature=read_notes(world)["signatures"][file])

    return read


def training(world: Path) -> Any:
    folder = world / "training"
    settings, choice = runner.RunSettings.read(folder), _read_choice(folder)
    return dataclasses.asdict(settings), choice


def trained(world: Path) -> Any:
    folder = world / "trained"
    summary, lines = runfolder.read_summary(folder), runfolder.read_metrics(folder)
    return summary, lines, runner.load_model(folder).state_dict()


def cell(world: Path) -> Any:
    return comparison.read_cell(world / "cell.json", f"settings {seed_of(world)}")


def influence(world: Path) -> Any:
    return dataclasses.asdict(influence_of(world / "recommend", seed_of(world)))


def language(world: Path) -> Any:
    histories, base = histories_of(seed_of(world)), world / "recommend" / "base"
    found = recommend.load_language("scratch:tiny", histories, base=base)
    words = sorted(found.tokenizer.get_vocab().items())
    return found.model.state_dict(), words, found.settings


def pretrained_mask(world: Path) -> Any:
    found = prunelab.from_pretrained(world / "pretrained", sparse=False)
    return prunelab.pretrained_mask(world / "pretrained").digest(), found.state_dict()


PLAIN = ("parts/run-100-000/training.pt", f"training/{runner.CHECKPOINT}", f"training/{LOGITS}")
PLAIN += ("recommend/surrogate.ckpt",)
IN_PARTS = ("tracin.pt", "shard-00000.pt", "shard-00001.pt")
IN_PARTS += tuple(f"run-100-000/{name}.pt" for name in ("epoch-0001", "recorder", "done"))
STORED = ("store.json", "inputs.npy", "targets.npy", "rows.npy")
IN_BASE = ("recommend.json", "model.safetensors", "tokenizer.json", "config.json")

KINDS = [
    *(Kind(f"unfinished/{name}", unfinished) for name in ("config.toml", "metrics.jsonl")),
    Kind(f"unfinished/{folders.CHECKPOINT}", unfinished),
    *(Kind(f"finished/{name}", finished) for name in ("config.toml", "metrics.jsonl")),
    *(Kind(f"finished/{name}", finished) for name in (folders.SUMMARY, folders.MODEL)),
    Kind(f"setup/{NETWORK}", setup_facts),
    Kind(f"setup/{START}", setup_start),
    *(Kind(f"setup/{TEST}/{name}", setup_test) for name in STORED),
    *(
        Kind(f"setup/{TRAIN}/{name}", setup_train)
        for name in (*STORED, "shares.npy", "share_ends.npy")
    ),
    Kind("s-dual.parquet", table),
    Kind("s-dual.times.json", times),
    Kind("few.parquet", subset),
    Kind(f"pretrained/{MASK_FILE}", pretrained_mask),
    Kind(f"parts/{SETTINGS}", part_settings),
    *(Kind(f"parts/{name}", part(name)) for name in IN_PARTS),
    *(Kind(file, plain_checkpoint(file)) for file in PLAIN),
    # Its metrics.jsonl is written anew from the checkpoint when it is continued.
    *(Kind(f"training/{name}", training) for name in ("config.toml", ALPHA_FILE)),
    *(Kind(f"trained/{name}", trained) for name in ("config.toml", "metrics.jsonl")),
    *(Kind(f"trained/{name}", trained) for name in ("summary.json", "model.safetensors")),
    Kind("cell.json", cell),
    Kind("recommend/influence.parquet", influence),
    *(Kind(f"recommend/base/{name}", language) for name in IN_BASE),
]

NOTES = "notes.json"  # of a world: what those who read it know without its files


@functools.cache
def read_notes(world: Path) -> Any:
    return json.loads((world / NOTES).read_text())


def write_notes(world: Path) -> None:
    """Signatures and settings, from the intact files."""
    provenance = ScoreTable.read(world / "s-dual.parquet").provenance["settings"]
    stored = json.loads((world / "parts" / SETTINGS).read_text())
    settings = {key: value for key, value in stored.items() if key not in ("checksum", "of")}
    signatures = {}
    for file in PLAIN:
        content = (world / file).read_bytes().partition(b"\n")[2]
        signatures[file] = torch.load(io.BytesIO(content), weights_only=True)["signature"]
    notes = {"parts": settings, "signatures": signatures}
    notes["settings"] = {**provenance, "methods": settings["methods"]}
    for key in ("method", "options"):
        notes["settings"].pop(key)
    (world / NOTES).write_text(json.dumps(notes))
    assert times_path(world / "s-dual.parquet").exists()


def digest_of(value: Any) -> str:
    """Of anything that readers return, by every bit of its numbers."""
    sha = hashlib.sha256()
    _digest(value, sha)
    return sha.hexdigest()


def _digest(value: Any, sha: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        sha.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            sha.update(f"[{key!r}".encode())
            _digest(value[key], sha)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        sha.update(f"({len(value)}".encode())
        for entry in value:
            _digest(entry, sha)
    elif hasattr(value, "row_ptr"):
        _digest((value.shape, value.row_ptr, value.cols), sha)
    else:
        assert value is None or isinstance(value, str | int | float | bool), type(value)
        sha.update(repr(value).encode())


# --- damages ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sound:
    """What may stand in a file's place: the same file of the other world, others of its own."""

    other: bytes
    neighbours: Sequence[bytes]


def flip_bits(data: bytes, chance: random.Random, _: Sound) -> bytes:
    out = bytearray(data)
    for _number in range(chance.choice((1, 1, 2, 4))):
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def truncate(data: bytes, chance: random.Random, _: Sound) -> bytes:
    lines = [place + 1 for place, byte in enumerate(data[:4096]) if byte == 10]  # whole lines
    places = [chance.randrange(len(data)), *lines[:1], *lines[-2:]]
    return data[: chance.choice([place for place in places if place < len(data)])]


def insert(data: bytes, chance: random.Random, _: Sound) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice((1, 1, 2, 8))) + data[at:]


def zeros(data: bytes, chance: random.Random, _: Sound) -> bytes:
    """As a power cut leaves blocks that were never written."""
    at = chance.randrange(len(data))
    end = min(len(data), at + chance.choice((1, 16, 512)))
    return data[:at] + bytes(end - at) + data[end:]


def splice(data: bytes, chance: random.Random, sound: Sound) -> bytes:
    """The beginning of this file and the end of the other run's, or the other way round."""
    at = chance.randrange(len(data))
    first, second = chance.sample((data, sound.other), 2)
    return first[:at] + second[at:]


def swap(_: bytes, __: random.Random, sound: Sound) -> bytes:
    return sound.other


def other_kind(_: bytes, chance: random.Random, sound: Sound) -> bytes:
    return chance.choice(sound.neighbours)


def empty(_: bytes, chance: random.Random, __: Sound) -> bytes:
    return chance.choice((b"", b"\n", b" "))


def other_json(_: bytes, chance: random.Random, __: Sound) -> bytes:
    values: list[Any] = [None, 3, -1.5, "text", [], {}, [[]], True, {"checksum": 3}, "sha256:"]
    return json.dumps(chance.choice(values)).encode() + chance.choice((b"", b"\n"))


DAMAGE = {
    "bit flips": flip_bits,
    "truncation": truncate,
    "insertion": insert,
    "zeros": zeros,
    "splice": splice,
    "of another run": swap,
    "of another kind": other_kind,
    "empty": empty,
    "other JSON": other_json,
}


def fuzz_chunk(
    worlds: Path, number: int, *, seed: int, chunk: int, count: int
) -> tuple[Tally, list[str]]:
    """Damage one kind of file so many times; what came of it, and a report of each crash."""
    kind, tally, crashes = KINDS[number], Tally(), []
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("error")
        world = Path(temporary) / "0"
        shutil.copytree(worlds / "0", world)
        file = world / kind.file
        data, whole = file.read_bytes(), digest_of(kind.read(world))
        neighbours = [(world / other.file).read_bytes() for other in KINDS if other is not kind]
        sound = Sound((worlds / "1" / kind.file).read_bytes(), neighbours)
        chance = random.Random(f"{seed}/{kind.file}/{chunk}")
        for _ in range(count):
            name = chance.choice(list(DAMAGE))
            damaged = DAMAGE[name](data, chance, sound)
            file.write_bytes(damaged)
            outcome, report = outcome_of(kind, world, whole)
            tally[outcome] += 1
            if outcome == "crashes":
                crashes.append(f"{kind.file}, {name}: {report}")
    return tally, crashes


def outcome_of(kind: Kind, world: Path, whole: str) -> tuple[str, str]:
    """ "refused", "equal", or "crashes" with what happened."""
    try:
        found = digest_of(kind.read(world))
    except USER_ERRORS as error:
        file = world / kind.file
        if file.name in str(error) or str(file.parent) in str(error):
            return "refused", ""
        return "crashes", f"the error names no file: {error}"
    except Exception as error:
        return "crashes", f"{type(error).__name__}: {error}"
    return ("equal", "") if found == whole else ("crashes", "something else was read")


def make_worlds(folder: Path) -> None:
    """The two worlds; the files that are damaged are of the first."""
    for seed in (0, 1):
        make_world(folder / str(seed), seed)
        write_notes(folder / str(seed))


def fuzz(
    *, seed: int, damages: int, workers: int, kinds: Sequence[int] | None = None
) -> tuple[dict[str, Tally], list[str]]:
    """Damage every kind of file so many times; outcomes by file, and reports of crashes."""
    chosen = range(len(KINDS)) if kinds is None else kinds
    total = {KINDS[number].file: Tally() for number in chosen}
    crashes: list[str] = []
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as temporary,
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        worlds = Path(temporary)
        pool.submit(make_worlds, worlds).result()
        jobs = {
            pool.submit(
                fuzz_chunk,
                worlds,
                number,
                seed=seed,
                chunk=start // CHUNK,
                count=min(CHUNK, damages - start),
            ): KINDS[number].file
            for number in chosen
            for start in range(0, damages, CHUNK)
        }
        for job in concurrent.futures.as_completed(jobs):
            tally, reports = job.result()
            total[jobs[job]].update(tally)
            for report in reports:
                print(report, file=sys.stderr)
            crashes += reports
            done = sum(counts.total() for counts in total.values())
            print(f"{done:,} of {len(total) * damages:,} damages", file=sys.stderr)
    return total, crashes


def main() -> int:
    """Run the command; the exit status is 1 if a damaged file was not refused."""
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz_files", description=__doc__)
    parser.add_argument("--damages", type=int, default=DAMAGES, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_DAMAGES} of each kind")
    parser.add_argument("--json", action="store_true", help="one JSON object a kind of file")
    arguments = parser.parse_args()
    damages = QUICK_DAMAGES if arguments.quick else arguments.damages
    started = time.monotonic()
    tallies, crashes = fuzz(seed=arguments.seed, damages=damages, workers=arguments.workers)
    tallies["all"] = sum(tallies.values(), Tally())
    for file, tally in tallies.items():
        counts = {key: tally[key] for key in ("refused", "equal", "crashes")}
        if arguments.json:
            print(json.dumps({"bench": "fuzz_files", "case": file, "damages": damages, **counts}))
        else:
            print(f"{file:>32}: " + ", ".join(f"{counts[key]:,} {key}" for key in counts))
    print(f"{len(crashes)} crashes, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
