"""The gate: what a module does that a substitute for it would drop, found and named.

Sparse layers, copies, fused forwards and plans stand in for modules. They know parameters, buffers
and the forward of a class; hooks, ties and the like change what a module computes or what its
gradients do. Each is refused here, by the name of the module, before anything stands in for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.parameter import is_lazy

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.base import SparseLayer

FUSED_FORWARD = "fused_by_sparsemodel"  # marks a forward that `fusing` has put in

_CALLED = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "full backward pre-hooks",
    "_backward_hooks": "backward hooks",
}
_OF_STATE = {
    "_state_dict_pre_hooks": "state-dict hooks",
    "_state_dict_hooks": "state-dict hooks",
    "_load_state_dict_pre_hooks": "load-state-dict hooks",
    "_load_state_dict_post_hooks": "load-state-dict hooks",
}
_GLOBAL = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
# The last is nn.MultiheadAttention's own, which reads the weight behind forward's back: a sparse
# layer has one to read.
_REPLACEABLE: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv2d,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)
# Subclasses of other libraries that compute the same outside of torchscript, which sparse layers
# refuse.
_REPLACEABLE_BY_NAME = ("timm.layers.linear.Linear",)


def module_title(name: str, module: nn.Module) -> str:
    """How messages name a module."""
    return f"the {type(module).__name__} {name!r}"


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or ("forward" in own and not _is_ours(module, own["forward"]))
    )


def _is_ours(module: nn.Module, forward: Any) -> bool:
    """Whether a forward on an instance is that of `fusing`, or its class's after unpickling."""
    own = getattr(forward, "__func__", None) is type(module).forward
    return own or hasattr(forward, FUSED_FORWARD)


def extras(module: nn.Module) -> str:
    """What calling a module does beside the forward of its class, in words; "" where nothing."""
    found = [words for hooks, words in _CALLED.items() if getattr(module, hooks, None)]
    if not found and not is_plain(module):
        found = ["a forward that was set on the instance"]
    return " and ".join(found)


def has_global_hooks() -> bool:
    """Whether torch calls hooks for every module (`register_module_forward_hook` and others)."""
    return any(getattr(torch_modules, hooks) for hooks in _GLOBAL)


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether something is called when the tensor's gradient comes."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def check_plain(model: nn.Module, error: type[SparseModelError]) -> None:
    """Refuse a model of which not every call and gradient is its classes' own.

    Raises:
        error: hooks on a module, on a parameter or for all modules, a forward that was set on an
            instance, or parameters that share memory.
    """
    if has_global_hooks():
        raise error("there are hooks for all modules (torch's global ones); remove them first")
    for name, module in model.named_modules():
        if found := extras(module):
            raise error(f"{module_title(name, module)} has {found}; remove them first")
    _check_parameters(model, error)


