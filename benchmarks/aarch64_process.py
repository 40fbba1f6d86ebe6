"""Training steps of a program with numpy and the native library alone, on whatever machine.

    python -m benchmarks.aarch64_process FOLDER OUT.npz

reads what `benchmarks.aarch64` laid out in FOLDER, and leaves losses, state, growth and logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sparsemodel.kernels.cpu.library import isa
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.trainer import Trainer
from sparsemodel.storage.state_file import load_state

STEPS, LEARNING_RATE, MOMENTUM = 3, 0.05, 0.9
CANDIDATES = 20  # of each pruned layer


def main(folder: Path, out: Path) -> None:
    program = Program.parse((folder / "program.json").read_bytes())
    state, _ = load_state(folder / "state.safetensors")
    with np.load(folder / "samples.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    batch = len(images) // STEPS
    trainer = Trainer(program, state.ordered(program.shapes()), batch_size=batch, recompute=True)
    losses = [
        trainer.step(
            images[place : place + batch], labels[place : place + batch],
            lr=LEARNING_RATE, momentum=MOMENTUM,
        )[0]
        for place in range(0, STEPS * batch, batch)
    ]  # fmt: skip
    assert state.patterns is not None
    grown = trainer.growth(
        dict.fromkeys(state.patterns, CANDIDATES), images[:batch], labels[:batch]
    )
    found = {
        "losses": np.array(losses, np.float32),
        "logits": trainer.forward(images),
        **{f"state {name}": value for name, value in trainer.state().values.items()},
        **{f"places {name}": places for name, (places, _) in grown.items()},
        **{f"growth {name}": values for name, (_, values) in grown.items()},
    }
    np.savez(out, isa=np.array(isa()), **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
