"""Models as people have them: small bodies, and twists of what a module does beside its class.

A twist changes a model in place, at a place that its generator draws. The property of all of
them: what stands in for the model computes the same, or the model was refused by name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations, parametrize, prune

from sparsemodel.layers.sparsify import sparse_layers
from sparsemodel.masks.mask import Mask

SHAPE, CLASSES = (3, 6, 6), 4


class Residual(nn.Module):
    """A block with a shortcut, batch norm, addition and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.scale = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        if self.scale != 1:
            y = y * self.scale
        return functional.relu(self.norm2(self.conv2(y)) + x)


class Net(nn.Module):
    """Stem, block, pool and two linear layers, through a container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Residual()
        self.pool = nn.MaxPool2d(2)
        self.middle = nn.Identity()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.middle(self.pool(self.block(self.stem(x)))))
        return logits


def plain() -> nn.Sequential:
    """A sequence of convolutions, norms in place and linear layers of equal shape."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Identity(),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Linear(6, CLASSES),
    )


BODIES: dict[str, Callable[[], nn.Module]] = {"net": Net, "plain": plain}


# --- modules whose forward is more than its operations -------------------------------------------


class Straight(torch.autograd.Function):
    """Doubles, and passes gradients on as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Straight.apply(x)
        return y


class WithoutGradients(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x + x
        return x + y


class InHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.lin(x.flatten(1)[:, :1])
        return x + y.float().sum() * 0 + x


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.detach()


class CountsInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x + x


class ScalesByABuffer(nn.Module):
    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.factor * 2)


class CountsInPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(x)
        return x * len(self.log)


class CachesATensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.ones(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.mul_(2)
        return x * self.cache


class Draws(nn.Module):
    """Multiplies by a number drawn from the generator that `draw` uses."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self._draw = [draw]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._draw[0]()


