"""Memory and time of scoring images that stay in their files, by their number.

    python -m benchmarks.stream_memory [--quick] [--json] [--plot FILE.png] [--threads N]
        [--processor-time] [--counts SMALL,LARGE]

Pictures of 3×16×16 (PNG) lie in shards of 10,000, parquet with row groups of 1,000 and WebDataset's
tar; for times also 4,000 of 3×128×128 (JPEG). A little network scores them by
`datapruning.score(stream(FILES), method="el2n")`, each case in a fresh process. The peak is the
kernel's high-water mark of the whole process at the end; a second row has it above what was
resident once everything was imported. The larger number of images stands beside the smaller: a
ratio of 1 is memory that does not grow. One more case trains (method forgetting, one epoch) on the
smaller number.

Time is that of the whole call, with the index, the checksums and the table, an image. Its peers
read the same files by a torch DataLoader that yields whole batches, with none or some workers, and
compute EL2N alone; the scores must be the same. Ours decodes the larger pictures by as many threads
as the fastest of these numbers. With --processor-time, time is that of the processors, of workers
as well. Works on Linux alone.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.process_memory import resident
from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import use_threads
from prunelab.runs.temporary import temporary_folder

BENCH = "stream_memory"
KINDS = ("parquet", "tar")
COUNTS, QUICK = (20_000, 200_000), (2_000, 8_000)
SHARD, GROUP, BATCH = 10_000, 1_000, 256
SMALL, LARGE, CLASSES = 16, 128, 10  # pixels of a side
NUM_LARGE = 4_000
WORKERS = (0, 1, 2)
TOLERANCE = 1e-6
MIB = 2**20
WALL, PROCESSOR = "seconds", "processor seconds"

Found = dict[str, float]
"""What `measure` tells of a case."""


def rows(
    counts: Sequence[int], *, threads: int, workers: Sequence[int], clock: str = WALL
) -> Iterator[Row]:
    """Peaks in MiB and times in ms, for either kind of file."""
    size = min(SHARD, *counts)
    with temporary_folder() as folder:
        for kind in KINDS:
            write_shards(folder / kind, kind, max(counts), size=size)
            yield from _of_kind(
                kind, folder / kind, counts, threads=threads, workers=workers, clock=clock
            )
        kind, count = KINDS[0], min(NUM_LARGE, *counts)
        write_shards(folder / "large", kind, count, size=count, side=LARGE)

        def of(side: str) -> Found:
            case = {"count": count, "of": count, "threads": threads}
            return measured(side, kind, folder / "large", **case)

        ours = min((of(f"ours {n}") for n in workers), key=lambda found: found[clock])
        peers = {n: of(f"loader {n}") for n in workers}
        yield from _times(
            f"{kind} {count} images of {LARGE}x{LARGE}", count, ours, peers, clock=clock
        )


def _of_kind(
    kind: str,
    folder: Path,
    counts: Sequence[int],
    *,
    threads: int,
    workers: Sequence[int],
    clock: str,
) -> Iterator[Row]:
    small, large = counts

    def of(side: str, count: int) -> Found:
        case = {"count": count, "of": large, "threads": threads}
        return measured(side, kind, folder, **case)

    few, many = of("ours 0", small), of("ours 0", large)
    name = f"ours, {small} images"
    for what in ("peak", "peak above imports"):
        case = f"{kind} {large} images, {what}"
        yield Row(BENCH, case, 1.0, many[what] / MIB, few[what] / MIB, name, "MiB")
    if kind == KINDS[0]:
        trained = of("training 0", small)
        case = f"{kind} {small} images, training, peak"
        yield Row(BENCH, case, 1.0, trained["peak"] / MIB, few["peak"] / MIB, name, "MiB")
    peers = {n: of(f"loader {n}", large) for n in workers}
    yield from _times(f"{kind} {large} images", large, many, peers, clock=clock)


def _times(
    case: str, count: int, ours: Found, peers: dict[int, Found], *, clock: str
) -> Iterator[Row]:
    for n, peer in peers.items():
        if not math.isclose(peer["mean"], ours["mean"], rel_tol=TOLERANCE):
            raise RuntimeError(f"{case}: mean score {ours['mean']}, by a DataLoader {peer['mean']}")
        times = (1e3 * side[clock] / count for side in (ours, peer))
        yield Row(BENCH, f"{case}, an image", 1.0, *times, f"DataLoader, {n} workers", "ms")


def measured(side: str, kind: str, folder: Path, **case: int) -> Found:
    """`measure` in a fresh process."""
    words = json.dumps([side, kind, str(folder), case])
    command = [sys.executable, "-m", f"benchmarks.{BENCH}", "--measure", words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side}, {kind}, {case}: {done.stderr[-800:]}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(side: str, kind: str, folder: Path, *, count: int, of: int, threads: int) -> Found:
    """Score so many images of those in the folder: peaks in bytes, seconds, the mean score.

    Args:
        side: "ours", "loader" or "training", and its number of workers.
    """
    import datapruning.scoring.score  # noqa: F401, PLC0415 - before the first look at memory

    torch.set_num_threads(threads)
    files = sorted(folder.glob(f"*.{kind}"))
    files = files[: count * len(files) // of]
    way, number = side.split()
    before, started, spent = resident("VmRSS"), time.perf_counter(), _processor_seconds()
    if way == "loader":
        scores = _by_loader(kind, files, num_workers=int(number))
    else:
        scores = _ours(files, num_workers=int(number), trains=way == "training")
    seconds, peak = time.perf_counter() - started, resident("VmHWM")
    spent = _processor_seconds() - spent
    if len(scores) != count:
        raise RuntimeError(f"{len(scores)} scores of {count} images")
    return {
        "peak": peak, "peak above imports": peak - before, WALL: seconds,
        PROCESSOR: spent,
        "mean": float(scores.double().mean()),
    }  # fmt: skip


def _processor_seconds() -> float:
    """Of this process and of children that have ended."""
    return sum(os.times()[:4])


def network(seed: int = 0) -> nn.Module:
    """A little network with random weights, for pictures of any size."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten(),
        nn.Linear(8 * 64, CLASSES),
    )  # fmt: skip


