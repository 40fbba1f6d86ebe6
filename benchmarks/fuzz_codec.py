"""Fuzz the codec: damaged and hostile frames must be decoded or refused, never anything else.

    python -m benchmarks.fuzz_codec --inputs 1000000 [--seed 0] [--quick] [--json]

Valid frames of every kind are damaged, mostly with the envelope repaired so that the parser
behind it is reached, and go through every decoder. Anything but a value or a CodecError is a
crash: it is printed with the input, and the exit status is 1. The inputs depend on the seed
alone, not on the number of workers.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from sparsemodel.codec import (
    Limits,
    decode_entries,
    decode_mask,
    decode_mask_delta,
    decode_state,
    encode_entries,
    encode_mask,
    encode_mask_delta,
    encode_state,
    peek,
)
from sparsemodel.errors import CodecError
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import complement
from sparsemodel.runtime.state import SparseState

LIMITS = Limits(
    max_elements=4096, max_layers=8, max_name_bytes=32, max_dims=4, max_frame_bytes=8192
)
QUICK_INPUTS = 20_000
CHUNK_INPUTS = 10_000
HEADER_BYTES = 4
CRC_BYTES = 4
SHAPES = {"stem": (3, 5), "conv.weight": (8, 4, 3, 3), "fc.weight": (10, 6), "bias": (10,)}
PRUNABLE = ("conv.weight", "fc.weight")
# Numbers that sit at the edges of the format: varint widths, limits, 32 and 63 bits.
EDGES = (0, 1, 2, 127, 128, 4095, 4096, 4097, 2**28, 2**31, 2**32 - 1, 2**35, 2**62, 2**63 - 1)

Decoder = Callable[[bytes], object]
Tally = dict[str, collections.Counter[str]]


def layer(active: np.ndarray) -> Pattern:
    """The pattern of a bool array of the weight's shape."""
    return Pattern.from_positions(active.shape, np.flatnonzero(active))


def make_masks() -> tuple[Patterns, Patterns]:
    """A mask, and the one that an adjustment makes of it."""
    rng = np.random.default_rng(0)
    old = {name: rng.random(SHAPES[name]) < 0.2 for name in PRUNABLE}
    new = {name: active ^ (rng.random(SHAPES[name]) < 0.1) for name, active in old.items()}
    return (
        Patterns({name: layer(active) for name, active in old.items()}),
        Patterns({name: layer(active) for name, active in new.items()}),
    )


def make_frames() -> list[bytes]:
    """Valid frames of every kind, mode and dtype."""
    base, new = make_masks()
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    active = {name: values[name].reshape(-1)[base[name].positions()] for name in base}
    clustered = np.zeros(2000, dtype=bool)
    clustered[1880:1890] = True
    masks = [
        base,
        Patterns({name: layer(rng.random(SHAPES[name]) < 0.8) for name in PRUNABLE}),
        Patterns({"a": layer(np.zeros(7, dtype=bool)), "b": layer(np.ones(1, dtype=bool))}),
        Patterns({"bitmap": layer(rng.random(40) < 0.5)}),
        Patterns({"active gaps": layer(clustered), "pruned gaps": layer(~clustered)}),
        Patterns({"rice": layer(rng.random(1500) < 0.02)}),
    ]
    entries = {}
    for name, pattern in base.items():
        chosen = complement(pattern.positions(), num_total=pattern.num_weights)[::9]
        entries[name] = (chosen, rng.standard_normal(len(chosen), np.float32))
    frames = [encode_mask(mask) for mask in masks]
    frames += [encode_mask_delta(base, new), encode_mask_delta(base, base)]
    state = SparseState({**values, **active}, base)
    frames += [encode_state(state, dtype=dtype) for dtype in ("fp32", "bf16", "int8")]
    frames += [encode_state(SparseState({"bias": values["bias"]}), dtype="fp16")]
    return [*frames, encode_entries(entries, patterns=base), encode_entries({}, patterns=base)]


