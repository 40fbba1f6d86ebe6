"""From a torch model to the program that describes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from sparsemodel.errors import PlanError, ProgramError
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLayer
from sparsemodel.layers.tracing import is_leaf
from sparsemodel.plans.rules import Operation, conv_geometry
from sparsemodel.plans.trace import trace_operations
from sparsemodel.runtime.pattern import Shape
from sparsemodel.runtime.program import Node, Program


def program_of(model: nn.Module, input_shape: Sequence[int]) -> Program:
    """The operations of a model as data, for a `Trainer` elsewhere.

    A model and its sparsified form have the same program: tensors are dense and have the names of
    the dense model's state.

    Args:
        model: float32; what a `TrainingPlan` takes, on any device.
        input_shape: of one sample, (C, H, W) or (features,).

    Raises:
        PlanError: an operation that plans do not know, which the message names, a parameter that
            two layers share or that is frozen, or a tensor that is not float32.

    >>> program = program_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (4,))
    >>> [node.kind for node in program.nodes], program.classes
    (['input', 'conv', 'relu', 'conv'], 2)
    """
    operations = trace_operations(model, tuple(input_shape))
    seen: dict[int, str] = {}
    for name, tensor, _ in _float_state(model):
        if tensor.dtype != torch.float32:
            raise PlanError(f"{name!r}: a program needs a state in float32, got {tensor.dtype}")
        if id(tensor) in seen:
            raise PlanError(f"{name!r} and {seen[id(tensor)]!r} share a parameter")
        seen[id(tensor)] = name
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise PlanError(
            f"{frozen[0]!r} is frozen, and a program says nothing of that: who runs it would train "
            "it; call requires_grad_() on it, or train the model through its modules"
        )
    return traced_program(model, operations)


def traced_program(model: nn.Module, operations: Sequence[Operation]) -> Program:
    """The program of a model whose operations are known, in their order.

    Raises:
        PlanError: numbers that no program has.
    """
    alone = is_leaf(model)  # a model that is one layer has a state without paths
    nodes = tuple(_node(operation, "" if alone else operation.name) for operation in operations)
    tensors = tuple((name, shape) for name, _, shape in _float_state(model))
    try:
        return Program(operations[0].shape, nodes, tensors)
    except ProgramError as error:
        raise PlanError(str(error)) from None


def _float_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Shape]]:
    """Name, tensor and dense shape of all floating-point state, in the dense model's order."""
    for path, module in model.named_modules(remove_duplicate=False):
        lasting = module._buffers.keys() - module._non_persistent_buffers_set
        own = [
            *module._parameters.items(),
            *((n, b) for n, b in module._buffers.items() if n in lasting),
        ]
        for name, tensor in own:
            if tensor is None or not tensor.is_floating_point():
                continue
            if isinstance(module, SparseLayer) and name == "values":
                yield _joined(path, "weight"), tensor, tuple(module.weight_shape)
            else:
                yield _joined(path, name), tensor, tuple(tensor.shape)


def _node(operation: Operation, path: str) -> Node:
    module = operation.module
    node = Node(operation.kind, operation.inputs, operation.name)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return replace(
            node,
            weight=_own(module, path, "weight"),
            bias=_own(module, path, "bias"),
            mean=_own(module, path, "running_mean"),
            variance=_own(module, path, "running_var"),
            eps=module.eps,
            momentum=module.momentum,
            relu=operation.relu,
        )
    if isinstance(module, SparseLayer | nn.Linear | nn.Conv2d):
        node = replace(node, weight=_joined(path, "weight"), bias=_own(module, path, "bias"))
    if isinstance(module, SparseConv2d | nn.Conv2d):
        g = conv_geometry(module, operation.name)
        return replace(
            node, stride=g.stride, padding=g.padding, dilation=g.dilation, groups=g.groups
        )
    if operation.window is None:
        return node
    w = operation.window
    return replace(
        node,
        kernel=(w.kernel_h, w.kernel_w),
        stride=(w.stride_h, w.stride_w),
        padding=(w.pad_h, w.pad_w),
        include_pad=operation.include_pad,
    )


def _own(module: nn.Module, path: str, name: str) -> str | None:
    """The full name of a module's parameter or buffer; None where it has none."""
    return None if getattr(module, name) is None else _joined(path, name)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
