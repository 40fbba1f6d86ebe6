"""What a run is asked to do: sections of settings, and a method with its own; checked at birth.

The same sections and keys are read from three places: the command line, a TOML file with one
table per section, and Flower's run config, where a key is written `section.key`. The section
`method` holds the method's name and that method's settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import tomli_w

from fedprune.errors import ConfigError
from fedprune.methods import DEFAULT_METHOD, METHODS, method_class, method_name
from fedprune.methods.base import Method
from fedprune.settings import (
    CPU_COHORT,
    DataConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
    ServerConfig,
    TrainingConfig,
    problems,
)
from prunelab.data.reading import Reading, reading

Scalar = str | int | float | bool
METHOD_NAME = "method.name"
METHOD_SETTINGS = "method.settings"
"""A key of Flower's run config: the method's settings as one JSON object."""

_SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "server": ServerConfig,
    "federation": FederationConfig,
    "privacy": PrivacyConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the bits of a run's result (the output folder does not).

    Raises:
        ConfigError: one message with every problem found.

    >>> config = RunConfig.parse({"data.clients": 4, "method.density": 0.1})
    >>> config.data.clients, config.method.target_density
    (4, 0.1)
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    method: Method = field(default_factory=METHODS[DEFAULT_METHOD])
    server: ServerConfig = field(default_factory=ServerConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def __post_init__(self) -> None:
        found = [f"seed: expected 0 or more, got {self.seed}"] if self.seed < 0 else []
        found += problems(**{section: getattr(self, section) for section in _SECTIONS})
        if self.privacy.dp != "none":
            found += [f"method.name: {why}" for why in self.method.unaccounted()]
        if self.method.collects:
            found += [
                f"{key}: {self.method.name} needs to see single clients' answers; leave it out"
                for key, needs in (
                    ("privacy.secure_aggregation", self.privacy.secure_aggregation),
                    ("privacy.dp", self.privacy.dp != "none"),
                    ("federation.aggregation", self.federation.aggregation != "mean"),
                )
                if needs
            ]
        if found:
            raise ConfigError("; ".join(found))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build from flat `section.key` names; what is not named keeps its default."""
        values = dict(values)
        name = values.pop(METHOD_NAME, "") or DEFAULT_METHOD
        kind = method_class(name)
        values = {**_packed_settings(values.pop(METHOD_SETTINGS, "")), **values}
        known = {**_flat_sections(cls.seed, _SECTIONS), **_flat_method(kind())}
        found: list[str] = []
        parts: dict[str, dict[str, Any]] = {section: {} for section in ("", "method", *_SECTIONS)}
        for key, value in values.items():
            if key not in known:
                found.append(_unknown_key(key, known, name))
                continue
            section, _, setting = key.rpartition(".")
            try:
                parts[section][setting] = _convert(key, value, type(known[key]))
            except ConfigError as error:
                found.append(str(error))
        sections = {section: kind(**parts[section]) for section, kind in _SECTIONS.items()}
        try:
            method = kind(**parts["method"])
        except ConfigError as error:
            found.append(str(error))
        if found:
            raise ConfigError("; ".join([*found, *problems(**sections)]))
        return cls(**parts[""], method=method, **sections)

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a TOML file; `overrides` win over it."""
        return cls.parse({**read_toml(path), **(overrides or {})})

    def flat(self) -> dict[str, Scalar]:
        """Every setting as `section.key` -> value, in a fixed order."""
        parts = {section: getattr(self, section) for section in _SECTIONS}
        return {
            "seed": self.seed,
            METHOD_NAME: method_name(self.method),
            **_flat_method(self.method),
            **{
                f"{section}.{key}": value
                for section, part in parts.items()
                for key, value in dataclasses.asdict(part).items()
            },
        }

    def flower(self) -> dict[str, Scalar]:
        """The same for Flower's run config, which knows no method's settings: they are one key."""
        own = _flat_method(self.method)
        packed = json.dumps(self.method.settings()) if own else ""
        rest = {key: value for key, value in self.flat().items() if key not in own}
        return {**rest, METHOD_SETTINGS: packed}

    def toml(self) -> str:
        """The same settings as a TOML file, one table per section."""
        tables: dict[str, Any] = {}
        for key, value in self.flat().items():
            section, _, setting = key.rpartition(".")
            (tables.setdefault(section, {}) if section else tables)[setting] = value
        return tomli_w.dumps(tables)

    @property
    def reading(self) -> Reading:
        """How the data set is taken; nothing is set aside where clients test the model."""
        data = self.data
        return reading(
            resize=data.resize,
            columns=data.columns,
            task=self.training.task,
            test_share=0.0 if self.federation.clients_test else data.test_share,
        )

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that name these settings."""
        return sha256(json.dumps(self.flat()).encode()).hexdigest()[:32]

    @property
    def model_name(self) -> str:
        """The model's name, the data set's default where none was given."""
        return self.model.name or DEFAULT_MODELS.get(self.data.dataset, "resnet20")

    @property
    def clients_per_round(self) -> int:
        """How many clients are asked in each round."""
        return min(self.federation.clients_per_round or self.data.clients, self.data.clients)

    @property
    def cohort(self) -> int:
        """How many clients the batched engine trains at a time, at most."""
        on_cpu = self.training.device == "cpu"
        size = self.training.cohort or (CPU_COHORT if on_cpu else self.clients_per_round)
        return min(size, self.clients_per_round)


