"""Ways of pruning a language model in one shot, by perplexity, and beside what says nothing.

    python -m simulations.prune_language_model --model FOLDER --data TEXT [--test TEXT]

Every way (language_ways.py) prunes the same model to the same densities and N:M patterns, by the
same sequences for calibration, of which there are several draws. Test sequences are the text's last
tenth, or another text, and choose nothing. What perplexity hides (prunelab.language.tasks) is asked
on the first draw. Every run leaves its outcome in a file; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.language.models import read_model, read_tokenizer
from prunelab.language.perplexity import perplexity
from prunelab.language.tasks import (
    Facts,
    Planted,
    agreeing,
    choices,
    facts,
    planted,
    retrieval,
)
from prunelab.language.text import both_sides, drawn, in_batches, read_text
from simulations.archive import add_archive_argument, archived
from simulations.jobs import (
    FINISHED,
    Outcome,
    check_settings,
    parsed,
    read_outcome,
    run_jobs,
    workers_of,
)
from simulations.language_ways import NOT_IN_GROUPS, UNITS, WEIGHTS, Task
from simulations.page import commits_of, page, publish, table, without_paths
from simulations.statistics import told_ratio, told_values
from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.masks.distribution import n_of_m

REFUSED = "refused"
PATTERNS = ("0.7", "0.5", "0.3", "2:4", "4:8")
"""Densities of weights, ranked within rows, and groups."""
SHARES = ("0.9", "0.8", "0.5")
"""Densities of heads and channels."""
CONTROL, UNIT_CONTROL = "magnitude", "units, magnitude"
EVERY_WAY = (*WEIGHTS, *UNITS)
ASKED, PLANTED = 32, 32
"""Test sequences of which more is asked than perplexity, and tokens of one with a planted pair."""


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        model, data, test: as `fedprune prune` takes them.
        samples: sequences for calibration; tested: for testing, at most; of `length` tokens.
        steps: of training for each block, where a way trains.
    """

    model: str
    data: str
    test: str
    samples: int
    tested: int
    length: int
    steps: int


@cache
def sides(setting: Setting) -> tuple[Tensor, Tensor]:
    """Sequences for calibration and for testing."""
    tokenizer = read_tokenizer(setting.model)
    texts = read_text(setting.data), read_text(setting.test) if setting.test else ""
    pool, test = both_sides(*texts, tokenizer, length=setting.length)
    return pool, test[: setting.tested]


@dataclass(frozen=True)
class Questions:
    """What perplexity hides, asked of every model on the same sequences.

    Attributes:
        known: rare tokens of which the model before pruning is sure.
        pairs: planted in sequences.
        chosen: sequences on which two models are compared.
        said: what the model before pruning chooses there.
    """

    known: Facts
    pairs: Planted
    chosen: Tensor
    said: Tensor

    def answers(self, model: nn.Module) -> dict[str, float]:
        """A model's: shares, and ranks of the token that was planted."""
        found, said = retrieval(model, self.pairs), choices(model, self.chosen)
        return {
            "facts": self.known.kept_by(said),
            "rank": found.planted.rank,
            "without the pair": found.without.rank,
            "agreement": agreeing(said, self.said),
        }


@cache
def questions(setting: Setting) -> Questions:
    """Of test sequences; facts are counted as rare over the text for calibration."""
    pool, test = sides(setting)
    dense, chosen = read_model(setting.model), test[:ASKED]
    known = facts(dense, chosen, reference=pool)
    pairs = planted(chosen[:, :PLANTED], seed=0)
    return Questions(known, pairs, chosen, choices(dense, chosen))


