"""The graph of a model's forward pass, layers of this package seen as wholes."""

from __future__ import annotations

import copy
import operator
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from sparsemodel.errors import SparseModelError
from sparsemodel.layers.gate import extras, has_global_hooks, is_plain, module_title
from sparsemodel.layers.linear_and_conv import SparseLayer
from sparsemodel.layers.norm_and_pool import FUSED

# torch.fx patches nn.Module for the whole process while it traces.
_TRACING = threading.RLock()

# A forward may be steered by such attributes of its module; hooks and parts are looked at apart.
_SETTINGS = (bool, int, float, str, tuple, type(None))


def trace_forward(model: nn.Module) -> fx.Graph:
    """The graph of one forward call, the same in training and in evaluation.

    The model is left as it was, modes included. Threads take turns, and may use other models
    meanwhile.

    Raises:
        SparseModelError: torch.fx cannot trace the model, or a graph would not be all of it: it
            computes something else in training than in evaluation (other than what its layers do
            by themselves), a part without gradients or under autocast, draws random numbers
            outside of its layers, or changes its own attributes.
    """
    with _TRACING:
        graph, other = (_traced(model, training) for training in (True, False))
    if str(graph) != str(other):
        differing = next((n for n, o in zip(graph.nodes, other.nodes, strict=False)
                          if n.format_node() != o.format_node()), None)  # fmt: skip
        raise SparseModelError(
            f"{type(model).__name__} computes something else in training than in evaluation"
            f"{place_of(differing)}"
        )
    return graph


def place_of(node: fx.Node | None) -> str:
    """In whose forward an operation stands, as a part of a message; "" in that of the model."""
    stack = {} if node is None else node.meta.get("nn_module_stack", {})
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    return f", in the {kind.__name__} {path!r}"


def _traced(model: nn.Module, training: bool) -> fx.Graph:
    for _ in range(2):  # of random states, another thread may have moved one meanwhile
        before = _random_states()
        with _mode(model, training), torch.set_grad_enabled(training), _unchanged(model):
            try:
                with _WithoutDraws():
                    graph = _Tracer().trace(model)
            except MemoryError:
                raise
            except Exception as error:  # whatever a model's own code raises on symbols
                where = f"{error}{getattr(error, _PLACE, '')}"
                raise _untraceable(model, where) from error
        if before == _random_states():
            return graph
    raise _untraceable(model, _DRAWS)


def _untraceable(model: nn.Module, why: str) -> SparseModelError:
    return SparseModelError(f"{type(model).__name__} cannot be traced: {why}")


