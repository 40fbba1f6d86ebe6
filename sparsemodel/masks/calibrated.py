"""Importance scores of a linear layer's weights from calibration statistics. High means keep.

Each takes the model, names of weights [out, in] of linear layers, and a calibration, with the
statistics of those layers that its entry in `registry.CRITERIA` names. They rank weights of one
output against each other: `prune(within="row")`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsemodel.calibration.collect import GRADIENTS, GRAM, INPUTS
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.errors import CalibrationError
from sparsemodel.masks.probe import named_weights

DAMPING = 0.01  # of the mean of H's diagonal, as SparseGPT has it


def wanda(model: nn.Module, names: Iterable[str], calibration: Calibration) -> dict[str, Tensor]:
    """|w_ij| · ‖x_j‖₂: its square is what removing that one weight changes the output by, squared.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models (ICLR
    2024), equation 1.

    Raises:
        MaskError: an unknown name.
        CalibrationError: the calibration lacks INPUTS of a layer.
    """
    return {
        name: weight.detach().abs().float() * _norms(calibration, name, weight)
        for name, weight in named_weights(model, names).items()
    }


def gblm(
    model: nn.Module, names: Iterable[str], calibration: Calibration, *, alpha: float = 100.0
) -> dict[str, Tensor]:
    """|w_ij| · (‖x_j‖₂ + α ‖g_ij‖₂), where g_ij is the loss's gradient, one for each sequence.

    With α = 0 it is Wanda.
    Source: Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models
    (2023).

    Raises:
        MaskError: an unknown name.
        CalibrationError: the calibration lacks INPUTS or GRADIENTS of a layer.
    """
    scores = {}
    for name, weight in named_weights(model, names).items():
        gradients = calibration.sums(GRADIENTS, layer_of(name)).totals["squares"].sqrt()
        size = _norms(calibration, name, weight) + alpha * gradients.float().to(weight.device)
        scores[name] = weight.detach().abs().float() * size
    return scores


def obs(model: nn.Module, names: Iterable[str], calibration: Calibration) -> dict[str, Tensor]:
    """w_ij² / [H⁻¹]_jj, H = XᵀX: what the output changes by where the other weights make up for it.

    H is damped by 1 % of the mean of its diagonal. Inputs that are all zero count for nothing.
    Source: Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon
    (NIPS 1992); with one H for all rows as Frantar and Alistarh, SparseGPT (ICML 2023).

    Raises:
        MaskError: an unknown name.
        CalibrationError: the calibration lacks GRAM of a layer.
    """
    scores = {}
    for name, weight in named_weights(model, names).items():
        products = calibration.sums(GRAM, layer_of(name)).totals["products"]
        diagonal = products.diagonal()
        added = DAMPING * diagonal.mean() + (diagonal == 0)  # H is invertible then
        inverse = torch.linalg.inv(products + torch.diag(added)).diagonal()
        gains = torch.where(diagonal > 0, 1.0 / inverse, 0.0).float().to(weight.device)
        scores[name] = weight.detach().float().square() * gains
    return scores


def taylor_mixed(
    model: nn.Module, names: Iterable[str], calibration: Calibration
) -> dict[str, Tensor]:
    """|w g − ½ w² F|: the loss's change to second order, F the mean squared gradient of sequences.

    Source: Ma et al., LLM-Pruner (NeurIPS 2023), equation 5, with g the mean gradient.

    Raises:
        MaskError: an unknown name.
        CalibrationError: the calibration lacks GRADIENTS of a layer.
    """
    scores = {}
    for name, weight in named_weights(model, names).items():
        found = calibration.sums(GRADIENTS, layer_of(name))
        values = weight.detach().double().cpu()
        change = values * found.mean("gradient") - 0.5 * values.square() * found.mean("squares")
        scores[name] = change.abs().float().to(weight.device)
    return scores


def dpruner(
    model: nn.Module, names: Iterable[str], calibration: Calibration, *, strength: float = 0.1
) -> dict[str, Tensor]:
    """|w g′ − ½ w² F|: what a domain needs, with what all text needs weighed in.

    g and F are the mean gradient and the mean squared gradient of the domain's sequences, as in
    `taylor_mixed`, which it is with a strength of 0. G, the scores of `obs`, is of open text:

        calibrate(model, open_text, {GRAM: layers}).merge(
            calibrate(model, domain, {GRADIENTS: layers}))

    The domain's loss is added λ Σ G (w′ − w)², where w′ is w after a step of gradient descent at
    rate η. Then w′ − w = −η g, and by the chain rule, with F for the second derivative of the
    loss, the gradient becomes g′ = g (1 + 2 λ η² G F).

    Source: Zhang et al., Pruning as a Domain-specific LLM Extractor (findings of NAACL 2024), the
    loss and its Taylor score. How g′ follows from them, and η, is our reading: 2 η² is one over the
    mean of G F in each layer, so that `strength`, λ, is the mean share that is added to g, whatever
    the unit of the loss and the number of tokens.

    Raises:
        MaskError: an unknown name.
        CalibrationError: the calibration lacks GRAM or GRADIENTS of a layer.
    """
    general = obs(model, names := list(names), calibration)
    scores = {}
    for name, weight in named_weights(model, names).items():
        found = calibration.sums(GRADIENTS, layer_of(name))
        values, squares = weight.detach().double().cpu(), found.mean("squares")
        shared = general[name].double().cpu() * squares
        mean = shared.mean()
        added = strength * shared / mean if mean > 0 else torch.zeros_like(shared)
        change = values * found.mean("gradient") * (1 + added) - 0.5 * values.square() * squares
        scores[name] = change.abs().float().to(weight.device)
    return scores


def layer_of(name: str) -> str:
    """The linear layer that a weight is of."""
    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        raise CalibrationError(f"{name!r}: statistics are of layers, whose weights end in .weight")
    return module


def _norms(calibration: Calibration, name: str, weight: Tensor) -> Tensor:
    norms = calibration.moments(INPUTS, layer_of(name)).norms
    if weight.dim() != 2 or weight.shape[1] != len(norms):
        raise CalibrationError(
            f"{name!r} is {tuple(weight.shape)}, its inputs have {len(norms)} features; expected a "
            "linear layer's weight [out, in]"
        )
    return norms.float().to(weight.device)
