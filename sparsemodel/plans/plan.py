"""A training step of a whole network in one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsemodel.errors import PlanError, SparseModelError
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.cpu.plan_abi import Images, NativePlan, Sgd
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.layers.growth import counted_layers
from sparsemodel.layers.linear_and_conv import SparseLayer, SparseLinear
from sparsemodel.masks.adjust import Entries
from sparsemodel.optim import SparseSGD
from sparsemodel.plans.arrays import BoundLayer, BoundModule, BoundNorm
from sparsemodel.plans.growth import Growth
from sparsemodel.plans.rules import Operation, conv_geometry
from sparsemodel.plans.trace import trace_operations

Tensor = torch.Tensor

_NATIVE_NAMES = {"max_pool": "maxpool", "avg_pool": "avgpool", "global_pool": "global_avgpool"}


@dataclass(frozen=True)
class OperationSeconds:
    """What one operation took in the last run."""

    name: str
    kind: str
    forward: float
    backward: float


class TrainingPlan:
    """Forward pass, loss and backward pass of a sparsified model as one native call.

    The model stays the owner of parameters, gradients and running statistics: `step` fills
    `.grad` of its parameters (overwriting what is there), any optimiser moves them, and it can be
    trained, saved and evaluated through its modules in between. Results equal the modules' up to
    rounding, and are the same bits for every number of threads (torch.get_num_threads()).
    Activations live in one arena, made by the first run and used by all later ones.

    Known are sparse and plain convolutions and linear layers, batch norm, ReLU, addition, max,
    average and global average pooling, flattening, and their functional forms, in a model that
    torch.fx can trace. Plain layers are computed with sparse kernels as full patterns: meant for
    stems and classifiers, slow for whole networks. The loss is the mean softmax cross-entropy.

    After `change_mask`, or when parameters move, the next call follows by itself. Freezing or
    thawing a parameter needs a new plan.

    Args:
        model: of sparse and plain layers, float32 on the CPU; its training flag plays no part.
        input_shape: of one sample, (C, H, W) or (features,).
        batch_size: the largest batch; smaller ones may be given to every call.
        recompute: whether convolution outputs that only batch norm reads are computed again in
            the backward pass instead of kept: about half the memory, for some more time.
        activation_dtype: float32, or bfloat16: results of batch norm, ReLU, addition and pooling
            are kept for the backward pass in half the bytes. Loss and statistics stay the same
            bits; gradients are those of activations rounded to 8 bits.
        normalization: mean and standard deviation of each channel, for pixels in [0, 1]; needed
            to give images in bytes.

    Raises:
        PlanError: the model has an operation that plans do not know, which the message names.
        SparseModelError: the native library is not in use.

    >>> from sparsemodel.kernels.cpu import native
    >>> from sparsemodel.masks.mask import Mask
    >>> from sparsemodel.layers.sparsify import sparsify
    >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = sparsify(dense, Mask({"2.weight": torch.eye(2, 8).bool()}))
    >>> if native.loaded():
    ...     plan = TrainingPlan(model, (4,), batch_size=16)
    ...     loss, num_correct = plan.step(torch.zeros(3, 4), torch.tensor([0, 1, 1]))
    ...     assert model[2].values.grad.shape == (2,)
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        *,
        batch_size: int,
        recompute: bool = False,
        activation_dtype: torch.dtype = torch.float32,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self._model = model
        self._input_shape = tuple(input_shape)
        self._batch_size = batch_size
        self._operations = trace_operations(model, self._input_shape)
        self._classes = self._operations[-1].shape[0]
        self._pixels = _pixel_factors(self._input_shape, normalization)
        if activation_dtype not in {torch.float32, torch.bfloat16}:
            raise SparseModelError(
                f"activation_dtype is torch.float32 or torch.bfloat16, got {activation_dtype}"
            )
        self._plan = NativePlan(
            batch_size, recompute=recompute, bfloat16=activation_dtype == torch.bfloat16
        )
        self._bound: list[BoundModule] = []
        self._nodes: dict[nn.Module, int] = {}  # of sparse layers
        for number, operation in enumerate(self._operations):
            added = self._add(operation)
            assert added == number, "each operation is one node"
        self._refuse_ties()
        self._refresh()
        self._plan.build(len(self._operations) - 1)

    @property
    def batch_size(self) -> int:
        """The largest batch."""
        return self._batch_size

    @property
    def arena_bytes(self) -> int:
        """Bytes of all activations and their gradients for a full batch."""
        return self._plan.arena_bytes()

    def step(
        self, images: Tensor, labels: Tensor, *, optimizer: SparseSGD | None = None
    ) -> tuple[float, int]:
        """Loss and gradients of a batch, in training mode; and the update, if asked.

        Every parameter's `.grad` is overwritten, running statistics move as in training.

        Args:
            images: [B, *input_shape], float32 (or uint8, with `normalization`), on the CPU.
            labels: [B], int64 in [0, classes).
            optimizer: its step is taken in the same native call; it has one parameter group, of
                exactly the parameters that the plan trains. None: step any optimiser yourself.

        Returns:
            Mean cross-entropy, and how many largest logits are at the label.

        Raises:
            SparseModelError: images or labels of another shape, dtype or range; nothing has
                changed then.
        """
        images, labels = self._checked_batch(images, labels)
        sgd = None if optimizer is None else self._sgd(optimizer)
        for bound in self._bound:
            bound.refresh(optimizer)
        result = self._plan.train(
            len(images),
            self._native(images),
            labels.data_ptr(),
            sgd=sgd,
            threads=torch.get_num_threads(),
        )
        for bound in self._bound:
            bound.hand_over()
        # Autograd cannot see writes through an address.
        torch.autograd.graph.increment_version(
            [t for bound in self._bound for t in bound.written(parameters=sgd is not None)]
        )
        return result

    def topk_pruned_gradients(
        self, counts: Mapping[str, int], images: Tensor, labels: Tensor
    ) -> dict[str, Entries]:
        """The largest gradients, by magnitude, at pruned weights, of a batch in training mode.

        As `grow.topk_pruned_gradients` of the mean cross-entropy, without its memory: what is
        added to the plan's is a tile of gradient for each thread and O(K). The backward pass ends
        with the earliest layer asked for. Parameters, gradients, momentum and running statistics
        stay as they are.

        Args:
            counts: weight name of a sparse layer (`sparsify.sparse_layers`) -> how many to keep.
            images, labels: as in `step`.

        Returns:
            Name -> (flat indices, int64, ascending; gradients, float32), at most counts[name] of
            each: fewer where fewer weights are pruned, none where the plan has no such layer. Of
            equal magnitudes the lower index is kept.

        Raises:
            MaskError: names that do not fit, a negative count, a gradient that is NaN.
            SparseModelError: images or labels of another shape, dtype or range.
        """
        images, labels = self._checked_batch(images, labels)
        growth = Growth(counted_layers(self._model, counts), self._nodes, counts)
        self._refresh()
        return growth.take(self._plan, self._native(images), labels)

    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Mean loss and number correct by running statistics, of any number of samples.

        Args:
            images: [N, *input_shape]; more than a batch go through in pieces.
            labels: [N], int64.
        """
        images, labels = self._checked(images), _checked_labels(labels, len(images))
        self._refresh()
        total, correct = 0.0, 0
        pieces = zip(images.split(self._batch_size), labels.split(self._batch_size), strict=True)
        for some, their_labels in pieces:
            loss, right = self._plan.infer(
                len(some),
                self._native(some),
                labels=their_labels.data_ptr(),
                threads=torch.get_num_threads(),
            )
            total += loss * len(some)
            correct += right
        return total / len(images), correct

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] by running statistics, of any number of samples [N, ...]."""
        images = self._checked(images)
        self._refresh()
        logits = torch.empty(len(images), self._classes)
        pieces = zip(images.split(self._batch_size), logits.split(self._batch_size), strict=True)
        for some, result in pieces:
            self._plan.infer(
                len(some),
                self._native(some),
                logits=result.data_ptr(),
                threads=torch.get_num_threads(),
            )
        return logits

    def seconds(self) -> list[OperationSeconds]:
        """Time of each operation in the last run; the loss counts with the last one."""
        forward, backward = self._plan.seconds()
        return [
            OperationSeconds(operation.name, operation.kind, float(f), float(b))
            for operation, f, b in zip(self._operations, forward, backward, strict=True)
        ]

    def _add(self, operation: Operation) -> int:
        """Add the node of an operation to the native plan; its number."""
        if operation.kind == "conv":
            return self._add_layer(operation)
        if operation.kind == "norm":
            return self._add_norm(operation)
        if operation.kind == "input":
            return self._plan.add("input", *_planes(operation.shape))
        name = _NATIVE_NAMES.get(operation.kind, operation.kind)
        arguments: list[object] = list(operation.inputs)
        if operation.window is not None:
            arguments.append(operation.window)
        if operation.kind == "avg_pool":
            arguments.append(operation.include_pad)
        return self._plan.add(name, *arguments)

    def _add_layer(self, operation: Operation) -> int:
        module, (source,) = operation.module, operation.inputs
        assert module is not None, "a layer is a module"
        geometry = _geometry(operation)
        size = _planes(self._operations[source].shape)[1:]
        sizes = native.conv_sizes(self._batch_size, size, geometry.output_size(*size), geometry)
        node = self._plan.add("conv", source, sizes)
        self._bound.append(BoundLayer(self._plan, node, module, operation.name, geometry))
        if isinstance(module, SparseLayer):
            self._nodes[module] = node
        return node

    def _add_norm(self, operation: Operation) -> int:
        module = operation.module
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        source, residual = (*operation.inputs, -1)[:2]
        momentum = -1.0 if module.momentum is None else module.momentum
        node = self._plan.add("batchnorm", source, residual, operation.relu, module.eps, momentum)
        self._bound.append(BoundNorm(self._plan, node, module, operation.name))
        return node

    def _refuse_ties(self) -> None:
        seen: dict[int, str] = {}
        for bound in self._bound:
            for parameter, _ in bound.parameters():
                if id(parameter) in seen:
                    raise PlanError(
                        f"{bound.title!r} and {seen[id(parameter)]!r} share a parameter, so that "
                        "its gradients would add up; train the model through its modules"
                    )
                seen[id(parameter)] = bound.title

    def _sgd(self, optimizer: SparseSGD) -> Sgd:
        """The numbers of an optimiser that trains what the plan trains."""
        if not isinstance(optimizer, SparseSGD) or len(optimizer.param_groups) != 1:
            raise SparseModelError(
                "expected a SparseSGD with one parameter group; call step() of others yourself"
            )
        group = optimizer.param_groups[0]
        theirs = {id(p) for p in group["params"] if p.requires_grad}
        own = {id(p) for b in self._bound for p, _ in b.parameters() if p.requires_grad}
        if theirs != own:
            raise SparseModelError(
                f"the optimiser has {len(theirs)} parameters, the plan trains {len(own)}, and "
                "they are not the same; call the optimiser's step() yourself"
            )
        return Sgd(float(group["lr"]), group["momentum"], group["weight_decay"])

    def _refresh(self) -> None:
        for bound in self._bound:
            bound.refresh()

    def _checked_batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self._checked(images), _checked_labels(labels, len(images))
        if len(images) > self._batch_size:
            raise SparseModelError(
                f"the plan is for batches of at most {self._batch_size}, got {len(images)}"
            )
        return images, labels

    def _checked(self, images: Tensor) -> Tensor:
        allowed = (torch.float32,) if self._pixels is None else (torch.float32, torch.uint8)
        shape = tuple(images.shape)
        if shape[1:] != self._input_shape or len(shape) < 2 or shape[0] < 1:
            raise SparseModelError(f"expected images [B, *{self._input_shape}], got {shape}")
        if images.dtype not in allowed or images.device.type != "cpu":
            names = " or ".join(str(dtype) for dtype in allowed)
            raise SparseModelError(
                f"expected images of {names} on the CPU, got {images.dtype} on {images.device} "
                "(bytes need normalization=(mean, std))"
            )
        return images.contiguous()

    def _native(self, images: Tensor) -> Images:
        if images.dtype == torch.float32:
            return Images.floats(images.data_ptr())
        assert self._pixels is not None, "bytes are refused without"
        scale, shift = self._pixels
        return Images.bytes(images.data_ptr(), scale.data_ptr(), shift.data_ptr())


