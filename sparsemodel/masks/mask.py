"""Masks: which weights of a model exist.

A mask names parameters and gives each a boolean pattern of its shape; True means that the weight
is active. Parameters that a mask does not name are dense (never pruned).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.distribution import score_array
from sparsemodel.runtime.adjust import largest
from sparsemodel.runtime.pattern import Pattern, Patterns, PatternSet


class Mask(PatternSet[torch.Tensor]):
    """An immutable set of boolean patterns, one for each prunable parameter, in a fixed order.

    Args:
        patterns: parameter name -> bool tensor of the parameter's shape. Copied to the CPU.

    Raises:
        MaskError: a pattern is not boolean, is empty, or there is no pattern at all.

    >>> mask = Mask({"fc.weight": torch.tensor([[True, False], [False, False]])})
    >>> mask.num_active, mask.num_weights, mask.density
    (1, 4, 0.25)
    """

    def __init__(self, patterns: Mapping[str, torch.Tensor]) -> None:
        for name, pattern in patterns.items():
            if pattern.dtype != torch.bool:
                raise MaskError(f"mask of {name!r}: expected a bool tensor, got {pattern.dtype}")
            if pattern.numel() == 0:
                raise MaskError(f"mask of {name!r}: the pattern has no elements")
        super().__init__(
            {
                name: pattern.detach().to("cpu", copy=True).contiguous()
                for name, pattern in patterns.items()
            }
        )
        self._csr: Patterns | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the mask's order."""
        return {name: tuple(pattern.shape) for name, pattern in self._patterns.items()}

    def counts(self) -> dict[str, int]:
        """Name -> number of active weights, in the mask's order."""
        return {name: int(pattern.sum()) for name, pattern in self._patterns.items()}

    def active(self, name: str) -> torch.Tensor:
        """Flat indices of the active weights of a layer: int64, ascending, shape [num_active]."""
        return torch.nonzero(self._patterns[name].reshape(-1)).reshape(-1)

    def pruned(self, name: str) -> torch.Tensor:
        """Flat indices of the pruned weights of a layer: int64, ascending, shape [num_pruned]."""
        return torch.nonzero(~self._patterns[name].reshape(-1)).reshape(-1)

    def digest(self) -> str:
        """32 hexadecimal digits that name this mask: a hash of names, shapes and patterns.

        Two masks are equal exactly when their digests are (up to a 128-bit hash collision).
        """
        return self.csr().digest()

    def csr(self) -> Patterns:
        """The same patterns as CSR rows, for what works without torch; made once."""
        if self._csr is None:
            self._csr = Patterns(
                {
                    name: Pattern.from_positions(
                        tuple(pattern.shape), np.flatnonzero(pattern.numpy())
                    )
                    for name, pattern in self._patterns.items()
                }
            )
        return self._csr

    @classmethod
    def from_csr(cls, patterns: Patterns) -> Mask:
        """The mask of CSR patterns."""
        masks = {}
        for name, pattern in patterns.items():
            flat = torch.zeros(pattern.num_weights, dtype=torch.bool, device="cpu")
            flat[torch.from_numpy(pattern.positions())] = True
            masks[name] = flat.reshape(pattern.shape)
        mask = cls(masks)
        mask._csr = patterns
        return mask

    @classmethod
    def from_torch(cls, model: nn.Module) -> Mask:
        """The mask of a model that `torch.nn.utils.prune` has pruned; layers it has not are dense.

        Call `prune.remove` on those layers before `sparsify`.

        Raises:
            MaskError: no layer is pruned so, or a mask holds something else than zeros and ones.
        """
        from sparsemodel.masks.torch_pruning import mask_from_torch  # noqa: PLC0415

        return mask_from_torch(model)

    def to_torch(self, model: nn.Module) -> None:
        """Prune a model by `torch.nn.utils.prune`, in place: weight_orig and weight_mask.

        Raises:
            MaskError: the model lacks a parameter that the mask names, it has another shape, or is
                pruned so already; the model is as it was.

        >>> layer = nn.Linear(2, 1)
        >>> Mask({"weight": torch.tensor([[True, False]])}).to_torch(layer)
        >>> layer.weight_mask, Mask.from_torch(layer).density
        (tensor([[1., 0.]]), 0.5)
        """
        from sparsemodel.masks.torch_pruning import mask_to_torch  # noqa: PLC0415

        mask_to_torch(self, model)

    def replace(self, patterns: Mapping[str, torch.Tensor]) -> Mask:
        """A new mask with some layers' patterns replaced.

        Raises:
            MaskError: a name that this mask does not have, or a pattern of another shape.
        """
        for name, pattern in patterns.items():
            if name not in self._patterns:
                raise MaskError(f"no layer {name!r} in this mask; it has {list(self._patterns)}")
            if pattern.shape != self._patterns[name].shape:
                raise MaskError(
                    f"mask of {name!r}: expected shape {tuple(self._patterns[name].shape)}, "
                    f"got {tuple(pattern.shape)}"
                )
        return Mask({**self._patterns, **patterns})

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to zero, in place.

        Raises:
            MaskError: the model lacks a parameter that the mask names, or it has another shape.
        """
        for weight, pattern in zip(
            weights_under(self, model).values(), self._patterns.values(), strict=True
        ):
            # masked_fill, not multiplication: 0 * inf would leave a NaN behind.
            weight.masked_fill_(~pattern.to(weight.device), 0.0)


def weights_under(mask: Mask, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a mask names, in its order.

    Raises:
        MaskError: the model lacks one, or it has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, shape in mask.shapes().items():
        if name not in parameters:
            raise MaskError(f"the model has no parameter {name!r} that the mask names")
        check_shape(name, parameters[name], shape)
    return {name: parameters[name] for name in mask}


def check_shape(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    """Raise MaskError unless a weight has the shape of its mask."""
    if tuple(weight.shape) != shape:
        raise MaskError(
            f"mask of {name!r}: the model's parameter has shape {tuple(weight.shape)}, the mask "
            f"{shape}"
        )


def num_not_zero(mask: Mask, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """How many pruned weights are not zero, of each name that the mask has."""
    return {
        name: int(weight.detach()[~mask[name].to(weight.device)].count_nonzero())
        for name, weight in weights.items()
    }


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that may be pruned: convolution and linear weights, the stem apart.

    The stem sees the raw input and holds few weights; it, biases, normalisation parameters and
    layers of other kinds (transposed, parametrised, embeddings) stay dense. So do layers that share
    a parameter with another (tied) and, where some of the model is trained, frozen weights. The
    stem is the layer of any of these kinds that the input reaches first. Where a model's code
    cannot be followed so far, it is the first convolution in the order of registration, or the
    first layer where there is no convolution. A model of a single layer has no stem apart, and
    that layer is prunable.

    Returns:
        Name -> parameter, in the order of `model.named_parameters()`.

    Raises:
        MaskError: the model has no convolution or linear layer but its stem.
    """
    layers = {name: module for name, module in model.named_modules() if _has_weights(module)}
    names = {
        f"{name}.weight" if name else "weight": module
        for name, module in layers.items()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    }
    is_trained = any(p.requires_grad for p in model.parameters())
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    found = {
        name: p
        for name, p in model.named_parameters()
        if name in names
        and (p.requires_grad or not is_trained)
        and all(owners[id(own)] == 1 for own in names[name].parameters(recurse=False))
    }
    if len(layers) > 1:
        stem = _stem(model, list(layers.values()))
        found = {name: p for name, p in found.items() if names[name] is not stem}
    if not found:
        others = [f"{type(m).__name__} {name!r}" for name, m in layers.items()]
        kinds = f"; it has {', '.join(others[:4])}" if others else ""
        raise MaskError(
            f"{type(model).__name__} has no convolution or linear layer with a weight of its own "
            f"(the stem apart), so nothing can be pruned{kinds}: remove parametrisations and "
            "ties, train what is frozen, and exchange other classes (transformers' Conv1D) for "
            "nn.Linear"
        )
    return found