def _ours(files: Sequence[Path], *, num_workers: int, trains: bool) -> Tensor:
    import datapruning  # noqa: PLC0415

    samples = datapruning.stream(files, num_workers=num_workers)
    if trains:
        once = datapruning.TrainingConfig(epochs=1, lr=0.01)
        table = datapruning.score(samples, model=network, method="forgetting", training=once)
    else:
        table = datapruning.score(samples, model=network().eval(), method="el2n")
    scores: Tensor = table.scores
    return scores


@torch.no_grad()
def _by_loader(kind: str, files: Sequence[Path], *, num_workers: int) -> Tensor:
    """What one would write by hand: whole batches of a DataLoader, and EL2N of each."""
    model = network().eval()
    loader = DataLoader(_Batches(kind, files), batch_size=None, num_workers=num_workers)
    scores = []
    for images, labels in loader:
        probability = model((images.float() / 255 - 0.5) / 0.25).softmax(1)
        probability[torch.arange(len(labels)), labels] -= 1
        scores.append(probability.norm(dim=1))
    return torch.cat(scores)


class _Batches(IterableDataset[Any]):
    """Batches of decoded pictures; each worker reads every so many-th file."""

    def __init__(self, kind: str, files: Sequence[Path]) -> None:
        self.kind, self.files = kind, files

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        import numpy as np  # noqa: PLC0415
        from PIL import Image  # noqa: PLC0415

        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        read = {"parquet": _parquet_batches, "tar": _tar_batches}[self.kind]
        for path in self.files[first::step]:
            for cells, labels in read(path):
                arrays = [np.asarray(Image.open(io.BytesIO(cell)).convert("RGB")) for cell in cells]
                images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
                yield images, torch.tensor(labels)


def _parquet_batches(path: Path) -> Iterator[tuple[list[bytes], list[int]]]:
    import pyarrow.parquet  # noqa: PLC0415

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH, columns=["img", "label"]):
        yield batch["img"].to_pylist(), batch["label"].to_pylist()


def _tar_batches(path: Path) -> Iterator[tuple[list[bytes], list[int]]]:
    cells: list[bytes] = []
    labels: list[int] = []
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]
            file = archive.extractfile(member)
            assert file is not None
            if member.name.endswith(".png"):
                cells.append(file.read())
            else:
                labels.append(int(file.read()))
            if len(labels) == BATCH == len(cells):
                yield cells, labels
                cells, labels = [], []
    if cells:
        yield cells, labels


def write_shards(folder: Path, kind: str, count: int, *, size: int, side: int = SMALL) -> None:
    """So many pictures in files of one size; tar files behind the first are copies of it.

    A number stands behind each picture, where no reader looks, so that no two are alike.
    """
    folder.mkdir(parents=True)
    pictures = _pictures(side)
    for number, start in enumerate(range(0, count, size)):
        path = folder / f"train-{number:06d}.{kind}"
        cells = (pictures[i % len(pictures)] + b"%d" % (start + i) for i in range(size))
        if kind == "parquet":
            _write_parquet(path, list(cells))
        elif number:
            shutil.copyfile(folder / "train-000000.tar", path)
        else:
            _write_tar(path, cells)


def _pictures(side: int) -> list[bytes]:
    """Files of random pictures, smooth ones where they are large."""
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    random, found = np.random.default_rng(0), []
    for _ in range(512):
        buffer = io.BytesIO()
        picture = Image.fromarray(random.integers(0, 256, (SMALL, SMALL, 3), dtype=np.uint8))
        picture.resize((side, side)).save(buffer, "PNG" if side == SMALL else "JPEG")
        found.append(buffer.getvalue())
    return found


def _write_parquet(path: Path, cells: list[bytes]) -> None:
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    labels = [i % CLASSES for i in range(len(cells))]
    table = pyarrow.table({"img": pyarrow.array(cells, pyarrow.binary()), "label": labels})
    pyarrow.parquet.write_table(table, path, row_group_size=GROUP)


def _write_tar(path: Path, cells: Iterator[bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, cell in enumerate(cells):
            for name, data in (("png", cell), ("cls", b"%d" % (number % CLASSES))):
                member = tarfile.TarInfo(f"{number:06d}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def main() -> None:
    """Run the command, or one case of it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="2,000 and 8,000 images, a DataLoader without workers")
    add_timing_arguments(parser)
    parser.add_argument("--counts", help="two numbers of images")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, kind, folder, case = json.loads(arguments.measure)
        print(json.dumps(measure(side, kind, Path(folder), **case)))
        return
    threads = use_threads(arguments.threads or 1)
    counts = QUICK if arguments.quick else COUNTS
    if arguments.counts:
        counts = tuple(map(int, arguments.counts.split(",")))
    workers = WORKERS[:1] if arguments.quick else WORKERS
    clock = PROCESSOR if arguments.processor_time else WALL
    show(rows(counts, threads=threads, workers=workers, clock=clock), arguments)


if __name__ == "__main__":
    main()