class AsksForGradients(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x if torch.is_grad_enabled() else x


class Reads(nn.Module):
    """Reads the weight of another module behind its back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer.weight.mean()  # type: ignore[operator]


# --- twists --------------------------------------------------------------------------------------

Twist = Callable[[nn.Module, random.Random, ExitStack], None]


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def of(*kinds: type[nn.Module]) -> Callable[[nn.Module, random.Random], nn.Module]:
    """Draws a module of a model, of these classes."""
    return lambda model, draw: draw.choice([m for m in model.modules() if isinstance(m, kinds)])


LAYER, NORM = of(nn.Linear, nn.Conv2d), of(nn.BatchNorm2d, nn.BatchNorm1d)
ACT, ANY = of(nn.ReLU), of(nn.Module)


def on(
    place: Callable[[nn.Module, random.Random], nn.Module], change: Callable[[nn.Module], Any]
) -> Twist:
    def twist(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
        change(place(model, draw))

    return twist


def middle(build: Callable[[], nn.Module]) -> Twist:
    """Put a module in the place of the first nn.Identity."""

    def twist(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
        for path, module in list(model.named_modules()):
            if type(module) is nn.Identity:
                parent, _, key = path.rpartition(".")
                setattr(model.get_submodule(parent), key, build())
                return

    return twist


def globally(register: Callable[..., Any], hook: Callable[..., Any]) -> Twist:
    def twist(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
        cleanup.callback(register(hook).remove)

    return twist


def scaled(*arguments: Any) -> Any:
    """A forward hook."""
    return 1.25 * arguments[2] if isinstance(arguments[2], torch.Tensor) else None


def scaled_input(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    return (1.25 * inputs[0], *inputs[1:]) if inputs else None


def scaled_gradients(module: nn.Module, gradients: Any, outputs: Any = None) -> Any:
    return tuple(None if g is None else 1.5 * g for g in gradients)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def tie(name: str) -> Twist:
    """Make two layers share a parameter, where two have one of equal shape."""

    def twist(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
        some = [m for m in layers(model) if getattr(m, name) is not None]
        draw.shuffle(some)
        for one in some:
            for other in some:
                if one is not other and getattr(one, name).shape == getattr(other, name).shape:
                    setattr(other, name, getattr(one, name))
                    return

    return twist


def in_one_memory(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
    some = layers(model)
    for one in some:
        for other in some:
            if one is not other and one.weight.numel() <= other.weight.numel():
                flat = other.weight.data.view(-1)[: one.weight.numel()]
                one.weight = nn.Parameter(flat.view(one.weight.shape))
                return


def own_forward(module: nn.Module) -> None:
    """As libraries that dispatch between devices set it."""
    former = module.forward
    module.forward = lambda *a, **k: 2 * former(*a, **k)  # type: ignore[method-assign]


def closure(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
    layer = draw.choice(layers(model))
    layer.penalty = lambda: layer.weight.square().sum()  # type: ignore[assignment]


def widened(layer: nn.Module) -> None:
    """The weight says what is computed, attributes only what is printed."""
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = 1, 1
    elif isinstance(layer, nn.Conv2d):
        layer.in_channels, layer.kernel_size = 1, (1, 1)


def dilated(layer: nn.Module) -> None:
    """As segmentation networks change a classifier's convolutions."""
    if isinstance(layer, nn.Conv2d):
        layer.dilation, layer.padding = (2, 2), tuple(k - 1 for k in layer.kernel_size)


def last_exchanged(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
    """Another classifier."""
    path = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, key = path.rpartition(".")
    old = model.get_submodule(path)
    new = nn.Linear(old.weight.shape[1], CLASSES)
    new.load_state_dict(old.state_dict())
    setattr(model.get_submodule(parent), key, new)


def twice(model: nn.Module, draw: random.Random, cleanup: ExitStack) -> None:
    """A layer that is called in two places, where two have equal shapes."""
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for _, one in named:
        for path, other in named:
            alike = type(one) is type(other) and one.weight.shape == other.weight.shape
            if one is not other and alike and one.bias is not None and other.bias is not None:
                parent, _, key = path.rpartition(".")
                setattr(model.get_submodule(parent), key, one)
                return


def frozen(parameter: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        own = module._parameters[parameter]
        if own is not None:
            own.requires_grad_(False)

    return change


def hooked(parameter: str, register: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        own = module._parameters[parameter]
        if own is not None and register == "gradient":
            own.register_hook(lambda g: 2 * g)
        elif own is not None:
            own.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))

    return change


TWISTS: dict[str, Twist] = {
    "nothing": lambda model, draw, cleanup: None,
    # hooks
    "forward hook": on(ANY, lambda m: m.register_forward_hook(scaled)),
    "forward hook on a norm": on(NORM, lambda m: m.register_forward_hook(scaled)),
    "forward hook on an activation": on(ACT, lambda m: m.register_forward_hook(scaled)),
    "forward pre-hook": on(ANY, lambda m: m.register_forward_pre_hook(scaled_input)),
    "backward hook": on(LAYER, lambda m: m.register_full_backward_hook(scaled_gradients)),
    "backward pre-hook": on(ANY, lambda m: m.register_full_backward_pre_hook(scaled_gradients)),
    "weight hook": on(LAYER, hooked("weight", "gradient")),
    "bias hook": on(LAYER, hooked("bias", "gradient")),
    "norm weight hook": on(NORM, hooked("weight", "gradient")),
    "hook after accumulation": on(LAYER, hooked("weight", "accumulated")),
    "global forward hook": globally(torch_modules.register_module_forward_hook, scaled),
    "global forward pre-hook": globally(
        torch_modules.register_module_forward_pre_hook, scaled_input
    ),
    "global backward pre-hook": globally(
        torch_modules.register_module_full_backward_pre_hook, scaled_gradients
    ),
    "state hook": on(LAYER, lambda m: m.register_state_dict_post_hook(lambda *_: None)),
    "forward of an instance": on(ANY, own_forward),
    "forward of a norm": on(NORM, own_forward),
    "forward of an activation": on(ACT, own_forward),
    # weights that are not plain parameters
    "parametrised weight": on(
        LAYER, lambda m: parametrize.register_parametrization(m, "weight", Twice())
    ),
    "parametrised bias": on(
        of(nn.Linear), lambda m: parametrize.register_parametrization(m, "bias", Twice())
    ),
    "weight norm": on(LAYER, parametrizations.weight_norm),
    "weight norm by hooks": on(LAYER, nn.utils.weight_norm),
    "torch's prune": on(LAYER, lambda m: prune.l1_unstructured(m, "weight", 0.3)),
    "torch's prune, removed": on(
        LAYER, lambda m: prune.remove(prune.l1_unstructured(m, "weight", 0.3), "weight")
    ),
    "tied weights": tie("weight"),
    "tied biases": tie("bias"),
    "weights in one memory": in_one_memory,
    "more parameters": on(
        LAYER, lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(2)))
    ),
    "more buffers": on(LAYER, lambda m: m.register_buffer("extra", torch.ones(2))),
    "more modules": on(LAYER, lambda m: m.add_module("extra", nn.Linear(2, 2))),
    "channels last": lambda model, draw, cleanup: model.to(  # type: ignore[call-overload]
        memory_format=torch.channels_last
    ),
    "doubles": lambda model, draw, cleanup: model.double(),
    # modes and freezing
    "frozen weight": on(LAYER, frozen("weight")),
    "frozen bias": on(LAYER, frozen("bias")),
    "frozen norm": on(NORM, frozen("weight")),
    "norm in evaluation": on(NORM, lambda m: m.eval()),
    "all but a norm in evaluation": on(NORM, lambda m: m.eval().train()),
    "model in evaluation": lambda model, draw, cleanup: model.eval(),
    # settings that are not those of the constructor
    "attributes of another width": on(LAYER, widened),
    "dilated afterwards": on(LAYER, dilated),
    "momentum": on(NORM, lambda m: setattr(m, "momentum", 0.5)),
    "cumulative momentum": on(NORM, lambda m: setattr(m, "momentum", None)),
    "epsilon": on(NORM, lambda m: setattr(m, "eps", 0.5)),
    "scale of the block": on(ANY, lambda m: hasattr(m, "scale") and setattr(m, "scale", 3)),
    "in place": on(ACT, lambda m: setattr(m, "inplace", True)),
    "another classifier": last_exchanged,
    "called twice": twice,
    "a closure": closure,
    # forwards that are more than their operations
    "autograd function": middle(Doubled),
    "no_grad inside": middle(WithoutGradients),
    "autocast inside": middle(InHalf),
    "detach": middle(Detached),
    "counter in a buffer": middle(CountsInABuffer),
    "factor in a buffer": middle(ScalesByABuffer),
    "factor in a fleeting buffer": middle(lambda: ScalesByABuffer(persistent=False)),
    "counter in Python": middle(CountsInPython),
    "a list that grows": middle(Remembers),
    "a tensor that is no buffer": middle(CachesATensor),
    "torch's random numbers": middle(lambda: Draws(lambda: torch.rand(()).item())),
    "Python's random numbers": middle(lambda: Draws(random.random)),
    "numpy's random numbers": middle(lambda: Draws(lambda: float(np.random.rand()))),  # noqa: NPY002
    "asks for gradients": middle(AsksForGradients),
    "dropout": middle(lambda: nn.Dropout(0.5)),
    "weight read elsewhere": lambda model, draw, cleanup: middle(
        lambda: Reads(draw.choice(layers(model)))
    )(model, draw, cleanup),
}  # fmt: skip


