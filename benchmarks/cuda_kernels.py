"""The CUDA kernels against torch eager, torch.compile and cuSPARSE (torch's CSR and BSR).

    python -m benchmarks.cuda_kernels [--quick] [--json]

Every result is compared with a peer's before anything is timed. Times are medians of device
events; all sides take turns in one process, and what they read and write is larger than an L2
cache. "of copy" is the share of the bandwidth of a large copy on the same GPU that ours reaches,
counting each array once: a low share says that the kernel, not the memory, is the limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import cuda_peers as peers
from benchmarks import rows as rows_of_benchmarks
from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.cuda import array_ops as cuda_array_ops
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import layer_ops as cuda_ops
from sparsemodel.kernels.cuda import linear as cuda_linear
from sparsemodel.kernels.layout import features_first
from sparsemodel.kernels.reference import linear_topk_grad

Tensor = torch.Tensor
Call = Callable[[], Any]

BENCH = "cuda_kernels"
DENSITIES = (0.01, 0.05, 0.1)
TOLERANCE = 1e-3  # of the largest entry: TF32 is off, sums are in another order
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """How large the cases are; the default is beyond an L2 cache of 50 MiB."""

    entries: int = 1 << 26
    width: int = 4096
    batch: int = 8192
    tokens: int = 64
    vocabulary: int = 128_000
    rows: int = 2048


QUICK = Sizes(entries=1 << 24, batch=2048, rows=512)


@dataclass(frozen=True)
class Case:
    """One operation: ours, its peers, and the bytes of all arrays that it must read and write.

    `compared` says what of the results must agree; None where a call changes its arguments.
    """

    name: str
    density: float
    ours: Call
    peers: dict[str, Call]
    num_bytes: int
    compared: Callable[[Tensor], Tensor] | None = lambda result: result


@dataclass(frozen=True)
class Row(rows_of_benchmarks.Row):
    """Beside a peer's, the share of a copy's bandwidth that ours reaches."""

    share_of_copy: float

    def as_line(self) -> str:
        return f"{super().as_line()}, {self.share_of_copy:.0%} of copy"


def cases(device: torch.device, sizes: Sizes, densities: Sequence[float]) -> Iterator[Case]:
    """All cases, each made when it is its turn."""
    with torch.device(device):
        yield from _arrays(sizes)
        for density in densities:
            yield from linear_cases(sizes, density)
        yield _loss(sizes)


def _arrays(sizes: Sizes) -> Iterator[Case]:
    n, ops = sizes.entries, cuda_array_ops
    mask = torch.rand(n) < 0.05
    values, gradient, mean, square = torch.randn(4, n).unbind()
    square = square.abs()
    step = (0.0, 0.9, 0.0)  # a learning rate of 0, so that turns do not move the values
    yield Case(
        "sgd_step", 1.0, lambda: ops.sgd_step(values, gradient, mean, *step),
        peers.sgd(values, gradient, mean, step), 20 * n, compared=None,
    )  # fmt: skip
    adam = (0.0, 0.9, 0.999, 1e-8, 0.0, False, 5)
    yield Case(
        "adam_step", 1.0, lambda: ops.adam_step(values, gradient, mean, square, *adam),
        peers.adam(values, gradient, mean, square, adam), 28 * n, compared=None,
    )  # fmt: skip
    high, low = torch.zeros(2, n, dtype=torch.int64).unbind()
    refused, positions = torch.zeros(2, dtype=torch.int64), torch.nonzero(mask).flatten()
    update = torch.randn(len(positions))
    for name, density, given in (
        ("client's update, dense", 1.0, (high, low, gradient, None, None, 3, refused)),
        ("client's update, sparse", 0.05, (high, low, update, None, positions, 3, refused)),
    ):
        num_bytes = given[2].numel() * (36 if given[4] is None else 44)
        ours = partial(ops.fixed_add, *given)
        yield Case(name, density, ours, peers.fixed_add(given), num_bytes, compared=None)


def linear_cases(sizes: Sizes, density: float) -> Iterator[Case]:
    """The operators of a sparse linear layer, on the current default device."""
    width, batch = sizes.width, sizes.batch
    mask = torch.rand(width, width) < density
    row_ptr, cols = csr_from_mask(mask)
    values = torch.randn(len(cols)) / width**0.5
    weight = torch.zeros(width, width).masked_scatter(mask, values)
    x, dy = (features_first(torch.randn(batch, width)) for _ in range(2))
    index = row_ptr, cols, cuda_ops.transposed_index(row_ptr, cols, width)
    layer = peers.Linear(weight, mask, row_ptr, cols, x, dy)
    num_bytes = 8 * width * batch + 8 * len(cols)
    flat_dy, flat_x, pattern = dy.t(), x.t(), (row_ptr, cols)

    def input_gradient() -> Tensor:
        return cuda_ops.linear_backward(dy, x, values, *index, width, (True, False, False))[0]

    def at_the_mask() -> Tensor:  # whatever the table says
        runner = cuda.runner(x.device)
        assert runner is not None
        return cuda_linear.weight_gradient(runner, flat_dy, flat_x, *pattern)

    yield Case(
        "linear", density, lambda: cuda_ops.linear(x, values, None, row_ptr, cols),
        layer.forward(density), num_bytes,
    )  # fmt: skip
    yield Case(
        "linear, input gradient", density, input_gradient, layer.input_gradient(), num_bytes
    )  # fmt: skip
    yield Case(
        "linear, gradient at the mask", density, at_the_mask, layer.weight_gradient(), num_bytes
    )  # fmt: skip
    k = len(cols) // 10
    yield Case(
        "top-K growth", density, lambda: linear_topk_grad(x, dy, row_ptr, cols, k)[1],
        layer.growth(k), num_bytes,
        # At the threshold any may win; ours come back to the CPU.
        compared=lambda gradients: gradients.abs().sort().values.cpu(),
    )  # fmt: skip
    yield Case(
        "per-sample norms", density,
        lambda: cuda_array_ops.square_norms(flat_dy, flat_x, *pattern),
        layer.norms(), num_bytes,
    )  # fmt: skip
    shape = width, sizes.tokens, batch // sizes.tokens
    planes = flat_dy.view(shape), flat_x.view(shape)
    yield Case(
        "per-sample norms of sequences", density,
        lambda: cuda_array_ops.square_norms(*planes, *pattern),
        peers.sequence_norms(*planes, *pattern), num_bytes,
    )  # fmt: skip


def _loss(sizes: Sizes) -> Case:
    shape = sizes.rows, sizes.vocabulary
    logits, teacher = torch.randn(shape), torch.randn(shape)
    labels = torch.randint(0, shape[1], shape[:1])

    def ours() -> Tensor:
        loss, logs = cuda_array_ops.kd_loss(logits, teacher, labels, 0.5, 2.0)
        ones = torch.ones_like(loss)
        return cuda_array_ops.kd_loss_backward(ones, logits, teacher, labels, logs, 0.5, 2.0)

    num_bytes = 4 * 5 * logits.numel()  # both twice, and the gradient
    return Case("KD loss and gradient", 1.0, ours, peers.loss(logits, teacher, labels), num_bytes)


def compare(case: Case) -> None:
    """Refuse to time what does not compute the same as its peers."""
    if case.compared is None:
        return
    ours = case.compared(case.ours())
    for name, peer in case.peers.items():
        if name.endswith("(another pattern)"):
            continue
        expected = case.compared(peer())
        bound = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not torch.allclose(ours.to(expected.dtype), expected, rtol=0, atol=bound):
            raise SystemExit(f"{case.name}: ours and {name} differ; nothing was timed")


def milliseconds(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median of each call by device events, after two unmeasured calls of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def copy_bandwidth(rounds: int) -> float:
    """Bytes a millisecond that a large copy reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / milliseconds({"copy": lambda: target.copy_(source)}, rounds)["copy"]