def first_called(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> nn.Module | None:
    """The first module of a kind that a forward call reaches; None where none is, or not known.

    The model is left as it was. What comes after that module need not be traceable.
    """
    with _TRACING, _mode(model, model.training):
        before = [(module, _contents(module)) for module in model.modules()]
        try:
            _Tracer(wanted).trace(model)
        except _Reached as reached:
            return reached.module
        except Exception:  # whatever a model's own code raises on symbols
            return None
        finally:
            for module, contents in before:
                _restore(module, contents)
    return None


def is_leaf(module: nn.Module, name: str = "") -> bool:
    """Whether a traced graph calls `module` as a whole."""
    return _Tracer().is_leaf_module(module, name)


class Watch:
    """What a traced graph took for granted: modules in their places, plain, with their settings.

    Args:
        model: as it was traced.
        modules: those that are not called any more, or not as they were.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._seen = [(module, type(module)) for module in {id(m): m for m in modules}.values()]
        watched = {id(module) for module, _ in self._seen}
        self._places = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in watched
        ]
        self._settings = [
            (module, key, value)
            for module, _ in self._seen
            for key, value in vars(module).items()
            if type(value) in _SETTINGS and key != "training" and not key.startswith("_")
        ]

    def change(self) -> str:
        """What has changed since, in words; "" where nothing has."""
        if has_global_hooks():
            return "hooks for all modules were set"
        for module, kind in self._seen:
            if type(module) is not kind:
                return f"a {kind.__name__} became a {type(module).__name__}"
            if not is_plain(module):
                return f"{extras(module)} were set on a {kind.__name__}"
        for parent, key, child in self._places:
            if parent._modules.get(key) is not child:
                return f"the module {key!r} was exchanged"
        for module, key, value in self._settings:
            if module.__dict__.get(key) != value:
                return f"{key!r} of a {type(module).__name__} was changed"
        return ""


class _Reached(BaseException):
    """Ends a trace at a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Proxy(fx.Proxy):
    """Tells `x += y` from `x = x + y`: other names of x see the sum."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    # Reads of buffers become nodes; otherwise what is done to them would be done while tracing.
    proxy_buffer_attributes = True

    def __init__(self, wanted: Callable[[nn.Module], bool] = lambda module: False) -> None:
        super().__init__()
        self._wanted = wanted
        self._thread, self._context = threading.get_ident(), _context()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, (SparseLayer, *FUSED.values()))
        return leaf or super().is_leaf_module(module, name)

    def create_node(self, *arguments: Any, **named: Any) -> fx.Node:
        if _context() != self._context:
            raise SparseModelError(
                "it computes a part under no_grad, autocast or the like, or in an autograd.Function"
            )
        return super().create_node(*arguments, **named)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:  # another thread uses a model meanwhile
            return forward(*args, **kwargs)
        if self._wanted(m):
            raise _Reached(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if not hasattr(error, _PLACE):  # the innermost one
                path = (self.submodule_paths or {}).get(m, "")
                setattr(error, _PLACE, f", in the {type(m).__name__} {path!r}")
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _context() -> tuple[bool, ...]:
    """What a graph does not record of the surroundings of an operation."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


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


def _random_states() -> tuple[Any, ...]:
    """Where Python's and numpy's own generators stand."""
    _, keys, place, *_ = np.random.get_state()  # noqa: NPY002 - what others draw from
    return random.getstate(), np.asarray(keys).tobytes(), place


class _WithoutDraws(TorchFunctionMode):
    """Inside, torch draws no random numbers, which a graph would keep as constants."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "").removesuffix("_like").rstrip("_")
        if name in _RANDOM and not any(isinstance(a, fx.Proxy) for a in args):
            raise SparseModelError(_DRAWS)
        return func(*args, **(kwargs or {}))


_PLACE = "_place"  # an attribute of errors: in whose forward they were raised
_DRAWS = "it draws random numbers outside its layers"
_RANDOM = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    *("binomial", "random", "uniform", "exponential", "geometric", "cauchy", "log_normal"),
}


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what running the model's code changed of its modules, and refuse if it did.

    Raises:
        SparseModelError: an attribute was changed.
    """
    before = [(path, module, _contents(module)) for path, module in model.named_modules()]
    changed = ""
    try:
        yield
    finally:
        for path, module, contents in before:
            if keys := _restore(module, contents):
                changed = f"{module_title(path, module)} changes its attributes {keys[:4]}"
    if changed:
        raise _untraceable(model, changed)


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attribute -> itself, and a copy of what can change in place."""
    return {
        key: (value, _copied(value)) for key, value in vars(module).items() if key != "training"
    }


def _copied(value: Any) -> Any:
    if isinstance(value, list | dict | set):
        return copy.copy(value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else None


def _restore(module: nn.Module, contents: dict[str, tuple[Any, Any]]) -> list[str]:
    """Put attributes back; which had changed, other than by constants that tracing leaves."""
    own, changed = vars(module), []
    for key in own.keys() - contents.keys() - {"training"}:
        del own[key]
        if "_constant" not in key:
            changed.append(key)
    for key, (value, kept) in contents.items():
        if own.get(key, _GONE) is not value or not _is_same(value, kept):
            changed.append(key)
            own[key] = value
            _refill(value, kept)
    return changed


_GONE = object()


def _is_same(value: Any, kept: Any) -> bool:
    """Whether an attribute still has the content of its copy."""
    if isinstance(value, torch.Tensor):
        alike = (value == kept) | (value.isnan() & kept.isnan())
        return value.is_meta or bool(alike.all())
    if isinstance(value, dict):
        return list(value) == list(kept) and _is_same([*value.values()], [*kept.values()])
    if isinstance(value, set):
        return bool(value == kept)
    if isinstance(value, list):
        return len(value) == len(kept) and all(a is b for a, b in zip(value, kept, strict=True))
    return True


def _refill(value: Any, kept: Any) -> None:
    """Give a container or a tensor the content of its copy again."""
    if isinstance(value, torch.Tensor):
        value.detach().copy_(kept)
    elif isinstance(value, list):
        value[:] = kept
    elif isinstance(value, dict | set):
        value.clear()
        value.update(kept)
