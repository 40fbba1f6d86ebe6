"""Networks of torchvision, timm and transformers by name: "torchvision/resnet18".

Their weights are drawn by the seed, and nothing is downloaded but a configuration that "hf/NAME"
takes from the hub. A function of your own may load pre-trained ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelab.errors import ModelError, close_names

# By the beginning of a name: what torchvision calls the size of an image.
_SIZED = {"vit_": "image_size", "maxvit_": "input_size"}
# Without the classifiers that some train beside the last one; their draws as published.
_ALONE = {"aux_logits": False, "init_weights": True}
_OWN = {"googlenet": _ALONE, "inception_v3": _ALONE}


def is_of_library(name: str) -> bool:
    """Whether a name says which library has the network."""
    return name.partition("/")[0] in LIBRARIES


def check_library_name(name: str) -> None:
    """Raise ModelError unless the library is installed and has a network of that name.

    What transformers has is known when it is built.
    """
    library, _, own = name.partition("/")
    if library == "hf":
        _transformers(name)
        if own.startswith((".", "/", "~")) and not Path(own).expanduser().is_dir():
            raise ModelError(f"model {name!r}: there is no folder {own}; looked from {Path.cwd()}")
    elif own not in (known := known_names(library)):
        hint = close_names(own, known) or f"; it has {len(known)}, such as {', '.join(known[:3])}"
        raise ModelError(f"unknown model {name!r}: {library} has no such network{hint}")


def build_of_library(
    name: str, *, num_classes: int | None, input_shape: tuple[int, ...] | None, width: int | None
) -> nn.Module:
    """A network by the name of a library, its weights drawn by torch's generator.

    Args:
        num_classes: of transformers' networks: None for a causal language model.
        input_shape: of one image (channels, height, width), None for texts.

    Raises:
        ModelError: unknown name, a library that is not installed, samples that its networks are
            not for, or a size that the network cannot have.
    """
    check_library_name(name)
    library, _, own = name.partition("/")
    try:
        return LIBRARIES[library](own, num_classes, input_shape, width)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    except Exception as error:  # whatever a library raises of sizes and files
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{name} cannot be built for classes {num_classes}, shape {input_shape}: "
            f"{type(error).__name__}: {first}"
        ) from error


def known_names(library: str) -> list[str]:
    """The classification networks that torchvision or timm has.

    Raises:
        ModelError: timm is not installed.
    """
    if library == "torchvision":
        from torchvision import models  # noqa: PLC0415

        return list(models.list_models(module=models))
    try:
        import timm  # noqa: PLC0415
    except ImportError:
        raise _not_installed("timm/NAME", "timm") from None
    return list(timm.list_models())


def _torchvision(
    name: str, num_classes: int | None, input_shape: tuple[int, ...] | None, width: int | None
) -> nn.Module:
    from torchvision import models  # noqa: PLC0415

    classes, (channels, height, side) = _for_images(num_classes, input_shape)
    options: dict[str, Any] = dict(_OWN.get(name, {}))
    for beginning, size in _SIZED.items():
        if name.startswith(beginning):
            if height != side:
                raise ModelError(f"it takes square images, got {height}×{side}")
            options[size] = side if size == "image_size" else (height, side)
    if width is not None:
        if not has_width(f"torchvision/{name}"):
            raise _fixed(width)
        options["width_mult"] = width_mult(width)
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    if channels != 3:
        _change_channels(network, channels)
    return network


def has_width(name: str) -> bool:
    """Whether a name's network has an adjustable width: torchvision's with a `width_mult`."""
    return name.startswith("torchvision/mobilenet_v")


def width_mult(width: int) -> float:
    """What a network with a factor of its width (1 as published) takes for a whole number."""
    return width / 8


def _change_channels(network: nn.Module, channels: int) -> None:
    """A first convolution for images of other channels, which is registered first in all."""
    path, old = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    network.set_submodule(path, new)
    if hasattr(network, "transform_input"):  # by the means of three channels
        network.transform_input = False  # type: ignore[assignment]


def _timm(
    name: str, num_classes: int | None, input_shape: tuple[int, ...] | None, width: int | None
) -> nn.Module:
    import timm  # noqa: PLC0415

    classes, (channels, height, side) = _for_images(num_classes, input_shape)
    if width is not None:
        raise _fixed(width)
    published = timm.models.get_pretrained_cfg(name)
    # Those of another size otherwise stop at their first image.
    is_sized = published is not None and published.fixed_input_size
    size = {"img_size": (height, side)} if is_sized else {}
    network: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=classes, in_chans=channels, **size
    )
    return network


def _hugging_face(
    name: str, num_classes: int | None, input_shape: tuple[int, ...] | None, width: int | None
) -> nn.Module:
    """By its configuration, with the head that the samples ask for."""
    transformers = _transformers(name)
    if width is not None:
        raise _fixed(width)
    config = transformers.AutoConfig.from_pretrained(os.path.expanduser(name))
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", torch.float32)
    if num_classes is not None:
        config.num_labels = num_classes
    if input_shape is not None:
        _, (channels, height, side) = _for_images(num_classes, input_shape)
        config.num_channels = channels
        config.image_size = side if height == side else (height, side)
        head = transformers.AutoModelForImageClassification
    elif num_classes is not None:
        head = transformers.AutoModelForSequenceClassification
    else:
        head = transformers.AutoModelForCausalLM
    network: nn.Module = head.from_config(config)
    return network.train()


def _for_images(
    num_classes: int | None, input_shape: tuple[int, ...] | None
) -> tuple[int, tuple[int, int, int]]:
    if num_classes is None or input_shape is None or len(input_shape) != 3:
        raise ModelError(
            "it is for labelled images [channels, height, width], and these samples are none "
            f"(classes {num_classes}, shape {input_shape}); give a network of your own"
        )
    channels, height, side = input_shape
    return num_classes, (channels, height, side)


def _fixed(width: int) -> ModelError:
    return ModelError(
        f"its width is fixed; leave model.width at 0, got {width}, or give a function with a "
        "parameter width"
    )


def _transformers(name: str) -> Any:
    try:
        import transformers  # noqa: PLC0415
    except ImportError:
        raise _not_installed(name, "transformers") from None
    return transformers


def _not_installed(name: str, package: str) -> ModelError:
    return ModelError(f"the model {name!r} needs {package}: pip install 'fedprune[embeddings]'")


_Builder = Callable[[str, int | None, tuple[int, ...] | None, int | None], nn.Module]
LIBRARIES: dict[str, _Builder] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hugging_face,
}
