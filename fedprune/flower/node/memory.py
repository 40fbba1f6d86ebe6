"""What a node keeps in its folder, so that a killed one goes on where it was.

`message` is what it works on, `answer` its reply with the state after it, until the reply is sent,
and `state-RUN` what the ClientApp holds between the messages of a run. An answer and its state are
one file: a message that is answered again is answered from the same state, to the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext

from fedprune.flower.node.parcel import Parcel, seal, unseal
from prunelab.runs.folder import write_file

MESSAGE, ANSWER, NODE = "message", "answer", "node.json"
OTHER_RUNS = 1  # whose states are kept beside the newest run's
SECRET = "secret:"  # names of what is never written down


class Memory:
    """The folder; also what is held of runs in this process.

    Args:
        folder: of this node alone; is made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._contexts: dict[int, Context] = {}

    # --- who the node is -----------------------------------------------------------------------

    def last_node(self, address: str) -> int:
        """The id that this node had at a SuperLink, else 0."""
        try:
            return int(json.loads((self._folder / NODE).read_text())[address])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def note_node(self, address: str, node_id: int) -> None:
        """Keep the id that this node has at a SuperLink."""
        write_file(self._folder / NODE, json.dumps({address: node_id}).encode())

    # --- messages ------------------------------------------------------------------------------

    def message(self) -> Parcel | None:
        """The message that was received and not answered yet."""
        return self._parcel(MESSAGE)

    def message_age(self) -> float:
        """Seconds since it was received."""
        return time.time() - (self._folder / MESSAGE).stat().st_mtime

    def received(self, parcel: Parcel) -> None:
        """Keep a message until it is answered."""
        write_file(self._folder / MESSAGE, parcel.to_bytes())

    def answer(self) -> Parcel | None:
        """The reply that may not have been sent; its state is the run's from now on."""
        try:
            state, reply = unseal((self._folder / ANSWER).read_bytes())
            parcel = Parcel.from_bytes(reply)
        except (FileNotFoundError, ValueError):
            return None
        write_file(self._state_file(parcel.run_id), seal(state))
        return parcel

    def answered(self, parcel: Parcel, context: Context) -> None:
        """Keep a reply, and the state after it, until it is sent."""
        state = context_to_proto(_written(context)).SerializeToString()
        write_file(self._folder / ANSWER, seal(state, parcel.to_bytes()))
        (self._folder / MESSAGE).unlink(missing_ok=True)

    def sent(self, parcel: Parcel) -> None:
        """The reply is at the SuperLink, or nobody waits for it."""
        self.answer()  # its state becomes the run's
        (self._folder / ANSWER).unlink(missing_ok=True)
        self.dropped()

    def dropped(self) -> None:
        """Nobody waits for an answer to the message."""
        (self._folder / MESSAGE).unlink(missing_ok=True)

    # --- states --------------------------------------------------------------------------------

    def context(self, run_id: int) -> Context | None:
        """A run's context, as its last message left it."""
        if run_id not in self._contexts:
            try:
                (state,) = unseal(self._state_file(run_id).read_bytes())
                self._contexts[run_id] = context_from_proto(ProtoContext.FromString(state))
            except (FileNotFoundError, ValueError):
                return None
        return self._contexts[run_id]

    def begin(
        self, run_id: int, *, node_id: int, series: int, config: Mapping[str, Any]
    ) -> Context:
        """The context of a run that is new here; earlier runs are forgotten."""
        for other in list(self._contexts)[:-OTHER_RUNS]:
            del self._contexts[other]
        files = sorted(self._folder.glob("state-*"), key=lambda file: file.stat().st_mtime)
        for file in files[:-OTHER_RUNS]:
            file.unlink()
        self._contexts[run_id] = Context(
            run_id=run_id,
            node_id=node_id,
            node_config={},
            state=RecordDict(),
            run_config=dict(config),
            series_id=series,
        )
        return self._contexts[run_id]

    def _state_file(self, run_id: int) -> Path:
        return self._folder / f"state-{run_id}"

    def _parcel(self, name: str) -> Parcel | None:
        try:
            return Parcel.from_bytes((self._folder / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return None


def _written(context: Context) -> Context:
    """A context less what is secret."""
    state = RecordDict()
    for name, record in context.state.items():
        kept = record
        if isinstance(record, ConfigRecord):
            kept = ConfigRecord({k: v for k, v in record.items() if not k.startswith(SECRET)})
        state[name] = kept
    return Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config={},
        state=state,
        run_config=context.run_config,
        series_id=context.series_id,
    )
