"""Ways of pruning a language model in one shot, by perplexity, and beside what says nothing.

    python -m simulations.prune_language_model --model FOLDER --data TEXT [--test TEXT]

Every way prunes the same model to the same densities and N:M patterns, by the same sequences for
calibration, of which there are several draws. Test sequences are the text's last tenth, or another
text, and choose nothing. Every run leaves its outcome in a file; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.language.models import read_model
from prunelab.language.perplexity import perplexity
from prunelab.language.text import drawn, in_batches, parted, read_text, sequences
from simulations.jobs import FAILED, FINISHED, Outcome, check_settings, parsed, run_jobs, workers_of
from simulations.page import page, table
from simulations.statistics import interval
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.errors import SparseModelError
from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.calibrated import CALIBRATED, needs_of, wanda
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune
from sparsemodel.masks.structure import n_of_m

Batches = list[dict[str, Tensor]]
Way = Callable[[nn.Module, Batches, float, str, int], Mask]
"""(model, batches, density, "row" or such as "2:4", seed) prunes the model."""

PATTERNS = ("0.7", "0.5", "0.3", "2:4", "4:8")
"""Densities, ranked within rows, and groups."""
BATCH = 8


def _by_blocks(criterion: str) -> Way:
    def prune_it(
        model: nn.Module, batches: Batches, density: float, within: str, seed: int
    ) -> Mask:
        return prune_blocks(
            model, density, batches, criterion=criterion, within=within, seed=seed
        )  # fmt: skip

    return prune_it


def _reversed(model: nn.Module, batches: Batches, density: float, within: str, seed: int) -> Mask:
    """Wanda's order from behind: what it calls important goes first."""
    from sparsemodel.calibration.blocks import by_blocks  # noqa: PLC0415

    patterns, weights = {}, block_weights(model)

    def cut(block: str, found: Calibration) -> None:
        def score(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
            return {name: -each for name, each in wanda(model, names, found).items()}

        mask = prune(model, density, criterion=score, within=within, names=weights[block])
        mask.apply(model)
        patterns.update({name: mask[name] for name in mask})

    by_blocks(model, batches, lambda block: needs_of(wanda, weights[block]), cut)
    return Mask(patterns)


def _globally(distribution: str) -> Way:
    def prune_it(
        model: nn.Module, batches: Batches, density: float, within: str, seed: int
    ) -> Mask:
        names = [name for block in block_weights(model).values() for name in block]
        mask = prune(model, density, distribution=distribution, names=names)
        mask.apply(model)
        return mask

    return prune_it


WAYS: Mapping[str, Way] = {
    "random": _by_blocks("random"),
    "wanda, reversed": _reversed,
    "magnitude": _by_blocks("magnitude"),
    **{name: _by_blocks(name) for name in CALIBRATED},
    "magnitude, all layers": _globally("global"),
    "magnitude, all layers, a minimum each": _globally("global-minimum"),
}
WHOLE = ("magnitude, all layers", "magnitude, all layers, a minimum each")
"""Ways that share weights out over layers, which groups do not allow."""


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        model, data, test: as `fedprune prune` takes them.
        samples: sequences for calibration; tested: for testing, at most; of `length` tokens.
    """

    model: str
    data: str
    test: str
    samples: int
    tested: int
    length: int


@cache
def sides(setting: Setting) -> tuple[Tensor, Tensor]:
    """Sequences for calibration and for testing."""
    _, tokenizer = read_model(setting.model)
    pool = sequences(read_text(setting.data), tokenizer, length=setting.length)
    if setting.test:
        test = sequences(read_text(setting.test), tokenizer, length=setting.length)
    else:
        pool, test = parted(pool)
    return pool, test[: setting.tested]


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
        model, _ = read_model(self.setting.model)
        values: dict[str, Any] = {}
        if self.way:
            groups = n_of_m(self.pattern)
            density = groups[0] / groups[1] if groups else float(self.pattern)
            calibration = in_batches(drawn(pool, self.setting.samples, seed=self.draw), size=BATCH)
            started = time.process_time()
            within = self.pattern if groups else "row"
            mask = WAYS[self.way](model, calibration, density, within, self.draw)
            values = {"density": mask.density, "processor_seconds": time.process_time() - started}
        return Outcome(FINISHED, values={"perplexity": perplexity(model, test), **values})


def jobs_of(setting: Setting, patterns: Sequence[str], draws: Sequence[int]) -> list[PruneJob]:
    """The dense model, then draw by draw every way at every pattern that it can."""
    jobs = [
        PruneJob(setting, way, pattern, draw)
        for draw in draws
        for pattern in patterns
        for way in WAYS
        if n_of_m(pattern) is None or way not in WHOLE
    ]
    return [PruneJob(setting), *jobs]


def body(jobs: Sequence[PruneJob], found: Mapping[str, Outcome]) -> list[str]:
    """The tables: perplexities, and what is told apart from magnitude."""
    done = {job: found[job.name].values for job in jobs if found[job.name].status == FINISHED}
    patterns = list(dict.fromkeys(job.pattern for job in done if job.way))
    values: dict[tuple[str, str], dict[int, float]] = {}
    for job, value in done.items():
        values.setdefault((job.way, job.pattern), {})[job.draw] = value["perplexity"]
    rows = []
    for way in WAYS:
        cells = [_told(list(values.get((way, pattern), {}).values())) for pattern in patterns]
        rows.append([way, *cells])
    dense = [value["perplexity"] for job, value in done.items() if not job.way]
    text = f"The dense model's perplexity is {dense[0]:.2f}." if dense else ""
    lines = ["## Perplexity", "", text, "", table(["way", *patterns], rows)]
    rows = [
        [way, *(_against(values, way, pattern) for pattern in patterns)]
        for way in WAYS
        if way != "magnitude"
    ]
    lines += [
        "", "## Against magnitude", "",
        "The natural logarithm of the perplexity over that of magnitude's mask, paired by draws, "
        "with its 95 % interval: below zero is better.", "",
        table(["way", *patterns], rows),
    ]  # fmt: skip
    spent = {
        way: [v["processor_seconds"] for job, v in done.items() if job.way == way] for way in WAYS
    }
    rows = [[way, f"{statistics.mean(each):.1f}"] for way, each in spent.items() if each]
    return [*lines, "", "## Processor time of a pruning", "", table(["way", "s"], rows)]


def _told(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "infinite"
    mean = statistics.mean(values)
    form = ".2f" if mean < 1000 else ",.0f"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean:{form}}{spread}"


def _against(values: Mapping[tuple[str, str], Mapping[int, float]], way: str, pattern: str) -> str:
    ours, theirs = values.get((way, pattern), {}), values.get(("magnitude", pattern), {})
    pairs = [
        math.log(ours[draw] / theirs[draw])
        for draw in sorted(ours.keys() & theirs.keys())
        if math.isfinite(ours[draw]) and math.isfinite(theirs[draw])
    ]
    if not pairs:
        return "-"
    one = interval(pairs)
    return f"{one.mean:+.2f}" + (f" ± {one.half:.2f}" if len(pairs) > 1 else "")


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.prune_language_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, or a hub's name")
    parser.add_argument("--data", required=True, help="a text; its last tenth is for testing")
    parser.add_argument("--test", default="", help="another text for testing")
    parser.add_argument("--title", default="", help="what the page calls the model")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--draws", type=int, default=3, help="of sequences for calibration")
    parser.add_argument("--samples", type=int, default=128, help="sequences for calibration")
    parser.add_argument("--tested", type=int, default=64, help="sequences for testing, at most")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, help="where runs go; default runs/NAME-MODEL")
    given = parsed(parser, words)
    title = given.title or Path(given.model).name
    setting = Setting(
        given.model, given.data, given.test, given.samples, given.tested, given.length
    )
    out = given.out or Path("runs") / f"prune_language_model-{title}"
    try:
        sides(setting)
        check_settings(out, asdict(setting))
        for pattern in given.patterns.split(","):
            if n_of_m(pattern) is None:
                float(pattern)
    except (PrunelabError, SparseModelError, ValueError) as error:
        parser.error(str(error))
    jobs = jobs_of(setting, given.patterns.split(","), range(given.draws))
    with workers_of(given, on_gpus=False) as workers:
        found = run_jobs(jobs, out, workers)
    shown = {name: value for name, value in asdict(setting).items() if "/" not in str(value)}
    command = f"python -m simulations.prune_language_model --model {title} --data TEXT"
    text = page(
        f"Pruning {title} in one shot",
        command=f"{command} --samples {given.samples} --length {given.length}",
        at=", ".join(sorted({one.commit for one in found.values()})),
        notes=[
            f"mean ± sample standard deviation over {given.draws} draws of sequences for "
            "calibration; magnitude needs none, so it does not vary",
            "densities are those of every linear layer of the blocks, ranked within rows; "
            "embeddings, norms and the output layer are whole",
            "test sequences choose nothing",
        ],
        body=body(jobs, found),
        settings=shown,
    )
    saved = out / "table.md"
    saved.write_text(text, encoding="utf-8")
    print(text)
    print(f"table: {saved}")
    failed = sum(one.status == FAILED for one in found.values())
    if failed:
        raise SystemExit(f"{failed} runs failed: run again, they are retried")


if __name__ == "__main__":
    main()