def check_copied(model: nn.Module) -> None:
    """Refuse a model of which a copy would be another.

    Raises:
        SparseModelError: hooks on a parameter, parameters that share memory without being one,
            an attribute that is computed of other tensors, or a function on a module that keeps a
            module or parameter of the model to itself.
    """
    _check_parameters(model, SparseModelError)
    kept = {id(module) for module in model.modules()}
    kept |= {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        title = module_title(path, module)
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                raise SparseModelError(
                    f"{title} holds {key!r}, which is computed of other tensors (as by weight_norm "
                    "with hooks, or by torch.nn.utils.prune, whose mask Mask.from_torch keeps, "
                    "before prune.remove) and cannot be copied; make it a parameter or a buffer"
                )
        for key, function in _functions(module):
            if _keeps(function, kept):
                raise SparseModelError(
                    f"{title} holds a function in {key!r} that keeps a part of the model, "
                    "so that a copy would still use the old one; make it a method"
                )


def replaceable_layer(model: nn.Module, name: str, shape: tuple[int, ...]) -> nn.Module:
    """The layer whose weight is called `name`, if a sparse one computes the same in its place.

    Raises:
        MaskError: the model has no such weight, or it has another shape.
        SparseModelError: the layer has no sparse form, or does what that would not carry.
    """
    path, _, leaf = name.rpartition(".")
    layer = dict(model.named_modules(remove_duplicate=False)).get(path)
    if isinstance(layer, SparseLayer) and leaf == "weight":
        found, weight = tuple(layer.weight_shape), layer.values
    else:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if layer is None or name not in parameters:
            raise MaskError(
                f"the model has no parameter {name!r} that the mask names{_hint(layer)}"
            )
        weight = parameters[name]
        if is_lazy(weight):
            raise SparseModelError(f"{name!r} has no size yet; run the model once on a batch")
        found = tuple(weight.shape)
    if found != shape:
        raise MaskError(f"mask of {name!r} has shape {shape}, its weight {found}")
    if problem := _obstacle(model, path, layer, leaf, weight):
        raise SparseModelError(problem)
    return layer


def _obstacle(
    model: nn.Module, path: str, layer: nn.Module, leaf: str, weight: nn.Parameter
) -> str:
    """Why a sparse layer would not compute the same; "" where it would."""
    name = f"{path}.{leaf}" if path else leaf
    # Subclasses may compute anything.
    is_known = (
        type(layer) in _REPLACEABLE
        or isinstance(layer, SparseLayer)
        or _class_title(layer) in _REPLACEABLE_BY_NAME
    )
    if leaf != "weight" or not is_known:
        return (
            f"{name!r} belongs to a {_class_title(layer)}, which has no sparse form (nn.Linear and "
            "nn.Conv2d have); leave it out of the mask, or train dense weights under it"
        )
    for own in ("weight", "values", "bias"):
        other = _tied(model, layer, layer._parameters.get(own))
        if other:
            what = f"the bias beside {name!r}" if own == "bias" else f"the weight {name!r}"
            return f"{what} is tied to {other}; leave the layer out of the mask or untie it"
    hooks = extras(layer) or next(
        (words for hooks, words in _OF_STATE.items() if getattr(layer, hooks, None)), ""
    )
    if hooks:
        return f"the layer of {name!r} has hooks ({hooks}); remove them before sparsify"
    known = {"weight", "values", "bias", "row_ptr", "cols", "transposed", "bits", "blocks"}
    odd = sorted({*layer._parameters, *layer._buffers, *layer._modules} - known)
    if odd:
        return f"the layer of {name!r} also has {odd}, which its sparse form would drop"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return (
            f"the weight {name!r} is a {type(weight).__name__} of {weight.dtype}; sparse layers "
            "take a plain nn.Parameter of real floats"
        )
    return ""


def _class_title(layer: nn.Module) -> str:
    kind = type(layer)
    home = "" if kind.__module__.startswith("torch.") else f"{kind.__module__}."
    return f"{home}{kind.__name__}"


def _hint(layer: nn.Module | None) -> str:
    """What to do where a weight is not a parameter but made of others at each call."""
    if layer is None or not isinstance(getattr(layer, "weight", None), torch.Tensor):
        return ""
    return (
        f"; the weight of that {type(layer).__name__} is made anew at each call (by "
        "torch.nn.utils.prune, weight_norm or the like): remove that first"
    )


def _tied(model: nn.Module, layer: nn.Module, parameter: nn.Parameter | None) -> list[str]:
    """Other modules' names for a parameter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        name
        for name, other in model.named_parameters(remove_duplicate=False)
        if other is parameter and modules[name.rpartition(".")[0]] is not layer
    ]


def _check_parameters(model: nn.Module, error: type[SparseModelError]) -> None:
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if has_hooks(parameter):
            raise error(
                f"the parameter {name!r} has hooks on its gradients, which would not be called; "
                "remove them first"
            )
    if pair := _overlap(named):
        raise error(
            f"{pair[0]!r} and {pair[1]!r} are two parameters in the same memory, so that a step of "
            "one moves the other; make them one parameter or give each its own memory"
        )


def _overlap(named: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
    """Two tensors of which one lies, at least partly, where the other does."""
    spans = sorted(
        (start, end, name) for name, tensor in named.items() for start, end in _span(tensor)
    )
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            return name, other
    return None


def _span(tensor: torch.Tensor) -> Iterable[tuple[int, int]]:
    """First and last address of a tensor's elements; none where it has no memory of its own."""
    if (
        is_lazy(tensor)
        or tensor.layout is not torch.strided
        or tensor.is_meta
        or not tensor.numel()
    ):
        return
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    if start:
        yield start, start + (reach + 1) * tensor.element_size()


def _functions(module: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """The plain functions that lie on an instance, its hooks among them."""
    for key, value in vars(module).items():
        if key == "_compiled_call_impl":  # of module.compile(), which copies leave behind
            continue
        held = value.values() if isinstance(value, dict) else [value]
        yield from ((key, each) for each in held if isinstance(each, FunctionType))


def _keeps(function: FunctionType, parts: set[int]) -> bool:
    """Whether a function, or one that it holds, has one of these objects or a method of it."""
    functions, seen = [function], set()
    while functions:
        looked_at = functions.pop()
        seen.add(looked_at)
        for cell in looked_at.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if id(content) in parts or id(getattr(content, "__self__", None)) in parts:
                return True
            if isinstance(content, FunctionType) and content not in seen:
                functions.append(content)
    return False
