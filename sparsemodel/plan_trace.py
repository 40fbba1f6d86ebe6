"""From a model to the list of operations that a training plan runs."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional

from sparsemodel.errors import PlanError
from sparsemodel.fused import FUSED, FusedBatchNorm2d
from sparsemodel.kernels import pool
from sparsemodel.kernels.cpu import PoolGeometry
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.layers import SparseConv2d, SparseLayer, SparseLinear

Kind = Literal[
    "input", "conv", "norm", "relu", "add", "max_pool", "avg_pool", "global_pool", "flatten"
]
Shape = tuple[int, ...]

MAX_WINDOW = 256  # places of a pooling window
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, FusedBatchNorm2d)
_MAX_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVG_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_PLANES = {(2, 3), (3, 2), (-2, -1), (-1, -2)}


@dataclass(frozen=True)
class Operation:
    """One operation on results of earlier ones.

    Shapes are of one sample, [C, H, W] or [features].
    """

    kind: Kind
    inputs: tuple[int, ...]  # numbers of operations; of a norm, the residual is the second
    shape: Shape
    name: str  # the module's path or the function's name
    module: nn.Module | None = None
    window: PoolGeometry | None = None
    include_pad: bool = True
    relu: bool = False


def trace_operations(model: nn.Module, input_shape: Shape) -> list[Operation]:
    """The operations of one forward pass, batch norm fused with addition and ReLU.

    Args:
        model: takes one tensor [B, *input_shape] and returns logits [B, classes].
        input_shape: (C, H, W) or (features,).

    Returns:
        Operations in the order in which they run; the last one gives the logits.

    Raises:
        PlanError: an operation that plans do not know, named in the message, a module that is
            called twice, or a model that torch.fx cannot trace.
    """
    graph = _graph(model)
    operations, output = _Translator(model, input_shape).run(graph)
    shape = operations[output].shape
    if len(shape) != 1:
        raise PlanError(f"expected logits [B, classes], got an output of shape [B, *{shape}]")
    return _fused(_live(operations, output))


def conv_geometry(module: SparseConv2d | nn.Conv2d, title: str) -> ConvGeometry:
    """The geometry of a sparse or plain convolution.

    Raises:
        PlanError: padding that is not zeros, or uneven.
    """
    if isinstance(module, SparseConv2d):
        return module.geometry
    left, right, top, bottom = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros" or (left, top) != (right, bottom):
        raise _unknown(f"{title} with padding {module.padding} ({module.padding_mode})")
    return ConvGeometry(
        module.out_channels,
        module.in_channels,
        *_pair(module.kernel_size),
        *_pair(module.stride),
        *(top, left),
        *_pair(module.dilation),
        module.groups,
    )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, (SparseLayer, *FUSED.values()))
        return leaf or super().is_leaf_module(module, name)


def _graph(model: nn.Module) -> fx.Graph:
    """The graph of a forward pass, if it is the same in training and in evaluation."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise PlanError(f"{_title(name, module)} has hooks, which a plan would not call")
    if _Tracer().is_leaf_module(model, ""):
        model = nn.Sequential(model)
    attributes = set(model.__dict__)
    graphs = []
    try:
        for training in (True, False):
            with _mode(model, training):
                graphs.append(_Tracer().trace(model))
    except Exception as error:  # whatever a model's own code raises on symbolic inputs
        raise PlanError(f"{type(model).__name__} cannot be traced: {error}") from error
    finally:
        for name in set(model.__dict__) - attributes:  # constants that tracing left behind
            del model.__dict__[name]
    if str(graphs[0]) != str(graphs[1]):
        raise PlanError(
            f"{type(model).__name__} computes something else in training than in evaluation"
        )
    return graphs[0]


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _live(operations: list[Operation], output: int) -> list[Operation]:
    """The operations that the output needs, if leaving out the others changes nothing."""
    needed = {output}
    for number in range(output, -1, -1):
        if number in needed:
            needed.update(operations[number].inputs)
    for number, operation in enumerate(operations):
        if number not in needed and operation.kind == "norm":
            raise PlanError(f"the result of the batch norm {operation.name!r} is not used")
    return _renumbered(operations, sorted(needed))


def _renumbered(operations: list[Operation], order: list[int]) -> list[Operation]:
    place = {number: index for index, number in enumerate(order)}
    return [
        replace(operations[number], inputs=tuple(place[i] for i in operations[number].inputs))
        for number in order
    ]


