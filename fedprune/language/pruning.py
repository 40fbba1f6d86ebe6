"""One language model pruned in one shot, measured beside random and magnitude masks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedprune.language.page import CONTROLS, pruning_page
from prunelab.errors import RunError
from prunelab.language.models import read_model, read_tokenizer
from prunelab.language.perplexity import perplexity
from prunelab.language.text import both_sides, drawn, in_batches, read_text
from prunelab.pretrained import save_pretrained
from prunelab.runs.folder import REPORT, SUMMARY, write_file
from prunelab.runs.version import __version__
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.by_blocks import prune_blocks
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.registry import CALIBRATED

CHOICES = (*CALIBRATED, *CONTROLS)
LONGEST = 512  # tokens of a sequence, unless it is said
WATCHED = 16  # test sequences on which the model is looked at after each block
Told = Callable[[str], None]


@dataclass(frozen=True)
class Pruning:
    """What is asked for.

    Attributes:
        model: a folder, a .gguf file, or a name on the hub.
        data: a text for calibration; its last tenth is the test text where there is no `test`.
        criterion: one of CHOICES.
        pattern: where weights are ranked against each other: "row", "layer", or such as "2:4".
        density: of every linear layer of the blocks; None: that of the pattern, or .5.
        samples: sequences for calibration, drawn by the seed.
        length: tokens of a sequence; 0: as many as the model takes, 512 at most.
        tested: sequences for testing, at most.
        controls: whether random and magnitude masks are measured too.
    """

    model: str
    data: str
    test: str = ""
    criterion: str = "wanda"
    pattern: str = "row"
    density: float | None = None
    samples: int = 128
    length: int = 0
    tested: int = 64
    seed: int = 0
    controls: bool = True

    def __post_init__(self) -> None:
        if self.criterion not in CHOICES:
            known = ", ".join(CHOICES)
            raise MaskError(f"unknown criterion {self.criterion!r}; known: {known}")
        if self.pattern not in {"row", "layer"} and n_of_m(self.pattern) is None:
            raise MaskError(
                f"pattern: expected 'row', 'layer' or such as '2:4', got {self.pattern!r}"
            )
        for name in ("samples", "tested"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise DensityError(f"density must be in (0, 1], got {self.density}")

    @property
    def share(self) -> float:
        """The density."""
        if self.density is not None:
            return self.density
        groups = n_of_m(self.pattern)
        return groups[0] / groups[1] if groups else 0.5


def prune_language_model(
    asked: Pruning, out: str | Path, *, force: bool = False, say: Told = lambda _: None
) -> dict[str, Any]:
    """Prune a language model and write it, its mask, a summary and a page.

    The folder is read by `transformers.AutoModelForCausalLM.from_pretrained`, with zeros at the
    pruned weights, and by `prunelab.from_pretrained`, as sparse layers.

    Args:
        out: the folder.
        force: write into one that is not empty.
        say: is told how far it is.

    Returns:
        The summary.

    Raises:
        ModelError, DataError, RunError: a model, text or folder that cannot be used.
        MaskError, DensityError, CalibrationError: what is asked for cannot be.
    """
    started, folder = time.monotonic(), Path(out)
    if folder.exists() and any(folder.iterdir()) and not force:
        raise RunError(f"{folder} is not empty; give another folder, or --force")
    texts = read_text(asked.data), read_text(asked.test) if asked.test else ""
    model, tokenizer = read_model(asked.model), read_tokenizer(asked.model)
    pool, test = _sides(asked, texts, model, tokenizer)
    calibration = drawn(pool, asked.samples, seed=asked.seed)
    found: dict[str, float] = {"dense": perplexity(model, test)}
    say(
        f"dense: perplexity {found['dense']:.2f} on {len(test)} sequences of {test.shape[1]} tokens"
    )
    for control in CONTROLS if asked.controls else ():
        if control != asked.criterion:
            other = read_model(asked.model)
            _pruned(asked, other, calibration, control)
            found[control] = perplexity(other, test)
            del other  # one model beside the one in hand
            say(f"{control}: perplexity {found[control]:.2f}")
    by_block: list[float] = []

    def watch(block: str) -> None:
        by_block.append(perplexity(model, test[:WATCHED]))
        say(f"{block}: perplexity {by_block[-1]:.2f} on {len(test[:WATCHED])} sequences")

    first = perplexity(model, test[:WATCHED])
    mask = _pruned(asked, model, calibration, asked.criterion, watch)
    found[asked.criterion] = perplexity(model, test)
    say(f"{asked.criterion}: perplexity {found[asked.criterion]:.2f}")
    saved = save_pretrained(model, folder, mask=mask, tokenizer=tokenizer, force=force)
    total = sum(parameter.numel() for parameter in model.parameters())
    summary = {
        **asdict(asked),
        "density_target": asked.share,
        "density": mask.density,
        "parameters": total,
        "prunable": mask.num_weights,
        "pruned": mask.num_weights - mask.num_active,
        "layer_densities": mask.densities(),
        "calibration_sequences": len(calibration),
        "test_sequences": len(test),
        "length": test.shape[1],
        "perplexity_dense": found["dense"],
        "perplexity": found[asked.criterion],
        **{f"perplexity_{name}": found.get(name) for name in CONTROLS},
        "perplexity_by_block": [first, *by_block],
        "model_bytes": saved.num_bytes,
        "mask_bytes": saved.mask_bytes,
        "seconds": round(time.monotonic() - started, 3),
        "version": __version__,
    }
    write_file(folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    pruning_page(summary).write(folder / REPORT)
    return summary


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


def _pruned(
    asked: Pruning,
    model: nn.Module,
    calibration: Tensor,
    criterion: str,
    after: Callable[[str], None] = lambda _: None,
) -> Mask:
    return prune_blocks(
        model, asked.share, in_batches(calibration), criterion=criterion,
        within=asked.pattern, seed=asked.seed, after=after,
    )  # fmt: skip
