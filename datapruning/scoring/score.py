"""Score the samples of a data set: in shards, resumable, with one method or several at once."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError, ScoreWarning
from datapruning.scoring.engines import Engine, engine_of
from datapruning.scoring.jobs import Progress, Recipe, whole
from datapruning.scoring.methods import METHODS, Method, Score, checked_options, named_methods
from datapruning.scoring.parts import Parts, open_parts
from datapruning.scoring.steps import mean_confidence
from datapruning.selection.table import OR_FORCE, ScoreTable
from prunelab.data.arrays import warn_of_gaps
from prunelab.data.datasets import DATASETS, fingerprint
from prunelab.data.given import load_sample_set
from prunelab.data.objects import as_samples
from prunelab.data.reading import Reading
from prunelab.data.reading import reading as make_reading
from prunelab.data.samples import ImageSamples, Samples
from prunelab.data.streamed import StreamedImages
from prunelab.errors import RunError
from prunelab.networks import Network, check_model
from prunelab.runs.folder import locked, write_file
from prunelab.runs.settings import differences
from prunelab.runs.temporary import temporary_folder
from prunelab.runs.threads import computing
from prunelab.runs.version import __version__
from prunelab.training.loop import TrainingConfig
from prunelab.training.precision import FLOAT32
from prunelab.training.task import Classification, Task, check_fits, make_task, task_of
from sparsemodel.extras import need
from sparsemodel.storage.sealed import checksum, read_sealed_json, sealed_json

SHARD_SIZE = 4096
EARLY_SHARE = 0.1


def score(
    data: Any,
    *,
    method: str | Method | Score | Sequence[str | Method | Score],
    model: Network = "resnet8",
    out: Path | str | None = None,
    reading: Reading | Mapping[str, Any] | None = None,
    task: Task | None = None,
    training: TrainingConfig | None = None,
    seed: int = 0,
    density: float | None = None,
    check: bool = False,
    runs: int | None = None,
    early: int | None = None,
    options: Mapping[str, Any] | None = None,
    engine: str | Engine = "inline",
    device: str = "cpu",
    threads: int = 1,
    shard_size: int = SHARD_SIZE,
    force: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Score every sample of the training side; high means keep.

    Killed and started again with the same arguments, it goes on where it was and ends with the
    same bits: unfinished work lies in a folder beside `out`, with `.parts` behind its name.

    Args:
        data: what `as_samples` takes: a data set's name, a folder of parquet files, arrays
            (images, labels), a torch or Hugging Face data set, or samples, such as `stream` makes
            of files that do not fit into memory.
        method: a name in METHODS, a `Method`, or a function (logits, labels) -> scores of a
            trained model; or several, which then share the models they can.
        model: a name, "module:function", or a function that makes an untrained model (see
            `build_model`); or a trained model, which is scored with as it is (for methods that
            need one model and no record of its training).
        out: parquet file of the table; with several methods NAME.parquet becomes
            NAME-METHOD.parquet. None: nothing is left on disk, and nothing can be resumed.
        reading: how data of a name, folder or file are taken: what `prunelab.data.reading.reading`
            takes, such as {"columns": "label=kind", "resize": 32, "test_share": 0.2}.
        task: None: what the samples are for.
        training: of each model; None: TrainingConfig().
        density: train and score with a sparse model that keeps this share of its weights.
        check: with `density`, score with the dense model as well, beside `out` as
            NAME.dense.parquet; reports then compare the two.
        runs: models for each method that trains several, in place of the method's own number.
        early: epochs after which "early" scores look; None: a tenth of the epochs.
        options: of the methods, such as {"window": 5}; each goes to the methods that have it.
        engine: "inline", or "ray": models and shards go to the workers of a Ray cluster; or an
            `Engine`.
        threads: of torch, for each job; the bits depend on it.
        shard_size: samples of a part.
        force: start anew and overwrite what is there, tables and parts; False: what is there is
            gone on with, and refused where it is of other settings.
        progress: called with (what, done, total).

    Returns:
        A ScoreTable; of several methods a dict of them.

    Raises:
        ScoreError: an unknown method or option, or data that a method cannot score.
        ModelError: a model that cannot be made, or that does not fit the data.
        RunError: parts or a table of other settings are in the way.

    Warns:
        ScoreWarning: scores that are NaN or all equal; the table is written all the same.

    >>> table = score("digits", method="random")
    >>> len(table), table.method
    (1437, 'random')
    """
    methods = named_methods(method)
    names = list(methods)
    if isinstance(reading, Mapping):
        reading = make_reading(**reading)
    samples, dataset, source = _samples(data, reading)
    task, training = task or make_task(task_of(samples)), training or TrainingConfig()
    settings = _settings(
        methods, samples, task, model,
        training=training, seed=seed, density=density, runs=runs,
        early=early, options=options or {}, device=device, threads=threads,
    )  # fmt: skip
    runner = engine_of(engine)
    paths = table_paths(out, names)
    if force and out is not None:
        _discard(Path(out), names)
    tables = _finished(paths, settings)
    if len(tables) < len(names):
        with ExitStack() as stack:
            folder = _parts_folder(out, stack)
            parts = open_parts(folder, {**settings, "shard_size": shard_size})
            try:
                stack.enter_context(locked(folder))
            except RunError:
                # Who held the lock may have come to its end, and have taken the folder with it.
                tables = _finished(paths, settings)
                if len(tables) < len(names):
                    raise
            else:
                stack.enter_context(runner)
                recipe = Recipe(
                    parts=parts, samples=samples, task=task, model=model,
                    training=training, seed=seed, density=density,
                    device=device, threads=threads, methods=methods, options=settings["methods"],
                    runs=runs, early=settings["early"], shard_size=shard_size,
                )  # fmt: skip
                _check_model(recipe)
                scores, seconds = _computed(recipe, runner, progress)
                tables = {
                    name: _table(
                        name,
                        scores[name],
                        recipe,
                        settings,
                        dataset=dataset,
                        source=source,
                        reading=reading,
                    )
                    for name in names
                }
                _keep(tables, paths, seconds, parts)
    if density is not None and check:
        again = [m if m.name else name for name, m in methods.items()]
        _check_dense(
            data, again, model=model, out=out, reading=reading, task=task, training=training,
            seed=seed, runs=runs, early=early, options=options, engine=engine, device=device,
            threads=threads, shard_size=shard_size, force=force, progress=progress,
        )  # fmt: skip
    return (
        tables if isinstance(method, Sequence) and not isinstance(method, str) else tables[names[0]]
    )


