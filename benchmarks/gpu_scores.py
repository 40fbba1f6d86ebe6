"""Scores of a data set on one device, beside a bare forward pass and torch.func's vmap.

    python -m benchmarks.gpu_scores [--device cuda] [--data FOLDER] [--quick] [--json]

EL2N, GraNd and influence are whole calls of `datapruning.score` with a trained model, from stored
bytes to a table, its fixed cost among it; influence is TracIn of that one model, the mean
gradient's pass among it. Prototypes are `embed` and `self_supervised`. The bare forward pass has
its images on the device as floats, in inference mode, channels last, in the fastest of several
batches. vmap takes gradients by sample, in the fastest of several chunks, of fewer samples, which
lie on the device. Before anything is timed all sides score some samples without TF32 and are
compared: "off" is the largest difference in the largest score. k-means has many ends; there it is
that of the mean score from the mean with scikit-learn's clusters. In the timings convolutions are
as torch is set, in TF32.

Two rows are for choosing: the forward pass in torch's own layout, which scores use, and GraNd with
all convolutions by patches in place of grouped ones. Weights are random; without --data so are
the images, a pattern a class and noise in CIFAR's shape.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import rows as rows_of_benchmarks
from benchmarks.rows import add_arguments, show
from benchmarks.score_speed import Subject, compare, vmapped
from benchmarks.timing import Clock, interleaved, use_threads
from datapruning.embeddings.embed import embed
from datapruning.scores import prototypes
from datapruning.scoring.methods import METHODS
from datapruning.scoring.score import score
from prunelab.data.samples import ImageSamples, taken
from prunelab.data.streamed import stream
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig, epoch_rates
from prunelab.training.task import ImageClassification
from sparsemodel.gradients import sample_gradients

BENCH = "gpu_scores"
SHAPE, CLASSES = (3, 32, 32), 10
TASK, TRAINING = ImageClassification(), TrainingConfig()
TRACIN = replace(METHODS["tracin"], moments="last", name="tracin-last")
PASSES, GRADIENTS = ("EL2N", "prototypes"), ("influence", "GraNd")
PATCHES = "GraNd by patches"
PROTOTYPES_TOLERANCE = 0.1

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """What is measured: a network, samples of each kind of score and of vmap, and turns."""

    name: str
    passes: int
    gradients: int
    few: int
    batches: tuple[int, ...]
    chunks: tuple[int, ...]
    rounds: int


FULL = Size("resnet18", 12288, 2048, 256, (256, 1024), (32, 128), 2)
QUICK = Size("resnet8", 64, 16, 16, (32, 64), (8,), 1)


@dataclass(frozen=True)
class Row(rows_of_benchmarks.Row):
    """Microseconds a sample; the largest difference of the results is `off`, where it was taken."""

    off: float | None = None

    def as_json(self) -> str:
        rates = {"samples_per_second": 1e6 / self.ours, "peer_samples_per_second": 1e6 / self.peer}
        return json.dumps({**json.loads(super().as_json()), **rates})

    def as_line(self) -> str:
        off = "" if self.off is None else f", off by {self.off:.0e}"
        return (
            f"{self.case:<48} {1e6 / self.ours:>11,.0f} samples/s {self.ratio:8.2f} x  "
            f"{self.peer_name} ({1e6 / self.peer:,.0f}){off}"
        )


class Sides:
    """All ways of scoring samples by one model on one device."""

    def __init__(self, samples: ImageSamples, model: nn.Module, device: str) -> None:
        self.samples, self.device = samples, device
        self.model = model.to(device).eval()
        self.images, self.labels = (part.to(device) for part in samples.batch(samples.ids))
        self.last = copy.deepcopy(self.model).to(memory_format=torch.channels_last)
        self.images_last = self.images.contiguous(memory_format=torch.channels_last)

    def first(self, count: int) -> Sides:
        """The same of fewer samples."""
        return Sides(taken(self.samples, torch.arange(count)), self.model, self.device)

    def ours(self, what: str) -> Tensor:
        """A score by name, as users call it."""
        if what == PATCHES:
            with by_patches():
                return self.ours("GraNd")
        if what == "prototypes":
            vectors = embed(self.samples, task=TASK, model=self.model).to(self.device)
            return prototypes.self_supervised(vectors, num_clusters=CLASSES, seed=0)
        method = {"EL2N": "el2n", "GraNd": "grand", "influence": TRACIN}[what]
        table = score(
            self.samples, method=method, model=self.model, training=TRAINING,
            device=self.device, threads=torch.get_num_threads(),
        )  # fmt: skip
        found: Tensor = table.scores
        return found

    @torch.inference_mode()
    def forward(self, batch: int, *, channels_last: bool = True) -> Tensor:
        """Logits of all samples, [N, C]."""
        model, images = (
            (self.last, self.images_last) if channels_last else (self.model, self.images)
        )
        return torch.cat([model(part) for part in images.split(batch)])

    def vmap(self, what: str, chunk: int) -> Tensor:
        """GraNd or influence by per-sample gradients that are held."""
        batch = self.images, self.labels
        of = Subject("", TASK, self.model, batch, len(self.labels))
        return vmapped(of, chunk, self._mean_gradient() if what == "influence" else None)

    def _mean_gradient(self) -> dict[str, Tensor]:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        sums = [torch.zeros_like(p) for p in parameters]
        for images, labels in zip(self.images.split(256), self.labels.split(256), strict=True):
            loss = TASK.loss(self.model, (images, labels)).sum()
            torch._foreach_add_(sums, list(torch.autograd.grad(loss, parameters)))
        return {n: s / len(self.labels) for n, s in zip(names, sums, strict=True)}


def rows(size: Size, samples: ImageSamples, device: str) -> Iterator[Row]:
    """Rows of one score after the other, each when it has been timed."""
    model = build_model(size.name, num_classes=CLASSES, input_shape=SHAPE, seed=0)
    of = Sides(taken(samples, torch.arange(size.passes)), model, device)
    few, some = of.first(size.few), of.first(size.gradients)
    case, off = f"{size.name} on {device}", agreement(few, size)
    timed = partial(_microseconds, rounds=size.rounds, clock=clock_of(device))
    forwards: dict[str, tuple[Call, int]] = {
        f"forward pass b{batch}": (partial(of.forward, batch), size.passes)
        for batch in size.batches
    }
    batch = size.batches[0]
    own = f"forward pass b{batch}, torch's layout"
    passes = timed(
        {own: (partial(of.forward, batch, channels_last=False), size.passes), **forwards}
    )
    best = _fastest(passes, tuple(forwards))
    yield Row(BENCH, f"{own}, {case}", 1.0, passes[own], passes[best], best, "us")
    for what in PASSES + GRADIENTS:
        sides, count = (of, size.passes) if what in PASSES else (some, size.gradients)
        ours = (what, PATCHES) if what == "GraNd" else (what,)
        vmaps: dict[str, tuple[Call, int]] = {}
        if what in GRADIENTS:
            for chunk in size.chunks:
                vmaps[f"vmap, chunks of {chunk}"] = partial(few.vmap, what, chunk), size.few
        found = timed({**{way: (partial(sides.ours, way), count) for way in ours}, **vmaps})
        for way in ours:
            agrees = None if vmaps else off[way]
            yield Row(BENCH, f"{way}, {case}", 1.0, found[way], passes[best], best, "us", agrees)
            if vmaps:
                peer = _fastest(found, tuple(vmaps))
                yield Row(
                    BENCH, f"{way}, {case}", 1.0, found[way], found[peer], peer, "us", off[way]
                )  # fmt: skip


def agreement(of: Sides, size: Size) -> dict[str, float]:
    """By how much the scores of all sides differ, in float32 without TF32.

    Raises:
        RuntimeError: by more than rounding.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        errors = of.forward(size.batches[0]).double().softmax(1)
        errors[torch.arange(len(of.labels), device=of.device), of.labels] -= 1
        rate = sum(epoch_rates(TRAINING, len(of.labels))) / TRAINING.epochs
        theirs = {
            "EL2N": errors.norm(dim=1).cpu(),
            "influence": rate * of.vmap("influence", size.chunks[0]).cpu(),
        }
        theirs["GraNd"] = theirs[PATCHES] = of.vmap("GraNd", size.chunks[0]).cpu()
        found = {what: compare(what, scores, of.ours(what)) for what, scores in theirs.items()}
        return {**found, "prototypes": _prototypes_off(of)}


