"""Clients of one secure sum, and what a server has of them, without any wire between."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedprune.privacy import secure_sum
from fedprune.privacy.randomness import Words
from fedprune.privacy.secure_sum import Announced, threshold_of

SESSION = "a sum"


@dataclass
class Party:
    """Clients of one sum, and what a server has of them."""

    num: int
    share: float = 0.5
    kept: dict[int, dict[str, bytes]] = field(default_factory=dict)
    publics: dict[int, bytes] = field(default_factory=dict)
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    announced: dict[int, Announced] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = {client: {} for client in range(self.num)}

    def advertise(self, clients: list[int]) -> None:
        for client in clients:
            self.publics[client] = secure_sum.advertise(self.kept[client], SESSION, client)

    def exchange(self, clients: list[int]) -> None:
        for client in clients:
            commitment, sealed = secure_sum.share(
                self.kept[client], SESSION, self.publics,
                weight=1, at_least=2, threshold_share=self.share,
            )  # fmt: skip
            self.sealed[client] = sealed
            self.announced[client] = Announced(self.publics[client], commitment)

    def mask(self, client: int, words: Words, width: int) -> bytes:
        return secure_sum.mask(
            self.kept[client], SESSION, words.copy(), clients=list(self.announced), width=width
        )

    def unmask(self, client: int, survivors: list[int]) -> dict[int, bytes]:
        mine = {c: self.sealed[c][client] for c in self.announced if c != client}
        return secure_sum.unmask(self.kept[client], SESSION, survivors, mine)

    @property
    def threshold(self) -> int:
        return threshold_of(len(self.publics), self.share)

    def unmasked(
        self, total: Words, told: dict[int, dict[int, bytes]], survivors: list[int], width: int
    ) -> Words:
        secure_sum.remove_masks(
            total, told, session=SESSION, announced=self.announced, survivors=survivors,
            threshold=self.threshold, width=width,
        )  # fmt: skip
        return total & np.uint64(2 ** (8 * width) - 1)


def ready(num: int) -> Party:
    party = Party(num)
    party.advertise(list(range(num)))
    party.exchange(list(range(num)))
    return party
