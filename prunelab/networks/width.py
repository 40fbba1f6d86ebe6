"""How wide a network may be for a number of bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from prunelab.errors import ModelError
from prunelab.networks.build import Network, build_model, title, width_parameter
from prunelab.networks.builtin import ADJUSTABLE_WIDTH
from prunelab.networks.state import float_state, uninitialised

_GAP = 64  # widths in a row that a network may not have, such as what its heads do not divide
_BEYOND = 16  # so far sizes may fall again, of networks that round their widths
_NARROWEST, _WIDEST = 1 << 10, 1 << 24  # no network is looked for beyond


def narrow_width(
    model: Network,
    *,
    num_classes: int | None,
    input_shape: tuple[int, ...] | None,
    max_bytes: int,
) -> int:
    """The largest width whose fp32 state (parameters, batch-norm statistics) fits `max_bytes`.

    Sizes need not grow with every width (some networks round theirs to eights), and a network may
    not have every width.

    Args:
        model: what `build_model` takes with a `width`.

    Raises:
        ModelError: the model's width is fixed, makes no difference, or even the narrowest needs
            more.
    """
    if not width_parameter(model):
        raise ModelError(
            f"a narrower network is asked for, and {title(model)} has a fixed width; use one of "
            f"{', '.join(ADJUSTABLE_WIDTH)}, or a function with a parameter width"
        )

    def build(width: int) -> nn.Module:
        return build_model(
            model, num_classes=num_classes, input_shape=input_shape, seed=0, width=width
        )

    return _widest(title(model), build, max_bytes)


def _widest(name: str, build: Callable[[int], nn.Module], max_bytes: int) -> int:
    """Doubling, bisection, then some wider ones."""
    sizes: dict[int, int] = {}
    refusals: list[str] = []

    def first(widths: range) -> int | None:
        """The first that the network can have."""
        for width in widths:
            try:
                sizes[width] = _bytes_of(build, width)
                return width
            except Exception as error:  # whatever the network's own code raises of a width
                refusals.append(f"of width {width}: {error}")
        return None

    def fits(width: int) -> bool:
        return sizes[width] <= max_bytes

    best, high = 0, 1
    while (found := first(_below(high, high // 2))) is None or fits(found):
        best = found or best
        if high >= (_WIDEST if best else _NARROWEST):
            why = f"takes {sizes[best]} bytes of width {best}" if best else refusals[0]
            raise ModelError(
                f"{name}: no width was found that takes about {max_bytes} bytes; it {why}"
            )
        high *= 2
    low, high = best, found
    while high - low > 1:
        middle = (low + high) // 2
        found = first(_below(middle, low))
        if found is not None and not fits(found):
            high = found
        else:
            best, low = found or best, middle
    if not best:
        least = min(sizes)
        raise ModelError(
            f"{name} of width {least} takes {sizes[least]} bytes; allowed are {max_bytes}"
        )
    beyond = (first(range(width, width + 1)) for width in range(best + 1, best + 1 + _BEYOND))
    return max([best, *(width for width in beyond if width is not None and fits(width))])


def _below(width: int, end: int) -> range:
    """Widths from one downwards, to the next that a network with few of them can have."""
    return range(width, max(end, width - _GAP), -1)


def _bytes_of(build: Callable[[int], nn.Module], width: int) -> int:
    """Of a network's state in fp32, without its values where its code allows that."""
    try:
        with torch.device("meta"):  # shapes alone: the dense net may be far larger
            model = build(width)
    except ModelError:
        raise
    except Exception:  # whatever a network's own code raises without values
        with uninitialised():
            model = build(width)
    return 4 * sum(value.numel() for value in float_state(model).values())
