"""Configuration: one source of names, all problems at once, nothing unknown accepted."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedprune
from fedprune.config import RunConfig, own_settings, parse_assignments, read_toml
from fedprune.errors import ConfigError
from fedprune.flower.launch import launch_values
from fedprune.methods import METHODS
from fedprune.settings import EXECUTIONS, PARTITIONS, VALUE_DTYPES


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
        ({"method.densty": 0.1}, "of method 'fedtiny'; did you mean 'method.density'"),
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
        ({"federation.uplink_dtype": "fp8"}, "federation.uplink_dtype: .*fp16, bf16, int8; got"),
        ({"federation.uplink_topk": 0}, "federation.uplink_topk: expected 0 < uplink_topk <= 1"),
        ({"federation.uplink_topk": 30}, "uplink_topk <= 1, got 30"),
        ({"federation.max_share": 0}, "federation.max_share: expected 0 < max_share <= 1"),
        ({"pruning.density": 0.1}, "unknown config key 'pruning.density'"),
        ({"method.name": "fedtini"}, "unknown method 'fedtini'; known methods: fedavg, magnitude"),
        ({"method.name": "fedavg", "method.density": 0.1}, "'method.density' of method 'fedavg'"),
        ({"method.name": "fedprox", "method.muh": 1}, "of method 'fedprox'; did you mean .*mu'"),
        ({"method.name": "fedprox", "method.mu": -1}, "method.mu: expected 0 or more"),
        ({"method.name": "ssfl", "method.batches": 0}, "method.batches: expected at least 1"),
        ({"method.name": "magnitude", "method.pool_size": 2}, "of method 'magnitude'; "),
        ({"training.precision": "half"}, "training.precision: expected one of float32, bfloat16"),
        (
            {"training.precision": "bfloat16", "training.execution": "sparse"},
            "training.precision: sparse execution computes in float32",
        ),
        ({"method.granularity": "row"}, "method.granularity: .*layer, block, entire; got 'row'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(values)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(
            {
                "method.density": 2.0,
                "method.adjust_every": 0,
                "data.clients": 0,
                "training.lr": -1.0,
                "server.per_class": 0,
            }
        )
    for part in (
        *("method.density", "method.adjust_every"),
        *("data.clients", "training.lr", "server.per_class"),
    ):
        assert str(caught.value).count(f"{part}: ") == 1


def test_problems_of_values_are_told_beside_unknown_keys() -> None:
    values = {"training.lrr": 0.1, "method.density": 2, "training.batch_size": 1, "seed": "none"}
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(values)
    for part in ("'training.lrr'", "method.density: ", "training.batch_size: ", "seed: "):
        assert str(caught.value).count(part) == 1


def test_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        RunConfig.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(ConfigError, match="not a TOML file"):
        RunConfig.read(tmp_path / "bad.toml")


def test_derived_settings() -> None:
    config = RunConfig.parse({})
    assert config.model_name == "resnet8"
    assert config.clients_per_round == 8
    assert RunConfig.parse({"data.dataset": "cifar10"}).model_name == "resnet20"
    assert RunConfig.parse({"federation.clients_per_round": 3}).clients_per_round == 3
    assert RunConfig.parse({"federation.clients_per_round": 30}).clients_per_round == 8


def test_every_method_has_a_target_density() -> None:
    """A method without the setting trains the dense network."""
    for name, method in METHODS.items():
        config = RunConfig.parse({"method.name": name})
        assert (config.method, type(config.method)) == (method(), method)
        assert config.method.target_density == config.method.settings().get("density", 1.0)
    assert RunConfig.parse({"method.density": 0.25}).method.target_density == 0.25
    assert RunConfig.parse({"method.name": ""}).method == RunConfig().method


def test_assignments() -> None:
    assert parse_assignments(["a.b=1", "c = x=y"]) == {"a.b": "1", "c": "x=y"}
    with pytest.raises(ConfigError, match="expected section"):
        parse_assignments(["novalue"])


def test_flower_app_lists_every_key_with_its_default() -> None:
    """Flower refuses an override of a key that the app's own configuration does not list."""
    project = Path(fedprune.__file__).parent / "flower" / "app" / "pyproject.toml"
    tables = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    launch = {f"run.{key}" for key in tables.pop("run")}
    assert launch | {"run.launcher-pid"} == set(launch_values(Path(), resume=True, setup=Path()))
    flat = {"seed": tables.pop("seed")}
    flat |= {f"{name}.{key}": value for name, part in tables.items() for key, value in part.items()}
    assert RunConfig.parse(flat) == RunConfig()
    defaults = RunConfig().flower()
    assert flat == {**defaults, "method.name": "", "method.settings": ""}


def test_the_settings_of_a_method_are_one_key_of_flower() -> None:
    """Its run config knows no method; what it carries does not depend on which one is run."""
    keys = set()
    for name, method in METHODS.items():
        config = RunConfig.parse({"method.name": name, "seed": 3})
        values = config.flower()
        keys.add(tuple(values))
        assert all(isinstance(value, str | int | float | bool) for value in values.values())
        settings = json.loads(str(values["method.settings"]) or "{}")
        assert settings == method().settings()
        assert RunConfig.parse(values) == config
    assert len(keys) == 1


