"""A training step of a whole network in one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from sparsemodel.errors import PlanError, SparseModelError
from sparsemodel.kernels.cpu.plan_abi import Sgd
from sparsemodel.layers.growth import counted_layers
from sparsemodel.layers.tracing import Watch
from sparsemodel.masks.adjust import TensorEntries
from sparsemodel.optim import SparseSGD
from sparsemodel.plans.arrays import BoundLayer, BoundModule, BoundNorm
from sparsemodel.plans.program import traced_program
from sparsemodel.plans.trace import trace_operations
from sparsemodel.runtime.bound import BoundProgram, OperationSeconds

Tensor = torch.Tensor


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

    After `change_mask`, or when parameters move, the next call follows by itself. A model that
    gets hooks, other parts, settings or modes, or of which a parameter is frozen or thawed, needs
    a new plan: the next call says so.

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
        if activation_dtype not in {torch.float32, torch.bfloat16}:
            raise SparseModelError(
                f"activation_dtype is torch.float32 or torch.bfloat16, got {activation_dtype}"
            )
        operations = trace_operations(model, tuple(input_shape))
        self._watch = Watch(model, model.modules())
        self._plan = BoundProgram(
            traced_program(model, operations),
            batch_size=batch_size,
            recompute=recompute,
            bfloat16=activation_dtype == torch.bfloat16,
            normalization=normalization,
        )
        kinds: dict[str, type[BoundModule]] = {"conv": BoundLayer, "norm": BoundNorm}
        self._bound = [
            kinds[operation.kind](self._plan, number, operation.module, operation.name)
            for number, operation in enumerate(operations)
            if operation.kind in kinds and operation.module is not None
        ]
        self._is_untied = False
        self._refresh()
        self._plan.build()

    @property
    def batch_size(self) -> int:
        """The largest batch."""
        return self._plan.batch_size

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
        arrays = _array(images, "images"), _array(labels, "labels")
        sgd = None if optimizer is None else self._sgd(optimizer)
        self._refuse_mixed_modes()
        self._refresh(optimizer)
        result = self._plan.train(*arrays, sgd=sgd, threads=torch.get_num_threads())
        for bound in self._bound:
            bound.hand_over()
        # Autograd cannot see writes through an address.
        torch.autograd.graph.increment_version(
            [t for bound in self._bound for t in bound.written(parameters=sgd is not None)]
        )
        return result

    def topk_pruned_gradients(
        self, counts: Mapping[str, int], images: Tensor, labels: Tensor
    ) -> dict[str, TensorEntries]:
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
        arrays = _array(images, "images"), _array(labels, "labels")
        counted_layers(self._model, counts)  # refuses names and counts that do not fit
        self._refuse_mixed_modes()
        self._refresh()
        found = self._plan.growth(counts, *arrays, threads=torch.get_num_threads())
        return {
            name: (torch.from_numpy(indices), torch.from_numpy(top))
            for name, (indices, top) in found.items()
        }

    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Mean loss and number correct by running statistics, of any number of samples.

        Args:
            images: [N, *input_shape]; more than a batch go through in pieces.
            labels: [N], int64.
        """
        arrays = _array(images, "images"), _array(labels, "labels")
        self._refresh()
        total, correct = self._plan.evaluate(*arrays, threads=torch.get_num_threads())
        return total / len(images), correct

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] by running statistics, of any number of samples [N, ...]."""
        array = _array(images, "images")
        self._refresh()
        return torch.from_numpy(self._plan.forward(array, threads=torch.get_num_threads()))

    def batch_norm_statistics(self, images: Tensor) -> dict[str, Tensor]:
        """What the running statistics of each batch norm stand for, exactly, over all images.

        As `runtime.trainer.Trainer.batch_norm_statistics`: in training mode, of any number of
        samples [N, ...]; the model stays as it is.

        Returns:
            Names of running means and variances -> [channels].
        """
        array = _array(images, "images")
        self._refuse_mixed_modes()
        self._refresh()
        found = self._plan.statistics(array, threads=torch.get_num_threads())
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def seconds(self) -> list[OperationSeconds]:
        """Time of each operation in the last run; the loss counts with the last one."""
        return self._plan.seconds()

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

    def _refresh(self, optimizer: SparseSGD | None = None) -> None:
        """Follow what has moved; refuse what the plan was not made for.

        Raises:
            PlanError: hooks, modules or settings are others now.
        """
        if change := self._watch.change():
            raise PlanError(f"{change} after the plan was made; make a new one")
        moved = [bound.refresh(optimizer) for bound in self._bound]
        if any(moved) or not self._is_untied:
            self._is_untied = False
            self._refuse_ties()
            self._is_untied = True

    def _refuse_mixed_modes(self) -> None:
        for bound in self._bound:
            bound.check_mode(self._model.training)


def _array(tensor: Tensor, what: str) -> NDArray[Any]:
    """A tensor's memory as an array, which the runs check."""
    try:
        return tensor.detach().numpy()
    except (TypeError, RuntimeError) as error:  # another device, or a dtype that numpy lacks
        raise SparseModelError(
            f"expected {what} in memory of the CPU, got {tensor.dtype} on {tensor.device}"
        ) from error
