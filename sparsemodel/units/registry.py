"""All criteria of units by name, with what they are and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsemodel.calibration import collect
from sparsemodel.calibration.blocks import Block
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.taxonomy import ANY, Traits
from sparsemodel.units import depth, scores
from sparsemodel.units.unit import BLOCKS, CHANNELS, HEADS, HIDDEN, Key


@dataclass(frozen=True)
class UnitCriterion(Traits):
    """A criterion of units, after training where nothing else is said.

    Attributes:
        score: (model, blocks, calibration) -> (kind of unit, block) -> scores.
        statistics: kind -> of which modules of a block `calibrate` has to collect it.
    """

    score: Callable[[nn.Module, Sequence[Block], Calibration], dict[Key, Tensor]]
    statistics: Mapping[str, Callable[[Block], Iterable[str]]]

    @property
    def data(self) -> tuple[str, ...]:
        """What it looks at beside the weights."""
        return tuple(self.statistics)


def _ends(block: Block) -> Iterable[str]:
    """The layers that heads and channels end in."""
    return block.attention_out, block.down


def _attention_out(block: Block) -> Iterable[str]:
    return (block.attention_out,)


def _down(block: Block) -> Iterable[str]:
    return (block.down,)


def _itself(block: Block) -> Iterable[str]:
    return (block.name,)


def _norms(block: Block) -> Iterable[str]:
    return block.norms


_WIDTH = (HEADS, CHANNELS)
_FLAP = "An et al., AAAI 2024"
_CFSP = "Wang et al., COLING 2025"
_MINITRON = "Muralidharan et al., NeurIPS 2024"

UNIT_CRITERIA: dict[str, UnitCriterion] = {
    "wifv": UnitCriterion(
        scores.wifv, {collect.INPUTS: _ends}, units=_WIDTH,
        criterion="input variance, weighted", source=_FLAP,
    ),
    "ifv": UnitCriterion(
        scores.ifv, {collect.INPUTS: _ends}, units=_WIDTH,
        criterion="input variance", source=_FLAP,
    ),
    "wifn": UnitCriterion(
        scores.wifn, {collect.INPUTS: _ends}, units=_WIDTH,
        criterion="input norm, weighted", source=_FLAP,
    ),
    "amp": UnitCriterion(
        scores.amp, {collect.HEADS: _attention_out, collect.INPUTS: _down}, units=_WIDTH,
        criterion="size of activations", source="Mugnaini et al., 2025",
    ),
    "minitron": UnitCriterion(
        scores.minitron, {collect.SEQUENCES: _ends}, units=_WIDTH,
        criterion="size of activations", source=_MINITRON,
    ),
    "cfsp": UnitCriterion(
        scores.cfsp, {collect.INPUTS: _down}, units=(CHANNELS,),
        criterion="weights, input norm", source=_CFSP,
    ),
    "magnitude": UnitCriterion(
        scores.magnitude, {}, units=_WIDTH, criterion="size", source="baseline"
    ),
    "random": UnitCriterion(
        scores.random, {}, units=_WIDTH, criterion="chance", source="baseline", when=ANY
    ),
    "minitron-blocks": UnitCriterion(
        depth.minitron_blocks, {collect.ANGLES: _itself}, units=(BLOCKS,),
        criterion="cosine of in- and output", source=_MINITRON,
    ),
    "cfsp-blocks": UnitCriterion(
        depth.cfsp_blocks, {collect.ANGLES: _itself}, units=(BLOCKS,),
        criterion="angle of in- and output", source=_CFSP,
    ),
    "minitron-hidden": UnitCriterion(
        depth.minitron_hidden, {collect.SEQUENCES_OUT: _norms}, units=(HIDDEN,),
        criterion="size of activations", source=_MINITRON,
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
        for kind, modules_of in UNIT_CRITERIA[name].statistics.items():
            known = joint.setdefault(kind, [])
            found = (module for block in blocks for module in modules_of(block))
            known.extend(module for module in found if module not in known)
    return joint
