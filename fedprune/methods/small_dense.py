"""A small dense network of as many bytes as the sparse one: pruning's plainest rival.

The same network class, narrower, with the largest width whose fp32 message is not larger than
the sparse model's; trained by federated averaging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedprune.methods.base import Builder, Method, WidthRule

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SmallDense(Method):
    """Federated averaging of a narrower dense network of at most as many bytes.

    Attributes:
        density: of the sparse network whose bytes it may take.
    """

    name: ClassVar[str] = "small-dense"

    density: float = 0.05

    def build_model(self, build: Builder, widest: WidthRule) -> nn.Module:
        from sparsemodel.masks.distribution import uniform  # noqa: PLC0415
        from sparsemodel.masks.mask import prunable_parameters  # noqa: PLC0415
        from sparsemodel.storage.cost import model_bytes  # noqa: PLC0415

        full = build()
        prunable = prunable_parameters(full)
        shapes = {name: tuple(p.shape) for name, p in prunable.items()}
        kept = sum(uniform(shapes, self.density).values())
        pruned = sum(p.numel() for p in prunable.values()) - kept
        return build(width=widest(model_bytes(full) - 4 * pruned))
