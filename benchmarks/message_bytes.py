"""Bytes of the messages of a round: sparse frames against Flower's own dense arrays.

    python -m benchmarks.message_bytes [--quick] [--json]

Both sides are Flower records of the same model, sized by the same function: every object as
the transport sends it, headers included. Masks and mask differences are compared with their
entropy (ratio: entropy / bytes, at most 1).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import nn

from fedprune.exchange.messages import TrainRequest
from fedprune.flower.wire import encode_request, record_bytes
from prunelab.networks import build_model, float_state
from sparsemodel.codec import (
    encode_mask,
    encode_mask_delta,
    mask_delta_entropy_bytes,
    mask_entropy_bytes,
)
from sparsemodel.masks.adjust import prune_and_grow
from sparsemodel.masks.criteria import magnitude
from sparsemodel.masks.distribution import uniform
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
MODELS = ("resnet8", "resnet20", "resnet18", "vgg11_bn")
SHARE_MOVED = 0.3  # FedTiny's largest step: alpha


def rows(models: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One row a model, density and kind of message."""
    for name in models:
        model = build_model(name, num_classes=10, input_shape=(3, 32, 32), seed=0)
        dense = record_bytes(RecordDict({"arrays": ArrayRecord(model.state_dict())}))
        prunable = sum(p.numel() for p in prunable_parameters(model).values())
        other = sum(v.numel() for v in float_state(model).values()) - prunable
        for density in DENSITIES:
            mask = layerwise_mask(model, density)
            mask.apply(model)
            held = frozenset([mask.digest()])
            request = TrainRequest(round_index=0, weights=float_state(model), mask=mask)
            steady = record_bytes(encode_request(request, held=held, base=None, dtype="fp32"))
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
            entropy = mask_entropy_bytes(mask.csr())
            yield row(
                f"{name}, mask",
                density,
                ours=len(encode_mask(mask.csr())),
                peer=entropy,
                peer_name="entropy",
            )
            old, new = mask.csr(), adjusted(mask).csr()
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


def layerwise_mask(model: nn.Module, density: float) -> Mask:
    """Layer-wise magnitude mask."""
    parameters = prunable_parameters(model)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return mask_from_scores(magnitude(model, list(parameters)), uniform(shapes, density))


def adjusted(mask: Mask) -> Mask:
    """The mask after one prune-and-grow step of every layer, with random scores."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.rand(shape, generator=generator) + 1 for n, shape in mask.shapes().items()}
    counts, candidates = {}, {}
    for name, active in mask.counts().items():
        pruned = mask.pruned(name)
        counts[name] = min(math.floor(SHARE_MOVED * active), len(pruned))
        chosen = torch.randperm(len(pruned), generator=generator)[: counts[name]]
        candidates[name] = (pruned[chosen].sort().values, torch.ones(counts[name]))
    return prune_and_grow(mask, weights, candidates, counts)


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