def make_decoders() -> dict[str, Decoder]:
    """Every public decoder with small limits and the receiver's side of `make_frames`."""
    base, _ = make_masks()
    bias = {"bias": SHAPES["bias"]}
    return {
        "mask": lambda data: decode_mask(data, limits=LIMITS),
        "mask_delta": lambda data: decode_mask_delta(data, base=base, limits=LIMITS),
        "state": lambda data: decode_state(data, shapes=SHAPES, patterns=base, limits=LIMITS),
        "whole": lambda data: decode_state(data, shapes=bias, patterns=None, limits=LIMITS),
        "entries": lambda data: decode_entries(data, patterns=base, limits=LIMITS),
    }


def varint(number: int) -> bytes:
    """The format's LEB128, written apart from the code under test."""
    out = []
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def split_frame(frame: bytes) -> tuple[bytes, bytes]:
    """The first four bytes and the payload of a valid frame."""
    start = HEADER_BYTES + 1
    while frame[start - 1] >= 0x80:
        start += 1
    return frame[:HEADER_BYTES], frame[start:-CRC_BYTES]


def repair(header: bytes, payload: bytes) -> bytes:
    """A frame whose length and checksum are right."""
    body = header + varint(len(payload)) + payload
    return body + struct.pack("<I", zlib.crc32(body))


