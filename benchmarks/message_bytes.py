"""Bytes of the messages of a round: sparse frames against Flower's own dense arrays.

    python -m benchmarks.message_bytes [--quick] [--json]

Both sides are Flower records of the same model, sized by the same function: every object as
the transport sends it, headers included. Masks, mask differences, and which weights' changes
travel up, are compared with their entropy (ratio: entropy / bytes, at most 1).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from torch import nn

from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.exchange.uplink import CHOSEN, Uplink, compress, weights
from fedprune.flower.wire import ProgramText, encode_reply, encode_request, record_bytes
from prunelab.networks import build_model, float_state
from sparsemodel.codec import (
    encode_mask,
    encode_mask_delta,
    mask_delta_entropy_bytes,
    mask_entropy_bytes,
)
from sparsemodel.masks.distribution import uniform
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.adjust import prune_and_grow, prune_to_largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

INPUT = (3, 32, 32)
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
MODELS = ("resnet8", "resnet20", "resnet18", "vgg11_bn")
SHARE_MOVED = 0.3  # FedTiny's largest step: alpha
UPLINKS = tuple(Uplink(*way) for way in (("fp16", 1.0), ("int8", 1.0), ("int8", 0.1)))


def rows(models: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One row a model, density and kind of message."""
    for name in models:
        model = build_model(name, num_classes=10, input_shape=INPUT, seed=0)
        dense = record_bytes(RecordDict({"arrays": ArrayRecord(model.state_dict())}))
        prunable = sum(p.numel() for p in prunable_parameters(model).values())
        other = sum(v.numel() for v in float_state(model).values()) - prunable
        program = ProgramText.of(program_of(model, INPUT))
        for density in DENSITIES:
            state = pruned(model, density)
            assert state.patterns is not None
            steady = steady_round(state, program)
            yield row(
                f"{name}, steady round",
                density,
                ours=steady,
                peer=dense,
                peer_name="dense ArrayRecord of Flower",
            )
            limit = math.floor(4 * (1.05 * density * prunable + other))
            yield row(
                f"{name}, steady round",
                density,
                ours=steady,
                peer=limit,
                peer_name="1.05 d dense + unpruned",
            )
            for uplink in UPLINKS:
                sent, which = uplink_message(state, uplink)
                case = f"{name}, up, {uplink.dtype}, {uplink.topk:.0%}"
                yield row(
                    case, density, ours=sent, peer=dense, peer_name="dense ArrayRecord of Flower"
                )
                if which:
                    size = sum(v.size for v in weights(state).values.values())
                    some = np.arange(math.ceil(uplink.topk * size))
                    one = Patterns({"all": Pattern.from_positions((size,), some)})
                    bound = mask_entropy_bytes(one)
                    yield row(
                        f"{case}: which", density, ours=which, peer=bound, peer_name="entropy"
                    )
            entropy = mask_entropy_bytes(state.patterns)
            yield row(
                f"{name}, mask",
                density,
                ours=len(encode_mask(state.patterns)),
                peer=entropy,
                peer_name="entropy",
            )
            old, new = state.patterns, adjusted(state.patterns)
            delta = len(encode_mask_delta(old, new))
            bound = mask_delta_entropy_bytes(old, new)
            yield row(f"{name}, mask change", density, ours=delta, peer=bound, peer_name="entropy")


def row(case: str, density: float, *, ours: float, peer: float, peer_name: str) -> dict[str, Any]:
    return {
        "bench": "message_bytes",
        "case": case,
        "density": density,
        "ours": round(ours),
        "peer": round(peer),
        "peer_name": peer_name,
        "unit": "B",
        "ratio": peer / ours,
    }


def steady_round(state: SparseState, program: ProgramText) -> int:
    """Bytes of the second message of a run, to a client that holds the program and the mask."""
    request = Request("train", states={MODEL: state})
    first = encode_request(request, program=program, held=frozenset(), base=None, dtype="fp32")
    again = encode_request(request, program=program, held=first.held, base=None, dtype="fp32")
    return again.size


def uplink_message(state: SparseState, uplink: Uplink) -> tuple[int, int]:
    """Bytes of an answer in a steady round, and those in it that say which weights it is of."""
    random = np.random.default_rng(0)
    trained = {
        name: value + 0.01 * random.standard_normal(value.shape, np.float32)
        for name, value in state.values.items()
    }
    update, _ = compress(SparseState(trained, state.patterns), state, uplink)
    request = Request("train", states={MODEL: state})
    reply = Reply(100, {"loss": 0.1}, {MODEL: state})
    record = encode_reply(reply, request, dtype=uplink.dtype, update=update)
    return record_bytes(record), len(update.get(CHOSEN, b""))


def pruned(model: nn.Module, density: float) -> SparseState:
    """The model's state under a layer-wise magnitude mask."""
    values = {name: value.numpy() for name, value in float_state(model).items()}
    shapes = {name: tuple(p.shape) for name, p in prunable_parameters(model).items()}
    return prune_to_largest(SparseState(values), uniform(shapes, density))


def adjusted(patterns: Patterns) -> Patterns:
    """The mask after one prune-and-grow step of every layer, with random scores."""
    random = np.random.default_rng(0)
    values, counts, candidates = {}, {}, {}
    for name, pattern in patterns.items():
        free = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())
        values[name] = 1 + random.random(pattern.num_active, np.float32)
        counts[name] = min(math.floor(SHARE_MOVED * pattern.num_active), len(free))
        chosen = np.sort(random.choice(free, counts[name], replace=False))
        candidates[name] = (chosen, np.ones(counts[name], np.float32))
    after = prune_and_grow(SparseState(values, patterns), candidates, counts).patterns
    assert after is not None
    return after


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.message_bytes")
    parser.add_argument("--quick", action="store_true", help="resnet8 and resnet20 only")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    arguments = parser.parse_args()
    for entry in rows(MODELS[:2] if arguments.quick else MODELS):
        if arguments.json:
            print(json.dumps(entry), flush=True)
        else:
            print(
                f"{entry['case']:<24} d={entry['density']:<5g} {entry['ours']:>11,} B  "
                f"{entry['ratio']:7.3f} x  {entry['peer_name']} ({entry['peer']:,} B)",
                flush=True,
            )


if __name__ == "__main__":
    main()
