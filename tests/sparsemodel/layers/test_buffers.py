"""Buffers that no state carries, index tables and masks for instance, stay what the model made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsemodel
from sparsemodel.errors import CheckpointError, SparseModelError
from sparsemodel.layers.from_state import fixed_buffers, load_state_, sparse_model
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.state import SparseState


class Tables(nn.Module):
    """Permutes by a table of integers, masks by one of booleans, adds fleeting positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("allowed", torch.tensor([True, False, True, True]))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)[:, self.order] * self.allowed + self.positions * self.scale
        y: torch.Tensor = self.last(self.first(x))
        return y


def trained() -> tuple[Tables, Mask, SparseState]:
    """A model whose statistics have moved, under a mask, and its state as runs exchange it."""
    torch.manual_seed(0)
    model = Tables()
    model(torch.randn(8, 4))
    mask = Mask({"last.weight": torch.rand(3, 4) < 0.6})
    mask.apply(model)
    values = {
        name: (tensor[mask[name]] if name in mask else tensor).detach().numpy().copy()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    return model.eval(), mask, SparseState(values, mask.csr())


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_states_leave_them_alone() -> None:
    """Zeros in the place of a table would give other logits, and no error."""
    model, _, state = trained()
    plain, skeleton = Tables().eval(), Tables().eval()
    plain.norm.num_batches_tracked.fill_(9)
    load_state_(plain, state)
    sparse = sparse_model(skeleton, state)
    with torch.no_grad():
        torch.testing.assert_close(plain(X), model(X))
        torch.testing.assert_close(sparse(X), model(X))
    for other in (plain, sparse):
        assert int(other.get_buffer("norm.num_batches_tracked")) == 0
        assert other.get_buffer("order").tolist() == [2, 0, 3, 1]
    assert fixed_buffers(model) == ["order", "allowed", "positions"]


def test_a_model_on_meta_that_needs_them_is_refused_by_name(tmp_path: Path) -> None:
    model, mask, state = trained()
    with torch.device("meta"):
        empty = Tables()
    with pytest.raises(SparseModelError, match="the buffer 'order' is not part of the state"):
        sparse_model(empty, state)
    sparsemodel.save(sparsemodel.sparsify(model, mask), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"does not hold the buffer 'positions'.*on the CPU"):
        sparsemodel.load(tmp_path / "model", empty)
    loaded = sparsemodel.load(tmp_path / "model", Tables()).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), model(X))