def flip_bits(data: bytes, chance: random.Random, _other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if out:
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def truncate(data: bytes, chance: random.Random, _other: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def insert(data: bytes, chance: random.Random, _other: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice((1, 1, 2, 8))) + data[at:]


def splice(data: bytes, chance: random.Random, other: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def edit_number(data: bytes, chance: random.Random, _other: bytes) -> bytes:
    """Put an extreme number where a byte was: most bytes of a header are lengths or counts."""
    at = chance.randrange(len(data) + 1)
    return data[:at] + varint(chance.choice(EDGES)) + data[at + 1 :]


def random_bytes(_data: bytes, chance: random.Random, _other: bytes) -> bytes:
    return chance.randbytes(chance.randrange(64))


MUTATIONS = {
    "bit flips": flip_bits,
    "truncation": truncate,
    "insertion": insert,
    "splice": splice,
    "number edit": edit_number,
    "random bytes": random_bytes,
}


def make_inputs(
    frames: list[bytes], *, seed: int, chunk: int, num_inputs: int
) -> Iterator[tuple[str, bytes]]:
    """`num_inputs` damaged frames with the name of what was done to each."""
    chance = random.Random(f"{seed}/{chunk}")
    parts = [split_frame(frame) for frame in frames]
    names = list(MUTATIONS)
    for _ in range(num_inputs):
        name = chance.choice(names)
        mutate = MUTATIONS[name]
        index, other = chance.randrange(len(frames)), chance.randrange(len(frames))
        if chance.random() < 0.1:
            yield name, mutate(frames[index], chance, frames[other])
            continue
        header, payload = parts[index]
        # The digests at the front of most payloads let nothing else through when damaged.
        kept = chance.choice((0, 8, 8, 17, 17)) if header[-1] != 1 else 0
        payload = payload[:kept] + mutate(payload[kept:], chance, parts[other][1])
        yield name, repair(header, payload)


@dataclasses.dataclass(frozen=True)
class ChunkResult:
    """What came of one chunk, and the worker's peak memory (kB) before and after it."""

    tally: Tally
    crashes: list[str]
    worker: int
    peak_before: int
    peak_after: int


def fuzz_chunk(seed: int, chunk: int, num_inputs: int) -> ChunkResult:
    """Run one chunk of inputs through every decoder, warnings counted as crashes."""
    frames, decoders = make_frames(), make_decoders()
    tally: Tally = {name: collections.Counter() for name in MUTATIONS}
    crashes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for frame in frames:
            assert try_decoders(frame, decoders)[0] == "values", frame.hex()
        before = peak_memory()
        for name, data in make_inputs(frames, seed=seed, chunk=chunk, num_inputs=num_inputs):
            outcome, report = try_decoders(data, decoders)
            tally[name][outcome] += 1
            if outcome == "crashes":
                crashes.append(f"{report}\n  input ({name}): {data.hex()}")
    return ChunkResult(tally, crashes, os.getpid(), before, peak_memory())


def peak_memory() -> int:
    """Peak resident memory of this process so far, kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def try_decoders(data: bytes, decoders: dict[str, Decoder]) -> tuple[str, str]:
    """ "values" if some decoder reads the input, "errors" if all refuse it, "crashes" otherwise."""
    outcome = "errors"
    for name, decode in (("peek", peek), *decoders.items()):
        try:
            decode(data)
        except CodecError:
            continue
        except Exception as error:
            return "crashes", f"{name}: {type(error).__name__}: {error}"
        if name != "peek":
            outcome = "values"
    return outcome, ""


def run(*, seed: int, num_inputs: int, num_workers: int) -> tuple[Tally, list[str], int]:
    """Spread the chunks over workers; return tally, crash reports, growth of peak memory (kB)."""
    total: Tally = {name: collections.Counter() for name in MUTATIONS}
    crashes: list[str] = []
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    done = 0
    started = time.monotonic()
    sizes = [min(CHUNK_INPUTS, num_inputs - i) for i in range(0, num_inputs, CHUNK_INPUTS)]
    # A spawned worker starts from nothing, so that its peak memory is its own.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        jobs = [pool.submit(fuzz_chunk, seed, chunk, size) for chunk, size in enumerate(sizes)]
        for job in concurrent.futures.as_completed(jobs):
            result = job.result()
            for name, counts in result.tally.items():
                total[name].update(counts)
            for report in result.crashes:
                print(report, file=sys.stderr)
            crashes += result.crashes
            worker = result.worker
            first[worker] = min(result.peak_before, first.get(worker, result.peak_before))
            last[worker] = max(result.peak_after, last.get(worker, 0))
            done += sum(counts.total() for counts in result.tally.values())
            rate = done / (time.monotonic() - started)
            print(f"{done} of {num_inputs} inputs, {rate:.0f} a second", file=sys.stderr)
    return total, crashes, max((last[worker] - first[worker] for worker in last), default=0)


def make_row(case: str, counts: collections.Counter[str]) -> dict[str, str | int]:
    """One line of `--json`."""
    outcomes = {key: counts[key] for key in ("values", "errors", "crashes")}
    return {"bench": "fuzz_codec", "case": case, "inputs": counts.total(), **outcomes}


def main() -> int:
    """Run the command; the exit status is 1 if any input crashed a decoder."""
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz_codec", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many inputs to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_INPUTS} inputs")
    parser.add_argument("--json", action="store_true", help="one JSON object a mutation")
    arguments = parser.parse_args()
    num_inputs = QUICK_INPUTS if arguments.quick else arguments.inputs
    started = time.monotonic()
    tally, crashes, growth = run(
        seed=arguments.seed, num_inputs=num_inputs, num_workers=arguments.workers
    )
    seconds = time.monotonic() - started
    overall: collections.Counter[str] = sum(tally.values(), collections.Counter())
    rows = [make_row(name, counts) for name, counts in tally.items()] + [make_row("all", overall)]
    for row in rows:
        if arguments.json:
            print(json.dumps(row))
        else:
            print("{case:>14}: {inputs} inputs, {values} values, {errors} refused".format(**row))
    summary = (
        f"{num_inputs} inputs: {len(crashes)} crashes, {overall['values']} values, "
        f"{overall['errors']} refused, {num_inputs / seconds:.0f} inputs a second, "
        f"peak memory grew by {growth / 1024:.1f} MiB"
    )
    print(summary, file=sys.stderr if arguments.json else sys.stdout)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