@dataclass(frozen=True)
class PruneJob:
    """One run: a way, a density or pattern, a draw of sequences. No way: the dense model."""

    setting: Setting
    way: str = ""
    pattern: str = ""
    draw: int = 0

    @property
    def name(self) -> str:
        """Of its outcome."""
        if not self.way:
            return "dense"
        words = f"{self.way}-{self.pattern}-{self.draw}"
        return words.replace(", ", "-").replace(" ", "_").replace(":", "of")

    def run(self, out: Path) -> Outcome:
        """Prune and measure."""
        del out
        pool, test = sides(self.setting)
        model = read_model(self.setting.model)
        values: dict[str, Any] = {}
        if self.way:
            groups = n_of_m(self.pattern)
            density = groups[0] / groups[1] if groups else float(self.pattern)
            calibration = in_batches(drawn(pool, self.setting.samples, seed=self.draw))
            within = self.pattern if groups else "row"
            task = Task(calibration, density, within, self.draw, self.setting.steps)
            started = time.process_time()
            try:
                mask = {**WEIGHTS, **UNITS}[self.way](model, task)
            except MaskError as error:  # rows that do not divide into groups
                return Outcome(REFUSED, reason=str(error))
            values = {"density": mask.density, "processor_seconds": time.process_time() - started}
        if self.draw == 0:
            values["answers"] = questions(self.setting).answers(model)
        return Outcome(FINISHED, values={"perplexity": perplexity(model, test), **values})


def jobs_of(
    setting: Setting,
    patterns: Sequence[str],
    shares: Sequence[str],
    draws: Sequence[int],
    ways: Collection[str] = EVERY_WAY,
) -> list[PruneJob]:
    """The dense model, then draw by draw those ways at every pattern that they can."""
    jobs = []
    for draw in draws:
        jobs += [
            PruneJob(setting, way, pattern, draw)
            for pattern in patterns
            for way in WEIGHTS
            if way in ways and (n_of_m(pattern) is None or way not in NOT_IN_GROUPS)
        ]
        jobs += [
            PruneJob(setting, way, share, draw) for share in shares for way in UNITS if way in ways
        ]
    return [PruneJob(setting), *jobs]


def body(jobs: Sequence[PruneJob], found: Mapping[str, Outcome]) -> list[str]:
    """The tables: perplexities, what is told apart from magnitude, time."""
    ended = {job: found[job.name] for job in jobs if job.name in found}
    done = {job: one.values for job, one in ended.items() if one.status == FINISHED}
    dense = [value["perplexity"] for job, value in done.items() if not job.way]
    lines = [f"The dense model's perplexity is {dense[0]:.2f}."] if dense else []
    refused = {one.reason for one in found.values() if one.status == REFUSED}
    lines += [f"\nRefused: {reason}." for reason in sorted(refused)]
    for title, ways, control in (
        ("Weights", WEIGHTS, CONTROL), ("Heads and channels", UNITS, UNIT_CONTROL),
    ):  # fmt: skip
        own = {job: value for job, value in done.items() if job.way in ways}
        present = [way for way in ways if any(job.way == way for job in ended)]
        patterns = list(dict.fromkeys(job.pattern for job in ended if job.way in ways))
        if present:
            lines += _tables(title, own, present, patterns, control)
    return [*lines, *_hidden(done)]


def _hidden(done: Mapping[PruneJob, Mapping[str, Any]]) -> list[str]:
    """The table of what perplexity hides."""
    asked = {job: value for job, value in done.items() if "answers" in value}
    if not asked:
        return []
    names = list(dict.fromkeys(name for value in asked.values() for name in value["answers"]))
    rows = [
        [job.way or "dense", job.pattern or "1", told_values([value["perplexity"]], ".2f")]
        + [_answer(value["answers"][name]) for name in names]
        for job, value in sorted(asked.items(), key=lambda item: item[1]["perplexity"])
    ]
    return [
        "", "## What perplexity hides", "",
        "On the first draw, by perplexity. Facts: rare tokens of which the dense model is more "
        "than half sure; the share that is still chosen. Rank: a random pair of tokens at the "
        f"start of a sequence of {PLANTED}, its first token again at the end; the place of the "
        "second among all tokens there, the median over sequences, and without the pair. "
        "Agreement: the share of tokens where the dense model chooses the same.", "",
        table(["way", "kept", "perplexity", *names], rows, words=(0, 1)),
    ]  # fmt: skip


def _answer(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:,.0f}"


