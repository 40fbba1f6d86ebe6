"""One client's place: its samples, its settings, its model. Needs no torch."""

from __future__ import annotations

import getpass
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock

from fedprune.exchange.messages import Request, Resources
from fedprune.local.data import ClientData
from fedprune.local.model import LocalModel, Network, open_model
from fedprune.local.shares import open_client
from prunelab.errors import DataError
from prunelab.runs.imported import IMPORTED, source_digest
from prunelab.runs.seeds import stream_seed
from prunelab.runs.version import __version__
from sparsemodel.extras import extras_named
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.meter import peak_rss_bytes

if TYPE_CHECKING:
    from torch import nn

    from fedprune.config import RunConfig
    from fedprune.local.network import TorchNetwork

TRAIN = "train"  # of what a run starts from: the training samples, divided
SEED_DEV_SPLIT = 1  # the first part of a derived seed says what it is for


@dataclass(frozen=True)
class Local:
    """What a method's client half works with.

    Attributes:
        client: its number.
        data: its own samples, for training and for development.
        config: of the run.
        network: of the run.
        message_bytes: of the question, and of what is kept for the next one.
        kept: name -> bytes that answers leave here for later ones; a node that was restarted has
            lost them.
        simulated: whether the run was laid out here, for clients that are none.
    """

    client: int
    data: ClientData
    config: RunConfig
    network: Network
    message_bytes: int = 0
    kept: dict[str, bytes] = field(default_factory=dict)
    simulated: bool = False

    def open(self, state: SparseState) -> LocalModel:
        """The run's network holding `state`."""
        return open_model(self.network, state, self.config.training)

    def seed(self, stream: int, *parts: int) -> int:
        """A seed of this client in this run for one use."""
        return stream_seed(stream, self.config.seed, *parts, self.client)

    def resources(self, model_bytes: int, request: Request) -> Resources:
        """What this process holds: of the model, of the question's states, and of messages."""
        states = sum(sum(v.nbytes for v in s.values.values()) for s in request.states.values())
        return Resources(model_bytes + states + self.message_bytes, peak_rss_bytes())


def open_data(
    config: RunConfig,
    client: int,
    *,
    private: str = "",
    setup: str = "",
    expected: Mapping[str, Any] | None = None,
) -> ClientData:
    """A client's samples.

    Args:
        private: a folder or file of the node's own (see private.py): all its samples are this
            client's.
        expected: what the run says of its samples when a node joins.
        setup: the folder of what the run starts from; without either it is laid out, once.

    Raises:
        DataError: no such folder, or data that cannot be read or divided.
    """
    if private:
        from fedprune.local.private import private_store  # noqa: PLC0415 - few nodes need it

        folder, made_for = private_store(config, private, _own_folder(), expected=expected), None
    else:
        folder, made_for = setup_folder(config, setup) / TRAIN, config.digest
    return open_client(
        folder,
        client,
        seed=split_seed(config, client),
        with_test=config.federation.clients_test,
        made_for=made_for,
    )


def split_seed(config: RunConfig, client: int) -> int:
    """What decides which of its samples a client keeps for development and testing."""
    return stream_seed(SEED_DEV_SPLIT, config.seed, client)


def network_of(
    config: RunConfig, data: ClientData, program: Program | None, *, other: bool = False
) -> Network:
    """The run's network on a client; torch is imported where it has no program.

    Args:
        other: whether the program is of another network than the run's.
    """
    if other:
        assert program is not None, "other networks come as programs"
        return other_network(program)
    return network_for(config, data, program, None if program is None else program.shapes())


def other_network(program: Program) -> Network:
    """A network that is not the run's: where the runtime does not compute it, a module of its
    operations does."""

    def build() -> nn.Module:
        with extras_named("a network that the runtime does not compute here"):
            from sparsemodel.plans.module import ProgramModule  # noqa: PLC0415

        return ProgramModule(program)

    return Network(program, build, program.shapes(), other=True, key=program)


class Described(Protocol):
    """What a network has to know of the samples."""

    @property
    def num_classes(self) -> int | None: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def task(self) -> str: ...


def network_for(
    config: RunConfig,
    data: Described,
    program: Program | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> Network:
    """The run's network for such samples; torch is imported where it is needed.

    Args:
        shapes: of its float state; None: to be found out.
    """

    @cache
    def torch_network() -> TorchNetwork:
        with extras_named(
            "a network without a program, or a dense one but with training.execution = 'sparse',"
        ):
            from fedprune.local.network import TorchNetwork  # noqa: PLC0415

        return TorchNetwork(config, data.num_classes, data.input_shape, data.task)

    return Network(
        program,
        build=lambda: torch_network().empty_model(),
        shapes=torch_network().shapes if shapes is None else shapes,
        task=lambda: torch_network().task,
        key=(config.digest, data.num_classes, data.input_shape, data.task),
    )


def setup_folder(config: RunConfig, setup: str) -> Path:
    """The folder of what a run starts from; where nobody has laid it out, it is made, once."""
    from fedprune.rounds.setup import NETWORK, lay_out  # noqa: PLC0415

    if setup:
        return Path(setup)
    # Another release may lay out other files, and functions that were edited other data.
    values = json.dumps(
        {"version": __version__, "code": _code_of(config), **config.flower()}, sort_keys=True
    )
    folder = _own_folder() / sha256(values.encode()).hexdigest()[:16]
    if not (folder / NETWORK).exists():
        with FileLock(f"{folder}.lock"):
            if not (folder / NETWORK).exists():
                lay_out(config, folder, with_start=True)
    return folder


def _code_of(config: RunConfig) -> list[str]:
    """Digests of the packages of all that the configuration names as "module:name"."""
    names = (value for value in config.flat().values() if isinstance(value, str))
    return [source_digest(name) for name in names if IMPORTED.fullmatch(name)]


def _own_folder() -> Path:
    """A folder of this user's alone, for what was laid out here."""
    folder = Path(tempfile.gettempdir()) / f"fedprune-setups-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} belongs to somebody else; set TMPDIR to another folder")
    return folder
