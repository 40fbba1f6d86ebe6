"""Configuration: one source of names, all problems at once, nothing unknown accepted."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import fedprune
from fedprune.config import RunConfig, parse_assignments, read_toml
from fedprune.errors import ConfigError


def test_toml_round_trip(tmp_path: Path) -> None:
    config = RunConfig.parse({"seed": 3, "data.alpha": 0.1, "data.dataset": 'a "b" \\ c'})
    path = tmp_path / "config.toml"
    path.write_text(config.toml(), encoding="utf-8")
    assert RunConfig.read(path) == config
    assert read_toml(path) == config.flat()


def test_text_values_take_the_type_of_their_key() -> None:
    config = RunConfig.parse(
        {"training.rounds": "7", "training.lr": "1e-2", "data.augment": "true", "data.alpha": 1}
    )
    assert (config.training.rounds, config.training.lr) == (7, 0.01)
    assert config.data.augment is True
    assert config.data.alpha == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method.densty": 0.1}, "did you mean 'pruning.density'"),
        ({"nonsense": 1}, "unknown config key 'nonsense'"),
        ({"method.density": 0}, "density"),
        ({"method.density": 1.5}, "density"),
        ({"method.density": float("nan")}, "density"),
        ({"method.density": "many"}, "expected float, got 'many'"),
        ({"data.clients": 0}, "data.clients: expected at least 1"),
        ({"data.clients": 2.5}, "expected int"),
        ({"data.clients": True}, "expected int"),
        ({"data.augment": 1}, "expected bool"),
        ({"data.partition": "fair"}, "iid, dirichlet, pathological, natural"),
        ({"training.batch_size": 1}, "batch norm needs at least 2"),
        ({"training.lr": float("inf")}, "training.lr"),
        ({"training.momentum": 1.0}, "momentum"),
        ({"seed": -1}, "seed"),
        ({"federation.value_dtype": "fp8"}, "fp32, fp16, bf16, int8"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(values)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({"method.density": 2.0, "data.clients": 0, "training.lr": -1.0})
    for part in ("method.density", "data.clients", "training.lr"):
        assert part in str(caught.value)


def test_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        RunConfig.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(ConfigError, match="not a TOML file"):
        RunConfig.read(tmp_path / "bad.toml")


def test_derived_settings() -> None:
    config = RunConfig.parse({"training.rounds": 50})
    assert config.model_name == "resnet8"
    assert config.adjust_until == 30
    assert config.clients_per_round == 8
    few = RunConfig.parse({"federation.clients_per_round": 3, "method.adjust_until": 4})
    assert (few.clients_per_round, few.adjust_until) == (3, 4)


def test_assignments() -> None:
    assert parse_assignments(["a.b=1", "c = x=y"]) == {"a.b": "1", "c": "x=y"}
    with pytest.raises(ConfigError, match="expected section"):
        parse_assignments(["novalue"])


def test_flower_app_lists_every_key_with_its_default() -> None:
    """Flower refuses an override of a key that the app's own configuration does not list."""
    project = Path(fedprune.__file__).parent / "flower" / "app" / "pyproject.toml"
    tables = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    assert set(tables.pop("run")) == {"out", "resume"}
    flat = {"seed": tables.pop("seed")}
    flat |= {f"{name}.{key}": value for name, part in tables.items() for key, value in part.items()}
    assert flat == RunConfig().flat()