def dense_path(path: Path) -> Path:
    """Where the dense model's table stands beside a sparse proxy's."""
    return path.with_name(f"{path.stem}.dense{path.suffix}")


def times_path(path: Path) -> Path:
    """Where a table's processor times stand: beside it, so that its own bytes repeat."""
    return path.with_name(f"{path.stem}.times.json")


def _discard(out: Path, names: Sequence[str]) -> None:
    """Remove what `score` left for these methods, finished or not, tables of dense models too.

    Raises:
        RunError: another process is at work on them.
    """
    for path in (out, dense_path(out)):
        parts = _parts_of(path)
        if parts.is_dir():
            with locked(parts, wait=0):
                shutil.rmtree(parts)
        for table in table_paths(path, names).values():
            table.unlink(missing_ok=True)
            times_path(table).unlink(missing_ok=True)


def noted_times(path: Path) -> dict[str, Any] | None:
    """What stands beside a table: processor_seconds, and the methods that shared them.

    None where nobody noted it.

    Raises:
        ScoreError: the note is damaged, or of another table.
    """
    times = times_path(path)
    try:
        values: dict[str, Any] = read_sealed_json(
            times, of=_times_of(path), error=ScoreError, cure="delete it"
        )
    except FileNotFoundError:
        return None
    return values


def processor_seconds(path: Path) -> float | None:
    """The processor time that the scores of a table took; None where nobody noted it."""
    times = noted_times(path)
    return None if times is None else float(times["processor_seconds"])


def _times_of(path: Path) -> str:
    """A table's times belong to its bytes."""
    return f"times of {checksum(path.read_bytes())}"


def _check_dense(
    data: Any, methods: Sequence[str | Method], *, out: Path | str | None, **settings: Any
) -> None:
    if out is None:
        raise ScoreError("check writes the dense model's table beside out; give out")
    score(data, method=methods, out=dense_path(Path(out)), **settings)


def _samples(data: Any, reading: Reading | None) -> tuple[Samples, str, str | dict[str, Any]]:
    """Samples, the data set's name, and what to load it by ("" for samples of the caller's)."""
    if not isinstance(data, str | Path):
        samples = as_samples(data)
        if isinstance(samples, ImageSamples | StreamedImages):
            warn_of_gaps(samples.labels)
        if isinstance(samples, StreamedImages):
            return samples, samples.name, samples.opened_with
        return samples, type(data).__name__, ""
    # Nothing is tested here, so that ids are the rows of a file.
    dataset = load_sample_set(str(data), how=reading or Reading(test_share=0))
    is_path = Path(data).exists() and str(data) not in DATASETS
    return dataset.train, dataset.name, str(Path(data).resolve() if is_path else data)


