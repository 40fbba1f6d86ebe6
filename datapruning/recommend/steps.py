"""The steps of DEALRec with files between them: each is done once, and found again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datapruning.errors import ScoreError
from datapruning.recommend import language
from datapruning.recommend.effort import effort
from datapruning.recommend.finetune import FinetuneConfig, finetune
from datapruning.recommend.histories import Histories, HistorySamples
from datapruning.recommend.influence import DAMPING, DEPTH, surrogate_influence
from datapruning.recommend.prompts import TEMPLATES, Prompts, texts_of
from datapruning.recommend.surrogate import SurrogateConfig, SurrogateResult, train_surrogate
from datapruning.selection.table import ScoreTable
from prunelab.errors import DataError, ModelError
from prunelab.runs.folder import write_file
from sparsemodel.storage.sealed import read_sealed_json, sealed_json

TITLES = FinetuneConfig(epochs=4, batch_size=64, lr=2e-3)
"""How a model from scratch learns the titles, before it sees any history."""

ABOUT = "recommend.json"
"""What `Language.save` adds to a model's folder."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are written.

    Attributes:
        template: in TEMPLATES; None: "plain" for a model from scratch, else "instruction".
        max_length: tokens of prompt and answer.
        max_titles: of a history.
    """

    template: str | None = None
    max_length: int = 256
    max_titles: int = 10

    def changed(self, **settings: Any) -> PromptSettings:
        """With other settings, by name."""
        return replace(self, **settings)

    @classmethod
    def of(cls, folder: Path) -> PromptSettings | None:
        """Those of a model that `Language.save` left, if it is one."""
        about = _about(folder)
        return None if about is None else cls(**about["prompts"])


class Language:
    """A language model with the prompts that it understands.

    Attributes:
        name: as it was asked for.
        model, tokenizer: of transformers.
        prompts: of the histories' titles.
        titles: hexadecimal digits that name them.
        from_scratch: whether all its weights are fine-tuned, and not adapters.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        histories: Histories,
        *,
        settings: PromptSettings,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.titles = hashlib.sha256("\n".join(histories.titles).encode()).hexdigest()[:16]
        self.from_scratch = bool(getattr(model.config, "from_scratch", False))
        self.template = _template(settings.template, from_scratch=self.from_scratch)
        self.settings = replace(settings, template=self.template)
        self.prompts = Prompts(
            tokenizer,
            histories.titles,
            template=TEMPLATES[self.template],
            max_length=settings.max_length,
            max_titles=settings.max_titles,
        )

    def adapted(self, *, seed: int) -> nn.Module:
        """What is trainable made so: new adapters, or, of a model from scratch, all weights."""
        if self.from_scratch:
            return self.model
        return language.with_lora(self.model, language.LoraSettings(), seed=seed)

    def save(self, folder: Path, model: nn.Module | None = None) -> None:
        """Leave model and tokenizer as transformers reads them, and how prompts are written.

        Args:
            model: fine-tuned; None: the model as it was loaded. Of one with adapters those alone
                are written; the folder then names the model they belong to.
        """
        save: Any = (self.model if model is None else model).save_pretrained
        save(folder)
        self.tokenizer.save_pretrained(folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        about = {
            "name": self.name,
            "titles": self.titles,
            "prompts": asdict(self.settings),
            "files": {name: _sha256(folder / name) for name in names if name != ABOUT},
        }
        write_file(folder / ABOUT, sealed_json(ABOUT, about))


def load_language(
    name: str,
    histories: Histories,
    *,
    settings: PromptSettings | None = None,
    device: str = "cpu",
    base: Path | None = None,
    report: Report = lambda _: None,
) -> Language:
    """A language model; one from scratch first learns the titles of all items, once.

    Titles are the catalogue's, without any interaction. What is learned is the same for every
    seed of a comparison, as a pretrained model is.

    Args:
        name: of transformers, a folder, or scratch:SIZE.
        settings: of prompts; None: those that the folder was saved with, or the defaults.
        base: folder where a model from scratch is kept once it knows the titles.

    Raises:
        ModelError, DataError: an unknown model or template, or max_length too short.
    """
    is_new = name.startswith(language.SCRATCH)
    about = None if base is None or not is_new else _about(base)
    if about is not None:
        settings = settings or PromptSettings(**about["prompts"])
        model, tokenizer = language.load(str(base), device=device)
        known = Language(name, model, tokenizer, histories, settings=settings)
        if (about["name"], about["titles"]) != (name, known.titles):
            raise ModelError(
                f"{base} holds {about['name']} with titles of other data; delete it, or name "
                "another folder"
            )
        return known
    settings = settings or PromptSettings.of(Path(name)) or PromptSettings()
    words = TEMPLATES[_template(settings.template, from_scratch=is_new)]
    texts = texts_of(histories.titles, words)
    model, tokenizer = language.load(name, texts=texts, device=device)
    loaded = Language(name, model, tokenizer, histories, settings=settings)
    if is_new:
        report(f"{name} learns {histories.num_items} titles")
        finetune(loaded.model, loaded.prompts.catalogue(), config=TITLES, seed=0)
        if base is not None:
            loaded.save(base)
    return loaded


def influence_table(
    histories: Histories,
    samples: HistorySamples,
    folder: Path,
    *,
    config: SurrogateConfig,
    seed: int,
    device: str = "cpu",
    report: Report = lambda _: None,
) -> ScoreTable:
    """Train the surrogate and score every sample by it; FOLDER/influence.parquet.

    Raises:
        ScoreError: the folder has scores of other data or settings.
        RunError: as `train_surrogate`.
    """
    about = {"surrogate": asdict(config), "damping": DAMPING, "depth": DEPTH}

    def compute() -> tuple[Tensor, dict[str, Any]]:
        def told(result: SurrogateResult) -> None:
            ndcg = f", validation NDCG@10 {result.validation[-1]:.4f}" if result.validation else ""
            report(f"surrogate, epoch {len(result.losses)}: loss {result.losses[-1]:.3f}{ndcg}")

        checkpoint = folder / "surrogate.ckpt"
        model, result = train_surrogate(
            histories, config=config, seed=seed, device=device, checkpoint=checkpoint, on_epoch=told
        )
        report(f"influence of {len(samples)} samples")
        scores = surrogate_influence(model, samples, damping=DAMPING, depth=DEPTH, seed=seed)
        return scores, {"best_epoch": result.best_epoch, "epochs": len(result.losses)}

    return _once(
        folder / "influence.parquet", compute, samples, histories.name, seed=seed,
        method="dealrec-influence", model="sasrec", about=about,
    )  # fmt: skip


def effort_table(
    histories: Histories,
    samples: HistorySamples,
    folder: Path,
    *,
    language_model: Language,
    seed: int,
    report: Report = lambda _: None,
) -> ScoreTable:
    """Score every sample by the language model; FOLDER/effort.parquet.

    Raises:
        ScoreError: the folder has scores of other data or settings.
    """
    prompts = language_model.prompts
    about = {
        **asdict(language_model.settings),
        "trainable": "all" if language_model.from_scratch else "lora",
    }

    def compute() -> tuple[Tensor, dict[str, Any]]:
        report(f"effort of {len(samples)} samples for {language_model.name}")
        return effort(language_model.adapted(seed=seed), prompts.samples(samples)), {}

    return _once(
        folder / "effort.parquet", compute, samples, histories.name, seed=seed,
        method="dealrec-effort", model=language_model.name, about=about,
    )  # fmt: skip


def _once(
    path: Path,
    compute: Callable[[], tuple[Tensor, dict[str, Any]]],
    samples: HistorySamples,
    dataset: str,
    *,
    seed: int,
    method: str,
    model: str,
    about: dict[str, Any],
) -> ScoreTable:
    """The table of that file, or a new one in its place; another run's table is refused."""
    if path.exists():
        table = ScoreTable.read(path)
        kept = {name: table.provenance.get(name) for name in about}
        found = (table.method, table.fingerprint, table.seed, table.model, kept)
        if found != (method, samples.fingerprint, seed, model, about):
            raise ScoreError(
                f"{path} holds scores of other data or settings; delete it, or name another folder"
            )
        return table
    started = time.monotonic()
    scores, extra = compute()
    about = {**about, **extra, "seconds": time.monotonic() - started}
    table = ScoreTable(
        ids=samples.ids,
        scores=scores,
        method=method,
        dataset=dataset,
        fingerprint=samples.fingerprint,
        seed=seed,
        model=model,
        provenance=about,
    )
    table.write(path)
    return table


def _about(folder: Path) -> dict[str, Any] | None:
    """What `Language.save` noted there, if it did.

    Raises:
        ModelError: a file of the folder is not what was saved.
    """
    cure = f"delete {folder} and make it again"
    try:
        about = read_sealed_json(folder / ABOUT, of=ABOUT, error=ModelError, cure=cure)
    except FileNotFoundError:
        return None
    for name, digest in about["files"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise ModelError(f"{path}: missing, damaged, or changed since it was saved; {cure}")
    return about


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _template(template: str | None, *, from_scratch: bool) -> str:
    if template is None:
        return "plain" if from_scratch else "instruction"
    if template not in TEMPLATES:
        raise DataError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")
    return template