def _fused(operations: list[Operation]) -> list[Operation]:
    """Batch norm, an addition to it and the ReLU of that as one operation."""
    operations = list(operations)
    users = Counter(i for operation in operations for i in set(operation.inputs))
    gone = set()

    def plain_norm(number: int) -> bool:
        norm = operations[number]
        return norm.kind == "norm" and not norm.relu and users[number] == 1

    for number, operation in enumerate(operations):
        inputs = operation.inputs
        if operation.kind == "add" and inputs[0] != inputs[1]:
            norms = [i for i in inputs if plain_norm(i) and len(operations[i].inputs) == 1]
            if norms:
                norm = operations[norms[0]]
                residual = inputs[1] if inputs[0] == norms[0] else inputs[0]
                operations[number] = replace(norm, inputs=(norm.inputs[0], residual))
                gone.add(norms[0])
        elif operation.kind == "relu" and plain_norm(inputs[0]):
            operations[number] = replace(operations[inputs[0]], relu=True)
            gone.add(inputs[0])
    return _renumbered(operations, [n for n in range(len(operations)) if n not in gone])


class _Size:
    """What x.size() gives: the batch, unknown, and the sizes of a sample."""

    def __init__(self, shape: Shape) -> None:
        self.sizes: tuple[Any, ...] = (_BATCH, *shape)


_BATCH = object()
_STALE = object()  # a view of something that was changed in place