def test_packed_settings_are_checked_like_any_other() -> None:
    def parse(text: object, **values: object) -> RunConfig:
        return RunConfig.parse({"method.settings": text, **values})

    assert parse('{"density": 0.25}').method.target_density == 0.25
    # A key of its own wins over the packed one, as an option wins over a file.
    assert parse('{"density": 0.25}', **{"method.density": 0.5}).method.target_density == 0.5
    for text, message in (
        ("{", "method.settings: expected a JSON object, got '{'"),
        ("[1]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        (7, "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"densty": 0.1}', "'method.densty' of method 'fedtiny'; did you mean 'method.density'"),
        ('{"density": "many"}', "method.density: expected float, got 'many'"),
        ('{"density": NaN}', "method.density: expected 0 < density <= 1"),
        ('{"density": [1]}', "method.density: expected float"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse(text)


def test_settings_that_other_methods_own_are_left_out() -> None:
    shared = {"method.density": 0.1, "method.mu": 0.5, "method.pool_size": 3, "seed": 1}
    kept = {
        name: set(own_settings({**shared, "method.name": name})) - {"method.name", "seed"}
        for name in ("fedavg", "magnitude", "fedprox", "fedtiny")
    }
    assert kept == {
        "fedavg": set(),
        "magnitude": {"method.density"},
        "fedprox": {"method.density", "method.mu"},
        "fedtiny": {"method.density", "method.pool_size"},
    }
    # What no method knows is a mistake, and stays to be refused.
    assert "method.densty" in own_settings({"method.densty": 0.1, "method.name": "fedavg"})
    with pytest.raises(ConfigError, match="unknown method 'magic'"):
        own_settings({"method.name": "magic"})


SECTIONS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**63 - 1),
    "data.dataset": st.text(st.characters(exclude_categories=["Cs"])),
    "data.clients": st.integers(1, 10**6),
    "data.partition": st.sampled_from(PARTITIONS),
    "data.alpha": st.floats(0, exclude_min=True, allow_infinity=False),
    "data.augment": st.booleans(),
    "training.lr": st.floats(0, exclude_min=True, allow_infinity=False),
    "training.momentum": st.floats(0, 1, exclude_max=True),
    "training.execution": st.sampled_from(EXECUTIONS),
    "server.pretrain_epochs": st.integers(0, 10**6),
    "federation.value_dtype": st.sampled_from(VALUE_DTYPES),
    "federation.uplink_dtype": st.sampled_from(["", *VALUE_DTYPES]),
    "federation.uplink_topk": st.floats(0, 1, exclude_min=True),
}
DENSITY = st.floats(0, 1, exclude_min=True)
OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "fedavg": {},
    "magnitude": {"method.density": DENSITY},
    "small-dense": {"method.density": DENSITY},
    "fedprox": {"method.density": DENSITY, "method.mu": st.floats(0, allow_infinity=False)},
    "ssfl": {"method.density": DENSITY, "method.batches": st.integers(1, 10**6)},
    "wanda": {"method.density": DENSITY, "method.within": st.sampled_from(["row", "layer"])},
    "prunefl": {
        "method.density": DENSITY,
        "method.adaptive": st.booleans(),
        "method.fixed_time": st.floats(0, exclude_min=True, allow_infinity=False),
        "method.first_steps": st.integers(0, 10**6),
    },
    "fedsgc": {
        "method.adjust_after": st.floats(0, 1),
        "method.distribution": st.sampled_from(["uniform", "erk"]),
        "method.against": st.floats(0, 1),
    },
    "fedrts": {"method.individual": st.floats(0, 1), "method.adjust_every": st.integers(1, 99)},
    "fedtiny": {
        "method.density": DENSITY,
        "method.pool_size": st.integers(0, 10**6),
        "method.granularity": st.sampled_from(["layer", "block", "entire"]),
        "method.adjust_rate": st.floats(0, 1),
    },
}


@st.composite
def configurations(draw: st.DrawFn) -> RunConfig:
    name = draw(st.sampled_from(list(OWN)))
    strategies = {**SECTIONS, **OWN[name]}
    chosen = draw(st.sets(st.sampled_from(list(strategies))))
    values = {key: draw(strategies[key]) for key in sorted(chosen)}
    return RunConfig.parse({"method.name": name, **values})


@settings(max_examples=100, deadline=None)
@given(configurations())
def test_every_way_of_writing_a_configuration_down_keeps_it(config: RunConfig) -> None:
    assert RunConfig.parse(config.flat()) == config
    assert RunConfig.parse(config.flower()) == config
    tables = tomllib.loads(config.toml())
    assert RunConfig.parse(flat(tables)) == config
    assert flat(tables) == config.flat()
    # As text, which is how --set brings a value.
    assert RunConfig.parse({key: str(value) for key, value in config.flat().items()}) == config


def flat(tables: dict[str, Any]) -> dict[str, Any]:
    pairs = [
        (f"{name}.{key}", entry)
        for name, part in tables.items()
        if isinstance(part, dict)
        for key, entry in part.items()
    ]
    return {"seed": tables["seed"], **dict(pairs)}
