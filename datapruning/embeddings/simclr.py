"""A small SimCLR: an encoder trained on the images themselves, without labels.

Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations
(ICML 2020), with lightly's NT-Xent loss.
Departs from it: a small residual network, batches of hundreds, AdamW; crops, colours and noise
drawn for whole batches of tensors; mirrored views only where asked for, since a mirrored digit
is another sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.data.samples import Samples, shuffled
from prunelab.errors import DataError, ModelError, RunError, check_settings
from prunelab.networks import build_model
from prunelab.runs.seeds import generator, rng, stream_seed
from prunelab.training import checkpoint as checkpoints
from sparsemodel.masks.schedule import cosine

_ORDER, _WEIGHTS, _VIEWS = range(3)  # streams of the seed


@dataclass(frozen=True)
class SimclrConfig:
    """How the encoder is trained; the defaults suit some thousand images on two cores.

    Attributes:
        model, width: of `build_model`; the embedding is what its classifier would be given.
        epochs, batch_size, lr, weight_decay: AdamW, the rate falling along half a cosine.
        temperature: of NT-Xent.
        projection: dimensions of the head's output, where the loss is taken.
        min_area: crops cover this share of the image or more.
        flip: mirror half of the views; leave it off for digits and letters.
        jitter: largest change of brightness (in shares of the full range), contrast, colour.
        noise: standard deviation of the noise added, in shares of the full range.

    Raises:
        RunError: values out of range, all of them named.
    """

    model: str = "resnet8"
    width: int | None = None
    epochs: int = 50
    batch_size: int = 256
    lr: float = 2e-3
    weight_decay: float = 1e-4
    temperature: float = 0.5
    projection: int = 64
    min_area: float = 0.3
    flip: bool = False
    jitter: float = 0.4
    noise: float = 0.02

    def __post_init__(self) -> None:
        checks = {
            f"epochs must be at least 1, got {self.epochs}": self.epochs >= 1,
            f"batch_size must be at least 2, got {self.batch_size}": self.batch_size >= 2,
            f"lr must be positive and finite, got {self.lr}": 0 < self.lr < math.inf,
            f"weight_decay must be at least 0, got {self.weight_decay}": self.weight_decay >= 0,
            f"temperature must be positive, got {self.temperature}": self.temperature > 0,
            f"projection must be at least 1, got {self.projection}": self.projection >= 1,
            f"min_area must be in (0, 1], got {self.min_area}": 0 < self.min_area <= 1,
            f"jitter must be in [0, 1], got {self.jitter}": 0 <= self.jitter <= 1,
            f"noise must be at least 0, got {self.noise}": self.noise >= 0,
        }
        check_settings("simclr", checks)


def train_simclr(
    samples: Samples,
    *,
    config: SimclrConfig,
    seed: int,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """The trained encoder, in eval mode: images [B, C, H, W] -> [B, D].

    Weights, order and views follow from the seed; those of epoch e from (seed, e) alone, so a
    resumed run ends with the same bits on the CPU. The global random state is not touched.

    Args:
        samples: batches are (images, labels); the labels are not looked at.
        checkpoint: written after each epoch; if the file is there, the run goes on from it.
        on_epoch: is told (epoch, mean loss).

    Raises:
        ModelError: lightly is not installed, or a model whose classifier cannot be found.
        DataError: fewer than two samples, or samples that are no images.
        RunError: a loss that is not finite, or a checkpoint of another run.
    """
    encoder, head = _networks(samples, config, seed)
    networks = nn.ModuleDict({"encoder": encoder, "head": head}).to(device)
    optimizer = torch.optim.AdamW(
        networks.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    signature = {**asdict(config), "kind": "simclr", "seed": seed, "data": samples.fingerprint}
    start = 0
    if checkpoint is not None:
        state = checkpoints.load(Path(checkpoint), signature=signature)
        if state is not None:
            networks.load_state_dict(state["networks"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["epochs"]
    loss_of = _nt_xent(config.temperature)
    networks.train()
    for epoch in range(start, config.epochs):
        loss = _train_epoch(networks, samples, optimizer, loss_of, config, seed=seed, epoch=epoch)
        if not math.isfinite(loss):
            raise RunError(f"simclr: the loss became {loss} in epoch {epoch}; lower lr")
        if checkpoint is not None:
            state = {
                "networks": networks.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epochs": epoch + 1,
            }
            checkpoints.save(Path(checkpoint), state, signature=signature)
        if on_epoch is not None:
            on_epoch(epoch, loss)
    return encoder.eval()


def view(images: Tensor, *, config: SimclrConfig, generator: torch.Generator) -> Tensor:
    """One random view of each image: crop and resize, mirror, colours, noise.

    Args:
        images: float32 [N, C, H, W] as `prepare` gives them, where the full range is 4.
        generator: on the CPU, whatever the device of the images.

    Returns:
        [N, C, H, W] on the images' device.
    """
    n, channels = images.shape[:2]

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1, 1).uniform_(low, high, generator=generator).to(images.device)

    area, ratio = uniform(config.min_area, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    top, left = uniform(-1, 1) * (1 - height), uniform(-1, 1) * (1 - width)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if config.flip else 1.0
    zero = torch.zeros_like(height)
    corners = torch.cat([width * mirror, zero, left, zero, height, top], dim=1).reshape(n, 2, 3)
    grid = functional.affine_grid(corners, list(images.shape), align_corners=False)
    result = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mean = result.mean((1, 2, 3), keepdim=True)
    contrast = 1 + uniform(-config.jitter, config.jitter)
    result = (result - mean) * contrast + mean + 4 * uniform(-config.jitter, config.jitter) / 2
    if channels == 3:
        gray = result.mean(1, keepdim=True)
        colour = torch.where(uniform(0, 1) < 0.2, 0.0, 1 + uniform(-config.jitter, config.jitter))
        result = gray + (result - gray) * colour
    if config.noise > 0:
        noise = torch.randn(result.shape, generator=generator).to(result.device)
        result = result + 4 * config.noise * noise
    return result


def _networks(samples: Samples, config: SimclrConfig, seed: int) -> tuple[nn.Module, nn.Module]:
    if len(samples) < 2:
        raise DataError(f"simclr tells images apart: it needs two or more, got {len(samples)}")
    first = samples.batch(torch.tensor([0]))
    if not isinstance(first, tuple) or first[0].dim() != 4:
        raise DataError("simclr needs images: samples whose batches are (images, labels)")
    weights = stream_seed(seed, _WEIGHTS)
    channels, height, width = first[0].shape[1:]
    encoder = build_model(
        config.model, num_classes=1, input_shape=(channels, height, width), seed=weights,
        width=config.width,
    )  # fmt: skip
    name = next((n for n in ("fc", "classifier") if hasattr(encoder, n)), None)
    if name is None:
        raise ModelError(f"simclr: {config.model} has no layer fc or classifier to take off")
    size = getattr(encoder, name).in_features
    setattr(encoder, name, nn.Identity())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights)
        head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.projection))
    return encoder, head


def _nt_xent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        from lightly.loss import NTXentLoss  # noqa: PLC0415
    except ImportError:
        raise ModelError(
            "simclr needs lightly: pip install 'fedprune[embeddings]'; or embed by pixels or pca"
        ) from None
    loss: Callable[[Tensor, Tensor], Tensor] = NTXentLoss(temperature=temperature)
    return loss


def _train_epoch(
    networks: nn.ModuleDict,
    samples: Samples,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    config: SimclrConfig,
    *,
    seed: int,
    epoch: int,
) -> float:
    """One pass over the images; the mean loss."""
    order, random = rng(seed, _ORDER, epoch), generator(seed, _VIEWS, epoch)
    device = next(networks.parameters()).device
    everything = torch.arange(len(samples))
    parts = shuffled(samples, everything, batch_size=config.batch_size, rng=order)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for index, rows in enumerate(parts):
        rate = cosine(epoch + index / len(parts), value=config.lr, end=config.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = samples.batch(rows)[0].to(device)
        # Both views in one forward pass: batch norm sees them together.
        both = torch.cat([view(images, config=config, generator=random) for _ in range(2)])
        first, second = networks["head"](networks["encoder"](both)).chunk(2)
        loss = loss_of(first, second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach().double() * len(rows)
    return float(loss_sum) / len(samples)
