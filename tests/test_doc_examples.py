"""The lines of Python on the pages run as they are printed, and the commands there exist.

A page says in words what some names stand for ("`model` is your network"): here they are tiny ones.
The README's lines are in test_front_doors, those of docs/pruning.md in test_pruning_page.
"""

from __future__ import annotations

import csv
import io
import re
import shlex
import tarfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language
import torch
import training_loops
import typer
from PIL import Image
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import datapruning
import fedprune
import prunelab
import sparsemodel
from datapruning.cli import cli as datapruning_cli
from fedprune.cli import cli as fedprune_cli
from prunelab.data.samples import TokenSamples
from prunelab.networks import build_model
from sparsemodel.plans.plan import PlanError

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RUN_ELSEWHERE = {"README.md", "docs/pruning.md"}
SHORT = datapruning.TrainingConfig(epochs=1, batch_size=32)
Names = dict[str, Any]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def small(channels: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def digits(count: int = 60, *, channels: int = 1, side: int = 8) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, side, side), generator=generator)
    return images.to(torch.uint8), torch.arange(count) % 10


def pictures(count: int = 40) -> tuple[Any, Any]:
    """For resnet8: float32 [count, 3, 32, 32], and labels."""
    images, labels = digits(count, channels=3, side=32)
    return images.float() / 255, labels


def comparing(folder: Path) -> list[Names]:
    model = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32), seed=0)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    mask = sparsemodel.prune(model, density=0.2)
    scores = {name: model.get_parameter(name).detach().abs() for name in mask}

    def train(model: nn.Module, mask: Any, steps: int) -> float:
        return steps / 10_000

    return [{"model": model, "mask": mask, "scores": scores, "first_state": first, "train": train}]


def data_pruning(folder: Path) -> list[Names]:
    (folder / "shards").mkdir()
    images, labels = digits(channels=3)
    with tarfile.open(folder / "shards" / "train-0.tar", "w") as shard:
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
            for ending, content in (("png", file.getvalue()), ("cls", b"%d" % label)):
                entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    return [{"dataset": TensorDataset(*digits()), "net": small(), "teacher": small()},
            {"net": small(3)}]  # fmt: skip


def language_models(folder: Path) -> list[Names]:
    tiny_language.llama().save_pretrained(folder / "path/of/a/model")
    batches = tiny_language.texts()
    dense, test = Pairs(), torch.tensor([0, 1] * 10).repeat(64, 1)
    test[0, :2], test[-1, -2:] = torch.tensor([4, 5]), torch.tensor([2, 3])
    domain = tiny_language.texts(seed=1)
    tokens = torch.cat([batch["input_ids"] for batch in tiny_language.texts(8)]).numpy()
    samples = TokenSamples(tokens, np.ones_like(tokens), tokens)
    fresh = {"model": tiny_language.llama()}
    return [
        {"batches": batches},
        fresh,
        {"dense": dense, "pruned": dense, "test": test},
        {**fresh, "sparsemodel": sparsemodel, "open_text": batches, "domain": domain},
        {"fedprune": fedprune, "make_model": tiny_language.llama, "samples": samples},
    ]


