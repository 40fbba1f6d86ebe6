"""Messages as nobody honest sends them."""

from __future__ import annotations

import json
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from hypothesis import strategies as st

from fedprune.exchange.messages import MODEL
from fedprune.flower import wire
from fedprune.methods.fedtiny.pool import POOL

TEXT = st.text(max_size=6)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(TEXT, some, max_size=3),
    max_leaves=6,
)

# Whatever stands in a header, or happens to frames: an answer that cannot be used is one of two
# errors, which the server notes beside the client's number; any other would end the run.

HOSTILE = JSON | st.sampled_from(
    [10**400, -(10**400), 2**63, 2**53, -1, 0, 1, 1e308, 5e-324, True, MODEL, POOL, "0", "\ud800"]
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    return [path, *(p for key, item in inside for p in _paths(item, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], by)
    return copy


@st.composite
def hostile(draw: st.DrawFn, records: list[RecordDict]) -> RecordDict:
    """One of the records with a few places of its header changed, and its frames muddled."""
    header, parts = wire.read_record(draw(st.sampled_from(records)))
    changed: Any = header
    for _ in range(draw(st.integers(0, 2))):
        changed = _replaced(changed, draw(st.sampled_from(_paths(changed))), draw(HOSTILE))
    if isinstance(changed, dict):
        key = st.sampled_from([*"aefkmnopqrstux", "skip", "resync"])
        changed = {**changed, **draw(st.dictionaries(key, HOSTILE, max_size=1))}
    everything = [data for r in records for data in wire.read_record(r)[1].values()]
    for name in sorted(parts):
        what = draw(st.integers(0, 7))
        if what == 0:
            del parts[name]
        elif what == 1:
            parts[name] = draw(st.sampled_from(everything))
        elif what == 2:
            parts[name] = parts[name][: draw(st.integers(0, len(parts[name])))]
    return RecordDict({"c": ConfigRecord({"h": json.dumps(changed), **parts})})