# --- what is compared ----------------------------------------------------------------------------


def build(body: str, seed: int) -> nn.Module:
    """A body with weights and running statistics of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BODIES[body]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                # A channel without weights is constant; at 0 it would lie on the ReLU's kink.
                nn.init.uniform_(module.bias, 0.1, 0.3)
                nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
    return model


def batch(seed: int, model: nn.Module, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in the model's type, and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *SHAPE, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return images.to(next(model.parameters()).dtype), labels


def seed_all(seed: int) -> None:
    """The same numbers for whoever draws from a global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def run(model: nn.Module, seed: int, *, with_input: bool) -> dict[str, torch.Tensor]:
    """Loss, logits, gradients and buffers of one step; gradients under the parameters' names."""
    images, labels = batch(seed, model)
    images.requires_grad_(with_input)
    seed_all(seed)
    model.zero_grad()
    logits = model(images)
    found = {"logits": logits.detach(), "loss": functional.cross_entropy(logits, labels)}
    if logits.requires_grad:
        found["loss"].backward()
    if images.grad is not None:
        found["input"] = images.grad
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return {k: v.detach() for k, v in (found | gradients | buffers).items()}


def is_close(one: torch.Tensor, other: torch.Tensor, scale: float = 1.0) -> bool:
    """Equal up to what float32 sums in another order differ in, of values up to a scale."""
    if one.shape != other.shape:
        return False
    a, b = one.double(), other.double()
    scale = max(scale, float(a.abs().max()) if a.numel() else 0.0)
    close = (a - b).abs() <= 2e-4 * scale
    return bool((close | (a.isnan() & b.isnan())).all())


