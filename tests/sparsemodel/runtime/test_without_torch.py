"""A process in which torch cannot be imported trains what a torch process described."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import described, samples

from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.runtime.trainer import Trainer

CHILD = """
import sys
from importlib.abc import MetaPathFinder

class NoTorch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "flwr"}:
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, NoTorch())
from pathlib import Path
import numpy as np
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.runtime.trainer import Trainer

folder = Path(sys.argv[1])
program = Program.parse((folder / "program.json").read_bytes())
with np.load(folder / "state.npz") as file:
    stored = dict(file)
shapes = program.shapes()
patterns = Patterns({
    name: Pattern(shapes[name], stored[f"rows {name}"], stored[f"cols {name}"])
    for name in shapes if f"rows {name}" in stored
})
state = SparseState({name: stored[f"values {name}"] for name in shapes}, patterns)
trainer = Trainer(program, state, batch_size=8, recompute=True)
images, labels = stored["images"], stored["labels"]
statistics = trainer.batch_norm_statistics(images)
before = trainer.evaluate(images, labels)
steps = [trainer.step(images[i:i + 8], labels[i:i + 8], lr=0.05, momentum=0.9) for i in (0, 8)]
grown = trainer.growth(dict.fromkeys(patterns, 5), images[:8], labels[:8])
results = {f"state {n}": a for n, a in trainer.state().values.items()}
results |= {f"statistics {n}": a for n, a in statistics.items()}
results |= {f"grown {n}": a for n, (a, _) in grown.items()}
results["logits"] = trainer.forward(images)
np.savez(folder / "results.npz", before=before, steps=steps, **results)
assert "torch" not in sys.modules
"""


@pytest.mark.usefixtures("plans_on_one_thread")
def test_a_process_without_torch_has_the_same_bits(tmp_path: Path) -> None:
    assert cpu.library() is not None
    program, state = described("resnet18")
    assert state.patterns is not None
    images, labels = samples(20)
    (tmp_path / "program.json").write_text(program.text(), encoding="utf-8")
    arrays = {f"values {name}": array for name, array in state.values.items()}
    arrays |= {f"rows {name}": pattern.row_ptr for name, pattern in state.patterns.items()}
    arrays |= {f"cols {name}": pattern.cols for name, pattern in state.patterns.items()}
    np.savez(tmp_path / "state.npz", images=images, labels=labels, **arrays)
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], check=True)
    trainer = Trainer(program, state, batch_size=8, recompute=True)
    statistics = trainer.batch_norm_statistics(images)
    with np.load(tmp_path / "results.npz") as found:
        assert tuple(found["before"]) == trainer.evaluate(images, labels)
        for number, start in enumerate((0, 8)):
            batch = images[start : start + 8], labels[start : start + 8]
            assert tuple(found["steps"][number]) == trainer.step(*batch, lr=0.05, momentum=0.9)
        grown = trainer.growth(dict.fromkeys(state.patterns, 5), images[:8], labels[:8])
        assert np.array_equal(found["logits"], trainer.forward(images))
        for name, array in trainer.state().values.items():
            assert np.array_equal(found[f"state {name}"], array), name
        for name, array in statistics.items():
            assert np.array_equal(found[f"statistics {name}"], array), name
        for name, (indices, _) in grown.items():
            assert np.array_equal(found[f"grown {name}"], indices), name
