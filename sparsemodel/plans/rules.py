"""What a training plan makes of each module, function and method of a traced model."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from sparsemodel.errors import PlanError, SparseModelError
from sparsemodel.kernels import pooling
from sparsemodel.kernels.cpu.library import PoolGeometry
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.layers.gate import module_title
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear, geometry_of, weight_shape
from sparsemodel.layers.norm_and_pool import FUSED
from sparsemodel.layers.tracing import place_of
from sparsemodel.runtime.pattern import Shape
from sparsemodel.runtime.program import Kind
from sparsemodel.runtime.program_shapes import MAX_WINDOW

_PLANES = {(2, 3), (3, 2), (-2, -1), (-1, -2)}
# Options of pooling, and the one value of each that plans know.
_PLAIN_POOL: dict[str, tuple[Any, ...]] = {
    "ceil_mode": (False,),
    "dilation": (1, (1, 1)),
    "return_indices": (False,),
    "divisor_override": (None,),
}
_MAX_POOL = (
    *("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "return_indices",
)
_AVG_POOL = (
    *("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "divisor_override",
)


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


def conv_geometry(module: SparseConv2d | nn.Conv2d, title: str) -> ConvGeometry:
    """The geometry of a sparse or plain convolution.

    Raises:
        PlanError: padding that is not zeros, or uneven.
    """
    try:
        return geometry_of(module)
    except SparseModelError as error:
        raise unknown(
            f"{title} with padding {module.padding} ({module.padding_mode}: {error})"
        ) from error


class _Size:
    """What x.size() gives: the batch, unknown, and the sizes of a sample."""

    def __init__(self, shape: Shape) -> None:
        self.sizes: tuple[Any, ...] = (_BATCH, *shape)


_BATCH = object()
_STALE = object()  # a view of something that was changed in place


class Translator:
    """Interprets a graph, with operations in the place of tensors."""

    def __init__(self, modules: dict[str, nn.Module], input_shape: Shape) -> None:
        self._modules = modules
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
            try:
                self._values[node] = self._translate(node)
            except PlanError as error:
                place = "" if node.op == "call_module" else place_of(node)
                raise PlanError(f"{error}{place}") from error
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
            raise unknown(f"the {'method' if node.op == 'call_method' else 'function'} {name!r}")
        raise unknown(f"the attribute {str(node.target)!r} that its forward reads")

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
        raise unknown(f"{what} of something that is not an activation")

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
        name, title = str(node.target), module_title(str(node.target), module)
        rule = _MODULES.get(type(module))  # a subclass may do other things
        if rule is None:
            raise unknown(title)
        source = self._operand(node.args[0] if node.args else None, title)
        if type(module) in _WITH_PARAMETERS:
            if id(module) in self._called:
                raise PlanError(f"{title} is called twice, so that its gradients would add up")
            self._called.add(id(module))
        if rule is Translator.module_norm:
            return self._norm(node, module, source, name)
        if len(node.args) != 1 or node.kwargs:
            raise unknown(f"{title} called with more than its input")
        return int(rule(self, module, source, name))

    # ---- modules: (module, source, name) -> number of the operation ----

    def module_identity(self, module: nn.Module, source: int, name: str) -> int:
        return source

    def module_relu(self, module: nn.ReLU, source: int, name: str) -> int:
        return self._relu(source, name, in_place=module.inplace)

    def module_flatten(self, module: nn.Flatten, source: int, name: str) -> int:
        return self._flatten(source, name, module.start_dim, module.end_dim)

    def module_pool(self, module: nn.Module, source: int, name: str) -> int:
        kind: Kind = "max_pool" if isinstance(module, nn.MaxPool2d) else "avg_pool"
        return self._pool(kind, source, name, vars(module))

    def module_global_pool(self, module: nn.AdaptiveAvgPool2d, source: int, name: str) -> int:
        return self._global_pool(source, name, module.output_size)

    def module_linear(self, module: SparseLinear | nn.Linear, source: int, name: str) -> int:
        shape = self._shape(source)
        out_features, in_features = weight_shape(module)
        if shape != (in_features,):
            raise PlanError(
                f"{module_title(name, module)} expects [B, {in_features}], got [B, *{shape}]"
            )
        return self._add("conv", (source,), (out_features,), name, module=module)

    def module_conv(self, module: SparseConv2d | nn.Conv2d, source: int, name: str) -> int:
        shape, title = self._shape(source), module_title(name, module)
        geometry = conv_geometry(module, title)
        if len(shape) != 3 or shape[0] != geometry.in_channels:
            raise PlanError(f"{title} expects [B, {geometry.in_channels}, H, W], got [B, *{shape}]")
        size = geometry.output_size(shape[1], shape[2])
        if min(size) < 1:
            raise PlanError(f"the window of {title} does not fit its input [B, *{shape}]")
        return self._add("conv", (source,), (geometry.out_channels, *size), name, module=module)

    def module_norm(self, module: nn.Module, source: int, name: str) -> int:
        raise AssertionError("called with its node, which may hold a residual")

    def _norm(self, node: fx.Node, module: nn.Module, source: int, name: str) -> int:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        shape = self._shape(source)
        if len(shape) != (1 if type(module) is nn.BatchNorm1d else 3):
            raise unknown(f"{module_title(name, module)} on an input [B, *{shape}]")
        if shape[0] != module.num_features:
            raise PlanError(
                f"{module_title(name, module)} expects {module.num_features} channels, got "
                f"{shape[0]}"
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
            raise unknown(
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
            raise unknown(f"{name!r} of dimensions {start} to {end} (1 to -1 is)")
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
        raise unknown(f"{name!r} other than to [B, -1]")

    def _pool(self, kind: Kind, source: int, name: str, options: dict[str, Any]) -> int:
        for option, plain in _PLAIN_POOL.items():
            value = options.get(option, plain[0])
            if value not in plain:
                raise unknown(f"{name!r} with {option}={value}")
        channels, height, width = self._planes(source, name)
        kernel, pad = _pair(options["kernel_size"]), _pair(options.get("padding", 0))
        stride = options.get("stride")
        stride = kernel if stride is None or stride == () else _pair(stride)
        fits = all(
            0 <= 2 * p <= k <= n + 2 * p
            for k, p, n in zip(kernel, pad, (height, width), strict=True)
        )
        if not fits or kernel[0] * kernel[1] > MAX_WINDOW:
            raise unknown(f"{name!r}: a window {kernel} with padding {pad} on {height}×{width}")
        window = PoolGeometry.pool(1, channels, (height, width), kernel, stride=stride, padding=pad)
        return self._add(
            kind,
            (source,),
            (channels, int(window.out_h), int(window.out_w)),
            name,
            window=window,
            include_pad=bool(options.get("count_include_pad", True)),
        )

    def _global_pool(self, source: int, name: str, size: Any) -> int:
        if size not in (1, (1, 1), [1, 1]):
            raise unknown(f"{name!r} to {size} (to one pixel is)")
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
            raise unknown(f"{name!r} with keywords")
        source = self._operand(node.args[0], f"{name!r}")
        return self._reshape(source, name, self._value(node.args[1:]))

    def call_max_pool(self, node: fx.Node, name: str) -> int:
        given = _bound(_MAX_POOL, node, name)
        return self._pool("max_pool", self._operand(given["input"], f"{name!r}"), name, given)

    def call_avg_pool(self, node: fx.Node, name: str) -> int:
        given = _bound(_AVG_POOL, node, name)
        return self._pool("avg_pool", self._operand(given["input"], f"{name!r}"), name, given)

    def call_adaptive_pool(self, node: fx.Node, name: str) -> int:
        given = _bound(("input", "output_size"), node, name)
        source = self._operand(given["input"], f"{name!r}")
        return self._global_pool(source, name, given["output_size"])

    def call_mean(self, node: fx.Node, name: str) -> int:
        given = _bound(("input", "dim", "keepdim"), node, name)
        source = self._operand(given["input"], f"{name!r}")
        dims = given.get("dim")
        if not isinstance(dims, tuple | list) or tuple(dims) not in _PLANES:
            raise unknown(f"{name!r} over {dims} (over height and width is)")
        pooled = self._global_pool(source, name, 1)
        return pooled if given.get("keepdim") else self._flatten(pooled, name, 1)

    def call_size(self, node: fx.Node, name: str) -> Any:
        source = self._operand(node.args[0], f"{name!r}")
        if name == "getattr" and node.args[1] != "shape":
            raise unknown(f"the attribute {node.args[1]!r} of an activation")
        sizes = _Size(self._shape(source))
        if name == "size" and len(node.args) == 2:
            return sizes.sizes[node.args[1]]  # type: ignore[index]
        return sizes

    def call_getitem(self, node: fx.Node, name: str) -> Any:
        sizes, place = self._value(node.args[0]), node.args[1]
        if isinstance(sizes, _Size) and isinstance(place, int):
            return sizes.sizes[place]
        raise unknown(f"{name!r} of an activation")


_Rule = Callable[[Translator, fx.Node, str], Any]
_MODULES: dict[type[nn.Module], Callable[..., int]] = {
    nn.Identity: Translator.module_identity,
    nn.ReLU: Translator.module_relu,
    nn.Flatten: Translator.module_flatten,
    SparseLinear: Translator.module_linear,
    nn.Linear: Translator.module_linear,
    SparseConv2d: Translator.module_conv,
    nn.Conv2d: Translator.module_conv,
    nn.BatchNorm1d: Translator.module_norm,
    nn.BatchNorm2d: Translator.module_norm,
    nn.MaxPool2d: Translator.module_pool,
    nn.AvgPool2d: Translator.module_pool,
    nn.AdaptiveAvgPool2d: Translator.module_global_pool,
}
_MODULES |= {FUSED[kind]: rule for kind, rule in _MODULES.items() if kind in FUSED}
_WITH_PARAMETERS = {
    kind
    for kind, rule in _MODULES.items()
    if rule in {Translator.module_linear, Translator.module_conv, Translator.module_norm}
}
_RULES: dict[_Rule, tuple[Any, ...]] = {
    Translator.call_relu: (
        *(torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_"),
    ),
    Translator.call_add: (operator.add, operator.iadd, torch.add, "add", "add_"),
    Translator.call_flatten: (torch.flatten, "flatten"),
    Translator.call_reshape: (torch.reshape, "reshape", "view"),
    Translator.call_max_pool: (functional.max_pool2d, torch.max_pool2d, pooling.max_pool2d),
    Translator.call_avg_pool: (functional.avg_pool2d, pooling.avg_pool2d),
    Translator.call_adaptive_pool: (functional.adaptive_avg_pool2d, pooling.adaptive_avg_pool2d),
    Translator.call_mean: (torch.mean, "mean"),
    Translator.call_size: ("size", getattr),
    Translator.call_getitem: (operator.getitem,),
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
        raise unknown(f"{what!r} with the arguments {odd or list(node.args[len(names) :])}")
    return given


def _pair(number: Any) -> tuple[int, int]:
    if isinstance(number, int):
        return number, number
    pair = tuple(number)
    return (pair[0], pair[0]) if len(pair) == 1 else (pair[0], pair[1])


def unknown(what: str) -> PlanError:
    return PlanError(f"a training plan does not know {what}; train the model through its modules")
