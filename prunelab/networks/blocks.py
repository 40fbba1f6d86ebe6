"""A network's prunable parameters in blocks from the input to the output.

Blocks are found in the module tree: what lies under one name belongs together. Names come in the
order of registration, which is that of the forward pass in most networks; where it is not, or
where another cut is wanted, a hint says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import chain, groupby, pairwise

from torch import nn

from prunelab.errors import ModelError
from sparsemodel.masks.mask import prunable_parameters

GRANULARITIES = ("layer", "block", "entire")
FEWEST, MOST = 3, 12
"""About as many blocks an automatic cut makes."""
SMALL = 3
"""Layers of a part that is not cut where others can be."""


def parameter_blocks(
    model: nn.Module, *, granularity: str, hint: Sequence[str] | int = ()
) -> list[list[str]]:
    """Prunable parameters in groups from the input to the output.

    Args:
        granularity: "layer" (each its own), "block" or "entire" (one group). Blocks are the
            stages of a residual network, the classifier with the last; VGG's parts between max
            pools, where the first holds only the stem, with the classifier as the fifth; and of
            other networks about 3 to 12 parts of the module tree: stages, layers of an encoder,
            or several of them together. Single layers go with their neighbours, the classifier
            with the last block.
        hint: where to cut instead, for "block": names of modules, in the order from the input to
            the output, or how many parts of a name tell blocks apart. What lies under none of
            the names goes with the block before it.

    Raises:
        ModelError: another granularity, or a hint that names no module with prunable parameters.

    >>> network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    >>> parameter_blocks(network, granularity="block", hint=["1", "3"])
    [['1.weight', '2.weight'], ['3.weight', '4.weight']]
    """
    names = list(prunable_parameters(model))
    if granularity == "layer":
        return [[name] for name in names]
    if granularity == "entire":
        return [names]
    if granularity != "block":
        raise ModelError(f"granularity: expected layer, block or entire; got {granularity!r}")
    if isinstance(hint, int) and hint:
        return _parted(names, hint)
    if not isinstance(hint, int) and hint:
        return _blocks_by_hint(names, hint)
    groups: dict[int, list[str]] = {}
    for name in names:
        stage = _stage_of(model, name, last=max(groups, default=None))
        if stage is None:
            return _blocks_by_tree(names)
        groups.setdefault(stage, []).append(name)
    return [groups[stage] for stage in sorted(groups)]


def _stage_of(model: nn.Module, name: str, *, last: int | None) -> int | None:
    """Number of a parameter's stage, None where stages are not known; `last` is that before it."""
    first, *rest = name.split(".")
    if first.startswith("layer") and first[5:].isdigit():
        return int(first[5:])
    features = _vgg_features(model)
    if first in ("features", "classifier") and features is not None:
        before = features if first == "classifier" else features[: int(rest[0])]
        return sum(isinstance(layer, nn.MaxPool2d) for layer in before)
    if first == "fc" and last is not None:
        return last
    return None


def _vgg_features(model: nn.Module) -> nn.Sequential | None:
    """A network's features where they are a list of layers with several max pools in it."""
    features = getattr(model, "features", None)
    if not isinstance(features, nn.Sequential):
        return None
    is_list = all(name.isdigit() for name, _ in features.named_children())
    pools = sum(isinstance(part, nn.MaxPool2d) for part in features)
    return features if is_list and pools > 1 else None


def _blocks_by_hint(names: list[str], hint: Sequence[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {prefix: [] for prefix in hint}
    current = ""
    for name in names:
        under = [prefix for prefix in groups if name.startswith(f"{prefix}.")]
        current = max(under, key=len, default=current)
        groups.setdefault(current, []).append(name)
    first = groups.pop("", [])  # what comes before all of them
    for prefix, group in groups.items():
        if not group:
            paths = sorted({part for name in names for part in _paths(name)})
            close = difflib.get_close_matches(prefix, paths, n=3, cutoff=0.0)
            raise ModelError(
                f"blocks: no prunable layer lies under {prefix!r}; such as {', '.join(close)} do"
            )
    blocks = list(groups.values())
    return [first + blocks[0], *blocks[1:]]


def _paths(name: str) -> list[str]:
    """The modules around a parameter."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _blocks_by_tree(names: list[str]) -> list[list[str]]:
    """Parts of the module tree, taken apart as long as there are too few of them."""
    parts = _children(names)
    tail = 0  # parts behind the last that was taken apart: the classifier
    while len(blocks := _joined(parts, tail)) < FEWEST:
        large = [
            i for i, part in enumerate(parts) if len(part) > SMALL and len(_children(part)) > 1
        ]
        if not large:
            break
        tail = len(parts) - 1 - large[-1]
        parts = [
            new
            for i, part in enumerate(parts)
            for new in (_children(part) if i in large else [part])
        ]
    if len(blocks) <= MOST:
        return blocks
    count = -(-len(blocks) // -(-len(blocks) // MOST))
    bounds = [len(blocks) * i // count for i in range(count + 1)]
    return [list(chain(*blocks[a:b])) for a, b in pairwise(bounds)]


def _children(names: list[str]) -> list[list[str]]:
    """Names in the parts that the first difference between them makes."""
    for depth in range(1, max(name.count(".") for name in names) + 1):
        if len(parts := _parted(names, depth)) > 1:
            return parts
    return [names]


def _parted(names: list[str], depth: int) -> list[list[str]]:
    """Consecutive names that share so many parts of their paths."""
    groups = groupby(names, key=lambda name: name.split(".")[:-1][:depth])
    return [list(group) for _, group in groups]


def _joined(parts: list[list[str]], tail: int) -> list[list[str]]:
    """Parts as blocks: single layers with the part behind them, the last ones with that before."""
    blocks = [list(part) for part in parts]
    if tail:
        blocks = [*blocks[: -tail - 1], list(chain(*blocks[-tail - 1 :]))]
    if sum(len(block) > 1 for block in blocks) < 2:
        if len(blocks) > 2 and len(blocks[-1]) == 1:
            blocks = [*blocks[:-2], blocks[-2] + blocks[-1]]
        return blocks
    joined: list[list[str]] = []
    waiting: list[str] = []
    for block in blocks:
        waiting = waiting + block
        if len(block) > 1:
            joined.append(waiting)
            waiting = []
    joined[-1] += waiting
    return joined