def rows(sizes: Sizes, densities: Sequence[float], rounds: int) -> Iterator[Row]:
    """Time every case on the current GPU."""
    bandwidth = copy_bandwidth(rounds)
    print(f"# copy: {bandwidth / 1e6:.0f} GB/s", file=sys.stderr)
    for case in cases(torch.device("cuda"), sizes, densities):
        compare(case)
        times = milliseconds({"ours": case.ours, **case.peers}, rounds)
        ours = times.pop("ours")
        share = case.num_bytes / ours / bandwidth
        for name, peer in times.items():
            yield Row(BENCH, case.name, case.density, ours, peer, name, "ms", share)


def command(name: str, description: str | None) -> argparse.Namespace:
    """The command line of a benchmark on a GPU, whose kernels it turns on.

    Args:
        name: of the module.
        description: what its --help says.

    Raises:
        SystemExit: there is no GPU.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="smaller cases, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU (or no CUDA build of torch): nothing to measure")
    os.environ[cuda.ENVIRONMENT] = "on"
    return arguments


def show(found: Iterator[rows_of_benchmarks.Row], *, as_json: bool) -> None:
    """Print rows as they come, under a line that names the GPU."""
    name = torch.cuda.get_device_name()
    print(f"# {name}, torch {torch.__version__}, CUDA {torch.version.cuda}", file=sys.stderr)
    for row in found:
        print(row.as_json() if as_json else row.as_line(), flush=True)


def main() -> None:
    """Run the command."""
    arguments = command(BENCH, __doc__)
    if cuda.runner(torch.device("cuda")) is None:
        raise SystemExit("the CUDA kernels cannot be used here; the warning above says why")
    sizes, rounds = (QUICK, 10) if arguments.quick else (Sizes(), 50)
    densities = DENSITIES[:2] if arguments.quick else DENSITIES
    show(rows(sizes, densities, rounds), as_json=arguments.json)


if __name__ == "__main__":
    main()
