"""What it costs to collect statistics of a language model's layers, and what memory it takes.

    python -m benchmarks.calibration [--quick] [--json] [--threads N] [--processor-time]

A network of the Llama family with random weights, of SmolLM2-135M's width (576 features, 9 heads in
3 groups, 1,536 channels) and 6 of its 30 blocks. Time: mean, spread and size of the inputs of all
its linear layers (`calibrate`), and the same block by block (`by_blocks`), beside the bare forward
pass of the same batches; and one pass that collects all that criteria ask for beside one pass for
each. Memory (Linux): the high-water mark of a fresh process above what it held with model and
batches, beside a pass that keeps every layer's inputs until the end, as hooks that append do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.process_memory import reset_high_water, resident
from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import Clock, clock, interleaved, use_threads
from sparsemodel.calibration.blocks import by_blocks, describe
from sparsemodel.calibration.collect import ANGLES, GRAM, INPUTS, SEQUENCES, calibrate

BENCH = "calibration"
LAYERS, QUICK_LAYERS = 6, 2
BATCHES, SIZE, TOKENS = 8, 4, 256
MIB = 2**20


def model_of(layers: int) -> nn.Module:
    """A network with random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=TOKENS,
        )
    ).eval()  # fmt: skip


def batches_of(count: int) -> list[dict[str, Tensor]]:
    """Random tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 4096, (count, SIZE, TOKENS), generator=generator)
    return [{"input_ids": each} for each in drawn]


def forward(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """The bare forward pass."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def keep_all(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Mean and variance of every layer's inputs, which are kept until all batches are through."""
    kept: dict[str, list[Tensor]] = {}

    def hook(name: str, _: nn.Module, args: Any) -> None:
        kept.setdefault(name, []).append(args[0].flatten(0, 1))

    names = [name for block in describe(model) for name in block.linear]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names
    ]
    forward(model, batches)
    for handle in handles:
        handle.remove()
    for inputs in kept.values():
        torch.var_mean(torch.cat(inputs), 0)


def needs(model: nn.Module, kinds: tuple[str, ...] = (INPUTS,)) -> dict[str, list[str]]:
    """Statistics of a kind of all layers that it is for."""
    blocks = describe(model)
    return {
        kind: [block.name for block in blocks]
        if kind == ANGLES
        else [name for block in blocks for name in block.linear]
        for kind in kinds
    }


def all_blocks(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """The statistics of inputs, block by block."""
    layers = {block.name: block.linear for block in describe(model)}
    by_blocks(model, batches, lambda block: {INPUTS: layers[block]})


WAYS: dict[str, Callable[[nn.Module, list[dict[str, Tensor]]], object]] = {
    "keeps": keep_all,
    "collects": lambda model, batches: calibrate(model, batches, needs(model)),
    "blocks": all_blocks,
}


def rows(layers: int, num_batches: int, *, rounds: int, by: Clock) -> Iterator[Row]:
    """Times in ms a batch, and memory in MiB."""
    model, batches = model_of(layers), batches_of(2)
    several = (INPUTS, GRAM, SEQUENCES, ANGLES)

    def one_by_one() -> None:
        for kind in several:
            calibrate(model, batches, needs(model, (kind,)))

    found = interleaved(
        {
            "bare": lambda: forward(model, batches),
            "inputs": lambda: WAYS["collects"](model, batches),
            "blocks": lambda: all_blocks(model, batches),
            "several": lambda: calibrate(model, batches, needs(model, several)),
            "one by one": one_by_one,
        },
        rounds=rounds,
        clock=by,
    )
    found = {name: 1e3 * seconds / len(batches) for name, seconds in found.items()}
    bare = found["bare"]
    yield Row(BENCH, "inputs of all layers", 1.0, found["inputs"], bare, "bare forward", "ms")
    yield Row(BENCH, "inputs, block by block", 1.0, found["blocks"], bare, "bare forward", "ms")
    yield Row(
        BENCH, f"{len(several)} kinds, in one pass", 1.0, found["several"], found["one by one"],
        "a pass for each", "ms",
    )  # fmt: skip
    if sys.platform == "linux":
        peaks = {way: peak(way, layers, num_batches) / MIB for way in WAYS}
        case = f"memory of {num_batches} batches"
        for way, told in (("collects", "one pass"), ("blocks", "block by block")):
            yield Row(
                BENCH, f"{case}, {told}", 1.0, peaks[way], peaks["keeps"], "keeping inputs", "MiB"
            )


def peak(way: str, layers: int, num_batches: int) -> int:
    """Bytes that a fresh process held at most, above what it held with model and batches."""
    words = [sys.executable, "-m", "benchmarks.calibration", "--measure", way]
    words += [str(layers), str(num_batches)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, layers: int, num_batches: int) -> int:
    """`peak`, in that process."""
    torch.set_num_threads(1)
    model, batches = model_of(layers), batches_of(num_batches)
    forward(model, batches[:1])  # what any pass takes
    reset_high_water()
    before = resident("VmRSS")
    WAYS[way](model, batches)
    return resident("VmHWM") - before


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--measure"]:
        print(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, quick="two blocks, few rounds")
    add_timing_arguments(parser)
    given = parser.parse_args()
    use_threads(given.threads)
    layers = QUICK_LAYERS if given.quick else LAYERS
    few = 2 if given.quick else BATCHES
    by = clock(processor_time=given.processor_time)
    show(rows(layers, few, rounds=2 if given.quick else 9, by=by), given)


if __name__ == "__main__":
    main()
