"""Under a budget a client recomputes first, then takes smaller batches, then refuses in words."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks.device_budget import BudgetedClient, under
from fedprune.config import RunConfig
from fedprune.device.home import parse_bytes
from fedprune.rounds import folder as runfolder
from fedprune.rounds.setup import lay_out
from prunelab.errors import RunError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own account")


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of one client on digits, and the folder of what it starts from."""
    folder = tmp_path_factory.mktemp("budget")
    config = RunConfig.parse(
        {
            "data.num_train": 150, "data.num_test": 30, "data.clients": 1, "data.partition": "iid",
            "model.name": "resnet20", "training.rounds": 2, "training.local_epochs": 1,
            "training.batch_size": 128, "method.name": "fedtiny", "method.density": 0.1,
            "method.pool_size": 2, "method.adjust_every": 1, "method.adjust_until": 3,
            "server.per_class": 1, "server.pretrain_epochs": 1,
        }
    )  # fmt: skip
    lay_out(config, folder / "setup", with_start=True)
    return config, folder


def model_of(folder: Path, budget: int) -> str:
    """A digest of the model after the last round."""
    checkpoint = runfolder.read_checkpoint(folder / f"run-{budget}")
    assert checkpoint is not None
    digest = hashlib.sha256()
    for values in checkpoint.state.model.values.values():
        digest.update(values.tobytes())
    return digest.hexdigest()


def said(client: BudgetedClient) -> str:
    """What the client said of its last message, without the figure."""
    return client.fitted[-1].rpartition("; ")[0]


def figure(client: BudgetedClient) -> int:
    """The largest that it said a message would need."""
    return max(parse_bytes(told.rpartition("; ")[2].removesuffix(" at most"))
               for told in client.fitted)  # fmt: skip


@pytest.mark.slow
def test_bits_stay_where_recomputing_suffices(laid_out: tuple[RunConfig, Path]) -> None:
    """A real process; its peak by the kernel stays below each budget."""
    config, folder = laid_out
    wide = under(config, folder, 10**9)
    assert said(wide) == "as the run is set"
    assert wide.peak <= figure(wide)
    narrow_budget = figure(wide) - 3 * 10**6
    narrow = under(config, folder, narrow_budget)
    assert said(narrow) == "activations computed again"
    assert narrow.peak <= narrow_budget
    assert model_of(folder, narrow_budget) == model_of(folder, 10**9)
    least = figure(narrow) - 4 * 10**6
    small = under(config, folder, least)
    assert re.fullmatch(
        r"activations computed again, batches of \d+ instead of 128 \(other bits\)", said(small)
    )
    assert small.peak <= least
    assert model_of(folder, least) != model_of(folder, 10**9)


def test_too_small_a_budget_is_refused_before_training(laid_out: tuple[RunConfig, Path]) -> None:
    """The server is told the figure."""
    config, folder = laid_out
    with pytest.raises(RunError) as refused:
        under(config, folder, 30 * 10**6)
    assert re.search(
        r"the device's budget of 30\.0 MB is too small: the process would need [\d.]+ MB as the "
        r"run is set, and [\d.]+ MB with batches of 2; [\d.]+ MB of them before it begins",
        str(refused.value),
    ), refused.value
