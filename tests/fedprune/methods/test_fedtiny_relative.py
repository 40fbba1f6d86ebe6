"""Weights and gradients against their output's norm: what batch norm cannot see changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import laid_out, run_inline, tiny
from torch import nn

from fedprune.methods.fedtiny.pool import candidate_counts
from fedprune.methods.fedtiny.relative import (
    constant_outputs,
    normed_layers,
    output_norms,
    shares,
    unit_outputs,
)
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.setup import Setup
from sparsemodel.layers.from_state import load_state_
from sparsemodel.runtime.adjust import prune_to_largest
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return laid_out(tmp_path_factory.mktemp("setup"), method__name="fedtiny-plus")


def beginning(setup: Setup) -> SparseState:
    """Sparse enough that some outputs are silent, and none of them is shifted from zero."""
    counts = candidate_counts(setup.prunable, 0.03, num_candidates=1, seed=0)[0]
    state = prune_to_largest(setup.start_state(), counts)
    shifts = [name for name in state.values if name.endswith(".bias") and name != "fc.bias"]
    state = state.replace({name: np.zeros_like(state.values[name]) for name in shifts})
    assert any((np.diff(p.row_ptr) == 0).any() for p in (state.patterns or {}).values())
    return state


def normed_of(setup: Setup) -> dict[str, str | None]:
    program = setup.network.program
    assert program is not None
    return normed_layers(program)


def test_every_convolution_of_a_residual_network_has_its_norm_and_the_classifier_none(
    setup: Setup,
) -> None:
    normed = normed_of(setup)
    assert "fc.weight" not in normed
    assert normed["conv1.weight"] == "bn1.weight"
    assert normed["layer2.0.downsample.0.weight"] == "layer2.0.downsample.1.weight"
    assert {*normed, "fc.weight"} == set(setup.prunable) | {"conv1.weight"}


def test_the_function_stays_and_gradients_are_those_of_norm_one(setup: Setup) -> None:
    """Against autograd in float64: g' = g · ‖w_o‖, and none at a silent output."""
    state, normed = beginning(setup), normed_of(setup)
    torch.manual_seed(0)
    assert setup.network.program is not None
    shape = setup.network.program.input_shape
    images, labels = torch.randn(16, *shape).double(), torch.arange(16) % 3
    found = []
    for one in (state, unit_outputs(state, setup.network.program)):
        model = setup.network.build()
        load_state_(model, one)
        model.double().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-12
        logits = model(images)
        nn.functional.cross_entropy(logits, labels).backward()
        gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach().numpy(), gradients))
    (logits, plain), (same, unit) = found
    constant = constant_outputs(setup.network.program, state)
    assert np.allclose(same, logits, rtol=1e-4, atol=1e-5)
    num_reading_zeros = 0
    for name in normed:
        pattern = state.pattern(name)
        if pattern is None:
            continue
        norms = output_norms(pattern, state.values[name]) * ~constant[name]
        expected = (plain[name].reshape(len(norms), -1) * norms[:, None]).reshape(unit[name].shape)
        assert np.abs(unit[name] - expected).max() < 1e-4 * np.abs(expected).max()
        assert not unit[name][norms == 0].any()
        silent = np.diff(pattern.row_ptr) == 0
        assert constant[name][silent].all()
        num_reading_zeros += int((constant[name] & ~silent).sum())
    assert num_reading_zeros


def test_shares_by_hand_and_of_an_output_of_zeros() -> None:
    pattern = Pattern.from_positions((3, 2), np.array([0, 1, 4]))
    assert shares(pattern, np.float32([-3, 4, 2])).tolist() == [0.6, 0.8, 1.0]
    assert shares(pattern, np.float32([0, 0, 1])).tolist() == [0.0, 0.0, 1.0]
    assert output_norms(pattern, np.float32([-3, 4, 2])).tolist() == [5.0, 0.0, 2.0]


@pytest.mark.parametrize("growth_at", ["merged", "fresh"])
def test_no_output_falls_silent_or_speaks_up(growth_at: str, tmp_path: Path) -> None:
    """With `keep_outputs` none falls silent; and a silent one has no gradient to be grown by."""
    silent, moved = [], []
    for until in (1, 3):
        config = tiny(
            method__name="fedtiny-plus", method__density=0.03, method__relative=True,
            method__keep_outputs=True, method__growth_at=growth_at, method__adjust_every=1,
            method__adjust_until=until, method__granularity="entire", training__rounds=3,
        )  # fmt: skip
        out = run_inline(config, tmp_path / str(until))
        patterns = load_state(out / MODEL_FILE)[0].patterns
        assert patterns is not None
        silent.append([(np.diff(pattern.row_ptr) == 0).tolist() for pattern in patterns.values()])
        moved.append([bool(line["adjusted"]) for line in read_metrics(out) if "round" in line])
    assert moved == [[False] * 3, [True, True, False]]
    normed = [name != "fc.weight" for name in patterns]
    for before, after, has_norm in zip(*silent, normed, strict=True):
        assert before == after or not has_norm
    assert any(any(rows) for rows in silent[0])