def _prototypes_off(of: Sides) -> float:
    vectors = embed(of.samples, task=TASK, model=of.model)  # on the CPU
    theirs = prototypes.self_supervised(vectors, num_clusters=CLASSES, seed=0).mean()
    error = abs(float(of.ours("prototypes").mean() / theirs) - 1)
    if not error < PROTOTYPES_TOLERANCE:
        raise RuntimeError(f"prototypes: off by {error:.1e} from scikit-learn's mean distance")
    return error


@contextmanager
def by_patches() -> Iterator[None]:
    """Inside, convolutions' gradients by sample are products with patches, whatever their size."""
    before = sample_gradients.FEW_WEIGHTS
    sample_gradients.FEW_WEIGHTS = 1 << 30
    try:
        yield
    finally:
        sample_gradients.FEW_WEIGHTS = before


def clock_of(device: str) -> Clock:
    """Seconds on the wall, once the device has done what it was given."""
    if device != "cuda":
        return time.perf_counter

    def finished() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return finished


def _microseconds(
    calls: dict[str, tuple[Call, int]], *, rounds: int, clock: Clock
) -> dict[str, float]:
    """A sample's share of each call; calls stand with how many samples they score."""
    seconds = interleaved({n: call for n, (call, _) in calls.items()}, rounds=rounds, clock=clock)
    return {name: 1e6 * seconds[name] / count for name, (_, count) in calls.items()}


def _fastest(found: dict[str, float], names: tuple[str, ...]) -> str:
    return min(names, key=lambda name: found[name])


def drawn(count: int) -> ImageSamples:
    """Images of CIFAR's shape: a pattern a class, and noise."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    patterns = torch.randint(64, 192, (CLASSES, *SHAPE), generator=random)
    noise = torch.randint(-64, 64, (count, *SHAPE), generator=random)
    return ImageSamples((patterns[labels] + noise).to(torch.uint8), labels)


def read(folder: str, count: int) -> ImageSamples:
    """The first images of a folder of parquet; the others are not decoded."""
    return ImageSamples(*stream(folder).raw(torch.arange(count)))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCH}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser, quick="resnet8, a few samples, one turn")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", help="a folder of parquet such as CIFAR-10's; default: drawn")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    size = QUICK if arguments.quick else FULL
    samples = read(arguments.data, size.passes) if arguments.data else drawn(size.passes)
    if arguments.device == "cuda":
        print(f"# {torch.cuda.get_device_name()}", file=sys.stderr)
    show(rows(size, samples, arguments.device), arguments, native=False)


if __name__ == "__main__":
    main()
