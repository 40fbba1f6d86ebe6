"""Programs and states of devices are those of torch's networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedprune.device.networks import NETWORKS, for_samples, open_program, random_state
from prunelab.errors import ModelError
from prunelab.networks.build import build_model
from prunelab.networks.builtin import MODELS
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.trainer import Trainer


def test_every_built_in_network_has_its_program() -> None:
    assert set(NETWORKS) == set(MODELS)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("shape", "classes"), [((3, 32, 32), 10), ((1, 40, 48), 3), ((3, 64, 64), 100)]
)
def test_a_program_is_that_of_torchs_network(
    name: str, shape: tuple[int, int, int], classes: int
) -> None:
    """For pictures of any size, colour or number of classes. If a network has changed, write its
    `program_of(...).text()` into fedprune/device/programs."""
    model = build_model(name, num_classes=classes, input_shape=shape, seed=0)
    assert for_samples(open_program(name), shape, classes) == program_of(model, shape)


def test_a_program_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "net.json"
    file.write_text(open_program("resnet8").text())
    assert open_program(str(file)) == open_program("resnet8")
    file.write_text("{}")
    with pytest.raises(ModelError, match=r"net\.json"):
        open_program(str(file))
    with pytest.raises(ModelError, match=r"no network 'resnet81'.*did you mean 'resnet8'"):
        open_program("resnet81")


def test_a_random_state_has_the_density_and_comes_from_the_seed() -> None:
    """Of all layers but the first and the last; signals keep their size on the way."""
    program = open_program("resnet20")
    state, again, other = (random_state(program, density=0.1, seed=seed) for seed in (1, 1, 2))
    assert state.patterns is not None
    assert state.patterns.density == pytest.approx(0.1, abs=1e-4)
    assert not {"conv1.weight", "fc.weight"} & state.patterns.keys()
    assert state.patterns == again.patterns != other.patterns
    for name, values in state.values.items():
        np.testing.assert_array_equal(values, again.values[name])
    assert state.shapes() == program.shapes()
    images = np.random.default_rng(0).standard_normal((64, 3, 32, 32), np.float32)
    trainer = Trainer(program, state, batch_size=64)
    losses = [trainer.step(images, np.arange(64) % 10, lr=0.1, momentum=0.9)[0] for _ in range(30)]
    assert losses[0] < 5
    assert losses[-1] < 0.5 * losses[0]
