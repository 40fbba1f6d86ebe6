"""Rows of the table by which a GPU chooses sparse kernels: sparsemodel/kernels/cuda/measured.py.

    python -m benchmarks.gpu_choice [--quick]

Layers of float32 with TF32 off, each operator beside torch's dense one, compared before it is
timed. Times are medians of device events in milliseconds. What is printed goes into the table as
it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import cuda_kernels
from benchmarks.cuda_kernels import DENSITIES, Sizes, command, compare, milliseconds
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda.measured import Operator, Timed

# Width of a layer and rows of its input.
SHAPES = ((1024, 1024), (1024, 8192), (4096, 1024), (4096, 8192))

# Name of a case in benchmarks.cuda_kernels -> what the table calls it.
OPERATORS: dict[str, Operator] = {
    "linear": "forward",
    "linear, input gradient": "input gradient",
    "linear, gradient at the mask": "gradient at the mask",
    "per-sample norms": "norms",
    "per-sample norms of sequences": "norms of sequences",
}


def rows(shapes: tuple[tuple[int, int], ...], rounds: int) -> Iterator[Timed]:
    """Time every operator of every shape on the current GPU."""
    for width, batch in shapes:
        sizes = Sizes(width=width, batch=batch)
        for density in DENSITIES:
            for case in cuda_kernels.linear_cases(sizes, density):
                if case.name in OPERATORS:
                    yield timed(case, sizes, rounds)


def timed(case: cuda_kernels.Case, sizes: Sizes, rounds: int) -> Timed:
    """One row: ours, and the first peer, which is torch's dense way."""
    compare(case)
    dense = next(iter(case.peers.values()))
    times = milliseconds({"ours": case.ours, "dense": dense}, rounds)
    sparse, dense_time = (float(f"{times[name]:.3g}") for name in ("ours", "dense"))
    operator = OPERATORS[case.name]
    return Timed(operator, sizes.width, sizes.batch, case.density, sparse, dense_time)


def main() -> None:
    """Run the command."""
    arguments = command("gpu_choice", __doc__)
    if cuda.runner(torch.device("cuda")) is None:
        raise SystemExit("the CUDA kernels cannot be used here; the warning above says why")
    capability = torch.cuda.get_device_capability()
    print(f"Gpu({torch.cuda.get_device_name()!r}, {capability}, (", flush=True)
    with torch.device("cuda"):
        for row in rows(SHAPES[-1:] if arguments.quick else SHAPES, 10):
            print(f"    {row},", flush=True)
    print("))")


if __name__ == "__main__":
    main()
