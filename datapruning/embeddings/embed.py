"""Vectors of samples, by which prototypes, duplicates and neighbourhoods are found."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from datapruning.embeddings.pretrained import embed_pretrained, embedded
from datapruning.embeddings.simclr import SimclrConfig, train_simclr
from prunelab.data.samples import Samples
from prunelab.errors import DataError, ModelError
from prunelab.runs.seeds import stream_seed
from prunelab.training.task import Task

NUM_COMPONENTS = 64
SOURCES = ("pixels", "pca", "simclr", "model:NAME")
_MODEL = "model:"


def embed(
    samples: Samples,
    source: str | None = None,
    *,
    seed: int = 0,
    task: Task | None = None,
    model: nn.Module | None = None,
    config: SimclrConfig | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """Embeddings of all samples in the order of their rows, float32 [N, D] on the CPU.

    Args:
        source: where the vectors come from.
            "pixels": the images flattened; "pca": their first NUM_COMPONENTS principal
            components, or as many as there can be: controls for everything learned.
            "simclr": an encoder trained on these images without labels (`config`).
            "model:NAME": a network of torchvision, timm or transformers by name or folder, see
            `pretrained.load_embedder`; "model:NAME?random" with random weights.
            None: `task.embedding` of `model`, in eval mode, on the device where it is.
        seed: decides every random choice.
        checkpoint: of SimCLR's training; it goes on from the file if that is there.
        device: of SimCLR and of named networks.

    Raises:
        ModelError: an unknown source, or a model that cannot be had.
        DataError: a source for images with samples that are none.
        RunError: SimCLR's training fails, or its checkpoint is of another run.
    """
    if source is None or (task is not None or model is not None):
        if source is not None or task is None or model is None:
            raise ModelError("give a source, or both task and model without one")
        return embed_by_task(samples, task, model, batch_size=batch_size)
    where = torch.device(device)
    if source == "pixels":
        return _pixels(samples)
    if source == "pca":
        return pca(samples, num_components=NUM_COMPONENTS, seed=seed)
    if source == "simclr":
        encoder = train_simclr(
            samples, config=config or SimclrConfig(), seed=seed, checkpoint=checkpoint, device=where
        )
        return embedded(
            samples, lambda batch: encoder(batch[0]), batch_size=batch_size, device=where
        )
    if source.startswith(_MODEL):
        return embed_pretrained(
            samples, source.removeprefix(_MODEL), seed=seed, batch_size=batch_size, device=where
        )
    raise ModelError(f"unknown source of embeddings {source!r}; known: {', '.join(SOURCES)}")


def embed_by_task(
    samples: Samples, task: Task, model: nn.Module, *, batch_size: int = 256
) -> Tensor:
    """`task.embedding` of a model in eval mode; its modes are restored. float32 [N, D]."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return embedded(
            samples,
            partial(task.embedding, model),
            batch_size=batch_size,
            device=next(model.parameters()).device,
        )
    finally:
        for module, mode in modes:
            module.training = mode


def pca(samples: Samples, *, num_components: int, seed: int) -> Tensor:
    """The first principal components of the pixels, by falling variance, float32 [N, D].

    D is `num_components` or, where there are fewer, what pixels and samples allow; randomised
    for large images (scikit-learn's choice), with a fixed sign.

    Raises:
        DataError: samples that are no images.
    """
    from sklearn.decomposition import PCA  # noqa: PLC0415

    pixels = _pixels(samples).double().numpy()
    components = PCA(
        min(num_components, *pixels.shape), random_state=stream_seed(seed) % 2**32
    ).fit_transform(pixels)
    return torch.from_numpy(components).float()


def _pixels(samples: Samples) -> Tensor:
    batch = samples.batch(torch.arange(len(samples)))
    if not isinstance(batch, tuple) or batch[0].dim() != 4:
        raise DataError(
            "embeddings by pixels, pca or simclr need images: samples whose batches are "
            "(images, labels); for tokens give model:NAME, or task and model"
        )
    pixels: Tensor = batch[0].flatten(1).float()
    return pixels
