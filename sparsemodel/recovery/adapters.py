"""Low-rank changes of a pruned weight that can be merged without losing its mask.

Each is a parametrisation (torch.nn.utils.parametrize) of the weight of a linear layer.
Source: Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (2023),
section 3.2; LoRA is of Hu et al. (ICLR 2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """A weight W [out, in] that B A changes, of B [out, rank] and A [rank, in].

    A and B are float32 at least, and learn; W does not. `pruned` holds the mask as data, so that
    an active weight of value 0 is known to be active.

    Args:
        weight: W, under the mask.
        pattern: bool [out, in], True for active weights.
        rank: of the change, at least 1.
        scale: s, by which the change is multiplied where it is added.
        generator: of A, on the CPU.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    pruned: Tensor

    def __init__(
        self,
        weight: Tensor,
        pattern: Tensor,
        *,
        rank: int,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("pruned", ~pattern.to(weight.device))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        out, width = weight.shape
        a, b = self.start(out, width, rank, generator)
        self.lora_a = nn.Parameter(a.to(weight.device, dtype))
        self.lora_b = nn.Parameter(b.to(weight.device, dtype))

    @staticmethod
    def start(out: int, width: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A, uniform in ±1/√in as LoRA has it, and B, zero: no change."""
        drawn = torch.rand(rank, width, generator=generator, device="cpu")
        return (2.0 * drawn - 1.0) / math.sqrt(width), torch.zeros(out, rank, device="cpu")

    def product(self, weight: Tensor) -> Tensor:
        """B A, in the type of the weight."""
        return (self.lora_b @ self.lora_a).to(weight.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """The weight that stays when the adapter goes; zero under the mask."""
        return self.forward(weight).masked_fill(self.pruned, 0.0)


class MaskLora(Adapter):
    """W + s (M ∘ B A): the network that is trained is the one that is merged, to the bit."""

    def forward(self, weight: Tensor) -> Tensor:
        """W + s (M ∘ B A)."""
        return weight + (self.scale * self.product(weight)).masked_fill(self.pruned, 0.0)


class ScaleLora(Adapter):
    """W ∘ B A, where B A starts as ones: zeros stay zeros, also those that are active."""

    @staticmethod
    def start(out: int, width: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """1/√rank everywhere, so that B A = 1 up to rounding."""
        value = 1.0 / math.sqrt(rank)
        return (
            torch.full((rank, width), value, device="cpu"),
            torch.full((out, rank), value, device="cpu"),
        )

    def forward(self, weight: Tensor) -> Tensor:
        """W ∘ B A."""
        return weight * self.product(weight)


class LoraPrune(Adapter):
    """W + s B A while it is trained, W + s (M ∘ B A) when it is merged.

    Training costs no mask, but what is merged is another network than the one that was trained.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """W + s B A, which is dense."""
        return weight + self.scale * self.product(weight)


ADAPTERS: dict[str, type[Adapter]] = {
    "mask-lora": MaskLora,
    "scale-lora": ScaleLora,
    "lora-prune": LoraPrune,
}
