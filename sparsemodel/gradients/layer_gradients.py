"""What the parameters of each kind of layer get from a sample: one rule a kind.

A rule knows one forward method; a subclass with a forward of its own is another layer. Layers
without a rule and without layers inside are differentiated anew, a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sparsemodel.gradients.sample_gradients import (
    Active,
    Convolution,
    Factored,
    Recomputed,
    Rows,
    SampleGradient,
    Vector,
)
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.kernels.layout import contiguous_nchw
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear
from sparsemodel.layers.norm_and_pool import FusedBatchNorm2d

Tensor = torch.Tensor
BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass
class Call:
    """One call of a layer: what came in, what went out, and the gradient of that."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def input(self) -> Tensor:
        """The first argument."""
        x: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return x


Rule = Callable[[Any, Call, set[str]], dict[str, SampleGradient]]
"""(layer, call, wanted names of its parameters) -> name -> gradient of each sample."""


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule for a layer's forward method, if there is one."""
    if "forward" in layer.__dict__:
        return None
    kind = type(layer)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return _transposed_linear
    known = (base for base in kind.__mro__ if base in RULES)
    return next((RULES[base] for base in known if kind.forward is base.forward), None)


def obstacle(layer: nn.Module, wanted: set[str]) -> str | None:
    """Why a layer's gradients cannot be told apart by sample; None if they can."""
    rule, kind = rule_of(layer), type(layer).__name__
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "an Embedding with max_norm changes its weights as it is called"
    if isinstance(layer, nn.Embedding) and layer.scale_grad_by_freq:
        return "an Embedding with scale_grad_by_freq mixes the samples of a batch"
    if rule is None and any(
        next(child.parameters(), None) is not None for child in layer.children()
    ):
        return f"{kind} has parameters of its own beside layers that have some, and no rule"
    odd = wanted - {"weight", "bias", "values"}
    if rule is not None and odd:
        return f"{kind} has {', '.join(sorted(odd))} instead of a plain weight"
    return None


def mixing_layer(model: nn.Module) -> tuple[str, str] | None:
    """Name of a layer by which one sample's loss depends on the others, and what to do."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and (module.training or module.running_mean is None):
            cure = "call model.eval()" if module.track_running_stats else "track running statistics"
            return name, f"{type(module).__name__} takes its statistics over the batch: {cure}"
    return None


def recompute(layer: nn.Module, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    """The rule for all other layers: vmap over samples of the layer's own derivative."""
    batch = len(call.gradient)
    parameters = {name: p.detach() for name, p in layer.named_parameters(recurse=False)}
    batched = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch for x in call.args]
    keys = [key for key, x in call.kwargs.items() if isinstance(x, Tensor) and len(x) == batch]

    def of(name: str) -> Callable[[slice], Tensor]:
        def gradient(dy: Tensor, *inputs: Tensor) -> Tensor:
            given = iter(x.unsqueeze(0) for x in inputs)
            args = [next(given) if one else x for one, x in zip(batched, call.args, strict=True)]
            kwargs = {key: next(given) if key in keys else x for key, x in call.kwargs.items()}

            def forward(parameter: Tensor) -> Any:
                own = {**parameters, name: parameter}
                return torch.func.functional_call(layer, own, tuple(args), kwargs)

            pull: Any = torch.func.vjp(forward, parameters[name])[1]
            part: Tensor = pull(dy.unsqueeze(0))[0]
            return _float(part.reshape(-1))

        def gradients(samples: slice) -> Tensor:
            inputs = [x for x, one in zip(call.args, batched, strict=True) if one]
            inputs += [call.kwargs[key] for key in keys]
            parts = [x[samples] for x in (call.gradient, *inputs)]
            return torch.func.vmap(gradient)(*parts)

        return gradients

    return {name: Recomputed(of(name), batch, parameters[name]) for name in wanted}


