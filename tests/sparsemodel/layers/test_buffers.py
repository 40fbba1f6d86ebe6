"""What no state carries, index tables and frozen weights, stays what the model made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsemodel
from sparsemodel.errors import CheckpointError, MaskError, SparseModelError
from sparsemodel.layers.from_state import carried_tensors, fixed_tensors, load_state_, sparse_model
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
    assert fixed_tensors(model) == ["order", "allowed", "positions"]


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


class Language(nn.Module):
    """An embedding that is the classifier too, a frozen layer with an adapter, a shared table."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.base = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.base.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0 + seed))
        self.embedding.register_buffer("scale", self.scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        y: torch.Tensor = self.head(self.base(x) + self.scale * self.up(self.down(x)))
        return y


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_come_once_and_frozen_ones_not_at_all(device: str) -> None:
    """A tied model that two nodes fill with one state gives the same logits and stays tied."""
    sender = Language(0)
    carried = carried_tensors(sender)
    assert list(carried) == ["scale", "embedding.weight", "down.weight", "up.weight"]
    assert fixed_tensors(sender) == ["base.weight", "base.bias"]
    mask = Mask({"up.weight": torch.eye(4, 2).bool()})
    mask.apply(sender)
    values = {n: (t[mask[n]] if n in mask else t).numpy().copy() for n, t in carried.items()}
    state = SparseState(values, mask.csr())
    with torch.device(device):
        skeleton = Language(1)
    if device == "meta":
        with pytest.raises(SparseModelError, match=r"the frozen parameter 'base\.weight' is not"):
            sparse_model(skeleton, state)
        skeleton.base = Language(1).base.requires_grad_(False)
    sparse = sparse_model(skeleton, state)
    plain = Language(1)
    load_state_(plain, state)
    sender.base.load_state_dict(plain.base.state_dict())  # what every node has by the seed
    tokens = torch.arange(7)
    for model in (plain, sparse):
        torch.testing.assert_close(model(tokens), sender(tokens))
        assert model.get_parameter("head.weight") is model.get_parameter("embedding.weight")
        assert model.get_buffer("embedding.scale") is model.get_buffer("scale")
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"base.weight", "base.bias"}
    sparse(tokens).sum().backward()
    assert sparse.get_parameter("up.values").grad is not None
    with pytest.raises(MaskError, match="not of this model"):
        load_state_(plain.requires_grad_(True), state)


def test_a_wholly_frozen_model_is_carried_as_a_whole() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    assert list(carried_tensors(model)) == ["weight", "bias"]
    assert fixed_tensors(model) == []
