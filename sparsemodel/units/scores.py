"""Scores of heads and channels after training. High always means keep.

Each function takes a model, its blocks and their statistics, and returns (kind, block) -> scores
[units], float64 on the CPU; the model is left as it was. What it needs of `calibrate` is said by
`statistics` in its entry of sparsemodel.units.registry.UNIT_CRITERIA. A head is scored alone, with
grouped queries too; `allocation.by_groups` makes scores of KV groups of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block
from sparsemodel.calibration.collect import HEADS as HEAD_SIZES
from sparsemodel.calibration.collect import INPUTS, SEQUENCES
from sparsemodel.calibration.statistics import Calibration, Moments
from sparsemodel.units.unit import CHANNELS, HEADS, Key, Scores, weight_of

_Columns = Callable[[Tensor, Moments], Tensor]
"""(weight [out, in], moments of its input) -> score of each column, [in]."""


def wifv(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration, *, standard: bool = False
) -> dict[Key, Tensor]:
    """FLAP's weighted input feature variance, Var(x_j) · Σ_i W_ij².

    It is the mean squared change of the layer's output when column j is removed and its mean is
    kept as a bias. x and W are those of the layers that units end in, the attention's output and
    `down`. The scores of an attention's columns are squared; a head has the mean of its columns.
    Source: An et al., Fluctuation-based Adaptive Structured Pruning (AAAI 2024), and
    its code for the square. Departs from the code in its variance, which is exact here: that of
    all tokens.

    Args:
        standard: columns are standardised over their layer before heads are averaged, as the
            paper compares layers (`allocation.pooled`). The order in a layer is the same.

    Raises:
        CalibrationError: statistics that are missing.
    """
    return _by_columns(
        model, blocks, calibration, lambda w, x: x.variance * _sum(w.square()), standard=standard
    )


def ifv(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration, *, standard: bool = False
) -> dict[Key, Tensor]:
    """FLAP's input feature variance, Var(x_j); all else as `wifv`."""
    return _by_columns(model, blocks, calibration, lambda w, x: x.variance, standard=standard)


def wifn(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration, *, standard: bool = False
) -> dict[Key, Tensor]:
    """FLAP's weighted input feature norm, ‖x_j‖₂ · mean_i |W_ij|; all else as `wifv`."""
    return _by_columns(
        model, blocks, calibration, lambda w, x: x.norms * _sum(w.abs()) / len(w), standard=standard
    )


def amp(model: nn.Module, blocks: Sequence[Block], calibration: Calibration) -> dict[Key, Tensor]:
    """How large the activations of a unit are, in the mean over tokens.

    Of a head ‖x_h W_hᵀ‖₁, what it adds to the residual stream; of a channel |x_j| before `down`.
    Source: Mugnaini et al., Efficient LLMs with AMP: Attention Heads and MLP Pruning (2025).

    Raises:
        CalibrationError: statistics that are missing.
    """
    del model
    scores = {}
    for block in blocks:
        heads = calibration.sums(HEAD_SIZES, block.attention_out)
        channels = calibration.moments(INPUTS, block.down)
        scores[HEADS, block.name] = heads.mean("sizes")
        scores[CHANNELS, block.name] = channels.absolute / max(1, channels.count)
    return scores


def minitron(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration
) -> dict[Key, Tensor]:
    """√Σ over sequences of (mean over tokens of |x_j|)², x the input of `down`.

    A head has the ℓ₂ norm of that over its dimensions at the input of the attention's output
    layer. The paper ranks heads inside their KV group: `allocation.ranked_in_groups`.
    Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation
    (NeurIPS 2024), with the aggregations (mean, ℓ₂) of its code.

    Raises:
        CalibrationError: statistics that are missing.
    """
    del model
    scores = {}
    for block in blocks:
        squares = calibration.sums(SEQUENCES, block.attention_out).totals["squares"]
        scores[HEADS, block.name] = squares.reshape(block.num_heads, -1).sum(1).sqrt()
        scores[CHANNELS, block.name] = (
            calibration.sums(SEQUENCES, block.down).totals["squares"].sqrt()
        )
    return scores


