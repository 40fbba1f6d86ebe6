"""Rounds of FedTiny through fedprune's engines against a plain dense FedAvg loop in torch.

    python -m benchmarks.gpu_simulation [--device cuda] [--data FOLDER] [--quick] [--json]
        [--engines inline,batched,flower] [--cohorts 0,4] [--clients N] [--local-epochs N]
        [--repeats N] [--images N]

Both sides train the same network class on the same samples of the same clients, in mini-batches
of the same size, for as many local epochs, and evaluate on the same test images after every
round. The loop is what one would write without fedprune: one model, all images on the device,
torch.optim.SGD, a weighted sum of state dicts; it prunes nothing and sends nothing. Seconds are
those of a round once the first is over, which pays for warming up and for starting processes;
FedTiny grows and prunes in every other one. In every repetition each side has one run. Without
--data the images are drawn: CIFAR's shape, one pattern a class and noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.rows import Row, add_arguments, show
from benchmarks.timing import Clock, use_threads
from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS
from fedprune.local.data import split
from fedprune.local.site import split_seed
from fedprune.local.torch_models import EVALUATION_BATCH
from fedprune.rounds.folder import METRICS
from fedprune.rounds.run import ENGINES, run
from fedprune.rounds.workspace import Workspace, compute_device, open_workspace
from prunelab.data.batches import batches
from prunelab.data.samples import stored
from prunelab.data.tensors import prepare
from prunelab.networks import build_model
from prunelab.pages.console import listed
from prunelab.runs.seeds import rng
from prunelab.runs.temporary import temporary_folder

BENCH = "gpu_simulation"
POLL_SECONDS = 0.01
NUM_CLASSES, IMAGE = 10, (32, 32, 3)

Seconds = list[float]


@dataclass(frozen=True)
class Way:
    """One way of running FedTiny."""

    name: str
    engine: str
    execution: str
    cohort: int = 0


def rows(config: RunConfig, ways: Sequence[Way], *, repeats: int) -> Iterator[Row]:
    """One row for each way; the peer is the plain loop."""
    work = open_workspace(config)
    calls: dict[str, Callable[[], Seconds]] = {"plain": lambda: plain_rounds(work)}
    for way in ways:
        calls[way.name] = lambda way=way: engine_rounds(config, way)  # type: ignore[misc]
    found: dict[str, Seconds] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(statistics.mean(call()[1:]))
            print(f"# {name}: {60 / found[name][-1]:.2f} rounds a minute", file=sys.stderr)
    seconds = {name: statistics.median(values) for name, values in found.items()}
    case = f"{config.model_name} {config.data.clients} clients on {config.training.device}"
    for way in ways:
        ours, peer = seconds[way.name], seconds["plain"]
        density = config.method.target_density
        yield Row(BENCH, f"{case}, {way.name}", density, ours, peer, "plain dense FedAvg", "s")


def engine_rounds(config: RunConfig, way: Way) -> Seconds:
    """Seconds of each round of a whole FedTiny run through an engine."""
    training = dataclasses.replace(config.training, execution=way.execution, cohort=way.cohort)
    config = dataclasses.replace(config, training=training)
    with temporary_folder() as temporary:
        folder = Path(temporary) / "run"
        with _Watch(folder / METRICS) as watch:
            run(config, folder, engine=way.engine)
    expected = config.training.rounds + 1  # the line of the start before them
    if len(watch.times) != expected:
        raise RuntimeError(f"{way.name}: saw {len(watch.times)} of {expected} lines of metrics")
    return [after - before for before, after in zip(watch.times, watch.times[1:], strict=False)]


def plain_rounds(work: Workspace, *, clock: Clock = time.perf_counter) -> Seconds:
    """Seconds of each round of dense federated averaging, written down in plain torch."""
    config, dataset = work.config, work.dataset
    training, device = config.training, torch.device(config.training.device)
    model = build_model(
        config.model_name,
        num_classes=dataset.num_classes,
        input_shape=work.torch.input_shape,
        seed=config.seed,
        width=config.model.width or None,
    ).to(device)
    images, labels = stored(dataset.train)
    parts = [
        split(share, seed=split_seed(config, client)).train
        for client, share in enumerate(work.shares)
    ]
    clients = [
        (torch.from_numpy(images[p]).to(device), torch.from_numpy(labels[p]).to(device))
        for p in parts
    ]
    clients = [(images, labels) for images, labels in clients if len(labels) > 1]
    assert dataset.test is not None
    test_images, test_labels = (torch.from_numpy(x).to(device) for x in stored(dataset.test))
    total = sum(len(labels) for _, labels in clients)
    order, seconds = rng(config.seed), []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(training.rounds):
        began = clock()
        mean = {name: torch.zeros_like(value).float() for name, value in start.items()}
        for images, labels in clients:
            model.load_state_dict(start)
            _train(model, images, labels, work, order)
            for name, value in model.state_dict().items():
                mean[name].add_(value, alpha=len(labels) / total)
        start = {name: value.to(start[name].dtype) for name, value in mean.items()}
        model.load_state_dict(start)
        _accuracy(model, test_images, test_labels)  # waits for the device
        seconds.append(clock() - began)
    return seconds


def _train(
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    work: Workspace,
    order: np.random.Generator,
) -> None:
    training = work.config.training
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    for _ in range(training.local_epochs):
        for drawn in batches(len(labels), batch_size=training.batch_size, rng=order):
            index = torch.from_numpy(drawn).to(labels.device)
            optimizer.zero_grad()
            functional.cross_entropy(model(prepare(images[index])), labels[index]).backward()
            optimizer.step()


@torch.no_grad()
def _accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    correct = 0
    for start in range(0, len(labels), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        correct += int((model(prepare(images[part])).argmax(1) == labels[part]).sum())
    return correct / len(labels)


class _Watch:
    """When each line of a file appeared, in seconds; an engine may write it in another process."""

    def __init__(self, path: Path) -> None:
        self.times: Seconds = []
        self._path, self._ended = path, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(POLL_SECONDS)
            if self._path.exists():
                num_lines = self._path.read_bytes().count(b"\n")
                now = self._path.stat().st_mtime_ns * 1e-9
                self.times += [now] * (num_lines - len(self.times))


def write_images(folder: Path, *, num_train: int, num_test: int, seed: int = 0) -> None:
    """A folder of parquet like CIFAR-10's, of drawn images: a pattern a class, and noise."""
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(64, 192, (NUM_CLASSES, *IMAGE), generator=generator)
    for side, count in (("train", num_train), ("test", num_test)):
        labels = torch.arange(count) % NUM_CLASSES
        cells = []
        for label in labels.tolist():
            noise = torch.randint(-64, 64, IMAGE, generator=generator)
            data = io.BytesIO()
            Image.fromarray((patterns[label] + noise).to(torch.uint8).numpy()).save(data, "PNG")
            cells.append({"bytes": data.getvalue()})
        table = pyarrow.table({"img": cells, "label": labels.numpy()})
        pyarrow.parquet.write_table(table, folder / f"{side}.parquet")


