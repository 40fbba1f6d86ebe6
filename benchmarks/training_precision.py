"""Dense training in bfloat16 against float32: processor seconds an epoch, and test error.

    python -m benchmarks.training_precision [--quick] [--json] [--data NAME_OR_FOLDER]
        [--model NAME] [--samples N] [--epochs E] [--batch-size B] [--lr R] [--seeds 0,1,2]

For each seed the network is trained from the same start on the same batches in both precisions,
one after the other, by one thread, and tested in float32 after the last epoch. The time is the
median over the epochs: in the first the libraries still make their kernels. A row for each seed,
then the means.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean, median

from torch import Tensor, nn

from benchmarks.rows import Row, show
from benchmarks.timing import use_threads
from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig, evaluate, train
from prunelab.training.task import ImageClassification

BENCH = "training_precision"
TASK = ImageClassification()
MEASURES = {"epoch": "s", "test error": "%"}


def rows(data: ImageSet, model: str, config: TrainingConfig, seeds: Sequence[int]) -> Iterator[Row]:
    """For each seed, and for the mean of all, a row of time and one of error."""

    def row(measure: str, label: str, ours: float, peer: float) -> Row:
        case = f"{measure}, {model} {data.name}, {label}"
        return Row(BENCH, case, 1.0, ours, peer, "float32", MEASURES[measure])

    found: dict[str, list[tuple[float, float]]] = {measure: [] for measure in MEASURES}
    for seed in seeds:
        both = [_trained(data, model, config, seed, p) for p in ("bfloat16", "float32")]
        for measure, (ours, peer) in zip(MEASURES, zip(*both, strict=True), strict=True):
            found[measure].append((ours, peer))
            yield row(measure, f"seed {seed}", ours, peer)
    for measure, pairs in found.items():
        ours, peer = (mean(values) for values in zip(*pairs, strict=True))
        yield row(measure, "mean", ours, peer)


def _trained(
    data: ImageSet, model: str, config: TrainingConfig, seed: int, precision: str
) -> tuple[float, float]:
    """Processor seconds an epoch, and the error on the test side in %."""
    network = build_model(
        model, num_classes=data.num_classes, input_shape=data.input_shape, seed=seed
    )
    config, watch = dataclasses.replace(config, precision=precision), _Watch()
    train(network, ImageSamples.of(data), TASK, config=config, seed=seed, callbacks=[watch])
    seconds = median(after - before for before, after in pairwise(watch.times))
    found = evaluate(network, ImageSamples(data.test_images, data.test_labels), TASK)
    return seconds, 100 * (1 - found.accuracy)


class _Watch:
    """A callback that notes the processor time at the start and after each epoch."""

    def __init__(self) -> None:
        self.times = [time.process_time()]

    def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        pass

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        self.times.append(time.process_time())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCH}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="digits, resnet8, three epochs")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--data", default="fashion-mnist", help="a data set's name, or a folder")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--samples", type=int, help="a stratified subset of so many; default: all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.data, arguments.model, arguments.epochs = "digits", "resnet8", 3
    use_threads(1)
    arguments.processor_time, arguments.plot = True, None
    data = load_dataset(arguments.data, num_train=arguments.samples)
    config = TrainingConfig(
        epochs=arguments.epochs, batch_size=arguments.batch_size, lr=arguments.lr
    )
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    show(rows(data, arguments.model, config, seeds), arguments)


if __name__ == "__main__":
    main()
