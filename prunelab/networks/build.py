"""A network from a name, "module:function", a function or an object."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from prunelab.errors import ModelError, close_names
from prunelab.networks.builtin import ADJUSTABLE_WIDTH, MODELS, refuse_width
from prunelab.networks.libraries import (
    LIBRARIES,
    build_of_library,
    check_library_name,
    has_width,
    is_of_library,
    known_names,
    width_mult,
)
from prunelab.runs.imported import imported

Network = str | Callable[..., nn.Module] | nn.Module
"""What `build_model` takes."""


def check_model(name: str) -> None:
    """Raise ModelError unless `name` is a known model, or a "module:function" that is there."""
    if is_of_library(name):
        check_library_name(name)
    elif ":" in name:
        _imported(name)
    elif name not in MODELS:
        known = [*MODELS, *(f"torchvision/{own}" for own in known_names("torchvision"))]
        raise ModelError(
            f"unknown model {name!r}; known models: {', '.join(MODELS)}; or give module:function, "
            f"or a name of a library: {'/NAME, '.join(LIBRARIES)}/NAME{close_names(name, known)}"
        )


def build_model(
    model: Network,
    *,
    num_classes: int | None,
    input_shape: tuple[int, ...] | None,
    seed: int,
    width: int | None = None,
) -> nn.Module:
    """A network, the same bits for the same arguments; the global seed is not touched.

    Its numbers are float32, whatever torch's default is; a given network keeps its own type.

    Args:
        model: a name in MODELS; "torchvision/NAME", "timm/NAME" or "hf/FOLDER" (a folder or a
            name of the hub, of which the configuration alone is read), whose weights are drawn,
            too; "module:function", imported from the working folder or from what is installed; a
            function or class, called with those of num_classes, input_shape, seed and width that
            it has parameters for; or a network, which
            is copied with its weights.
        num_classes: None where samples have no classes; names of image networks need it.
        input_shape: (channels, height, width) of one image; None where samples are none. Of
            neither, "hf/..." makes a causal language model; of classes alone, of texts.
        width: channels of the first stage, where the model's is adjustable, as a function's with
            a parameter `width`; one with `width_mult` gets an eighth of it. None: its own.

    Raises:
        ModelError: unknown name, a library that is not installed, a width or image size that the
            model cannot have, or a function that asks for something else or returns something
            else.

    >>> model = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=0)
    >>> model.eval()(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    >>> def linear(num_classes):
    ...     return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    >>> build_model(linear, num_classes=10, input_shape=(1, 8, 8), seed=0)[1].out_features
    10
    """
    if isinstance(model, str) and (is_of_library(model) or ":" not in model):
        return _named(model, num_classes, input_shape, seed=seed, width=width)
    if isinstance(model, nn.Module):
        refuse_width(type(model).__name__, width)
        own = copy.deepcopy(model)
        _settle(own, type(model).__name__, input_shape, seed)
        return own
    function = _imported(model) if isinstance(model, str) else model
    if not callable(function):
        raise ModelError(
            f"model: expected a name, a function or a network, got {type(model).__name__}"
        )
    offered = {"num_classes": num_classes, "input_shape": input_shape, "seed": seed}
    arguments = _arguments(function, offered, width)
    with drawing(seed):
        built = function(**arguments)
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{title(function)} returned a {type(built).__name__}, expected a torch.nn.Module"
        )
    _settle(built, title(function), input_shape, seed)
    return built


@torch.no_grad()
def _settle(model: nn.Module, name: str, input_shape: tuple[int, ...] | None, seed: int) -> None:
    """Let lazy layers learn their sizes from a blank input."""
    if not any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        return
    if input_shape is None:
        raise ModelError(f"{name} has lazy layers: run it once on a batch before it is given")
    try:
        with drawing(seed):
            model.eval()(torch.zeros(2, *input_shape))
    except Exception as error:  # whatever the network's own code raises
        raise ModelError(
            f"{name} has lazy layers, and does not fit inputs {[2, *input_shape]}: "
            f"{type(error).__name__}: {error}"
        ) from error
    model.train()


def _named(
    name: str,
    num_classes: int | None,
    input_shape: tuple[int, ...] | None,
    *,
    seed: int,
    width: int | None,
) -> nn.Module:
    sizes = {"classes": num_classes, "width": width}
    sizes |= dict(zip(("channels", "image height", "image width"), input_shape or (), strict=False))
    for what, size in sizes.items():
        if size is not None and size < 1:
            raise ModelError(f"{name}: {what} must be at least 1, got {size}")
    if is_of_library(name):
        with drawing(seed):
            return build_of_library(
                name, num_classes=num_classes, input_shape=input_shape, width=width
            )
    check_model(name)
    if num_classes is None or input_shape is None or len(input_shape) != 3:
        raise ModelError(
            f"{name} is for labelled images [channels, height, width], and these samples are none "
            f"(classes {num_classes}, shape {input_shape}); give a network of your own"
        )
    channels, height, side = input_shape
    with drawing(seed):
        return MODELS[name](num_classes, (channels, height, side), width)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Inside, weights are float32 and drawn by the seed; torch's own state stays as it was."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def fitted(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images in the floating-point type of a network's weights."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return images.to(next(dtypes, images.dtype))


def _imported(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    try:
        found = imported(name)
    except ImportError as error:
        raise ModelError(f"model {name!r}: {error}") from error
    if not callable(found):
        raise ModelError(f"model {name!r} is a {type(found).__name__}, expected a function")
    function: Callable[..., Any] = found
    return function


def width_parameter(model: Network) -> str:
    """What a network's width is called, "width" or "width_mult"; "" where it has a fixed one."""
    if isinstance(model, nn.Module):
        return ""
    if isinstance(model, str) and (is_of_library(model) or ":" not in model):
        is_adjustable = model in ADJUSTABLE_WIDTH or has_width(model)
        return "width" if is_adjustable else ""
    function = _imported(model) if isinstance(model, str) else model
    named = {p.name for p in _parameters(function)}
    return next((name for name in ("width", "width_mult") if name in named), "")


def _arguments(
    function: Callable[..., Any], offered: dict[str, Any], width: int | None
) -> dict[str, Any]:
    """Of what is offered, what the function has a parameter for; the width, if one is asked for."""
    parameters = _parameters(function)
    own = width_parameter(function)
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in offered]
    if width is not None:
        if not own:
            raise ModelError(
                f"{title(function)} has a fixed width: give the function a parameter width, or "
                f"leave model.width at 0, got {width}"
            )
        offered = {**offered, own: width if own == "width" else width_mult(width)}
    elif own in needed:
        raise ModelError(f"{title(function)} has a parameter {own} without a default; give it one")
    needed = [name for name in needed if name != own]
    if needed:
        close = [difflib.get_close_matches(name, offered, n=1) for name in needed]
        hint = f" (did you mean {close[0][0]!r}?)" if close[0] else ""
        raise ModelError(
            f"{title(function)} has parameters {needed}{hint}; a model's function may ask for "
            f"{', '.join(offered)}: wrap it in one that does"
        )
    absent = [p.name for p in parameters if p.default is p.empty and offered.get(p.name) is None]
    absent = [name for name in absent if name in offered]
    if absent:
        raise ModelError(
            f"{title(function)} asks for {' and '.join(absent)}, which these samples do not have; "
            "give the parameter a default, or build the network with as many outputs as there are "
            "targets"
        )
    return {p.name: offered[p.name] for p in parameters if offered.get(p.name) is not None}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}
    ]


def title(model: Network) -> str:
    """How messages call what a network is made from."""
    if isinstance(model, str):
        return model
    return str(getattr(model, "__qualname__", type(model).__qualname__))