def mask_of_all(model: nn.Module, seed: int) -> Mask:
    """A random mask of every layer's weight, applied."""
    generator = torch.Generator().manual_seed(seed)
    patterns = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            pattern = torch.rand(layer.weight.shape, generator=generator) < 0.5
            pattern.view(-1)[0] = True
            patterns[f"{name}.weight"] = pattern
    mask = Mask(patterns)
    mask.apply(model)
    return mask


def mask_again(model: nn.Module, mask: Mask) -> None:
    """Lay a mask over the weights that still are parameters of its shapes, as sparse layers do."""
    parameters = dict(model.named_parameters())
    for name, pattern in mask.items():
        if name in parameters and parameters[name].shape == pattern.shape:
            parameters[name].data.masked_fill_(~pattern, 0.0)


def differences(model: nn.Module, sparse: nn.Module, seed: int, steps: int = 3) -> list[str]:
    """In what a sparse model differs from the model under its mask, over some steps.

    Empty as well where the model itself fails on its input.
    """
    found = []
    layers = sparse_layers(sparse)
    for step in range(steps):
        with_input = step == steps - 1
        try:
            expected = run(model, seed + step, with_input=with_input)
        except Exception:  # whatever a twisted model raises
            return []
        got = run(sparse, seed + step, with_input=with_input)
        for name, layer in layers.items():
            prefix = name.removesuffix("weight")
            for index in ("row_ptr", "cols", "transposed", "bits", "blocks"):
                del got[f"buffer {prefix}{index}"]
            if name in expected:
                expected[name] = expected[name][layer.mask()]
            if f"{prefix}values" in got:
                got[name] = got.pop(f"{prefix}values")
        # A bias before a batch norm has a gradient of rounding alone, in the scale of the others.
        scale = max(1.0, *(float(t.abs().max()) for t in expected.values() if t.numel()))
        found += [f"step {step}: {n} is in one alone" for n in expected.keys() ^ got.keys()]
        found += [
            f"step {step}: {name}"
            for name in expected.keys() & got.keys()
            if not is_close(expected[name], got[name], scale)
        ]
    return found


def names_of(model: nn.Module) -> list[str]:
    """Names of its parts."""
    return [n for n, _ in (*model.named_modules(), *model.named_parameters()) if n]


def is_named(names: list[str], message: str) -> bool:
    """Whether a message names a part of the model, or says that it is about all of them."""
    of_all = ("all modules", " cannot be traced: it draws", " '' ")
    return any(words in message for words in of_all) or any(repr(name) in message for name in names)


SEVERAL_TWISTS: dict[str, st.SearchStrategy[Any]] = {
    "body": st.sampled_from(sorted(BODIES)),
    "twists": st.lists(st.sampled_from(sorted(TWISTS)), min_size=2, max_size=3, unique=True),
    "seed": st.integers(0, 10_000),
}
"""What `given` draws for a body with more than one twist."""