DEFAULT_MODELS = {"digits": "resnet8", "fashion-mnist": "resnet8"}


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file of one table per section, as flat `section.key` names.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """TOML of one table per section, as flat `section.key` names.

    Of an app of Flower's (its pyproject.toml) the run config, less where a run is to be written.
    """
    tables = tomllib.loads(text)
    app = tables.get("tool", {}).get("flwr", {}).get("app", {}).get("config")
    if app is not None:
        tables = {name: value for name, value in app.items() if name != "run"}
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            flat[name] = value
    return flat


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """`["training.lr=0.05"]` -> `{"training.lr": "0.05"}`.

    Raises:
        ConfigError: an entry without `=`.
    """
    values = {}
    for entry in assignments:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--set {entry!r}: expected section.key=value")
        values[key.strip()] = value.strip()
    return values


def continued(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that goes on, with what was given anew in their place.

    What belongs to the stored method alone is left out where another is named.

    >>> continued({"seed": 1, "training.lr": 0.2}, {"seed": 2})
    {'seed': 2, 'training.lr': 0.2}
    """
    given = dict(given)
    given = {**_packed_settings(given.pop(METHOD_SETTINGS, "")), **given}
    if given.get(METHOD_NAME, stored.get(METHOD_NAME)) != stored.get(METHOD_NAME):
        stored = {key: value for key, value in stored.items() if not key.startswith("method.")}
    return {**stored, **given}


def own_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` less settings that only methods other than the one named there have.

    For comparisons, where one setting is meant for whichever method knows it.
    """
    name = values.get(METHOD_NAME) or DEFAULT_METHOD
    own = _flat_method(method_class(name)())
    others = {key for method in METHODS.values() for key in _flat_method(method())} - own.keys()
    return {key: value for key, value in values.items() if key not in others}


def for_method(values: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """`values` for another method, less the settings of a method that this one does not have."""
    own = _flat_method(method_class(name or DEFAULT_METHOD)())
    return {key: value for key, value in values.items() if key in own or key[:7] != "method."}


def _flat_sections(seed: int, sections: Mapping[str, type[Any]]) -> dict[str, Scalar]:
    return {
        "seed": seed,
        **{
            f"{section}.{part.name}": getattr(kind(), part.name)
            for section, kind in sections.items()
            for part in dataclasses.fields(kind)
        },
    }


def _flat_method(method: Method) -> dict[str, Scalar]:
    return {f"method.{key}": value for key, value in method.settings().items()}


def _packed_settings(text: Any) -> dict[str, Any]:
    if text == "":
        return {}
    try:
        settings = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{METHOD_SETTINGS}: expected a JSON object, got {text!r:.60}")
    return {f"method.{key}": value for key, value in settings.items()}


def _unknown_key(key: str, known: Iterable[str], method: str) -> str:
    known = [METHOD_NAME, *known]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
    owner = f" of method {method!r}" if key.startswith("method.") else ""
    return f"unknown config key {key!r}{owner}{hint}"


def _convert(key: str, value: Any, expected: type) -> Scalar:
    """Bring a value to the type of its key; text stands for any type, an int for a float."""
    try:
        if expected is bool:
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            if isinstance(value, bool):
                return value
        elif expected is int and not isinstance(value, bool):
            if isinstance(value, int) or (isinstance(value, str) and float(value).is_integer()):
                return int(value)
        elif expected is float and not isinstance(value, bool):
            return float(value)
        elif expected is str and isinstance(value, str):
            return value
    except (ValueError, TypeError, OverflowError):
        pass
    raise ConfigError(f"{key}: expected {expected.__name__}, got {value!r}")
