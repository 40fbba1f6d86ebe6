"""Does the loss right after pruning foretell the loss after retraining? Every subset of filters.

    python -m simulations.oracle_pruning

The filters of the first convolution of a small network on the digits: of every subset of a size,
the loss on what the network was trained on, right after the others are cut out, and the loss on a
held-out part of the training side after retraining. Kendall's tau between the two, and between two
retrainings of the same subsets by other seeds: what the noise of retraining leaves to be foretold.
After Feng et al., Is Oracle Pruning the True Oracle? (2024). Every seed leaves its outcome in a
file; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.errors import RunError
from prunelab.runs.seeds import generator, seeded, stream_seed
from prunelab.training.loop import TrainingConfig, evaluate, train
from prunelab.training.task import ImageClassification
from simulations.jobs import (
    DID_DIVERGE,
    FINISHED,
    Outcome,
    check_settings,
    parsed,
    run_jobs,
    workers_of,
)
from simulations.page import commits_of, page, publish, table
from simulations.statistics import LEVEL, interval
from sparsemodel.protocols.oracle import kendall, retrain_correlation, subsets


@dataclass(frozen=True)
class Preset:
    """Size of an experiment.

    Attributes:
        filters: of the first convolution.
        kept: sizes of subsets.
        most: subsets of a size, drawn where there are more.
        epochs: of the dense training.
        retraining: epochs of it; each is a training of its own, its rate falling to 0.
        repeats: retrainings of a subset, by other seeds: two at least.
        held_out: share of the training side.
    """

    filters: int = 8
    kept: tuple[int, ...] = (4,)
    most: int = 30
    epochs: int = 20
    retraining: tuple[int, ...] = (1, 3, 10)
    repeats: int = 2
    lr: float = 0.1
    batch_size: int = 64
    held_out: float = 1 / 3


PRESETS = {
    "small": Preset(),
    "wide": Preset(filters=10, kept=(2, 4, 6, 8), most=252, retraining=(1, 3, 10, 30)),
}
_SIDES, _MODEL, _ORDER, _SUBSETS, _RETRAINING = range(5)  # streams of the seed


class Network(nn.Module):
    """Two convolutions on 8×8 digits, and a classifier."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, filters, 3, padding=1)
        self.conv2 = nn.Conv2d(filters, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv2(self.conv1(x).relu()).relu().flatten(1))
        return logits


def cut(network: Network, kept: Sequence[int]) -> Network:
    """A copy that has these filters of the first convolution alone."""
    small, rows = copy.deepcopy(network), list(kept)
    small.conv1 = nn.Conv2d(1, len(rows), 3, padding=1)
    small.conv2 = nn.Conv2d(len(rows), 8, 3, stride=2, padding=1)
    state = network.state_dict()
    for name in ("conv1.weight", "conv1.bias"):
        state[name] = state[name][rows]
    state["conv2.weight"] = state["conv2.weight"][:, rows]
    small.load_state_dict(state)
    return small


def sides(held_out: float, *, seed: int) -> tuple[ImageSamples, ImageSamples]:
    """The training side in two: what is trained on, and what is held out. Tests are not read."""
    whole = ImageSamples.of(load_dataset("digits"))
    order = torch.randperm(len(whole), generator=generator(seed, _SIDES))
    end = len(whole) - round(held_out * len(whole))
    parts = [ImageSamples(whole.images[rows], whole.labels[rows]) for rows in order.split(end)[:2]]
    return parts[0], parts[1]


@dataclass(frozen=True)
class OracleJob:
    """One seed: a dense network, its subsets, and all their retrainings."""

    preset: Preset
    seed: int

    @property
    def name(self) -> str:
        """Of its outcome."""
        return f"seed-{self.seed}"

    def run(self, out: Path) -> Outcome:
        """Train, cut, retrain; losses of every subset."""
        del out
        preset, task = self.preset, ImageClassification()
        started = time.process_time()
        trained_on, held_out = sides(preset.held_out, seed=self.seed)

        def fit(network: nn.Module, epochs: int, *stream: int) -> None:
            config = TrainingConfig(epochs=epochs, batch_size=preset.batch_size, lr=preset.lr)
            train(
                network, trained_on, task, config=config, seed=stream_seed(self.seed, *stream)
            )  # fmt: skip

        def retrained(kept: Sequence[int], epochs: int, *stream: int) -> float:
            network = cut(dense, kept)
            try:
                fit(network, epochs, _RETRAINING, *stream)
            except RunError:  # its loss was not finite
                return math.inf
            loss = evaluate(network, held_out, task).loss
            return loss if math.isfinite(loss) else math.inf

        with seeded(stream_seed(self.seed, _MODEL), torch.device("cpu")):
            dense = Network(preset.filters)
        try:
            fit(dense, preset.epochs, _ORDER)
        except RunError as error:
            return Outcome(DID_DIVERGE, reason=str(error))
        sizes = {}
        for size in preset.kept:
            chosen = subsets(
                preset.filters, size, count=preset.most,
                seed=stream_seed(self.seed, _SUBSETS, size),
            )  # fmt: skip
            before = [evaluate(cut(dense, kept), trained_on, task).loss for kept in chosen]
            after = {
                str(epochs): [
                    [
                        retrained(kept, epochs, size, place, epochs, repeat)
                        for place, kept in enumerate(chosen)
                    ]
                    for repeat in range(preset.repeats)
                ]
                for epochs in preset.retraining
            }
            sizes[str(size)] = {"subsets": chosen, "before": before, "after": after}
        tested = evaluate(dense, held_out, task)
        return Outcome(
            FINISHED,
            values={
                "sizes": sizes,
                "dense": {"loss": tested.loss, "accuracy": tested.accuracy},
                "processor_seconds": time.process_time() - started,
            },
        )


