"""A mask held in a plain loop: any optimiser, precision, accumulation and wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_a_process
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DataParallel

import sparsemodel
from sparsemodel.errors import MaskError
from sparsemodel.loops.hold import masked_weights


class Langevin(torch.optim.SGD):
    """Moves every weight in each step, whatever its gradient."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += 0.01 * torch.randn_like(parameter)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "noise": lambda p: Langevin(p, lr=0.1, momentum=0.9),
    "ours": lambda p: sparsemodel.SparseAdam(p, lr=0.1),
}


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


def batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8, generator=drawn), torch.randint(0, 3, (8,), generator=drawn))
        for _ in range(count)
    ]


def largest_pruned(model: nn.Module, mask: sparsemodel.Mask) -> float:
    parameters = dict(model.named_parameters())
    return max(float(parameters[n].detach()[~mask[n]].abs().max()) for n in mask)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_each_step(name: str) -> None:
    """Whatever the optimiser remembers from before: two dense steps leave momentum behind."""
    model = make_net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for images, labels in batches(2):
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = sparsemodel.prune(model, density=0.2)
    with sparsemodel.HeldMask(model, mask, optimizer):
        assert largest_pruned(model, mask) == 0
        for images, labels in batches():
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert largest_pruned(model, mask) == 0
    for parameter_name in mask:
        remembered = optimizer.state[dict(model.named_parameters())[parameter_name]].values()
        same = [v for v in remembered if v.shape == mask[parameter_name].shape]
        assert same
        assert all(not v[~mask[parameter_name]].any() for v in same)


def test_active_weights_train_as_those_of_a_sparse_model() -> None:
    """With clipping and accumulation: the norm is of the active gradients alone."""
    dense, mask = make_net(), sparsemodel.prune(make_net(), density=0.3)
    sparse = sparsemodel.sparsify(dense, mask)

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        held = sparsemodel.HeldMask(model, mask, optimizer) if model is dense else None
        for number, (images, labels) in enumerate(batches()):
            functional.cross_entropy(model(images), labels).backward()
            if number % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        if held is not None:
            held.release()

    train(dense)
    train(sparse)
    expected = sparsemodel.densify(sparse).state_dict()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_an_infinite_gradient_of_a_pruned_weight_is_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    model = nn.ParameterDict({"w": weight})
    mask = sparsemodel.Mask({"w": torch.tensor([True, False])})
    with sparsemodel.HeldMask(model, mask, torch.optim.SGD([weight], lr=1.0)):
        (weight * torch.tensor([1.0, torch.inf])).nansum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 0.0]


def test_released_or_forgotten_it_leaves_nothing_behind() -> None:
    model = make_net()
    mask = sparsemodel.prune(model, density=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError), sparsemodel.HeldMask(model, mask, optimizer):
        raise RuntimeError
    sparsemodel.sparsify(model, mask)  # refuses hooks on parameters
    held = sparsemodel.HeldMask(model, mask, optimizer)
    del held
    sparsemodel.sparsify(model, mask)
    images, labels = batches(1)[0]
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert largest_pruned(model, mask) > 0


class Holder(nn.Module):
    """As a LightningModule or peft's models hold a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(3, 3)


def test_names_are_found_through_wrappers_and_in_parts() -> None:
    model = make_net()
    mask = sparsemodel.prune(model, density=0.2)
    of_compiled = sparsemodel.Mask({f"_orig_mod.{name}": mask[name] for name in mask})
    of_wrapped = sparsemodel.Mask({f"module.{name}": mask[name] for name in mask})
    compiled = torch.compile(model, backend="eager")
    for wrapped in (
        compiled,
        DataParallel(model),
        DataParallel(compiled),
        Holder(model),
        Holder(compiled),
        DataParallel(Holder(model)),
    ):
        for given in (mask, of_compiled, of_wrapped):
            found = masked_weights(wrapped, given)
            assert list(found) == list(given)
            assert all(
                a is b
                for a, b in zip(found.values(), masked_weights(model, mask).values(), strict=True)
            )


def test_a_mask_that_does_not_fit_is_refused_before_anything_is_changed() -> None:
    model = make_net()
    before = copy.deepcopy(model.state_dict())
    mask = sparsemodel.prune(model, density=0.2)
    with pytest.raises(MaskError, match=r"does not fit Linear: it has no parameters \['2\.weight'"):
        sparsemodel.HeldMask(nn.Linear(3, 3), mask)
    other = sparsemodel.Mask({"4.weight": torch.ones(3, 63, dtype=torch.bool)})
    with pytest.raises(MaskError, match=r"shape \(3, 64\), the mask \(3, 63\)"):
        sparsemodel.HeldMask(model, other)
    twice = nn.ModuleDict({"a": model, "b": make_net(1)})
    with pytest.raises(MaskError, match=r"fits 2 parts of ModuleDict: \['a\.', 'b\.'\]"):
        sparsemodel.HeldMask(twice, mask)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)


def test_weights_in_pieces_are_refused(tmp_path: Path) -> None:
    assert "cut over several processes" in in_a_process(held_in_pieces, tmp_path)


def held_in_pieces(folder: Path) -> str:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{folder / 'rendezvous'}"
    )
    model = make_net()
    mask = sparsemodel.prune(model, density=0.2)
    try:
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        sparsemodel.HeldMask(model, mask)
    except MaskError as error:
        return str(error)
    finally:
        distributed.destroy_process_group()
    return ""


def test_a_compiled_model() -> None:
    model = make_net()
    mask = sparsemodel.prune(model, density=0.2)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.1)
    with sparsemodel.HeldMask(compiled, mask, optimizer):
        for images, labels in batches(2):
            functional.cross_entropy(compiled(images), labels).backward()
            assert not any(p.grad[~mask[n]].any() for n, p in model.named_parameters() if n in mask)
            optimizer.step()
            optimizer.zero_grad()
    assert largest_pruned(model, mask) == 0


def test_frozen_weights_are_zeroed_and_stay() -> None:
    model = make_net()
    mask = sparsemodel.prune(model, density=0.2)
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with sparsemodel.HeldMask(model, mask, optimizer):
        images, labels = batches(1)[0]
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert largest_pruned(model, mask) == 0
