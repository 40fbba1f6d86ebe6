"""Importance scores of weights. High always means keep.

Each function returns name -> score: float32, detached, of the parameter's shape and on its
device. The model is left as it was: parameters, gradients, buffers, modes and requires_grad.
A `loss` takes the model and returns its scalar loss on data of the caller's choice, in the
train or eval mode that the caller set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from sparsemodel.errors import MaskError
from sparsemodel.masks.probe import Loss, differentiable, named_weights, probing, scalar_loss

Criterion = Callable[..., dict[str, torch.Tensor]]
"""Takes some of model, names, loss, input_shape, generator; returns name -> score."""


def magnitude(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """|θ|, the absolute value of each weight.

    Raises:
        MaskError: the model has no parameter of such a name.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.load_state_dict({"weight": torch.tensor([[-3.0, 2.0]])})
    <All keys matched successfully>
    >>> magnitude(layer, ["weight"])
    {'weight': tensor([[3., 2.]])}
    """
    return {name: p.detach().abs().float() for name, p in named_weights(model, names).items()}


def random(
    model: nn.Module, names: Iterable[str], *, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Independent uniform scores in [0, 1): the baseline that every criterion has to beat.

    Raises:
        MaskError: the model has no parameter of such a name.
    """
    return {
        name: torch.rand(p.shape, generator=generator, device=generator.device).to(p.device)
        for name, p in named_weights(model, names).items()
    }


def snip(model: nn.Module, names: Iterable[str], loss: Loss) -> dict[str, torch.Tensor]:
    """|g θ|: to first order, how much the loss moves when a weight is removed.

    The paper divides by the sum over all weights, which changes no order and is left out.
    Source: Lee et al., SNIP (ICLR 2019), equation 6.

    Raises:
        MaskError: an unknown name, or a loss that is no scalar or has no gradient.
    """
    return {name: product.abs() for name, product in _gradient_products(model, names, loss).items()}


def taylor(model: nn.Module, names: Iterable[str], loss: Loss) -> dict[str, torch.Tensor]:
    """(g θ)²: the squared change of the loss, to first order, when a weight is removed.

    Ranks as `snip` on one loss; unlike it, it is the term to average over several losses.
    Source: Molchanov et al., Importance Estimation for Neural Network Pruning (CVPR 2019),
    equation 8.

    Raises:
        MaskError: an unknown name, or a loss that is no scalar or has no gradient.
    """
    return {
        name: product.square() for name, product in _gradient_products(model, names, loss).items()
    }


def grasp(model: nn.Module, names: Iterable[str], loss: Loss) -> dict[str, torch.Tensor]:
    """θ (H g): how much of the gradient flow gᵀg, halved, is lost when a weight is removed.

    The paper's score is −θ (H g), of which it removes the *highest* values; the sign is turned
    here so that high means keep. H and g are those of the named parameters alone. The paper
    softens its cross-entropy with temperature 200; that belongs to the caller's `loss`.
    Source: Wang et al., Picking Winning Tickets Before Training (ICLR 2020), equation 8.

    Raises:
        MaskError: an unknown name, or a loss that is no scalar or has no gradient.
    """
    with differentiable(model, names) as weights:
        parameters = list(weights.values())
        gradients = torch.autograd.grad(
            scalar_loss(model, loss), parameters, create_graph=True, materialize_grads=True
        )
        flow = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
        if not flow.requires_grad:  # a loss linear in these weights has no curvature
            return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
        products = torch.autograd.grad(flow, parameters, materialize_grads=True)
        return {
            name: (weight.detach() * product).float()
            for (name, weight), product in zip(weights.items(), products, strict=True)
        }


def synflow(
    model: nn.Module, names: Iterable[str], input_shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """|θ| ∂R/∂|θ| / R: the share of all input-to-output flow that passes through a weight.

    R is the sum of the outputs of the model in eval mode for an input of ones, when every
    parameter is replaced by its absolute value. R is computed in float64, and the division by
    it, which changes no order, keeps deep models inside the range of float32. Without biases
    the scores of a layer that all paths cross sum to 1. Scored once, wide layers would lose all
    their weights first; `prune` takes the published 100 steps.
    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving
    synaptic flow (NeurIPS 2020), equation 2 and algorithm 1.

    Args:
        model: takes one floating-point tensor and returns one.
        names: parameters to score.
        input_shape: shape of one sample, without the batch dimension.

    Raises:
        MaskError: an unknown name, another model, or a flow that is zero or not finite.
    """
    weights = named_weights(model, names)
    with probing(model), torch.enable_grad():
        model.eval()
        state = {
            name: tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
            for name, tensor in model.named_buffers()
        }
        positive = {
            name: p.detach().double().abs().requires_grad_(name in weights)
            for name, p in model.named_parameters()
        }
        device = next(iter(weights.values())).device
        ones = torch.ones(1, *input_shape, dtype=torch.float64, device=device)
        try:
            flow = scalar_loss(
                model, lambda m: torch.func.functional_call(m, {**state, **positive}, (ones,)).sum()
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise MaskError(
                "synflow feeds the model ones of a floating-point type and adds up its outputs, "
                f"which this model does not allow ({error}); networks of tokens need another "
                "criterion"
            ) from error
        if not (torch.isfinite(flow) and flow > 0):
            raise MaskError(
                f"the synaptic flow of the model is {flow.item():g}, expected a finite positive "
                "number; some layer passes nothing on, or its values are not finite"
            )
        products = torch.autograd.grad(
            flow, [positive[name] for name in weights], materialize_grads=True
        )
    return {
        name: (positive[name].detach() * product / flow.detach()).float()
        for name, product in zip(weights, products, strict=True)
    }


def _gradient_products(
    model: nn.Module, names: Iterable[str], loss: Loss
) -> dict[str, torch.Tensor]:
    """Name -> g θ, float32."""
    with differentiable(model, names) as weights:
        gradients = torch.autograd.grad(
            scalar_loss(model, loss), list(weights.values()), materialize_grads=True
        )
        return {
            name: (gradient * weight.detach()).float()
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