@dataclass(frozen=True)
class Said:
    """What one seed says of one size and length of retraining.

    Attributes:
        tau, p, anomaly: of losses before against means over retrainings.
        noise: Kendall's tau of two retrainings of the same subsets.
        oracle, best, median: mean loss after retraining of the subset that was best before, of the
            one that is best after (chosen by these losses, so flattered by them), of the median.
    """

    tau: float
    p: float
    anomaly: float
    noise: float
    oracle: float
    best: float
    median: float


def said(cell: Mapping[str, Any], epochs: str) -> Said:
    """The figures of one seed, from its losses."""
    chosen, before, after = cell["subsets"], cell["before"], cell["after"][epochs]
    mean = [sum(losses) / len(after) for losses in zip(*after, strict=True)]
    found = retrain_correlation(chosen, before, mean)
    by_subset = {tuple(kept): loss for kept, loss in zip(chosen, mean, strict=True)}
    return Said(
        tau=found.tau,
        p=found.p,
        anomaly=found.anomaly,
        noise=kendall(after[0], after[1])[0],
        oracle=by_subset[found.oracle],
        best=by_subset[found.best],
        median=sorted(mean)[len(mean) // 2],
    )


def body(found: Sequence[Outcome], preset: Preset) -> list[str]:
    """The tables, of the seeds that finished."""
    cells = [one.values["sizes"] for one in found if one.status == FINISHED]
    if not cells:
        return ["No seed has finished."]
    correlations, losses = [], []
    for size in preset.kept:
        for epochs in preset.retraining:
            each = [said(cell[str(size)], str(epochs)) for cell in cells]
            head = [f"{size} of {preset.filters}", str(epochs)]
            small = sum(one.p < 0.05 for one in each)
            correlations.append([
                *head,
                _told(each, lambda one: one.tau),
                f"{small} of {len(each)}",
                _told(each, lambda one: one.noise),
                _told(each, lambda one: 100 * one.anomaly, digits=0),
            ])  # fmt: skip
            losses.append([
                *head,
                *(_told(each, pick, digits=3) for pick in (_oracle, _median, _best)),
                _told(each, lambda one: one.median - one.oracle, digits=3),
            ])  # fmt: skip
    shared = ["kept", "epochs"]
    return [
        "## Rank correlation", "",
        "Kendall's tau of the training loss right after pruning and the held-out loss after "
        "retraining, the mean over retrainings by different seeds; in how many seeds p < .05; tau "
        "of two such retrainings of the same subsets; and the share of subsets that end better "
        "than the oracle, the one that was best before.", "",
        table([*shared, "tau", "p < .05", "tau of retrainings", "better than the oracle, %"],
              correlations),
        "",
        "## Held-out loss after retraining", "",
        "Of the oracle, of the median subset, and of the best, which these losses themselves "
        "choose, so that it is too good; and what the oracle gains over the median, paired by "
        "seeds.", "",
        table([*shared, "oracle", "median", "best", "median − oracle"], losses),
    ]  # fmt: skip


def _oracle(one: Said) -> float:
    return one.oracle


def _median(one: Said) -> float:
    return one.median


def _best(one: Said) -> float:
    return one.best


def _told(each: Sequence[Said], pick: Callable[[Said], float], *, digits: int = 2) -> str:
    """Mean ± half of the interval; of values that are not all finite, how many are not."""
    values = [pick(one) for one in each]
    if lost := sum(not math.isfinite(value) for value in values):
        return f"not finite in {lost}"
    found = interval(values)
    spread = f" ± {found.half:.{digits}f}" if found.count > 1 else ""
    return f"{found.mean:.{digits}f}{spread}"


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.oracle_pruning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, help="where outcomes go; default runs/NAME-PRESET")
    given = parsed(parser, words)
    preset = PRESETS[given.preset]
    out = given.out or Path("runs") / f"oracle_pruning-{given.preset}"
    try:
        seeds = [int(seed) for seed in given.seeds.split(",")]
        check_settings(out, asdict(preset))
    except ValueError as error:
        parser.error(str(error))
    with workers_of(given, on_gpus=False) as workers:
        found = run_jobs([OracleJob(preset, seed) for seed in seeds], out, workers)
    text = written(list(found.values()), given.preset, seeds)
    suffix = "" if given.preset == "small" else f"_{given.preset}"
    saved = Path(__file__).parent / f"oracle_pruning{suffix}.md"
    publish(text, saved, found.values(), what="seeds")


def written(found: Sequence[Outcome], name: str, seeds: Sequence[int]) -> str:
    """The page."""
    done = [one.values for one in found if one.status == FINISHED]
    minutes = [value["processor_seconds"] / 60 for value in done]
    accuracies = [100 * value["dense"]["accuracy"] for value in done]
    notes = [
        "digits of scikit-learn, the training side alone; a part of it that is held out is where "
        "losses after retraining are taken; nothing was tuned, and test data were not read",
        f"means over {len(done)} of {len(found)} seeds ± half of Student's {100 * LEVEL:g} % "
        "interval; a seed decides the sides, the dense network, its training and all retrainings",
        "p by the normal approximation, of the subsets of one seed; they share a dense network",
    ]
    if done:
        notes.append(
            f"held-out accuracy of the dense networks: {sum(accuracies) / len(done):.1f} %; a seed "
            f"took {sum(minutes) / len(done):.1f} processor minutes"
        )
    preset = PRESETS[name]
    listed = ",".join(map(str, seeds))
    return page(
        "Is the best pruned network the best retrained one?",
        command=f"python -m simulations.oracle_pruning --preset {name} --seeds {listed}",
        at=commits_of(found),
        notes=notes,
        body=body(found, preset),
        settings=asdict(preset),
    )


if __name__ == "__main__":
    main()
