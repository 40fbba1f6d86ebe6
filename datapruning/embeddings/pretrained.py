"""Embeddings by pre-trained networks of torchvision, timm and transformers, by name or folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.data.samples import Samples
from prunelab.errors import ModelError
from prunelab.training.task import CausalLM, ImageClassification, batch_on

_RANDOM = "?random"
_SIZE = 224  # where a model does not say for which size of image it was trained

AT_ONCE = 16
"""Batches whose embeddings leave a device together."""

Embedder = Callable[[Any], Tensor]
"""A batch on the model's device -> [B, D]."""


def load_embedder(name: str, *, seed: int, device: torch.device, of_tokens: bool) -> Embedder:
    """A function that embeds batches by a network in eval mode, without gradients.

    Args:
        name: a network of torchvision or timm, a name of the transformers hub, or a folder that
            transformers or timm wrote. "torchvision/" or "timm/" in front names the library
            where both have one; "?random" at the end asks for random weights, which nothing
            else ever gives.
        seed: of random weights.
        of_tokens: batches are tokens (a model of transformers), not images.

    Raises:
        ModelError: unknown name, a library that is not installed, or weights that cannot be
            had.
    """
    plain = name.removesuffix(_RANDOM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedder, network = _load(plain, pretrained=plain == name, of_tokens=of_tokens)
    network.to(device).eval()
    return embedder


def embed_pretrained(
    samples: Samples, name: str, *, seed: int, batch_size: int, device: torch.device
) -> Tensor:
    """float32 [N, D] on the CPU, in the order of the rows; see `load_embedder`."""
    of_tokens = not isinstance(samples.batch(torch.tensor([0])), tuple)
    embedder = load_embedder(name, seed=seed, device=device, of_tokens=of_tokens)
    return embedded(samples, embedder, batch_size=batch_size, device=device)


@torch.no_grad()
def embedded(
    samples: Samples, embedder: Embedder, *, batch_size: int, device: torch.device
) -> Tensor:
    """What an embedder makes of all samples, float32 [N, D] on the CPU.

    A GPU is waited for once in AT_ONCE batches.
    """
    found = []
    for block in torch.arange(len(samples)).split(AT_ONCE * batch_size):
        parts = [embedder(batch_on(samples, rows, device)) for rows in block.split(batch_size)]
        found.append(torch.cat([part.float() for part in parts]).cpu())
    return torch.cat(found)


def _load(name: str, *, pretrained: bool, of_tokens: bool) -> tuple[Embedder, nn.Module]:
    folder = Path(name)
    if folder.is_dir():
        if "model_type" in _folder_config(folder):
            return _transformers(name, pretrained=pretrained, of_tokens=of_tokens)
        return _timm(f"local-dir:{folder.resolve()}", pretrained=pretrained)
    if not of_tokens:
        import torchvision.models  # noqa: PLC0415

        plain = name.removeprefix("torchvision/")
        if plain in torchvision.models.list_models(module=torchvision.models):
            return _torchvision(plain, pretrained=pretrained)
        if name.startswith("torchvision/"):
            raise ModelError(f"torchvision has no classification network {plain!r}")
        if name.startswith("timm/") or _timm_has(name):
            return _timm(name.removeprefix("timm/"), pretrained=pretrained)
    return _transformers(name, pretrained=pretrained, of_tokens=of_tokens)


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} is not a folder of a transformers or timm model: config.json ({error})"
        ) from None
    return config


def _torchvision(name: str, *, pretrained: bool) -> tuple[Embedder, nn.Module]:
    import torchvision.models  # noqa: PLC0415

    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        network: nn.Module = torchvision.models.get_model(
            name, weights=weights if pretrained else None
        )
    except (OSError, RuntimeError) as error:
        raise _no_weights(name, error) from None
    like = weights.transforms()
    size = like.crop_size[0] if like.crop_size else _SIZE
    task = ImageClassification()

    def embed(batch: Any) -> Tensor:
        images = _resized(batch[0], size=size, mean=like.mean, std=like.std)
        return task.embedding(network, (images, batch[1]))

    return embed, network


def _timm_has(name: str) -> bool:
    try:
        import timm  # noqa: PLC0415
    except ImportError:
        return False
    return bool(timm.is_model(name))


def _timm(name: str, *, pretrained: bool) -> tuple[Embedder, nn.Module]:
    try:
        import timm  # noqa: PLC0415
    except ImportError:
        raise _not_installed(name, "timm") from None
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # the hub client and timm raise many kinds; the cure is one
        raise _no_weights(name, error) from None
    like = timm.data.resolve_model_data_config(network)

    def embed(batch: Any) -> Tensor:
        images = _resized(
            batch[0], size=like["input_size"][-1], mean=like["mean"], std=like["std"],
            channels=like["input_size"][0],
        )  # fmt: skip
        embedded: Tensor = network(images)
        return embedded

    return embed, network


def _transformers(name: str, *, pretrained: bool, of_tokens: bool) -> tuple[Embedder, nn.Module]:
    try:
        import transformers  # noqa: PLC0415
    except ImportError:
        raise _not_installed(name, "transformers") from None
    try:
        if pretrained:
            network = transformers.AutoModel.from_pretrained(name)
        else:
            network = transformers.AutoModel.from_config(
                transformers.AutoConfig.from_pretrained(name)
            )
        processor: Any = (
            None if of_tokens else transformers.AutoImageProcessor.from_pretrained(name)
        )
    except Exception as error:  # the hub client raises many kinds; the cure is one
        raise _no_weights(name, error) from None
    if of_tokens:
        task = CausalLM()
        return (lambda batch: task.embedding(network, batch)), network

    def embed(batch: Any) -> Tensor:
        images = _with_channels(_unit_range(batch[0]), 3)
        inputs = processor(images=images, do_rescale=False, return_tensors="pt")
        output = network(pixel_values=inputs["pixel_values"].to(images.device))
        pooled = getattr(output, "pooler_output", None)
        # Without a pooled output: the mean over patches or positions.
        embedded: Tensor = output.last_hidden_state if pooled is None else pooled
        if embedded.dim() == 4:
            return embedded.flatten(2).squeeze(2) if pooled is not None else embedded.mean((2, 3))
        return embedded.mean(1) if embedded.dim() == 3 else embedded

    return embed, network


def _resized(
    images: Tensor,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int = 3,
) -> Tensor:
    """Images as `prepare` gives them -> those that the network was trained on."""
    images = _with_channels(_unit_range(images), channels)
    images = functional.interpolate(
        images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    as_channels = (1, len(mean), 1, 1)
    return (images - images.new_tensor(mean).reshape(as_channels)) / images.new_tensor(std).reshape(
        as_channels
    )


def _unit_range(images: Tensor) -> Tensor:
    """Undoes `prepare`: values in [0, 1]."""
    return (images * 0.25 + 0.5).clamp(0, 1)


def _with_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    if channels == 1:
        return images.mean(1, keepdim=True)
    raise ModelError(f"images have {images.shape[1]} channels; the network takes {channels}")


def _no_weights(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"no weights for the model {name!r} ({type(error).__name__}: {str(error)[:200]}); check "
        "the name and the network, give a folder of a model instead, or ask for random weights "
        f"with model:{name}{_RANDOM}"
    )


def _not_installed(name: str, package: str) -> ModelError:
    return ModelError(f"the model {name!r} needs {package}: pip install 'fedprune[embeddings]'")
