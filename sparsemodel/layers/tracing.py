"""The graph of a model's forward pass, layers of this package seen as wholes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from sparsemodel.errors import SparseModelError
from sparsemodel.layers.linear_and_conv import SparseLayer
from sparsemodel.layers.norm_and_pool import FUSED


def trace_forward(model: nn.Module) -> fx.Graph:
    """The graph of one forward call, the same in training and in evaluation.

    The model is left as it was, modes included.

    Raises:
        SparseModelError: torch.fx cannot trace the model, or it computes something else in
            training than in evaluation (other than what its layers do by themselves).
    """
    attributes = set(model.__dict__)
    graphs = []
    try:
        for training in (True, False):
            with _mode(model, training):
                graphs.append(_Tracer().trace(model))
    except Exception as error:  # whatever a model's own code raises on symbolic inputs
        raise SparseModelError(f"{type(model).__name__} cannot be traced: {error}") from error
    finally:
        for name in set(model.__dict__) - attributes:  # constants that tracing left behind
            del model.__dict__[name]
    if str(graphs[0]) != str(graphs[1]):
        raise SparseModelError(
            f"{type(model).__name__} computes something else in training than in evaluation"
        )
    return graphs[0]


def is_leaf(module: nn.Module, name: str = "") -> bool:
    """Whether a traced graph calls `module` as a whole."""
    return _Tracer().is_leaf_module(module, name)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward method."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class _Proxy(fx.Proxy):
    """Tells `x += y` from `x = x + y`: other names of x see the sum."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, (SparseLayer, *FUSED.values()))
        return leaf or super().is_leaf_module(module, name)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training or evaluation mode inside; as they were on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
