"""What a run starts from, in a folder: samples divided, the network described, the first weights.

Server and clients read it with numpy alone; whoever lays it out (workspace.py) needs torch, and
may be a process of its own, whose memory is then given back.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.config import RunConfig
from fedprune.exchange.messages import ClientInfo
from fedprune.given import is_given
from fedprune.local.data import ClientData, Split, label_histogram, split
from fedprune.local.model import Network
from fedprune.local.shares import share_of
from fedprune.local.site import TRAIN, Local, network_for, split_seed
from fedprune.methods import is_given as is_given_method
from fedprune.methods import method_name
from fedprune.methods.base import Method
from prunelab.data.store import SampleStore, open_store
from prunelab.errors import DataWarning, RunError
from prunelab.runs.children import ended_with_parent
from prunelab.runs.folder import write_file
from sparsemodel.extras import need
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.sealed import read_sealed_json, sealed_json
from sparsemodel.storage.state_file import load_state, save_state

__all__ = ["NETWORK", "START", "TEST", "TRAIN", "Reference", "Setup", "lay_out"]

TEST = "test"  # a sample store, as TRAIN, which has the clients' shares
NETWORK, START = "network.json", "start.safetensors"
REFUSED = 3  # exit status of the child whose last line is what a user can mend, as JSON
CURE = "delete the folder, and it is laid out again"


@dataclass(frozen=True)
class Reference:
    """What savings are measured against: the full dense network, counted.

    Attributes:
        num_parameters: trained numbers.
        model_bytes: of its float state.
        layer_macs: multiply-accumulates of each layer for one sample.
    """

    num_parameters: int
    model_bytes: int
    layer_macs: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Setup:
    """A run's parts as its server sees them.

    Attributes:
        config: of the run.
        folder: where they lie.
    """

    config: RunConfig
    folder: Path

    @property
    def method(self) -> Method:
        """The run's method."""
        return self.config.method

    @cached_property
    def data(self) -> SampleStore:
        """The training samples, divided; what is known of all samples is known of these."""
        return open_store(self.folder / TRAIN, made_for=self.config.digest)

    @cached_property
    def test(self) -> SampleStore | None:
        """The server's test samples; None where clients test on their own."""
        if self.config.federation.clients_test:
            return None
        return open_store(self.folder / TEST, verify=True, made_for=self.config.digest)

    def shares(self) -> dict[int, ClientInfo]:
        """What the run gave each client of the training samples."""
        found, with_test = {}, self.config.federation.clients_test
        for client in range(self.config.data.clients):
            share, seed = share_of(self.data, client), split_seed(self.config, client)
            rows = split(share, with_test=with_test, seed=seed)
            known = np.concatenate([rows.train, rows.dev])
            histogram = label_histogram(self.data.targets[known], self.data.num_classes)
            found[client] = ClientInfo(
                client, len(rows.train), len(rows.dev), histogram, len(rows.test)
            )
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the float state, in the order in which states hold it."""
        return {name: tuple(shape) for name, shape in self._facts["shapes"].items()}

    @cached_property
    def prunable(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that may be pruned."""
        return {name: self.shapes[name] for name in self._facts["prunable"]}

    @property
    def blocks(self) -> Mapping[str, list[list[str]]]:
        """Granularity -> prunable parameters in groups from the input to the output."""
        blocks: dict[str, list[list[str]]] = self._facts["blocks"]
        return blocks

    @cached_property
    def program(self) -> Program | None:
        """The network as the runtime runs it; None where it has no program."""
        text = self._facts["program"]
        return Program.parse(text) if text else None

    @property
    def metric(self) -> str:
        """What the task's metric is called; empty where it has none."""
        return str(self._facts["metric"])

    @property
    def no_program(self) -> str:
        """Why the network has no program; empty where it has one."""
        return str(self._facts["no_program"])

    @property
    def layer_macs(self) -> Mapping[str, int]:
        """Multiply-accumulates of each layer of the run's network for one sample, when dense."""
        macs: dict[str, int] = self._facts["layer_macs"]
        return macs

    @cached_property
    def reference(self) -> Reference:
        """The full dense network's figures."""
        return Reference(**self._facts["reference"])

    @property
    def width(self) -> str:
        """Channels of the first stage, where the network says so, else empty."""
        return str(self._facts["width"])

    @cached_property
    def network(self) -> Network:
        """The network for models of this process."""
        return network_for(self.config, self.data, self.program, self.shapes)

    def place(self) -> Local:
        """The server's own place: its few labelled samples, all of them for training."""
        config, data = self.config, self.data
        rows = np.array(self._facts["server_samples"], dtype=np.int64)
        none = Split(*data.take(rows[:0]))
        samples = ClientData(Split(*data.take(rows)), none, none, data.num_classes, data.task)
        return Local(config.data.clients, samples, config, self.network)

    def start_state(self) -> SparseState:
        """The dense model that every method starts from.

        Raises:
            CheckpointError: it was not laid out, or is damaged.
            RunError: it is of another run.
        """
        file = self.folder / START
        state, metadata = load_state(file)
        if metadata.get("settings") != self.config.digest:
            raise RunError(f"{file} was laid out for a run with other settings; {CURE}")
        return state.ordered(self.shapes)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        file, of = self.folder / NETWORK, _network_of(self.config)
        try:
            return read_sealed_json(file, of=of, error=RunError, cure=CURE)
        except FileNotFoundError:
            raise RunError(f"{file} is missing; {CURE}") from None


def write_facts(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Leave what is known of a run's network; the last file of a Setup."""
    write_file(folder / NETWORK, sealed_json(_network_of(config), facts))


def write_start(folder: Path, config: RunConfig, state: SparseState) -> None:
    """Leave the weights that a run starts from."""
    save_state(folder / START, state, metadata={"settings": config.digest})


def _network_of(config: RunConfig) -> str:
    return f"network of settings {config.digest}"


def lay_out(config: RunConfig, folder: Path, *, with_start: bool) -> None:
    """Lay out what a run starts from, in this process if it has torch already, else in a child.

    What this process alone knows, a child would not.

    Args:
        folder: is made.
        with_start: whether the first weights are needed; a run that is continued has its own.

    Raises:
        ConfigError, DataError, ModelError, RunError: a name is unknown, or the data do not allow
            it.
    """
    if "torch" in sys.modules or _holds_objects(config):
        from fedprune.rounds.workspace import open_workspace  # noqa: PLC0415

        open_workspace(config).lay_out(folder, with_start=with_start)
        return
    need("torch", "dividing the run's data and describing its network")
    command = [sys.executable, "-m", "fedprune.rounds.lay_out", str(folder)]
    done = subprocess.run(
        ended_with_parent(*command, *["--start"] * with_start),
        input=json.dumps(config.flower()),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == REFUSED:
        raise RunError(json.loads(done.stdout.splitlines()[-1]))
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', done.stderr)
        where = "{}, line {}, in {}".format(*places[-1]) if places else "no place is known"
        raise RunError(
            f"setting up failed: {last[0]} ({where}); --debug shows the trace"
        ) from RuntimeError(done.stderr)
    for text in json.loads(done.stdout.splitlines()[-1]):
        warnings.warn(text, DataWarning, stacklevel=2)


def _holds_objects(config: RunConfig) -> bool:
    """Whether a setting is the name of something that was given to this process."""
    names = (value for value in config.flat().values() if isinstance(value, str))
    return any(map(is_given, names)) or is_given_method(method_name(config.method))
