"""What a model under a mask costs, counted from its layers: operations and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from sparsemodel.errors import MaskError
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.probe import probing

FLOAT_BYTES = 4

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_macs(
    model: nn.Module, input_shape: tuple[int, ...] | Callable[[nn.Module], object]
) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer for one sample, when dense.

    The model runs once in eval mode on zeros and is left as it was. Padding counts as input,
    as is usual. Only layers that are called as modules are seen; a layer called several times
    counts each time.

    Args:
        model: takes one floating-point tensor.
        input_shape: shape of one sample, without the batch dimension; or a function that runs
            the model on one sample, whatever that is.

    Returns:
        Name of the weight -> multiply-accumulates, in the order of the modules.

    >>> layer_macs(nn.Conv2d(3, 8, kernel_size=3, padding=1), (3, 4, 4))
    {'weight': 3456}
    """
    macs: Counter[str] = Counter()
    with probing(model), torch.no_grad(), ExitStack() as hooks:
        model.eval()
        for name, module in model.named_modules():
            if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
                weight_name = f"{name}.weight" if name else "weight"
                macs[weight_name] = 0
                handle = module.register_forward_hook(_counter(weight_name, macs))
                hooks.callback(handle.remove)
        reference = next(model.parameters(), torch.empty(0))
        if callable(input_shape):
            input_shape(model)
        else:
            model(torch.zeros(1, *input_shape, dtype=reference.dtype, device=reference.device))
    return dict(macs)


def model_bytes(model: nn.Module, *, mask: Mask | None = None) -> int:
    """Bytes of the model's values in float32: active weights, other parameters, statistics.

    Floating-point buffers (running means and variances) count, integer counters do not; nor do
    the positions of the active weights, whose size depends on how they are encoded.

    Raises:
        MaskError: the mask does not fit the model.

    >>> model_bytes(nn.BatchNorm2d(8))
    128
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    if mask is not None:
        _check_fits(model, mask)
        sizes |= mask.counts()
    statistics = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    return FLOAT_BYTES * (sum(sizes.values()) + statistics)


def _counter(
    name: str, macs: Counter[str]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    """A forward hook that adds a call's multiply-accumulates under `name`."""

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor), "hooked modules have a weight"
        # Each output value takes one product per input of its filter; a transposed convolution
        # is the reverse, one product per output that an input value reaches.
        values = inputs[0].numel() if isinstance(module, _TRANSPOSED) else output.numel()
        macs[name] += values * weight[0].numel()

    return count


def _check_fits(model: nn.Module, mask: Mask) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in mask.shapes().items():
        if shapes.get(name) != shape:
            raise MaskError(
                f"mask of {name!r}: the model's parameter has shape {shapes.get(name)}, "
                f"the mask {shape}"
            )