def _linear(layer: nn.Linear, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    x, dy = _positions(call)
    return _with_bias(Factored(dy, x), dy, "weight", wanted)


def _transposed_linear(layer: nn.Module, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    """transformers' Conv1D, a linear layer with weight [in, out]."""
    x, dy = _positions(call)
    return _with_bias(Factored(x, dy), dy, "weight", wanted)


def _sparse_linear(layer: SparseLinear, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    x, dy = _positions(call)
    return _with_bias(Active(Factored(dy, x), layer.row_ptr, layer.cols), dy, "values", wanted)


def _conv(layer: nn.Conv2d, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    x, dy = _alike(call.input, call.gradient)
    padding = (0, 0)
    if layer.padding_mode != "zeros" or layer.padding == "same":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    elif not isinstance(layer.padding, str):
        padding = (layer.padding[0], layer.padding[1])
    geometry = ConvGeometry(
        layer.out_channels,
        layer.in_channels,
        *_pair(layer.kernel_size),
        *_pair(layer.stride),
        *padding,
        *_pair(layer.dilation),
        layer.groups,
    )
    return _with_bias(Convolution(x, dy, geometry), dy.flatten(2).mT, "weight", wanted)


def _sparse_conv(layer: SparseConv2d, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    x, dy = map(contiguous_nchw, _alike(call.input, call.gradient))
    gradient = Active(Convolution(x, dy, layer.geometry), layer.row_ptr, layer.cols)
    return _with_bias(gradient, dy.flatten(2).mT, "values", wanted)


def _embedding(layer: nn.Embedding, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    ids = call.input.reshape(len(call.gradient), -1).long()
    dy = _float(call.gradient).reshape(*ids.shape, -1)
    if layer.padding_idx is not None:
        dy = dy.masked_fill((ids == layer.padding_idx).unsqueeze(2), 0)
    return {"weight": Rows(ids, dy, layer.num_embeddings)}


def _layer_norm(layer: nn.LayerNorm, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    x, dy = _alike(call.input, call.gradient)
    normal = functional.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    return _affine(normal, dy, wanted, dims=list(range(1, x.dim() - len(layer.normalized_shape))))


def _rms_norm(layer: nn.RMSNorm, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    x, dy = _alike(call.input, call.gradient)
    normal = functional.rms_norm(x, layer.normalized_shape, None, layer.eps)
    return _affine(normal, dy, wanted, dims=list(range(1, x.dim() - len(layer.normalized_shape))))


def _group_norm(layer: nn.GroupNorm, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    x, dy = _alike(call.input, call.gradient)
    normal = functional.group_norm(x, layer.num_groups, None, None, layer.eps)
    return _affine(normal, dy, wanted, dims=list(range(2, x.dim())))


def _batch_norm(layer: BatchNorm, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    """In eval mode; of the fused one, behind the addition and ReLU that its call had."""
    x, dy = _alike(call.input, call.gradient)
    mean, var = layer.running_mean, layer.running_var
    normal = functional.batch_norm(x, mean, var, eps=layer.eps)
    return _affine(normal, dy, wanted, dims=list(range(2, x.dim())))


def _fused_norm(layer: FusedBatchNorm2d, call: Call, wanted: set[str]) -> dict[str, SampleGradient]:
    cut = call.args[2] if len(call.args) > 2 else call.kwargs.get("relu", False)
    if cut:
        call.gradient = call.gradient * (call.output > 0)
    return _batch_norm(layer, call, wanted)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    FusedBatchNorm2d: _fused_norm,
    SparseLinear: _sparse_linear,
    SparseConv2d: _sparse_conv,
}


def _with_bias(
    weight: SampleGradient, dy: Tensor, name: str, wanted: set[str]
) -> dict[str, SampleGradient]:
    """The gradients of a weight and of the bias behind it; dy [B, T, out]."""
    found: dict[str, SampleGradient] = {name: weight, "bias": Vector(dy.sum(1))}
    return {name: found[name] for name in wanted}


def _affine(
    normal: Tensor, dy: Tensor, wanted: set[str], *, dims: list[int]
) -> dict[str, SampleGradient]:
    """The gradients of a scale and an offset that are alike along `dims`."""
    found: dict[str, SampleGradient] = {}
    if "weight" in wanted:
        product = normal.mul_(dy)
        found["weight"] = Vector((product.sum(dims) if dims else product).flatten(1))
    if "bias" in wanted:
        found["bias"] = Vector((dy.sum(dims) if dims else dy).flatten(1))
    return found


def _positions(call: Call) -> tuple[Tensor, Tensor]:
    """Input and gradient of a linear layer as [B, T, width]."""
    x, dy = _alike(call.input, call.gradient)
    return x.reshape(len(dy), -1, x.shape[-1]), dy.reshape(len(dy), -1, dy.shape[-1])


def _alike(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, of single precision at least: under autocast they differ."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    return x.detach().to(dtype), dy.to(dtype)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    return sizes[0], sizes[1]


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