def _has_weights(module: nn.Module) -> bool:
    """Whether a module multiplies what it is given by a matrix, or looks it up in one."""
    known = nn.modules.conv._ConvNd | nn.Linear | nn.Embedding | nn.RNNBase | nn.MultiheadAttention
    if isinstance(module, known):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and not module._modules


def _stem(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """Of layers with weights the one that the input reaches first."""
    from sparsemodel.layers.tracing import first_called, is_leaf  # noqa: PLC0415 - they know masks

    known = {id(layer) for layer in layers}

    def has_some(module: nn.Module) -> bool:
        # torch's own modules are seen as wholes, of which nobody knows what comes first inside.
        inside = module.modules() if is_leaf(module) else [module]
        return any(id(part) in known for part in inside)

    reached = first_called(model, has_some)
    convolutions = [m for m in layers if isinstance(m, nn.modules.conv._ConvNd)]
    return reached or (convolutions or layers)[0]


def mask_from_scores(scores: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> Mask:
    """Keep exactly `counts[name]` weights of highest score in each layer.

    Ties are broken by position: of equal scores the lower flat index is kept.

    Args:
        scores: name -> score of each weight (any real dtype); higher means keep.
        counts: name -> how many weights stay active.

    Raises:
        MaskError: scores that are NaN, or names that differ.
        DensityError: a count outside [0, numel].
    """
    if scores.keys() != counts.keys():
        raise MaskError(f"scores for {list(scores)} but counts for {list(counts)}")
    patterns = {}
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise MaskError(f"scores of {name!r} hold NaN: no order can be made of them")
        keep = counts[name]
        if not 0 <= keep <= score.numel():
            raise DensityError(f"{name!r} has {score.numel()} weights; cannot keep {keep}")
        kept = largest(score_array(score), keep)
        patterns[name] = torch.from_numpy(kept).reshape(score.shape)
    return Mask(patterns)
