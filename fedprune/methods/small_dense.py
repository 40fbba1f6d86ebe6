"""A small dense network of as many bytes as the sparse one: pruning's plainest rival.

The same network class, narrower, with the largest width whose fp32 message is not larger than
the sparse model's; trained by federated averaging.
"""

from __future__ import annotations

from torch import nn

from fedprune.methods.base import Method
from prunelab.networks import build_model, narrow_width
from sparsemodel.masks.distribution import uniform
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.storage.cost import model_bytes


class SmallDense(Method):
    """Federated averaging of a narrower dense network."""

    uses_density = True

    def build_model(self) -> nn.Module:
        full = self.build_reference()
        prunable = prunable_parameters(full)
        shapes = {name: tuple(p.shape) for name, p in prunable.items()}
        kept = sum(uniform(shapes, self.config.pruning.density).values())
        pruned = sum(p.numel() for p in prunable.values()) - kept
        name, dataset = self.config.model_name, self.dataset
        width = narrow_width(
            name,
            num_classes=dataset.num_classes,
            input_shape=dataset.input_shape,
            max_bytes=model_bytes(full) - 4 * pruned,
        )
        return build_model(
            name,
            num_classes=dataset.num_classes,
            input_shape=dataset.input_shape,
            seed=self.config.seed,
            width=width,
        )