def cfsp(
    model: nn.Module,
    blocks: Sequence[Block],
    calibration: Calibration,
    *,
    inner_power: float = 1.0,
    outer_power: float = 1.0,
) -> dict[Key, Tensor]:
    """CFSP's fine score of channels, ‖x_j‖^c · mean_i (D_ij + U_ij + G_ij).

    D, U and G are |W_down| · ‖x‖^b, |W_up|ᵀ and |W_gate|ᵀ [hidden, channels], each row divided by
    its sum: which part of a hidden dimension is a channel's. x is the input of `down`.
    Source: Wang et al., CFSP (COLING 2025), the recommended setting of its code. Departs from the
    code, which divides columns by their sums: averaged over those columns the weights cancel, and
    what remains is 3 ‖x_j‖^c / hidden.

    Args:
        inner_power: b.
        outer_power: c.

    Raises:
        CalibrationError: statistics that are missing.
    """
    scores = {}
    for block in blocks:
        norms = calibration.moments(INPUTS, block.down).norms
        down = _float(weight_of(model, block.down)).abs()
        inside = norms.pow(inner_power).to(down)
        total = _mean_share(down * inside)
        for name in (block.up, block.gate):
            if name:
                total = total + _mean_share(_float(weight_of(model, name)).abs().T)
        scores[CHANNELS, block.name] = total * norms.pow(outer_power)
    return scores


def magnitude(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration | None = None
) -> dict[Key, Tensor]:
    """The sum of the squares of a unit's weights, biases left out.

    Of a key and a value that several heads share, each head has its part.
    """
    del calibration
    scores = {}
    for block in blocks:
        heads, groups = block.num_heads, block.num_groups
        query, key, value = (
            _sum(_float(weight_of(model, name)).square().T)
            for name in (block.query, block.key, block.value)
        )
        out = _sum(_float(weight_of(model, block.attention_out)).square())
        shared = (key + value).reshape(groups, -1).sum(1) * (groups / heads)
        scores[HEADS, block.name] = (query + out).reshape(heads, -1).sum(
            1
        ) + shared.repeat_interleave(heads // groups)
        rows = [
            _sum(_float(weight_of(model, name)).square().T)
            for name in (block.up, block.gate)
            if name
        ]
        down = _sum(_float(weight_of(model, block.down)).square())
        scores[CHANNELS, block.name] = sum(rows, down)
    return scores


def random(
    model: nn.Module,
    blocks: Sequence[Block],
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
) -> dict[Key, Tensor]:
    """Independent uniform scores in [0, 1): the baseline that every criterion has to beat."""
    del calibration
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, block.name): torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
        for block in blocks
        for kind, size in (
            (HEADS, block.num_heads),
            (CHANNELS, weight_of(model, block.down).shape[1]),
        )
    }


def reversed_scores(scores: Scores) -> dict[Key, Tensor]:
    """The opposite order: a criterion that says something must be worse turned round."""
    return {key: -score for key, score in scores.items()}


def standard_scores(values: Tensor) -> Tensor:
    """(x − mean) / standard deviation of the population; zeros where all are equal."""
    if bool((values == values[0]).all()):
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / centred.square().mean().sqrt()


def _by_columns(
    model: nn.Module,
    blocks: Sequence[Block],
    calibration: Calibration,
    score: _Columns,
    *,
    standard: bool,
) -> dict[Key, Tensor]:
    def columns(layer: str) -> Tensor:
        weight = _float(weight_of(model, layer))
        return score(weight, calibration.moments(INPUTS, layer))

    scores = {}
    for block in blocks:
        heads, channels = columns(block.attention_out).square(), columns(block.down)
        if standard:
            heads, channels = standard_scores(heads), standard_scores(channels)
        scores[HEADS, block.name] = heads.reshape(block.num_heads, -1).mean(1)
        scores[CHANNELS, block.name] = channels
    return scores


def _mean_share(sizes: Tensor) -> Tensor:
    """Each channel's part of a row of sizes [rows, channels], in the mean over rows."""
    totals = sizes.sum(1, keepdim=True)
    return _sum(sizes / torch.where(totals > 0, totals, 1.0)) / len(sizes)


def _float(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _sum(values: Tensor) -> Tensor:
    """Over rows, float64 on the CPU."""
    return values.sum(0).double().cpu()
