"""Fusing batch norm, residual addition and ReLU through a whole model, where it can be traced."""

from __future__ import annotations

import functools
import operator
import types
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels import pooling
from sparsemodel.layers.gate import FUSED_FORWARD, is_plain
from sparsemodel.layers.norm_and_pool import FusedBatchNorm2d
from sparsemodel.layers.norm_fusion import Fusion, find_fusions
from sparsemodel.layers.tracing import Watch, is_leaf, trace_forward

_RELUS = {torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_"}
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, torch.relu_, functional.relu_}
_POOLS = {
    functional.max_pool2d: pooling.max_pool2d,
    functional.avg_pool2d: pooling.avg_pool2d,
    functional.adaptive_avg_pool2d: pooling.adaptive_avg_pool2d,
}
_WATCH = "_watched_by_sparsemodel"


def fuse_forward(model: nn.Module) -> bool:
    """Give `model` a forward method that fuses batch norm, addition and ReLU, in place.

    Modules, parameters and their names stay; only `model.forward` is replaced, by the code of
    its traced graph. Nothing is changed where `trace_forward` refuses the model, where it has
    hooks on containers, or has nothing to fuse. A model that gets hooks, other modules or other
    settings later computes by its class's forward as long as it has them.

    Args:
        model: its batch norms are FusedBatchNorm2d already.

    Returns:
        Whether forward was replaced.
    """
    graph = _trace(model)
    if graph is None:
        return False
    modules = dict(model.named_modules())
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    places, absorbed = _rewrite(graph, modules)
    if not places:
        return False
    traced = type(fx.GraphModule(model, graph)).forward
    plain = type(model).forward

    @functools.wraps(plain)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() or not self.__dict__[_WATCH].change():
            return traced(self, *arguments, **named)
        return plain(self, *arguments, **named)

    setattr(forward, FUSED_FORWARD, True)
    inside = [m for name, m in modules.items() if name not in called or name in absorbed]
    model.__dict__[_WATCH] = Watch(model, inside)
    model.__dict__["forward"] = types.MethodType(forward, model)
    return True


def unfuse_forward(model: nn.Module) -> None:
    """Undo `fuse_forward`: the class's forward is in force again."""
    if model.__dict__.pop(_WATCH, None) is not None:
        model.__dict__.pop("forward", None)


def _trace(model: nn.Module) -> fx.Graph | None:
    """The graph of one forward call, if it is known whole and calls no hooks of containers."""
    hooked = any(
        not is_plain(module)
        for name, module in model.named_modules()
        if not is_leaf(module, name) and (module is not model or "forward" in vars(model))
    )
    if hooked or is_leaf(model):
        return None
    try:
        graph = trace_forward(model)
    except SparseModelError:
        return None
    constants = any(
        node.op == "get_attr" and "_constant" in str(node.target) for node in graph.nodes
    )
    return None if constants else graph


def _rewrite(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[int, set[str]]:
    """Fuse what can be fused; how many places were, and the modules that take part in them."""
    places, absorbed = 0, set()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _POOLS:
            node.target = _POOLS[node.target]
            places += 1
    for fusion in find_fusions(graph.nodes, _View(modules)):
        parts = (fusion.norm, fusion.addition, fusion.relu)
        absorbed |= {str(n.target) for n in parts if n is not None and n.op == "call_module"}
        _replace(fusion)
        places += 1
    return places, absorbed


def _replace(fusion: Fusion[fx.Node]) -> None:
    """Put one call of the batch norm in the place of what ends the fusion; drop the rest."""
    norm, addition, last = fusion.norm, fusion.addition, fusion.last
    residual = None
    if addition is not None:
        left, right = addition.args
        residual = right if left is norm else left
    with last.graph.inserting_before(last):
        arguments = (norm.args[0], residual, fusion.relu is not None)
        fused = last.graph.call_module(str(norm.target), arguments)
    last.replace_all_uses_with(fused)
    last.graph.erase_node(last)
    if addition is not None and addition is not last:
        addition.graph.erase_node(addition)
    norm.graph.erase_node(norm)


class _View:
    """A traced graph, as `find_fusions` looks at it."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules

    def is_norm(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        norm = self._modules[str(node.target)]
        if type(norm) is not FusedBatchNorm2d or not is_plain(norm):
            return False
        if len(node.args) != 1 or node.kwargs or len(node.users) != 1:
            return False
        source = node.args[0]
        return isinstance(source, fx.Node) and not any(
            _changes(user, self._modules) for user in source.users
        )

    def summands(self, node: fx.Node) -> list[fx.Node]:
        known = node.op in {"call_function", "call_method"} and node.target in _ADDITIONS
        if not known or node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
            return []
        both = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if len(both) != 2:
            return []
        # `residual += norm` also changes the residual for others; `norm += residual` is seen by
        # none.
        return both[:1] if _changes(node) else both

    def before_relu(self, node: fx.Node) -> fx.Node | None:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or len(before.users) != 1:
            return None
        if node.op == "call_module":
            relu = self._modules[str(node.target)]
            return before if type(relu) is nn.ReLU and is_plain(relu) else None
        known = node.op in {"call_function", "call_method"} and node.target in _RELUS
        return before if known else None


def _changes(node: fx.Node, modules: dict[str, nn.Module] | None = None) -> bool:
    """Whether `node` may write into its first argument."""
    if node.op == "call_module" and modules is not None:
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in _IN_PLACE or bool(node.kwargs.get("inplace", False))
