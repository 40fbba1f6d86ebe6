"""What a device's node is doing, from the files in its home."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedprune.device.home import ANSWER, JOINED, Profile, read_json
from prunelab.pages.units import format_bytes, format_seconds
from prunelab.runs.folder import LOCK


def status_of(home: Path) -> dict[str, Any]:
    """All that is known of the device.

    Raises:
        ConfigError, RunError: there is no device in the home.
    """
    profile = Profile.read(home)
    return {
        "home": str(home),
        "alive": _is_held(home),
        "client": profile.client,
        "budget": profile.budget,
        "data": profile.data,
        "joined": _whole(home / JOINED, {"state", "superlink"}),
        "answer": _whole(home / ANSWER, {"action", "round", "time", "seconds", "peak_rss_bytes"}),
    }


def rows_of(status: dict[str, Any]) -> list[list[str]]:
    """The same for people: what, and its value."""
    joined, answer = status["joined"], status["answer"]
    state = joined.get("state", "joining" if status["alive"] else "never joined")
    if not status["alive"] and state not in {"never joined", "given up", "ended"}:
        state = "not running (it was killed)"
    rows = [["home", status["home"]], ["node", state]]
    if joined:
        rows.append(["server", joined["superlink"]])
        rows.append(["said last", joined.get("text") or "nothing"])
    rows.append(["client", str(status["client"]) if status["client"] >= 0 else "not said"])
    rows.append(["budget", format_bytes(status["budget"]) if status["budget"] else "none"])
    rows.append(["data", status["data"] or "its share of a run's"])
    if not answer:
        return [*rows, ["last answer", "none yet"]]
    ago = format_seconds(max(0.0, time.time() - answer["time"]))  # a clock may have been set back
    rows.append(
        ["last answer", f"{answer['action']}, after {answer['round']} rounds, {ago} ago"],
    )
    rows.append(["took", format_seconds(answer["seconds"])])
    rows.append(["peak of its memory", format_bytes(answer["peak_rss_bytes"])])
    if samples := answer.get("samples"):
        rows.append(["samples", ", ".join(f"{count} {use}" for use, count in samples.items())])
    if fitted := answer.get("fitted"):
        rows.append(["under the budget", fitted])
    if error := answer.get("error"):
        rows.append(["its error", error])
    return rows


def _whole(path: Path, keys: set[str]) -> dict[str, Any]:
    """A file of the home; empty where something is missing in it."""
    values = read_json(path)
    return values if keys <= values.keys() else {}


def _is_held(home: Path) -> bool:
    """Whether a process has joined from the home."""
    if not (home / LOCK).exists():
        return False
    try:
        with FileLock(home / LOCK, timeout=0):
            return False
    except Timeout:
        return True