def _settings(
    methods: Mapping[str, Method],
    samples: Samples,
    task: Task,
    model: Network,
    *,
    training: TrainingConfig,
    seed: int,
    density: float | None,
    runs: int | None,
    early: int | None,
    options: Mapping[str, Any],
    device: str,
    threads: int,
) -> dict[str, Any]:
    """All that decides a bit of a score, checked, as JSON holds it."""
    given = _options_of(methods, options)
    if isinstance(model, str):
        check_model(model)
    if training.steps is not None:
        raise ScoreError("scores are taken after epochs; give training.epochs, not steps")
    for name, number in (("runs", runs), ("early", early), ("threads", threads)):
        if number is not None and number < 1:
            raise ScoreError(f"{name} must be at least 1, got {number}")
    if density is not None and not 0 < density <= 1:
        raise ScoreError(f"density must be in (0, 1], got {density}")
    if density is not None and training.precision != FLOAT32:
        raise ScoreError(
            f"a sparse proxy is trained in {FLOAT32}; leave out the density, or the precision "
            f"{training.precision}"
        )
    for name, method in methods.items():
        _check_fits(name, method, samples, task, is_trained=isinstance(model, nn.Module))
    settings = {
        "fingerprint": samples.fingerprint,
        "methods": given,
        "model": _model_name(model),
        "task": type(task).__name__,
        "training": training.signature(),
        "seed": seed,
        "density": density,
        "runs": runs,
        "early": early or max(1, round(EARLY_SHARE * training.epochs)),
        "device": device,
        "threads": threads,
        "torch": torch.__version__,
    }
    layer = getattr(task, "layer", None)
    if layer is not None:
        settings["layer"] = layer
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _options_of(
    methods: Mapping[str, Method], options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Each method's options; one that no method has is an error."""
    unclaimed = set(options)
    result = {}
    for name, method in methods.items():
        own = {k: v for k, v in options.items() if k in method.options}
        result[name] = checked_options(name, method, own)
        unclaimed -= set(own)
    for key in sorted(unclaimed):
        first, method = next(iter(methods.items()))
        checked_options(first, method, {key: options[key]})  # raises, naming what there is
    return result


def _check_fits(
    name: str, method: Method, samples: Samples, task: Task, *, is_trained: bool
) -> None:
    if method.classes and (not isinstance(task, Classification) or samples.labels is None):
        raise ScoreError(
            f"method {name!r} is for samples with classes, and {type(task).__name__} or the "
            "samples have none; without classes there are: "
            + ", ".join(n for n, m in METHODS.items() if not m.classes)
        )
    if is_trained and (method.records or method.runs > 1 or method.moments == "spread"):
        raise ScoreError(
            f"method {name!r} trains models of its own; give a model's name or a function "
            "seed -> model, not a trained model"
        )
    if method.package:
        need(method.package, f"method {name!r}")


def _check_model(recipe: Recipe) -> None:
    """Raise ModelError if the model does not fit the data; of those to be made, the first is."""
    model = recipe.model
    if not isinstance(model, nn.Module):
        if not recipe.all_runs:
            return
        model = replace(recipe, density=None).build(recipe.run_seed(recipe.all_runs[0]))
    check_fits(recipe.task, model, recipe.samples, num_classes=None)


def _model_name(model: Network) -> str:
    if isinstance(model, str):
        return model
    if not isinstance(model, nn.Module):
        return str(getattr(model, "__qualname__", type(model).__qualname__))
    return f"{type(model).__name__} {fingerprint(*model.state_dict().values())}"


def table_paths(out: Path | str | None, names: Sequence[str]) -> dict[str, Path]:
    """Where `score` writes the table of each method; nowhere for None."""
    if out is None:
        return {}
    path = Path(out)
    if path.is_dir():
        raise ScoreError(f"{path} is a folder; give the name of a parquet file")
    if len(names) == 1:
        return {names[0]: path}
    return {name: path.with_name(f"{path.stem}-{name}{path.suffix}") for name in names}


def _finished(paths: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, ScoreTable]:
    """Tables that are there already; refused if they are of other settings."""
    found = {}
    for name, path in paths.items():
        if path.exists():
            table = ScoreTable.read(path)
            changed = differences(_of_method(settings, name), table.provenance.get("settings", {}))
            if changed:
                raise RunError(
                    f"{path} holds scores of other settings: {'; '.join(changed)}; {OR_FORCE}"
                )
            found[name] = table
    return found


def _of_method(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of one of several methods: its table does not know of the others."""
    own = {key: value for key, value in settings.items() if key != "methods"}
    return {**own, "method": name, "options": settings["methods"][name]}


def _parts_folder(out: Path | str | None, stack: ExitStack) -> Path:
    if out is None:
        return stack.enter_context(temporary_folder()) / "parts"
    return _parts_of(Path(out))


def _parts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _computed(
    recipe: Recipe, runner: Engine, progress: Progress | None
) -> tuple[dict[str, Tensor], float]:
    """Scores of each method, and the processor seconds they took.

    1. Train. 2. Prepare. 3. Observe the shards. 4. Finish.
    """
    seconds = runner.train(recipe, progress)
    started = time.process_time()
    with computing(recipe.threads):
        for name, options in recipe.options.items():
            prepare = recipe.methods[name].prepare
            if prepare is not None and recipe.parts.load(f"{name}.pt") is None:
                if progress is not None:
                    progress(f"preparing {name}", 0, 1)
                recipe.parts.save(f"{name}.pt", {"value": prepare(whole(recipe, name), **options)})
    seconds += time.process_time() - started
    observed: dict[str, Tensor] = {}
    if any(method.observe for method in recipe.methods.values()):
        seconds += runner.observe(recipe, progress)
        observed = _merged(recipe)
    started = time.process_time()
    scores = {}
    with computing(recipe.threads):
        for name, options in recipe.options.items():
            finish = recipe.methods[name].finish
            if finish is None:
                scores[name] = observed[name]
            else:
                seen = whole(recipe, name, observed=observed.get(name))
                scores[name] = finish(seen, **options)
    return scores, seconds + time.process_time() - started


def _table(
    name: str,
    scores: Tensor,
    recipe: Recipe,
    settings: Mapping[str, Any],
    *,
    dataset: str,
    source: str | dict[str, Any],
    reading: Reading | None,
) -> ScoreTable:
    scores, confidence = scores.double().cpu(), None
    if recipe.methods[name].records:
        confidence = mean_confidence(whole(recipe, name).recorders, **settings["methods"][name])
    return ScoreTable(
        ids=recipe.samples.ids,
        scores=scores,
        method=name,
        dataset=dataset,
        fingerprint=recipe.samples.fingerprint,
        seed=recipe.seed,
        model=str(settings["model"]) if recipe.methods[name].runs else "",
        labels=recipe.samples.labels,
        provenance={
            "settings": _of_method(settings, name),
            "source": source,
            **({} if reading is None else {"reading": reading.to_dict()}),
            "notes": notes_on(name, recipe.samples.ids, scores),
            "version": __version__,
        },
        confidence=confidence,
    )


def _merged(recipe: Recipe) -> dict[str, Tensor]:
    """The observations of all shards, rows in order."""
    shards = [recipe.parts.load_shard(number) for number in range(recipe.num_shards)]
    merged = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    assert torch.equal(merged.pop("id"), recipe.samples.ids)
    return merged


def notes_on(name: str, ids: Tensor, scores: Tensor, *, stacklevel: int = 5) -> list[str]:
    """Sentences on scores that no selection will take; each is also a warning."""
    notes = []
    missing = ids[~scores.isfinite()]
    if len(missing):
        first = ", ".join(map(str, missing[:5].tolist()))
        notes.append(
            f"{name}: {len(missing)} of {len(ids)} scores are not finite (ids {first}"
            f"{', ...' if len(missing) > 5 else ''}); they cannot be selected by"
        )
    elif len(ids) > 1 and bool((scores == scores[0]).all()):
        notes.append(
            f"{name}: all {len(ids)} scores are {float(scores[0]):g} (ids {int(ids[0])} ... "
            f"{int(ids[-1])}); they say nothing"
        )
    for note in notes:
        warnings.warn(note, ScoreWarning, stacklevel=stacklevel)
    return notes


def _keep(
    tables: Mapping[str, ScoreTable], paths: Mapping[str, Path], seconds: float, parts: Parts
) -> None:
    """Write the tables and their times, then remove the parts."""
    for name, path in paths.items():
        tables[name].write(path)
        times = {"processor_seconds": seconds, "methods": list(tables)}
        write_file(times_path(path), sealed_json(_times_of(path), times))
    if paths:
        parts.remove()