def ways_of(engines: Sequence[str], cohorts: Sequence[int], *, device: str) -> list[Way]:
    """The named engines, `batched` once for each size of a cohort.

    On a CPU, where sparse kernels make "auto" another thing, `inline` runs masked as well.
    """
    ways = []
    for engine in engines:
        if engine == "batched":
            ways += [
                Way(f"batched {cohort or 'auto'}", engine, "masked", cohort) for cohort in cohorts
            ]
            continue
        ways.append(Way(engine, engine, "auto"))
        if engine == "inline" and device == "cpu":
            ways.append(Way("inline masked", engine, "masked"))
    return ways


def configuration(arguments: argparse.Namespace, data: str) -> RunConfig:
    """The run that all sides make."""
    quick = arguments.quick
    return RunConfig.parse(
        {
            "data.dataset": data,
            "data.clients": arguments.clients or (4 if quick else 10),
            "model.name": "resnet8" if quick else "resnet18",
            "training.rounds": arguments.rounds,
            "training.local_epochs": arguments.local_epochs,
            "training.batch_size": 32 if quick else 64,
            "training.device": arguments.device,
            "training.threads": torch.get_num_threads(),
            "method.density": 0.05,
            "method.pool_size": 2,
            "server.pretrain_epochs": 1,
            "method.adjust_every": 2,
            "method.adjust_until": arguments.rounds,
        }
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCH}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser, quick="resnet8, four clients, a few hundred images, one repetition")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", help="a folder of parquet such as CIFAR-10's; default: drawn")
    parser.add_argument("--engines", default="", help=f"comma-separated, of {', '.join(ENGINES)}")
    parser.add_argument("--images", type=int, default=0, help="drawn for training")
    parser.add_argument("--cohorts", default="0", help="training.cohort of batched; 0: automatic")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of each run, at least 2")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; 1 with --quick")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: the first is not counted, so give at least 2")
    use_threads(arguments.threads)
    engines = listed(arguments.engines)
    if not engines:
        engines = ["inline", "batched"]
        if importlib.util.find_spec("ray") is not None and not arguments.quick:
            engines.append("flower")
    cohorts = [int(cohort) for cohort in listed(arguments.cohorts)]
    with temporary_folder() as temporary:
        try:
            device = compute_device(arguments.device)
            if not arguments.data:
                num_train = arguments.images or (400 if arguments.quick else 10_000)
                num_test = max(100, num_train // 10)
                write_images(Path(temporary), num_train=num_train, num_test=num_test)
            config = configuration(arguments, arguments.data or str(temporary))
            if device.type == "cuda":
                print(f"# {torch.cuda.get_device_name()}", file=sys.stderr)
            ways = ways_of(engines, cohorts, device=arguments.device)
            repeats = 1 if arguments.quick else arguments.repeats
            show(rows(config, ways, repeats=repeats), arguments, native=False)
        except USER_ERRORS as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
