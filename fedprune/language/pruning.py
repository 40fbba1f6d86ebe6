"""One language model pruned in stages, measured beside random and magnitude masks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedprune.language.asked import Pruning
from fedprune.language.page import pruning_page
from fedprune.language.unfinished import Unfinished, digest, refuse_used
from prunelab.errors import RunError
from prunelab.language.models import read_model, read_tokenizer
from prunelab.language.perplexity import perplexity
from prunelab.language.text import both_sides, drawn, in_batches, read_text
from prunelab.pretrained import allow_biases, save_pretrained
from prunelab.runs.folder import REPORT, SUMMARY, write_file
from prunelab.runs.version import __version__
from sparsemodel.errors import SparseModelError
from sparsemodel.masks.mask import Mask
from sparsemodel.pipeline.running import Pipeline
from sparsemodel.pipeline.stages import CONTROLS, Bias, Stage, Weights

LONGEST = 512  # tokens of a sequence, unless it is said
WATCHED = 16  # test sequences on which the model is looked at after each block
Told = Callable[[str], None]
_PATHS = ("model", "data", "test")  # a run is known by what lies there


def prune_language_model(
    asked: Pruning, out: str | Path, *, force: bool = False, say: Told = lambda _: None
) -> dict[str, Any]:
    """Prune a language model and write it, its mask, a summary and a page.

    The folder is read by `transformers.AutoModelForCausalLM.from_pretrained`, with zeros at the
    pruned weights, and by `prunelab.from_pretrained`, as sparse layers. A call that was cut leaves
    its state there: the same call goes on after the last stage that was finished, to the same bits.

    Args:
        out: the folder.
        force: write into one that is not empty, or holds a run of other settings that was cut.
        say: is told how far it is.

    Returns:
        The summary.

    Raises:
        ModelError, DataError, RunError: a model, text or folder that cannot be used.
        MaskError, DensityError, CalibrationError: what is asked for cannot be.
    """
    started, folder = time.monotonic(), Path(out)
    refuse_used(folder, force=force)
    texts = read_text(asked.data), read_text(asked.test) if asked.test else ""
    model, tokenizer = read_model(asked.model), read_tokenizer(asked.model)
    if Bias.name in asked.recover:
        allow_biases(model)
    pool, test = _sides(asked, texts, model, tokenizer)
    calibration = drawn(pool, asked.samples, seed=asked.seed)
    settings = {name: value for name, value in asdict(asked).items() if name not in _PATHS}
    settings |= {"model": digest(model.state_dict().values()), "version": __version__}
    settings["texts"] = digest([calibration, test])
    nothing: dict[str, Any] = {"perplexity": {}, "stages": [], "by_block": [], "seconds": 0.0}
    state = Unfinished.begun(folder, settings, nothing, force=force)
    run = _Run(asked, model, calibration, test, state, say, started - state.notes["seconds"])
    try:
        run.measure_dense()
        mask = run.prune()
    except SparseModelError:  # there is nothing to go on with
        state.remove()
        raise
    known, stages = state.notes["perplexity"], state.notes["stages"]
    chosen = stages[len(asked.choices()) - 1]["perplexity"]
    own = {name: chosen for name in CONTROLS if asked.choices(name) == asked.choices()}
    saved = save_pretrained(model, folder, mask=mask, tokenizer=tokenizer, force=True)
    summary = {
        **asdict(asked),
        "way": asked.way,
        "density_target": asked.target,
        "density": mask.density,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prunable": mask.num_weights,
        "pruned": mask.num_weights - mask.num_active,
        "layer_densities": mask.densities(),
        "calibration_sequences": len(calibration),
        "test_sequences": len(test),
        "length": test.shape[1],
        "perplexity_dense": known["dense"],
        "perplexity": stages[-1]["perplexity"],
        "perplexity_chosen": chosen,
        **{f"perplexity_{name}": known.get(name, own.get(name)) for name in CONTROLS},
        "perplexity_by_block": state.notes["by_block"],
        "stages": stages,
        "model_bytes": saved.num_bytes - state.num_bytes,
        "mask_bytes": saved.mask_bytes,
        "seconds": round(time.monotonic() - run.started, 3),
        "version": __version__,
    }
    write_file(folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    pruning_page(summary).write(folder / REPORT)
    state.remove()
    return summary


@dataclass(frozen=True)
class _Run:
    """One run, which notes in its state what it finds.

    Attributes:
        model: dense, or as far as its state says; changes.
        started: when it would have, had it not been cut.
    """

    asked: Pruning
    model: nn.Module
    calibration: Tensor
    test: Tensor
    state: Unfinished
    say: Told
    started: float

    def measure_dense(self) -> None:
        """The perplexity of the dense model and of the controls."""
        found = self.state.notes["perplexity"]
        if "dense" not in found:
            found["dense"] = perplexity(self.model, self.test)
            self._save()
        size = f"{len(self.test)} sequences of {self.test.shape[1]} tokens"
        self.say(f"dense: perplexity {found['dense']:.2f} on {size}")
        for control in self.asked.others():
            if control not in found:
                other = read_model(self.asked.model)
                self._pipeline(other, self.asked.choices(control)).run()
                found[control] = perplexity(other, self.test)
                del other  # one model beside the one in hand
                self._save()
            self.say(f"{control}: perplexity {found[control]:.2f}")

    def prune(self) -> Mask:
        """Run the stages that are left, and measure after each."""
        pipeline = self._pipeline(self.model, self.asked.stages(), self._watch)
        pipeline.restore(self.state.progress)
        notes, stages = self.state.notes, pipeline.stages
        if done := notes["stages"]:
            self.say(f"goes on after {done[-1]['told']}, stage {len(done)} of {len(stages)}")
        for stage in stages[pipeline.num_finished :]:
            started = time.monotonic()
            if isinstance(stage, Weights):
                notes["by_block"].append(perplexity(self.model, self.test[:WATCHED]))
            pipeline.advance()
            found, density = perplexity(self.model, self.test), pipeline.mask.density
            notes["stages"].append({
                "stage": stage.name, "told": stage.told, "density": density, "perplexity": found,
                "seconds": round(time.monotonic() - started, 3),
            })  # fmt: skip
            self._save(pipeline)
            self.say(f"{stage.told}: density {density:.4f}, perplexity {found:.2f}")
        return pipeline.mask

    def _pipeline(
        self, model: nn.Module, stages: list[Stage], after: Told = lambda block: None
    ) -> Pipeline:
        batches = in_batches(self.calibration)
        return Pipeline(model, stages, batches, seed=self.asked.seed, after=after)

    def _watch(self, block: str) -> None:
        found = perplexity(self.model, self.test[:WATCHED])
        self.state.notes["by_block"].append(found)
        self.say(f"{block}: perplexity {found:.2f} on {len(self.test[:WATCHED])} sequences")

    def _save(self, pipeline: Pipeline | None = None) -> None:
        self.state.notes["seconds"] = time.monotonic() - self.started
        self.state.save(pipeline.progress() if pipeline else None)


def _sides(
    asked: Pruning, texts: tuple[str, str], model: nn.Module, tokenizer: Any
) -> tuple[Tensor, Tensor]:
    """Sequences for calibration and for testing."""
    config: Any = model.config
    most = int(getattr(config, "max_position_embeddings", None) or LONGEST)
    length = asked.length or min(most, LONGEST)
    if length > most:
        raise RunError(f"length {length}: the model takes {most} tokens")
    pool, test = both_sides(*texts, tokenizer, length=length)
    return pool, test[: asked.tested]
