"""The largest gradients at pruned weights, by a native plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsemodel.errors import MaskError
from sparsemodel.kernels.cpu.plan_abi import Images, NativePlan, TopK
from sparsemodel.layers.linear_and_conv import SparseLayer
from sparsemodel.masks.adjust import Entries


class Growth:
    """Room for the largest pruned gradients of some layers.

    Args:
        layers: weight name -> layer.
        nodes: layer -> its node in the plan; layers that are not in it get no entries.
        counts: weight name -> how many entries to keep at most.
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        nodes: Mapping[torch.nn.Module, int],
        counts: Mapping[str, int],
    ) -> None:
        self._entries: dict[str, Entries] = {}
        self._asked: dict[str, TopK] = {}
        for name, count in counts.items():
            layer = layers[name]
            pruned = layer.weight_shape.numel() - len(layer.cols)
            k = min(count, pruned) if layer in nodes else 0
            indices, top = torch.empty(k, dtype=torch.int64), torch.empty(k)
            self._entries[name] = indices, top
            if k > 0:
                places = indices.data_ptr(), top.data_ptr()
                self._asked[name] = TopK(k, *places, 0, nodes[layer])

    def take(self, plan: NativePlan, images: Images, labels: torch.Tensor) -> dict[str, Entries]:
        """The entries, of the mean loss on a batch.

        Raises:
            MaskError: a gradient is NaN.
        """
        if not self._asked:
            return self._entries
        found = plan.topk_grads(
            len(labels),
            images,
            labels.data_ptr(),
            list(self._asked.values()),
            threads=torch.get_num_threads(),
        )
        for name, count in zip(self._asked, found, strict=True):
            if count < 0:
                raise MaskError(f"a gradient of {name!r} is NaN; has training diverged?")
        expected = [asked.k for asked in self._asked.values()]
        assert found == expected, "k was cut to the number of pruned weights"
        return self._entries
