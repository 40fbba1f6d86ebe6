"""2:4 layers through cuSPARSELt, and training of structured networks, on a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsemodel.kernels.blocks import semi_structured
from sparsemodel.layers.base import Execution
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.structure import block_mask, n_of_m_mask
from sparsemodel.optim import MaskedSGD, SparseSGD

# torch says so once, whenever a semi-structured tensor is made.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    bound = (2e-2 if dtype == torch.bfloat16 else 3e-3) * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("batch", [1, 7, 64, 300])
def test_two_of_four_forward_and_gradients(batch: int, dtype: torch.dtype) -> None:
    plain = nn.Linear(128, 64, dtype=dtype)
    mask = n_of_m_mask({"weight": plain.weight.detach().abs().float()})
    mask.apply(plain)
    sparse = sparsify(plain, mask, execution="2:4")
    assert semi_structured.obstacle(sparse.values, (64, 128)) is None
    x = torch.randn(batch, 128, dtype=dtype)
    results = []
    for layer in (sparse, plain.double()):
        inputs = x.to(next(layer.parameters()).dtype).requires_grad_()
        y = layer(inputs)
        y.float().square().mean().backward()
        results.append((y.detach(), inputs.grad))
    for found, expected in zip(*results, strict=True):
        near(found, expected, dtype)
    pattern = mask["weight"].to(x.device)
    near(sparse.values.grad, plain.weight.grad[pattern], dtype)
    near(sparse.bias.grad, plain.bias.grad, dtype)
    with torch.no_grad():
        for _ in range(2):  # compressed, then kept
            near(sparse(x), results[1][0], dtype)
        sparse.values.mul_(2)
        sparse.bias.mul_(2)
        near(sparse(x), 2 * results[1][0], dtype)


@pytest.mark.parametrize("execution", ["blocks", "2:4"])
def test_a_network_trains_as_the_masked_one(execution: Execution, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)
    scores = {f"{i}.weight": model[i].weight.detach().abs().float() for i in (0, 2)}
    blocks = block_mask(scores, dict.fromkeys(scores, 9), side=16)
    mask = blocks if execution == "blocks" else n_of_m_mask(scores)
    mask.apply(model)
    sparse = sparsify(model, mask, execution=execution)
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
