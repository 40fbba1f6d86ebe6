"""Scores of sparse proxies against a dense model's: how alike, and how much cheaper.

    python -m benchmarks.proxy_scores [--quick] [--json] [--data NAME_OR_FOLDER] [--model NAME]
        [--samples N] [--epochs E] [--seeds 0,1,2] [--criteria magnitude,snip]

For each seed a dense network is trained for a few epochs and scores its training samples in eval
mode (EL2N; GraNd with --grand). A sparse proxy starts from the same weights, is pruned and
trained in the same way, and scores too. Test data are not read.

Agreement is with the dense network of the *next* seed, for proxies and dense networks alike: the
peer, dense against dense, is the ceiling that chance of initialisation and order of samples
leaves. "1 - Spearman" and "1 - overlap" (share of the kept half that differs) are means over
seeds, less is better. Times are processor time of one thread, training and scoring together, all
ways in turn for each seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, show
from benchmarks.timing import use_threads
from datapruning.scores.error import el2n
from datapruning.scores.gradient import grand
from datapruning.scoring.proxy import sparse_proxy
from datapruning.selection.agreement import agreement
from datapruning.selection.table import ScoreTable
from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig, predict, train
from prunelab.training.task import ImageClassification, to_device
from sparsemodel.kernels.cpu import library as cpu

BENCH = "proxy_scores"
DENSITIES = (0.01, 0.05, 0.1)
KEEP = 0.5
GRAND_BATCH = 64
TASK = ImageClassification()

Score = Callable[[nn.Module, ImageSamples], Tensor]
Way = tuple[str, float]
"""(criterion, density); ("dense", 1) for the dense network."""


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and for how long."""

    data: ImageSet
    model: str
    config: TrainingConfig
    criteria: Sequence[str]
    densities: Sequence[float]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Run:
    """One scoring run: its table and its seconds."""

    table: ScoreTable
    seconds: float


def score_el2n(model: nn.Module, samples: ImageSamples) -> Tensor:
    """EL2N of all samples in eval mode."""
    return el2n(*predict(model, samples, TASK))


def score_grand(model: nn.Module, samples: ImageSamples) -> Tensor:
    """GraNd of all samples in eval mode, over all parameters that the model has."""
    model.eval()
    parts = torch.arange(len(samples)).split(GRAND_BATCH)
    device = next(model.parameters()).device
    return torch.cat([grand(TASK, model, to_device(samples.batch(p), device)) for p in parts])


SCORES: Mapping[str, Score] = {"el2n": score_el2n, "grand": score_grand}


def rows(setting: Setting, scores: Sequence[str]) -> Iterator[Row]:
    """For each score, criterion and density three rows: time, rank, kept half."""
    ways: list[Way] = [("dense", 1.0)]
    ways += [(criterion, d) for criterion in setting.criteria for d in setting.densities]
    runs = {
        (way, seed): _scored(setting, way, seed, scores) for seed in setting.seeds for way in ways
    }
    following = dict(zip(setting.seeds, [*setting.seeds[1:], setting.seeds[0]], strict=True))
    for name in scores:
        seconds, distance, differing = {}, {}, {}
        for way in ways:
            seconds[way] = mean(runs[way, seed][name].seconds for seed in setting.seeds)
            compared = [
                agreement(
                    runs[way, seed][name].table,
                    runs[ways[0], other][name].table,
                    keeps=[KEEP],
                )
                for seed, other in following.items()
            ]
            distance[way] = mean(1 - found.spearman for found in compared)
            differing[way] = mean(1 - found.overlap[KEEP] for found in compared)
        for what, unit, values in (
            ("time", "s", seconds),
            ("1 - Spearman", "", distance),
            ("1 - overlap of the kept half", "", differing),
        ):
            for way in ways[1:]:
                criterion, density = way
                case = f"{name} {what}, {setting.model} {criterion}"
                yield Row(BENCH, case, density, values[way], values[ways[0]], "dense", unit)


def _scored(setting: Setting, way: Way, seed: int, scores: Sequence[str]) -> dict[str, Run]:
    """Train once, then compute each score; each is charged the training and its own time."""
    criterion, density = way
    samples = ImageSamples.of(setting.data)
    model = build_model(
        setting.model,
        num_classes=setting.data.num_classes,
        input_shape=setting.data.input_shape,
        seed=seed,
    )
    start = time.process_time()
    if criterion != "dense":
        model = sparse_proxy(model, samples, TASK, density=density, criterion=criterion, seed=seed)
    train(model, samples, TASK, config=setting.config, seed=seed)
    training = time.process_time() - start
    found = {}
    for name in scores:
        start = time.process_time()
        values = SCORES[name](model, samples)
        seconds = training + time.process_time() - start
        table = ScoreTable(
            samples.ids, values, name, setting.data.name, samples.fingerprint, seed, setting.model
        )
        found[name] = Run(table, seconds)
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCH}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="digits, resnet8, two seeds")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios over the density")
    parser.add_argument("--data", default="digits", help="a data set's name, or a folder")
    parser.add_argument("--model", default="", help="default: resnet8 for digits, else resnet20")
    parser.add_argument("--samples", type=int, help="a stratified subset of so many; default: all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", default="0,1,2", help="two or more, comma-separated")
    parser.add_argument("--criteria", default="magnitude,snip")
    parser.add_argument("--grand", action="store_true", help="GraNd too")
    arguments = parser.parse_args()
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    if len(seeds) < 2:
        parser.error("--seeds: agreement is with another seed's dense network; give two or more")
    if cpu.isa() is None:
        parser.error("no native kernels in this environment: install fedprune with a compiler")
    use_threads(1)
    data = load_dataset(
        "digits" if arguments.quick else arguments.data, num_train=arguments.samples
    )
    setting = Setting(
        data=data,
        model=arguments.model or ("resnet8" if data.name == "digits" else "resnet20"),
        config=TrainingConfig(epochs=arguments.epochs, lr=arguments.lr),
        criteria=arguments.criteria.split(","),
        densities=DENSITIES,
        seeds=seeds[:2] if arguments.quick else seeds,
    )
    arguments.processor_time = True
    show(rows(setting, ["el2n", "grand"] if arguments.grand else ["el2n"]), arguments)


if __name__ == "__main__":
    main()
