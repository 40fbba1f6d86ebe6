"""All criteria of units by name, with what they are and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsemodel.calibration import collect
from sparsemodel.calibration.blocks import Block
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.units import depth, scores
from sparsemodel.units.unit import BLOCKS, CHANNELS, HEADS, HIDDEN, Key

Needs = Callable[[Sequence[Block]], dict[str, list[str]]]
"""blocks -> kind of statistic -> modules, as `calibrate` takes them."""


@dataclass(frozen=True)
class UnitCriterion:
    """A criterion in the terms of Cheng et al., A Survey on Deep Neural Network Pruning (2024).

    Attributes:
        score: (model, blocks, calibration) -> (kind of unit, block) -> scores.
        needs: which statistics it looks at.
        units: kinds that it scores.
        criterion: what it goes by.
        source: paper.
        when: units are removed.
    """

    score: Callable[[nn.Module, Sequence[Block], Calibration], dict[Key, Tensor]]
    needs: Needs
    units: tuple[str, ...]
    criterion: str
    source: str
    when: str = "after training"


def _nothing(blocks: Sequence[Block]) -> dict[str, list[str]]:
    del blocks
    return {}


def _of_outputs(kind: str) -> Needs:
    """A kind of statistic of the layers that heads and channels end in."""
    return lambda blocks: {kind: [name for b in blocks for name in (b.attention_out, b.down)]}


def _of_blocks(blocks: Sequence[Block]) -> dict[str, list[str]]:
    return {collect.ANGLES: [block.name for block in blocks]}


def _of_norms(blocks: Sequence[Block]) -> dict[str, list[str]]:
    return {collect.SEQUENCES_OUT: [name for block in blocks for name in block.norms]}


def _of_sizes(blocks: Sequence[Block]) -> dict[str, list[str]]:
    return {
        collect.HEADS: [block.attention_out for block in blocks],
        collect.INPUTS: [block.down for block in blocks],
    }


def _of_channels(blocks: Sequence[Block]) -> dict[str, list[str]]:
    return {collect.INPUTS: [block.down for block in blocks]}


_WIDTH = (HEADS, CHANNELS)
_FLAP = "An et al., AAAI 2024"
_MINITRON = "Muralidharan et al., NeurIPS 2024"

UNIT_CRITERIA: dict[str, UnitCriterion] = {
    "wifv": UnitCriterion(
        scores.wifv, _of_outputs(collect.INPUTS), _WIDTH, "variance of inputs, weighted", _FLAP
    ),
    "ifv": UnitCriterion(
        scores.ifv, _of_outputs(collect.INPUTS), _WIDTH, "variance of inputs", _FLAP
    ),
    "wifn": UnitCriterion(
        scores.wifn, _of_outputs(collect.INPUTS), _WIDTH, "norm of inputs, weighted", _FLAP
    ),
    "amp": UnitCriterion(
        scores.amp, _of_sizes, _WIDTH, "size of activations", "Mugnaini et al., 2025"
    ),
    "minitron": UnitCriterion(
        scores.minitron, _of_outputs(collect.SEQUENCES), _WIDTH, "size of activations", _MINITRON
    ),
    "cfsp": UnitCriterion(
        scores.cfsp, _of_channels, (CHANNELS,), "shares of weights, norm of inputs",
        "Wang et al., COLING 2025",
    ),
    "magnitude": UnitCriterion(scores.magnitude, _nothing, _WIDTH, "size of weights", "baseline"),
    "random": UnitCriterion(scores.random, _nothing, _WIDTH, "chance", "baseline"),
    "minitron-blocks": UnitCriterion(
        depth.minitron_blocks, _of_blocks, (BLOCKS,), "cosine of input and output", _MINITRON
    ),
    "cfsp-blocks": UnitCriterion(
        depth.cfsp_blocks, _of_blocks, (BLOCKS,), "angle of input and output",
        "Wang et al., COLING 2025",
    ),
    "minitron-hidden": UnitCriterion(
        depth.minitron_hidden, _of_norms, (HIDDEN,), "size of activations", _MINITRON
    ),
}  # fmt: skip


def needs_of(names: Iterable[str], blocks: Sequence[Block]) -> Mapping[str, list[str]]:
    """What `calibrate` has to collect for some criteria, so that one pass serves them all.

    Give it `num_heads` of a block too.

    >>> block = Block("0", "q", "k", "v", "o", "up", "down", "", ("norm",), 4, 2, 8)
    >>> needs_of(["wifv", "amp"], [block])
    {'inputs': ['o', 'down'], 'heads': ['o']}
    """
    joint: dict[str, list[str]] = {}
    for name in names:
        for kind, modules in UNIT_CRITERIA[name].needs(blocks).items():
            known = joint.setdefault(kind, [])
            known.extend(module for module in modules if module not in known)
    return joint