class _Translator:
    """Interprets a graph, with operations in the place of tensors."""

    def __init__(self, model: nn.Module, input_shape: Shape) -> None:
        self._modules = dict(model.named_modules())
        if _Tracer().is_leaf_module(model, ""):
            self._modules = {"0": model}
        self._input_shape = tuple(input_shape)
        self._operations: list[Operation] = []
        self._storage: list[int] = []  # by operation: the one whose memory it is a view of
        self._values: dict[fx.Node, Any] = {}
        self._called: set[int] = set()

    def run(self, graph: fx.Graph) -> tuple[list[Operation], int]:
        """The operations, and which of them gives the output."""
        for node in graph.nodes:
            if node.op == "output":
                result = self._value(node.args[0])
                if not isinstance(result, int):
                    raise PlanError("expected a model that returns one tensor of logits")
                return self._operations, result
            self._values[node] = self._translate(node)
        raise AssertionError("a graph ends in its output")

    def _translate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if self._operations:
                raise PlanError("expected a model of one input, got more")
            return self._add("input", (), self._input_shape, str(node.target))
        if node.op == "call_module":
            return self._module(node, self._modules[str(node.target)])
        if node.op in {"call_function", "call_method"}:
            name = getattr(node.target, "__name__", str(node.target))
            rule = _FUNCTIONS.get(name if node.op == "call_method" else node.target)
            if rule is not None:
                return rule(self, node, name)
            raise _unknown(f"the {'method' if node.op == 'call_method' else 'function'} {name!r}")
        raise _unknown(f"the attribute {str(node.target)!r} that its forward reads")

    def _value(self, argument: Any) -> Any:
        """What an argument of a node stands for: an operation's number, sizes or a constant."""
        if isinstance(argument, tuple | list):
            return tuple(self._value(a) for a in argument)
        if not isinstance(argument, fx.Node):
            return argument
        value = self._values[argument]
        if value is _STALE:
            raise PlanError(
                f"{argument.name!r} is read after an in-place operation on another view of it"
            )
        return value

    def _operand(self, argument: Any, what: str) -> int:
        """The number of the operation that an argument must be."""
        value = self._value(argument)
        if isinstance(argument, fx.Node) and isinstance(value, int):
            return value
        raise _unknown(f"{what} of something that is not an activation")

    def _add(
        self, kind: Kind, inputs: tuple[int, ...], shape: Shape, name: str, **rest: Any
    ) -> int:
        self._operations.append(Operation(kind, inputs, shape, name, **rest))
        number = len(self._operations) - 1
        self._storage.append(self._storage[inputs[0]] if kind == "flatten" else number)
        return number

    def _overwritten(self, by: int, source: int) -> None:
        """After an in-place operation all that held `source` hold its result."""
        for node, value in self._values.items():
            if isinstance(value, int) and self._storage[value] == self._storage[source]:
                self._values[node] = by if value == source else _STALE

    def _shape(self, number: int) -> Shape:
        return self._operations[number].shape

    def _planes(self, number: int, name: str) -> Shape:
        shape = self._shape(number)
        if len(shape) != 3:
            raise PlanError(f"{name!r} expects an input [B, C, H, W], got [B, *{shape}]")
        return shape

    def _module(self, node: fx.Node, module: nn.Module) -> int:
        name, kind = str(node.target), type(module)
        title = _title(name, module)
        source = self._operand(node.args[0] if node.args else None, title)
        if kind in {SparseConv2d, SparseLinear, nn.Conv2d, nn.Linear, *_NORMS}:
            if id(module) in self._called:
                raise PlanError(f"{title} is called twice, so that its gradients would add up")
            self._called.add(id(module))
        if kind in _NORMS:
            return self._norm(node, module, source, name)
        if len(node.args) != 1 or node.kwargs:
            raise _unknown(f"{title} called with more than its input")
        match module:
            case nn.Identity() if kind is nn.Identity:
                return source
            case nn.ReLU() if kind is nn.ReLU:
                return self._relu(source, name, in_place=module.inplace)
            case nn.Flatten() if kind is nn.Flatten:
                return self._flatten(source, name, module.start_dim, module.end_dim)
            case SparseConv2d() | SparseLinear() | nn.Conv2d() | nn.Linear() if kind in _LAYERS:
                return self._layer(module, source, name)
            case nn.MaxPool2d() if kind in {nn.MaxPool2d, FUSED[nn.MaxPool2d]}:
                if module.return_indices:
                    raise _unknown(f"{title} with return_indices")
                numbers = module.kernel_size, module.stride, module.padding, module.dilation
                return self._max_pool(source, name, *numbers, module.ceil_mode)
            case nn.AvgPool2d() if kind in {nn.AvgPool2d, FUSED[nn.AvgPool2d]}:
                if module.divisor_override is not None:
                    raise _unknown(f"{title} with divisor_override")
                numbers = module.kernel_size, module.stride, module.padding, module.ceil_mode
                return self._avg_pool(source, name, *numbers, module.count_include_pad)
            case nn.AdaptiveAvgPool2d() if kind in _ADAPTIVE:
                return self._global_pool(source, name, module.output_size)
        raise _unknown(title)

    def _layer(self, module: nn.Module, source: int, name: str) -> int:
        shape, title = self._shape(source), _title(name, module)
        if isinstance(module, SparseLinear | nn.Linear):
            if shape != (module.in_features,):
                raise PlanError(f"{title} expects [B, {module.in_features}], got [B, *{shape}]")
            return self._add("conv", (source,), (module.out_features,), name, module=module)
        assert isinstance(module, SparseConv2d | nn.Conv2d)
        geometry = conv_geometry(module, title)
        if len(shape) != 3 or shape[0] != geometry.in_channels:
            raise PlanError(f"{title} expects [B, {geometry.in_channels}, H, W], got [B, *{shape}]")
        size = geometry.output_size(shape[1], shape[2])
        if min(size) < 1:
            raise PlanError(f"the window of {title} does not fit its input [B, *{shape}]")
        return self._add("conv", (source,), (geometry.out_channels, *size), name, module=module)

    def _norm(self, node: fx.Node, module: nn.Module, source: int, name: str) -> int:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        shape = self._shape(source)
        if len(shape) != (1 if type(module) is nn.BatchNorm1d else 3):
            raise _unknown(f"{_title(name, module)} on an input [B, *{shape}]")
        if shape[0] != module.num_features:
            raise PlanError(
                f"{_title(name, module)} expects {module.num_features} channels, got {shape[0]}"
            )
        names = ("input", "residual", "relu")
        given = _bound(names, node, name)
        residual, relu = given.get("residual"), given.get("relu", False)
        inputs: tuple[int, ...] = (source,)
        if residual is not None:
            inputs = (source, self._operand(residual, f"{name!r} plus the residual"))
            self._same_shape(*inputs, name)
        return self._add("norm", inputs, shape, name, module=module, relu=bool(relu))

    def _same_shape(self, left: int, right: int, name: str) -> None:
        if self._shape(left) != self._shape(right):
            raise _unknown(
                f"{name!r} of shapes [B, *{self._shape(left)}] and [B, *{self._shape(right)}]"
            )

    def _relu(self, source: int, name: str, *, in_place: bool) -> int:
        result = self._add("relu", (source,), self._shape(source), name)
        if in_place:
            self._overwritten(result, source)
        return result

    def _sum(self, left: int, right: int, name: str, *, in_place: bool) -> int:
        self._same_shape(left, right, name)
        result = self._add("add", (left, right), self._shape(left), name)
        if in_place:
            self._overwritten(result, left)
        return result

    def _flatten(self, source: int, name: str, start: int = 0, end: int = -1) -> int:
        shape = self._shape(source)
        if start != 1 or end not in {-1, len(shape)}:
            raise _unknown(f"{name!r} of dimensions {start} to {end} (1 to -1 is)")
        if len(shape) == 1:
            return source
        return self._add("flatten", (source,), (math.prod(shape),), name)

    def _reshape(self, source: int, name: str, sizes: tuple[Any, ...]) -> int:
        if len(sizes) == 1 and isinstance(sizes[0], tuple):
            sizes = sizes[0]
        length = math.prod(self._shape(source))
        if len(sizes) == 2 and (
            (sizes[0] is _BATCH and sizes[1] in {-1, length}) or tuple(sizes) == (-1, length)
        ):
            return self._flatten(source, name, 1)
        raise _unknown(f"{name!r} other than to [B, -1]")

    def _window(
        self, source: int, name: str, kernel: Any, stride: Any, padding: Any
    ) -> tuple[PoolGeometry, Shape]:
        channels, height, width = self._planes(source, name)
        window, pad = _pair(kernel), _pair(padding)
        fits = all(
            0 <= 2 * p <= k <= n + 2 * p
            for k, p, n in zip(window, pad, (height, width), strict=True)
        )
        if not fits or window[0] * window[1] > MAX_WINDOW:
            raise _unknown(f"{name!r}: a window {window} with padding {pad} on {height}×{width}")
        stride = window if stride is None or stride == () else _pair(stride)
        g = PoolGeometry.pool(1, channels, (height, width), window, stride=stride, padding=pad)
        return g, (channels, int(g.out_h), int(g.out_w))

    def _max_pool(
        self,
        source: int,
        name: str,
        kernel: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> int:
        if ceil_mode or _pair(dilation) != (1, 1):
            raise _unknown(f"{name!r} with ceil_mode or dilation")
        window, shape = self._window(source, name, kernel, stride, padding)
        return self._add("max_pool", (source,), shape, name, window=window)

    def _avg_pool(
        self,
        source: int,
        name: str,
        kernel: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> int:
        if ceil_mode:
            raise _unknown(f"{name!r} with ceil_mode")
        window, shape = self._window(source, name, kernel, stride, padding)
        include = bool(count_include_pad)
        return self._add("avg_pool", (source,), shape, name, window=window, include_pad=include)

    def _global_pool(self, source: int, name: str, size: Any) -> int:
        if size not in (1, (1, 1), [1, 1]):
            raise _unknown(f"{name!r} to {size} (to one pixel is)")
        channels = self._planes(source, name)[0]
        return self._add("global_pool", (source,), (channels, 1, 1), name)

    # ---- functions and methods: (node, name) -> what the call gives ----

    def call_relu(self, node: fx.Node, name: str) -> int:
        given = _bound(("input", "inplace"), node, name)
        in_place = bool(given.get("inplace")) or name.endswith("_")
        return self._relu(self._operand(given["input"], f"{name!r}"), name, in_place=in_place)

    def call_add(self, node: fx.Node, name: str) -> int:
        given = _bound(("input", "other"), node, name)
        left, right = (self._operand(given[k], f"{name!r}") for k in ("input", "other"))
        return self._sum(left, right, name, in_place=name in {"iadd", "add_"})

    def call_flatten(self, node: fx.Node, name: str) -> int:
        given = _bound(("input", "start_dim", "end_dim"), node, name)
        source = self._operand(given.pop("input"), f"{name!r}")
        return self._flatten(source, name, given.get("start_dim", 0), given.get("end_dim", -1))

    def call_reshape(self, node: fx.Node, name: str) -> int:
        if node.kwargs:
            raise _unknown(f"{name!r} with keywords")
        source = self._operand(node.args[0], f"{name!r}")
        return self._reshape(source, name, self._value(node.args[1:]))

    def call_max_pool(self, node: fx.Node, name: str) -> int:
        given = _bound(_MAX_POOL, node, name)
        numbers = [given.get(k, d) for k, d in zip(_MAX_POOL[2:], (None, 0, 1, False), strict=True)]
        source = self._operand(given["input"], f"{name!r}")
        return self._max_pool(source, name, given["kernel_size"], *numbers)

    def call_avg_pool(self, node: fx.Node, name: str) -> int:
        given = _bound(_AVG_POOL, node, name)
        numbers = [
            given.get(k, d) for k, d in zip(_AVG_POOL[2:], (None, 0, False, True), strict=True)
        ]
        source = self._operand(given["input"], f"{name!r}")
        return self._avg_pool(source, name, given["kernel_size"], *numbers)

    def call_adaptive_pool(self, node: fx.Node, name: str) -> int:
        given = _bound(("input", "output_size"), node, name)
        source = self._operand(given["input"], f"{name!r}")
        return self._global_pool(source, name, given["output_size"])

    def call_mean(self, node: fx.Node, name: str) -> int:
        given = _bound(("input", "dim", "keepdim"), node, name)
        source = self._operand(given["input"], f"{name!r}")
        dims = given.get("dim")
        if not isinstance(dims, tuple | list) or tuple(dims) not in _PLANES:
            raise _unknown(f"{name!r} over {dims} (over height and width is)")
        pooled = self._global_pool(source, name, 1)
        return pooled if given.get("keepdim") else self._flatten(pooled, name, 1)

    def call_size(self, node: fx.Node, name: str) -> Any:
        source = self._operand(node.args[0], f"{name!r}")
        if name == "getattr" and node.args[1] != "shape":
            raise _unknown(f"the attribute {node.args[1]!r} of an activation")
        sizes = _Size(self._shape(source))
        if name == "size" and len(node.args) == 2:
            return sizes.sizes[node.args[1]]  # type: ignore[index]
        return sizes

    def call_getitem(self, node: fx.Node, name: str) -> Any:
        sizes, place = self._value(node.args[0]), node.args[1]
        if isinstance(sizes, _Size) and isinstance(place, int):
            return sizes.sizes[place]
        raise _unknown(f"{name!r} of an activation")


_Rule = Callable[[_Translator, fx.Node, str], Any]
_LAYERS = {SparseConv2d, SparseLinear, nn.Conv2d, nn.Linear}
_ADAPTIVE = {nn.AdaptiveAvgPool2d, FUSED[nn.AdaptiveAvgPool2d]}
_RULES: dict[_Rule, tuple[Any, ...]] = {
    _Translator.call_relu: (
        *(torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_"),
    ),
    _Translator.call_add: (operator.add, operator.iadd, torch.add, "add", "add_"),
    _Translator.call_flatten: (torch.flatten, "flatten"),
    _Translator.call_reshape: (torch.reshape, "reshape", "view"),
    _Translator.call_max_pool: (functional.max_pool2d, torch.max_pool2d, pool.max_pool2d),
    _Translator.call_avg_pool: (functional.avg_pool2d, pool.avg_pool2d),
    _Translator.call_adaptive_pool: (functional.adaptive_avg_pool2d, pool.adaptive_avg_pool2d),
    _Translator.call_mean: (torch.mean, "mean"),
    _Translator.call_size: ("size", getattr),
    _Translator.call_getitem: (operator.getitem,),
}
_FUNCTIONS: dict[Any, _Rule] = {
    function: rule for rule, functions in _RULES.items() for function in functions
}


def _bound(names: tuple[str, ...], node: fx.Node, what: str) -> dict[str, Any]:
    """The arguments of a call by name; what lies beyond `names` is refused."""
    given = dict(zip(names, node.args, strict=False)) | {
        name: value for name, value in node.kwargs.items() if name in names
    }
    if len(given) < len(node.args) + len(node.kwargs):
        odd = [name for name in node.kwargs if name not in names]
        raise _unknown(f"{what!r} with the arguments {odd or list(node.args[len(names) :])}")
    return given


def _pair(number: Any) -> tuple[int, int]:
    if isinstance(number, int):
        return number, number
    pair = tuple(number)
    return (pair[0], pair[0]) if len(pair) == 1 else (pair[0], pair[1])


def _title(name: str, module: nn.Module) -> str:
    return f"the {type(module).__name__} {name!r}"


def _unknown(what: str) -> PlanError:
    return PlanError(f"a training plan does not know {what}; train the model through its modules")
