"""Training of networks of sparse blocks on a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.structure import block_mask
from sparsemodel.optim import MaskedSGD, SparseSGD


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    bound = (2e-2 if dtype == torch.bfloat16 else 3e-3) * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=bound)


def test_a_network_trains_as_the_masked_one(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)
    scores = {f"{i}.weight": model[i].weight.detach().abs().float() for i in (0, 2)}
    mask = block_mask(scores, dict.fromkeys(scores, 9), side=16)
    mask.apply(model)
    sparse = sparsify(model, mask, execution="blocks")
    optimizer = SparseSGD(sparse.parameters(), lr=0.05)
    with MaskedSGD(model, mask, lr=0.05) as expected:
        for _ in range(4):
            x, labels = torch.randn(32, 64, dtype=dtype), torch.randint(0, 64, (32,))
            for network, steps in ((sparse, optimizer), (model, expected)):
                steps.zero_grad()
                functional.cross_entropy(network(x).float(), labels).backward()
                steps.step()
    dense = densify(sparse)
    for name, parameter in model.named_parameters():
        near(dense.get_parameter(name).detach(), parameter.detach(), dtype)