def _tables(
    title: str,
    done: Mapping[PruneJob, Mapping[str, Any]],
    ways: Sequence[str],
    patterns: Sequence[str],
    control: str,
) -> list[str]:
    values: dict[tuple[str, str], dict[int, float]] = {}
    for job, value in done.items():
        values.setdefault((job.way, job.pattern), {})[job.draw] = value["perplexity"]
    rows, against = [], []
    for way in ways:
        spent = [value["processor_seconds"] for job, value in done.items() if job.way == way]
        cells = [_told(list(values.get((way, pattern), {}).values())) for pattern in patterns]
        rows.append([way, *cells, f"{statistics.mean(spent):.1f}" if spent else "-"])
        if way != control:
            pairs = [(values.get((way, p), {}), values.get((control, p), {})) for p in patterns]
            against.append([way, *(told_ratio(*pair, ".2f") for pair in pairs)])
    return [
        "", f"## {title}", "",
        "Perplexity at each density or pattern, and seconds of processor time for a pruning.", "",
        table(["way", *patterns, "s"], rows), "",
        f"The natural logarithm of the perplexity over that of `{control}`, paired by draws, with "
        "its 95 % interval; below zero is better.", "",
        table(["way", *patterns], against),
    ]  # fmt: skip


def _told(values: Sequence[float]) -> str:
    is_small = not values or statistics.mean(values) < 1000
    return told_values(values, ".2f" if is_small else ",.0f")


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[PruneJob], Path]:
    """The command line, its runs, and where they go.

    Raises:
        SystemExit: it asks for what cannot be; nothing has been run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m simulations.prune_language_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, or a hub's name")
    parser.add_argument("--data", required=True, help="a text; its last tenth is for testing")
    parser.add_argument("--test", default="", help="another text for testing")
    parser.add_argument("--title", default="", help="what the page calls the model")
    parser.add_argument("--patterns", default=",".join(PATTERNS), help="densities, or such as 2:4")
    parser.add_argument("--shares", default=",".join(SHARES), help="of heads and channels")
    parser.add_argument("--draws", type=int, default=3, help="of sequences for calibration")
    parser.add_argument("--samples", type=int, default=128, help="sequences for calibration")
    parser.add_argument("--tested", type=int, default=64, help="sequences for testing, at most")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=200, help="of training a block, for PERP")
    parser.add_argument(
        "--way",
        action="append",
        choices=EVERY_WAY,
        metavar="NAME",
        help=f"one of those to run; default all: {'; '.join(EVERY_WAY)}",
    )
    parser.add_argument("--out", type=Path, help="where runs go; default runs/NAME-MODEL")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    add_archive_argument(parser)
    given = parsed(parser, words)
    given.title = given.title or Path(given.model).name
    setting = Setting(
        given.model, given.data, given.test, given.samples, given.tested, given.length,
        given.steps,
    )  # fmt: skip
    out = given.out or Path("runs") / f"prune_language_model-{given.title}"
    patterns, shares = given.patterns.split(","), given.shares.split(",")
    try:
        for pattern in (*patterns, *shares):
            if n_of_m(pattern) is None and not 0 < float(pattern) <= 1:
                raise ValueError(f"{pattern}: a density is in (0, 1]")
        sides(setting)
        check_settings(out, asdict(setting))
    except (PrunelabError, SparseModelError, ValueError) as error:
        parser.error(str(error))
    ways = given.way or EVERY_WAY
    return given, jobs_of(setting, patterns, shares, range(given.draws), ways), out


def main() -> None:
    """Run what is missing and write the page."""
    given, jobs, out = parse()
    setting = asdict(jobs[0].setting)
    with archived(given.archive, out, setting):
        if given.table_only:
            found = {job.name: one for job in jobs if (one := read_outcome(job.name, out))}
        else:
            with workers_of(given, on_gpus=False) as workers:
                found = run_jobs(jobs, out, workers)
    text = page(
        f"Pruning {given.title} in one shot",
        command=f"python -m simulations.prune_language_model --model {given.title} --data TEXT "
        f"{'--test TEXT ' * bool(given.test)}--samples {given.samples} --tested {given.tested} "
        f"--length {given.length} --steps {given.steps} "
        f"--patterns {given.patterns} --shares {given.shares}",
        at=commits_of(found.values()),
        notes=[
            f"mean ± sample standard deviation over {given.draws} draws of sequences for "
            "calibration; what needs none does not vary, and a single number is of one draw",
            "densities are those of every linear layer of the blocks, ranked within rows but where "
            "all layers are said; embeddings, norms and the output layer are whole",
            "test sequences choose nothing",
        ],
        body=body(jobs, found),
        settings=without_paths(setting),
    )
    publish(text, out / "table.md", found.values())


if __name__ == "__main__":
    main()
