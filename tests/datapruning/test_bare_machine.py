"""Every score on a machine that has torch, numpy and scikit-learn alone."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {
    "PIL", "datasets", "flwr", "flwr_datasets", "hydra", "kronfluence", "lightly", "matplotlib",
    "pandas", "peft", "pyarrow", "ray", "rich", "safetensors", "timm", "torchvision",
    "transformers", "typer",
}

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare()

import torch
torch.set_num_threads(1)
from torch import nn
import datapruning
from datapruning.scoring.methods import METHODS

random = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (60, 1, 8, 8), generator=random, dtype=torch.uint8)
samples = datapruning.ImageSamples(images, torch.arange(60) % 3)

def build(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))

methods = [name for name in METHODS if name != "influence-ekfac"]
tables = datapruning.score(
    samples, method=methods, model=build, runs=4,
    training=datapruning.TrainingConfig(epochs=4, lr=0.01),
    options={"embedding": "pca", "window": 3, "num_clusters": 3},
)
for name, table in tables.items():
    assert len(table) == 60 and table.scores.isfinite().all(), name
    kept = table.select(keep=0.5, policy="random").of(samples)
    datapruning.train(kept, model=build, training=datapruning.TrainingConfig(epochs=1))
print(len(tables), "scores")
"""


def test_every_score_runs_without_flower_or_pyarrow() -> None:
    """All but EK-FAC, which another package computes, and SimCLR's embedding."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("scores")