def _checked_labels(labels: Tensor, count: int) -> Tensor:
    if labels.shape != (count,) or labels.dtype != torch.int64 or labels.device.type != "cpu":
        raise SparseModelError(
            f"expected labels int64 [{count}] on the CPU, got {labels.dtype} of shape "
            f"{tuple(labels.shape)} on {labels.device}"
        )
    return labels.contiguous()


def _pixel_factors(
    shape: tuple[int, ...], normalization: tuple[Sequence[float], Sequence[float]] | None
) -> tuple[Tensor, Tensor] | None:
    """scale and shift with (byte / 255 - mean) / std = scale * byte + shift."""
    if normalization is None:
        return None
    mean, std = (torch.tensor(list(numbers), dtype=torch.float64) for numbers in normalization)
    if mean.shape != (shape[0],) or std.shape != mean.shape or not bool((std > 0).all()):
        raise SparseModelError(
            f"normalization: expected mean and positive std of {shape[0]} channels, got "
            f"{normalization}"
        )
    return (1 / (255 * std)).float(), (-mean / std).float()


def _planes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, *size = shape
    return (channels, size[0], size[1]) if size else (channels, 1, 1)


def _geometry(operation: Operation) -> ConvGeometry:
    module = operation.module
    if isinstance(module, SparseLinear | nn.Linear):
        return ConvGeometry(module.out_features, module.in_features, 1, 1)
    assert module is not None
    return conv_geometry(module, operation.name)  # type: ignore[arg-type]
