"""What the client app asks of the device that it runs on; any other node has none."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune.device.home import ANSWER, Profile, write_json
from sparsemodel.storage.meter import peak_rss_bytes

if TYPE_CHECKING:
    from fedprune.exchange.messages import Request
    from fedprune.local.site import Local


@dataclass(frozen=True)
class Device:
    """A device's home and profile, for one message.

    Attributes:
        home: None: the node is no device, and nothing here does anything.
    """

    home: Path | None = None
    profile: Profile = field(default_factory=Profile)

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> Device:
        """The device of a node's configuration.

        Raises:
            ConfigError, RunError: its home has no profile, or a damaged one.
        """
        if "home" not in node_config:
            return cls()
        home = Path(str(node_config["home"]))
        return cls(home, Profile.read(home))

    def fitted(self, request: Request, local: Local, told: dict[str, Any]) -> Local:
        """The client's place under the device's threads and budget.

        Args:
            told: what `answering` gave; what was changed is added.

        Raises:
            ClientError: the budget is too small; says what would be needed.
        """
        data = local.data
        told |= {
            "action": request.action,
            "round": request.round_index,
            "samples": {
                "training": len(data.train), "development": len(data.dev), "test": len(data.test)
            },
        }  # fmt: skip
        if self.profile.threads:
            training = replace(local.config.training, threads=self.profile.threads)
            local = replace(local, config=replace(local.config, training=training))
        if self.profile.budget:
            from fedprune.device.budget import fitting  # noqa: PLC0415 - few nodes have one

            local, told["fitted"] = fitting(local, request, budget=self.profile.budget)
        return local

    @contextmanager
    def answering(self, run: int) -> Iterator[dict[str, Any]]:
        """Leave in the home what became of a message: how long it took, and how much memory.

        Yields:
            What is said of it; may be added to.
        """
        started = time.monotonic()
        told: dict[str, Any] = {"run": str(run), "action": "a message", "round": 0}
        try:
            yield told
        except Exception as error:
            told["error"] = str(error) or type(error).__name__
            raise
        finally:
            if self.home is not None:
                told |= {
                    "time": time.time(),
                    "seconds": time.monotonic() - started,
                    "peak_rss_bytes": peak_rss_bytes(),
                }
                write_json(self.home / ANSWER, told)
