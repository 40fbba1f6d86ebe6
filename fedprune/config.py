"""What a run is asked to do: frozen dataclasses, one per concern, validated at birth.

The same sections and keys are read from three places: the command line, a TOML file with one
table per section, and Flower's run config, where a key is written `section.key`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune.errors import ConfigError

Scalar = str | int | float | bool


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how clients share them.

    `num_train` and `num_test` cut a stratified subset; 0 keeps everything. `alpha` is the
    Dirichlet concentration (small = every client sees few classes).
    """

    dataset: str = "digits"
    clients: int = 8
    partition: str = "dirichlet"
    alpha: float = 0.5
    classes_per_client: int = 2
    num_train: int = 0
    num_test: int = 0
    augment: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Which network. An empty name stands for the data set's default, width 0 for the model's."""

    name: str = ""
    width: int = 0


@dataclass(frozen=True)
class TrainingConfig:
    """Local training of a client: SGD with momentum, learning rate cosine-decayed over rounds.

    `execution` is how a masked model is computed: "sparse" (active weights only), "masked",
    "dense", or "auto": sparse on a CPU that has the native kernels, else masked. `cohort` is how
    many clients the batched engine trains at a time; 0: on a GPU as many of a round as its memory
    holds, which the first round measures, and CPU_COHORT on a CPU.
    """

    rounds: int = 20
    local_epochs: int = 2
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    device: str = "cpu"
    threads: int = 1
    execution: str = "auto"
    cohort: int = 0


@dataclass(frozen=True)
class PruningConfig:
    """The federated method and its settings (those of FedTiny, where others do not say).

    `adjust_every` is ΔR, `adjust_until` is R_stop (0: 60 % of the rounds), `adjust_rate` is α.
    `pool_size` 0 stands for max(1, round(0.1 / density)), at most `pool_limit`.
    """

    method: str = "fedtiny"
    density: float = 0.05
    pool_size: int = 0
    pool_limit: int = 10
    granularity: str = "block"
    adjust_every: int = 2
    adjust_until: int = 0
    adjust_rate: float = 0.3
    server_per_class: int = 5
    pretrain_epochs: int = 3


@dataclass(frozen=True)
class FederationConfig:
    """Who takes part in a round. `clients_per_round` 0 asks everybody; `timeout` in seconds."""

    clients_per_round: int = 0
    timeout: float = 600.0
    value_dtype: str = "fp32"


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the bits of a run's result (the output folder does not).

    Raises:
        ConfigError: one message with every problem found.

    >>> RunConfig.parse({"data.clients": 4, "pruning.density": 0.05}).data.clients
    4
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build from flat `section.key` names; what is not named keeps its default."""
        known = cls().flat()
        problems = []
        sections: dict[str, dict[str, Scalar]] = {}
        for key, value in values.items():
            if key not in known:
                problems.append(_unknown_key(key, known))
                continue
            try:
                converted = _convert(key, value, type(known[key]))
            except ConfigError as error:
                problems.append(str(error))
                continue
            section, _, name = key.rpartition(".")
            sections.setdefault(section, {})[name] = converted
        if problems:
            raise ConfigError("; ".join(problems))
        top: dict[str, Any] = dict(sections.pop("", {}))
        types = {f.name: type(getattr(cls(), f.name)) for f in dataclasses.fields(cls)}
        return cls(**top, **{name: types[name](**part) for name, part in sections.items()})

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a TOML file; `overrides` win over it."""
        return cls.parse({**read_toml(path), **(overrides or {})})

    def flat(self) -> dict[str, Scalar]:
        """Every setting as `section.key` -> value, in a fixed order."""
        result: dict[str, Scalar] = {}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                result.update({f"{name}.{key}": entry for key, entry in value.items()})
            else:
                result[name] = value
        return result

    def toml(self) -> str:
        """The same settings as a TOML file, one table per section."""
        lines: list[str] = []
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                lines += ["", f"[{name}]"]
                lines += [f"{key} = {json.dumps(entry)}" for key, entry in value.items()]
            else:
                lines.append(f"{name} = {json.dumps(value)}")
        return "\n".join(lines) + "\n"

    @property
    def model_name(self) -> str:
        """The model's name, the data set's default where none was given."""
        return self.model.name or DEFAULT_MODELS.get(self.data.dataset, "resnet20")

    @property
    def adjust_until(self) -> int:
        """R_stop: no mask adjustment happens at or after this round."""
        return self.pruning.adjust_until or max(1, round(0.6 * self.training.rounds))

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


CPU_COHORT = 4  # a compromise: no size stands out (benchmarks.gpu_simulation --cohorts)
DEFAULT_MODELS = {"digits": "resnet8", "fashion-mnist": "resnet8"}
PARTITIONS = ("iid", "dirichlet", "pathological", "natural")
GRANULARITIES = ("layer", "block", "entire")
VALUE_DTYPES = ("fp32", "fp16", "bf16", "int8")
DEVICES = ("cpu", "cuda")
EXECUTIONS = ("auto", "sparse", "masked", "dense")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file of one table per section, as flat `section.key` names.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
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


def _unknown_key(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
    return f"unknown config key {key!r}{hint}"


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


def _problems(config: RunConfig) -> Iterable[str]:
    """Every reason why this configuration cannot be run."""
    data, training, pruning = config.data, config.training, config.pruning
    # Names of methods and models are known to their registries; importing them here would
    # make every reader of a config load torchvision, so those two are checked when built.
    choices = {
        "data.partition": (data.partition, PARTITIONS),
        "pruning.granularity": (pruning.granularity, GRANULARITIES),
        "federation.value_dtype": (config.federation.value_dtype, VALUE_DTYPES),
        "training.device": (training.device, DEVICES),
        "training.execution": (training.execution, EXECUTIONS),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            yield f"{key}: expected one of {', '.join(allowed)}; got {value!r}"
    at_least_one = {
        "data.clients": data.clients,
        "data.classes_per_client": data.classes_per_client,
        "training.rounds": training.rounds,
        "training.local_epochs": training.local_epochs,
        "training.threads": training.threads,
        "pruning.pool_limit": pruning.pool_limit,
        "pruning.adjust_every": pruning.adjust_every,
        "pruning.server_per_class": pruning.server_per_class,
    }
    for key, count in at_least_one.items():
        if count < 1:
            yield f"{key}: expected at least 1, got {count}"
    not_negative = {
        "seed": config.seed,
        "data.num_train": data.num_train,
        "data.num_test": data.num_test,
        "model.width": config.model.width,
        "training.weight_decay": training.weight_decay,
        "training.cohort": training.cohort,
        "pruning.pool_size": pruning.pool_size,
        "pruning.adjust_until": pruning.adjust_until,
        "pruning.pretrain_epochs": pruning.pretrain_epochs,
        "federation.clients_per_round": config.federation.clients_per_round,
    }
    for key, amount in not_negative.items():
        if not amount >= 0:
            yield f"{key}: expected 0 or more, got {amount}"
    if training.batch_size < 2:
        yield f"training.batch_size: batch norm needs at least 2, got {training.batch_size}"
    if not 0 < pruning.density <= 1:
        yield f"pruning.density: expected 0 < density <= 1, got {pruning.density}"
    if not 0 <= training.momentum < 1:
        yield f"training.momentum: expected 0 <= momentum < 1, got {training.momentum}"
    if not 0 <= pruning.adjust_rate <= 1:
        yield f"pruning.adjust_rate: expected 0 to 1, got {pruning.adjust_rate}"
    for key, number in (
        ("data.alpha", data.alpha),
        ("training.lr", training.lr),
        ("federation.timeout", config.federation.timeout),
    ):
        if not 0 < number < float("inf"):
            yield f"{key}: expected a positive number, got {number}"
