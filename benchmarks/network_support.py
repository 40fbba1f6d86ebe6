"""Which networks of torchvision, timm and transformers are truly sparse from end to end.

    python -m benchmarks.network_support [--quick] [--json] [NAME ...]

Each is built with random weights, pruned by magnitude to a density of 0.2, made sparse, and takes
one step of training in evaluation mode. `way` is "program" where a client trains it without torch,
"modules" where torch calls its sparse layers, "refused" where it has no sparse form; `why` says
why it is no better. `error` is the largest difference of logits and gradients from the dense model
under the same mask, over the largest of them; a unit on the kink of a ReLU, whose gradient float32
decides either way, shows as 1e-3 or so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from prunelab.networks import build_model
from sparsemodel import prune, sparsify
from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.masks.mask import Mask
from sparsemodel.plans.program import program_of

DENSITY, CLASSES, SHAPE = 0.2, 10, (3, 64, 64)
NAMES = (
    *("resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "densenet121", "googlenet"),
    *("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5"),
    *("efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "swin_t", "vit_b_32"),
)
TIMM = (
    *("resnet18", "mobilenetv3_small_100", "efficientnet_lite0", "convnext_atto", "mixer_s32_224"),
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "test_vit", "test_nfnet", "test_byobnet"),
)
QUICK = ("timm/test_vit", "timm/test_nfnet", "Llama", "GPT-2", "ViT")


@dataclass(frozen=True)
class Support:
    """How one network is computed.

    Attributes:
        layers: sparse layers that it has.
        share: of its weights that lie in them.
    """

    name: str
    way: str
    layers: int = 0
    share: float = 0.0
    error: float = 0.0
    why: str = ""

    def as_line(self) -> str:
        """One line of a table."""
        numbers = f"{self.layers:>4} {self.share:>6.0%} {self.error:>8.0e}"
        return f"{self.name:<32} {self.way:<8}{numbers}  {self.why}"


def cases() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Name -> network and batch."""
    named = [f"torchvision/{name}" for name in NAMES] + [f"timm/{name}" for name in TIMM]
    return {name: lambda name=name: _of_images(name) for name in named} | _of_transformers()


def _of_images(name: str) -> tuple[nn.Module, Any]:
    model = build_model(name, num_classes=CLASSES, input_shape=SHAPE, seed=0)
    return model, torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def _of_transformers() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Two layers of each kind, with random weights."""
    try:
        import transformers as hf  # noqa: PLC0415
    except ImportError:
        return {}
    hf.logging.set_verbosity_error()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    size |= {"num_hidden_layers": 2}
    text = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    tokens = {"input_ids": torch.arange(12).view(2, 6)}
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}

    def of(head: Any, config: Any, batch: Any) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (head.from_config(config), batch)

    lm, labels = hf.AutoModelForCausalLM, hf.AutoModelForSequenceClassification
    heads = {"num_key_value_heads": 1}
    return {
        "Llama": of(lm, hf.LlamaConfig(**size, **text, **heads), tokens),
        "Llama, tied": of(
            lm, hf.LlamaConfig(**size, **text, **heads, tie_word_embeddings=True), tokens
        ),
        "GPT-NeoX": of(lm, hf.GPTNeoXConfig(**size, **text), tokens),
        "GPT-2": of(lm, hf.GPT2Config(**gpt2, **text), tokens),
        "BERT": of(labels, hf.BertConfig(**size, **text), tokens),
        "ViT": of(
            hf.AutoModelForImageClassification,
            hf.ViTConfig(**size, image_size=32, patch_size=8),
            images,
        ),
    }


def support(name: str, build: Callable[[], tuple[nn.Module, Any]]) -> Support:
    """Build, prune, make sparse, and compare a step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = build()
    model.eval()
    try:
        mask = prune(model, DENSITY)
        mask.apply(model)
        sparse = sparsify(model, mask)
    except (MaskError, SparseModelError) as error:
        return Support(name, "refused", why=str(error))
    total = sum(parameter.numel() for parameter in model.parameters())
    found = {
        "layers": len(mask),
        "share": mask.num_weights / total,
        "error": _difference(_step(model, batch, mask), _step(sparse, batch, mask)),
    }
    if not isinstance(batch, torch.Tensor):
        return Support(name, "modules", why="a program takes one tensor", **found)
    try:
        program_of(model.train(), batch.shape[1:])
    except SparseModelError as error:
        return Support(name, "modules", why=str(error), **found)
    return Support(name, "program", **found)


def _step(model: nn.Module, batch: Any, mask: Mask) -> list[torch.Tensor]:
    """Logits and gradients, those of pruned layers at their active weights."""
    outputs = model(**batch) if isinstance(batch, dict) else model(batch)
    logits = getattr(outputs, "logits", outputs)
    (logits - 1).square().mean().backward()
    return [logits.detach()] + [
        parameter.grad[mask[name]] if name in mask else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]


def _difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    assert [t.shape for t in one] == [t.shape for t in other]
    scale = max(float(t.abs().max()) for t in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / scale


def rows(names: list[str]) -> Iterator[Support]:
    """A row for each of these cases."""
    known = cases()
    for name in names:
        yield support(name, known[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all of them")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    arguments = parser.parse_args()
    for row in rows(arguments.names or list(QUICK if arguments.quick else cases())):
        print(json.dumps(asdict(row)) if arguments.json else row.as_line(), flush=True)


if __name__ == "__main__":
    main()