class Pairs(nn.Module):
    """Sure that 0 and 1, 2 and 3, 4 and 5 follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(20.0))

    def forward(self, input_ids: torch.Tensor) -> Any:
        following = nn.functional.one_hot(input_ids ^ 1, 6)
        return types.SimpleNamespace(logits=self.size.detach() * following)


def loops(folder: Path) -> list[Names]:
    import transformers  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    net, texts = small(), training_loops.texts()
    images, labels = digits()
    arguments = transformers.TrainingArguments(
        str(folder / "out"), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    drawn = np.random.default_rng(0)
    return [
        {
            "sparsemodel": sparsemodel, "datapruning": datapruning, "transformers": transformers,
            "functional": nn.functional, "model": training_loops.tiny_bert(), "dataset": texts,
            "arguments": arguments, "net": net,
            "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
            "loader": DataLoader(TensorDataset(images.float(), labels), 20),
            "StandardScaler": StandardScaler, "LogisticRegression": LogisticRegression,
            "X": drawn.normal(size=(60, 4)), "y": np.arange(60) % 2,
        }
    ]  # fmt: skip


def plan(folder: Path) -> list[Names]:
    dense = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32), seed=0)
    mask = sparsemodel.prune(dense, density=0.2)
    images, labels = pictures()
    arrays = {"images": images[:16].numpy(), "labels": labels[:16].numpy()}
    return [
        {
            "dense_model": dense, "mask": mask, "batches": [(images, labels)],
            "test_images": images, "test_labels": labels,
        },
        {"input_shape": (3, 32, 32), "PlanError": PlanError},
        {},
        {"batches": [(arrays["images"], arrays["labels"])], **arrays},
    ]  # fmt: skip


def finished(folder: Path) -> None:
    """A run in runs/mine."""
    fedprune.run(
        data="digits", model="resnet8", method="magnitude", rounds=1, clients=2,
        settings={"data.num_train": 60, "data.num_test": 40}, folder=folder / "runs/mine",
    )  # fmt: skip


def results(folder: Path) -> list[Names]:
    import transformers  # noqa: PLC0415

    finished(folder)
    (folder / "photos").mkdir()
    for number, image in enumerate(digits(3)[0]):
        Image.fromarray(image[0].numpy()).save(folder / "photos" / f"{number}.png")
    pruned = small()
    for layer in (pruned[2], pruned[6]):
        torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary())
    return [
        {"fedprune": fedprune},
        {"sparsemodel": sparsemodel, "torch": torch, "model": pruned, "other": small()},
        {
            "prunelab": prunelab, "transformers": transformers, "tokenizer": tokenizer,
            "lm": tiny_language.llama(),
        },
    ]  # fmt: skip


def vocabulary() -> Any:
    from tokenizers import Tokenizer  # noqa: PLC0415
    from tokenizers.models import WordLevel  # noqa: PLC0415

    words = {str(token): token for token in range(tiny_language.VOCABULARY)}
    return Tokenizer(WordLevel(words, unk_token="0"))


def runs(folder: Path) -> list[Names]:
    finished(folder)
    return [{}, {"fedprune": fedprune, "torch": torch, "pictures": digits(3)[0].numpy()}, {}]


def sparse(folder: Path) -> list[Names]:
    model = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32), seed=0)
    images, labels = pictures()
    wide = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    scores = {name: weight.abs() for name, weight in wide.named_parameters() if weight.dim() == 2}
    return [
        {"model": model, "mask": sparsemodel.prune(model, density=0.2),
         "images": images, "labels": labels},
        {"model": wide, "scores": scores, "shapes": {n: s.shape for n, s in scores.items()}},
    ]  # fmt: skip


def tasks(folder: Path) -> list[Names]:
    with (folder / "prices.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["rooms", "age", "price"])
        rows.writerows([k % 5, k % 7, 3.5 * (k % 5) + 0.1 * (k % 7)] for k in range(80))

    def make_net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    return [{"fedprune": fedprune, "nn": nn, "make_net": make_net}]


NAMED: Mapping[str, Callable[[Path], list[Names]]] = {
    "docs/comparing.md": comparing,
    "docs/datapruning.md": data_pruning,
    "docs/language_models.md": language_models,
    "docs/loops.md": loops,
    "docs/plan.md": plan,
    "docs/results.md": results,
    "docs/runs.md": runs,
    "docs/sparse.md": sparse,
    "docs/tasks.md": tasks,
}
"""What the words of a page name, block by block."""


def with_python() -> list[str]:
    found = [page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "python")]
    return [page for page in found if page not in RUN_ELSEWHERE]


@pytest.mark.filterwarnings("ignore::prunelab.errors.PrunelabWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("page", with_python())
def test_its_lines_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datapruning.students.train.TrainingConfig", lambda: SHORT)
    monkeypatch.setattr("datapruning.scoring.score.TrainingConfig", lambda: SHORT)
    plain = fedprune.run
    monkeypatch.setattr(
        fedprune, "run", lambda **given: plain(**{"rounds": 1, "clients": 2, **given})
    )
    named, names = NAMED[page](tmp_path), dict[str, Any]()
    for number, block in enumerate(blocks(ROOT / page, "python")):
        names |= named[number] if number < len(named) else {}
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


def commands() -> list[tuple[str, list[str]]]:
    """Pages and the words of their command lines."""
    found = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        for line in lines:
            for part in re.split(r"&&|\|", line.split(" #")[0]):
                words = shlex.split(part)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words and (
                    words[0] in {"fedprune", "datapruning"} or words[:2] == ["python", "-m"]
                ):
                    found.append((page.relative_to(ROOT).as_posix(), words))
    return found


CLIS = {"fedprune": fedprune_cli, "datapruning": datapruning_cli}


def test_commands_of_the_pages_exist() -> None:
    """Each names a command that is there, and options that it has."""
    assert len(commands()) > 50
    wrong = [
        f"{page}: {' '.join(words)} ({reason})"
        for page, words in commands()
        if (reason := not_there(words))
    ]
    assert not wrong, "\n".join(wrong)


def not_there(words: list[str]) -> str:
    """What a command line asks for that does not exist."""
    options = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    if words[0] in CLIS:
        command: Any = typer.main.get_command(CLIS[words[0]])
        for word in words[1:]:
            if not hasattr(command, "commands"):
                break
            if word not in command.commands:
                return "" if word in {"--help", "--version"} else f"no command {word}"
            command = command.commands[word]
        known = {name for one in command.params for name in [*one.opts, *one.secondary_opts]}
        return ", ".join(sorted(options - known - {"--help"}))
    module = words[2]
    if module.split(".")[0] not in {"simulations", "benchmarks", "prunelab"}:
        return ""
    file = ROOT / f"{module.replace('.', '/')}.py"
    return "" if file.exists() else f"no module {module}"
