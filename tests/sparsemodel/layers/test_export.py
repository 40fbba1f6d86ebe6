"""Other formats know no sparse layers: they say so, and take the densified model."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsemodel
from sparsemodel.errors import SparseModelError
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return sparsify(dense, prune(dense, density=0.5)).eval()


EXPORTS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, X),
    "torch.jit.trace without a check": lambda model: torch.jit.trace(model, X, check_trace=False),
    "torch.jit.script": torch.jit.script,
    "torch.export": lambda model: torch.export.export(model, (X,)).module(),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_ask_for_a_dense_model_and_take_it(name: str) -> None:
    model, export = network(), EXPORTS[name]
    with pytest.raises(SparseModelError, match=r"make the model dense first, sparsemodel\.densify"):
        export(model)
    with torch.no_grad():
        exported = export(densify(model))
        torch.testing.assert_close(exported(X), model(X), rtol=1e-5, atol=1e-6)


def test_onnx_asks_for_a_dense_model() -> None:
    """By torch.jit.trace; the newer exporter needs onnxscript and goes by torch.export."""
    with pytest.raises(SparseModelError, match=r"sparsemodel\.densify"):
        torch.onnx.export(network(), (X,), io.BytesIO(), dynamo=False)


def test_strict_export_goes_through_the_layers() -> None:
    model = network()
    program = torch.export.export(model, (X,), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X), model(X), rtol=1e-5, atol=1e-6)


class Pretrained(nn.Module):
    """As transformers' models write themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y

    def save_pretrained(self, path: Path) -> None:
        torch.save(self.state_dict(), path)


def test_save_pretrained_asks_for_a_dense_model(tmp_path: Path) -> None:
    """Its reader would find no weight of the names that it knows, and draw them anew."""
    inner = Pretrained()
    model = nn.Sequential(inner, nn.ReLU())
    mask = Mask({"0.body.weight": torch.eye(4).bool()})
    sparse = sparsify(model, mask)
    with pytest.raises(SparseModelError, match=r"sparsemodel\.save\(model, path\), or .*densify"):
        sparse[0].save_pretrained(tmp_path / "model")  # type: ignore[index, operator]
    sparsemodel.save(sparse, tmp_path / "sparse.safetensors")
    loaded = sparsemodel.load(tmp_path / "sparse.safetensors", model)
    with pytest.raises(SparseModelError, match="save_pretrained"):
        loaded[0].save_pretrained(tmp_path / "model")  # type: ignore[index, operator]
    densify(sparse)[0].save_pretrained(tmp_path / "model")  # type: ignore[index, operator]
    mask.apply(model)
    inner.save_pretrained(tmp_path / "plain")  # the model itself is as it was
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("model", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in two)
