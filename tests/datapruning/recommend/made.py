"""Small synthetic histories with an order that can be learned."""

from __future__ import annotations

import torch

from datapruning.recommend.histories import Histories, leave_last_out
from datapruning.recommend.ragged import Ragged


def made_histories(
    num_users: int = 120, num_items: int = 30, *, seed: int = 0, noise: float = 0.2
) -> Histories:
    """Users who mostly go from item i to item 2 i + 1 (modulo num_items), sometimes anywhere."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_users):
        length = int(torch.randint(2, 12, (), generator=random))
        row = [int(torch.randint(num_items, (), generator=random))]
        while len(row) < length:
            if float(torch.rand((), generator=random)) < noise:
                row.append(int(torch.randint(num_items, (), generator=random)))
            else:
                row.append((2 * row[-1] + 1) % num_items)
        rows.append([item + 1 for item in row])
    train, valid, test = leave_last_out(Ragged.of(rows))
    titles = [f"Made game {number}: part {number % 3}" for number in range(num_items)]
    return Histories("made", torch.arange(100, 100 + num_users), train, valid, test, titles)
