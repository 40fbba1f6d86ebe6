"""Masks of torch.nn.utils.prune come and go unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsemodel
from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 4, 3)
    return nn.Sequential(convolution, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_what_torch_pruned_becomes_a_sparse_model() -> None:
    """Two layers by their own criteria, one of them twice; the stem is not pruned."""
    model = network()
    torch_prune.random_unstructured(model[2], "weight", amount=0.5)
    torch_prune.l1_unstructured(model[2], "weight", amount=10)
    torch_prune.ln_structured(model[4], "weight", amount=1, n=2, dim=0)
    mask = Mask.from_torch(model)
    assert mask.counts() == {"2.weight": 144 - 72 - 10, "4.weight": 128}
    assert all(torch.equal(mask[n], model.get_buffer(f"{n}_mask") == 1) for n in mask)
    expected = model(X)
    with pytest.raises(SparseModelError, match=r"Mask\.from_torch keeps, before prune\.remove"):
        sparsemodel.sparsify(model, mask)
    for name in mask:
        torch_prune.remove(model.get_submodule(name.removesuffix(".weight")), "weight")
    torch.testing.assert_close(sparsemodel.sparsify(model, mask)(X), expected)
    with pytest.raises(MaskError, match=r"no layer that torch\.nn\.utils\.prune has pruned"):
        Mask.from_torch(model)


def test_a_round_trip_is_exact() -> None:
    model = network()
    mask = prune(model, density=0.3)
    other = network()
    mask.to_torch(other)
    assert Mask.from_torch(other).digest() == mask.digest()
    mask.apply(model)
    assert torch.equal(other(X), model(X))
    other(X).sum().backward()
    assert other[2].weight_orig.grad.count_nonzero() <= mask.counts()["2.weight"]
    for name in mask:
        torch_prune.remove(other.get_submodule(name.removesuffix(".weight")), "weight")
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_bias_may_be_pruned_too() -> None:
    layer = nn.Linear(3, 4)
    torch_prune.random_unstructured(layer, "bias", amount=3)
    assert Mask.from_torch(layer).counts() == {"bias": 1}


def test_refusals_leave_the_model_as_it_was() -> None:
    model, good = network(), torch.eye(3, 64).bool()
    refused = {
        r"no parameter '5\.weight' that": {"5.weight": good},
        r"no parameter '1\.weight' that": {"1.weight": good},
        r"'4\.weight': the model's parameter has shape \(3, 64\), the mask \(4, 64\)": {
            "4.weight": torch.eye(4, 64).bool()
        },
    }
    for text, wrong in refused.items():
        with pytest.raises(MaskError, match=text):
            Mask({"2.weight": torch.ones(4, 4, 3, 3).bool(), **wrong}).to_torch(model)
    assert list(model.state_dict()) == list(network().state_dict())
    Mask({"4.weight": good}).to_torch(model)
    with pytest.raises(MaskError, match=r"'4\.weight' is pruned .* already; call prune\.remove"):
        Mask({"4.weight": good}).to_torch(model)
    model[4].weight_mask.mul_(0.5)
    with pytest.raises(MaskError, match=r"'4\.weight': expected zeros and ones of shape \(3, 64\)"):
        Mask.from_torch(model)
