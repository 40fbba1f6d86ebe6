"""Training, growth, evaluation and statistics of a sparse model with numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.cpu.plan_abi import Sgd
from sparsemodel.runtime.arrays import Array, NamedArrays
from sparsemodel.runtime.bound import (
    BoundProgram,
    LayerArrays,
    Normalization,
    OperationSeconds,
    ParameterArrays,
    layer_geometry,
)
from sparsemodel.runtime.pattern import Patterns, Shape
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import LayerEntries, SparseState
from sparsemodel.runtime.structures import (
    Structure,
    check_pattern,
    native_library,
    shared_structures,
)

Values = Mapping[str, Array]
Correction = Callable[[Values, Values], None]


class Trainer:
    """A sparse model that is trained by its program: arrays and native code, no torch.

    Layers that the state's patterns do not name keep every weight. Gradients, momentum and the
    index by input are made when a step first needs them, activations by the first run, in one
    arena that all kinds of runs share. Results are the same bits for every number of threads,
    and those of `TrainingPlan`.

    Args:
        program: the network.
        state: its parameters and statistics, which are copied.
        batch_size: the largest batch of a step; evaluation and statistics go in batches of it.
        recompute: whether convolution outputs that only batch norm reads are computed again in
            the backward pass instead of kept: about half the memory, for some more time.
        bfloat16: whether what batch norm, ReLU, addition and pooling give is kept for the backward
            pass in half the bytes; gradients are those of activations rounded to 8 bits.
        threads: how many to use.
        normalization: mean and standard deviation of each channel, for pixels in [0, 1]; needed
            to give images in bytes.

    Raises:
        MaskError: a pattern that does not fit the program, or is damaged.
        SparseModelError: a state that does not fit it, a number outside its range, or the native
            library is not in use.
    """

    def __init__(
        self,
        program: Program,
        state: SparseState,
        *,
        batch_size: int,
        recompute: bool = False,
        bfloat16: bool = False,
        threads: int = 1,
        normalization: Normalization | None = None,
    ) -> None:
        if threads < 1:
            raise SparseModelError(f"expected threads >= 1, got {threads}")
        self._program = program
        self._threads = threads
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "recompute": recompute,
            "bfloat16": bfloat16,
            "normalization": normalization,
        }
        self._trained = [name for node in program.nodes for name in node.parameters()]
        self._batches = {
            number: np.zeros(1, np.int64)
            for number, node in enumerate(program.nodes)
            if node.kind == "norm" and node.momentum is None
        }
        self._patterns: Patterns | None = None
        self._structures: dict[int, Structure] = {}
        self._values = self._gradients = self._momentum = NamedArrays({})
        self._indexed = False
        self._bound: BoundProgram | None = None  # to the arrays above; None until a run needs it
        self._stale = False  # bound to arrays of patterns before
        BoundProgram(program, **self._options)  # refuses now what a run would refuse
        self.load(state)

    @property
    def program(self) -> Program:
        """The network."""
        return self._program

    def load(self, state: SparseState) -> None:
        """Take over the values of a state; momentum is kept if the patterns are the same.

        Raises:
            MaskError: a pattern that does not fit the program, or is damaged.
            SparseModelError: names, shapes or dtypes that are not the program's; nothing has
                changed then.
        """
        patterns = state.patterns
        if patterns is not self._patterns and patterns is not None:
            _check_patterns(self._program, patterns)
        shapes = _stored_shapes(self._program, patterns)
        _check_values(state.values, shapes)
        if not self._values or patterns != self._patterns:
            self._structures = _structures(self._program, patterns)
            self._patterns = patterns
            self._values = NamedArrays(shapes)
            if self._gradients:  # which parameters have them is settled when a plan is built
                self._bound = None
            self._gradients = self._momentum = NamedArrays({})
            self._indexed, self._stale = False, True
        for name, array in self._values.items():
            array[...] = state.values[name]

    def state(self) -> SparseState:
        """A copy of the current values, under their patterns."""
        return SparseState({n: a.copy() for n, a in self._values.items()}, self._patterns)

    def reset_momentum(self) -> None:
        """Forget the steps taken so far, as a new optimiser would."""
        self._momentum.clear()

    def momentum(self) -> dict[str, Array]:
        """A copy of what steps with momentum have gathered; empty before the first."""
        return {name: array.copy() for name, array in self._momentum.items()}

    def load_momentum(self, momentum: Values) -> None:
        """Go on as after the steps that gathered it.

        Raises:
            SparseModelError: names, shapes or dtypes that are not the trained parameters'.
        """
        _check_values(momentum, {name: self._values[name].shape for name in self._trained})
        self._plan(training=True, momentum=True)
        for name, array in self._momentum.items():
            array[...] = momentum[name]

    def step(
        self,
        images: Array,
        labels: NDArray[np.int64],
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        correct_gradients: Correction | None = None,
    ) -> tuple[float, int]:
        """One step of stochastic gradient descent on the mean cross-entropy of a batch.

        Args:
            images: [B, *input_shape], float32, or uint8 with `normalization`; B up to the batch
                size.
            labels: int64 [B], in [0, classes).
            lr, weight_decay: >= 0.
            momentum: in [0, 1); 0 keeps none.
            correct_gradients: called between gradients and update with name -> values and
                name -> gradients of all parameters; it may change the gradients in place.

        Returns:
            Mean loss before the update, and how many largest logits are at the label.

        Raises:
            SparseModelError: images, labels or numbers of another shape, dtype or range; nothing
                has changed then.
        """
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise SparseModelError(
                "expected lr >= 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got {lr}, {momentum} and {weight_decay}"
            )
        sgd = Sgd(lr, momentum, weight_decay)
        plan = self._plan(training=True, momentum=momentum > 0)
        if correct_gradients is None:
            return plan.train(images, labels, sgd=sgd, threads=self._threads)
        result = plan.train(images, labels, threads=self._threads)
        values = {name: self._values[name] for name in self._trained}
        correct_gradients(values, dict(self._gradients.items()))
        self._update(sgd)
        return result

    def growth(
        self, counts: Mapping[str, int], images: Array, labels: NDArray[np.int64]
    ) -> dict[str, LayerEntries]:
        """The largest gradients, by magnitude, at pruned weights, of a batch in training mode.

        Args:
            counts: name of a layer under a pattern -> how many to keep, >= 0.
            images, labels: as in `step`.

        Returns:
            Name -> (flat indices into the dense weight, int64, ascending; gradients, float32), at
            most counts[name] of each: fewer where fewer weights are pruned, none where the network
            does not use the layer. Of equal magnitudes the lower index is kept.

        Raises:
            MaskError: a name without a pattern, a negative count, a gradient that is NaN.
            SparseModelError: images or labels of another shape, dtype or range.
        """
        for name, count in counts.items():
            if self._patterns is None or name not in self._patterns:
                known = [] if self._patterns is None else list(self._patterns)
                raise MaskError(f"no layer {name!r} under a pattern; those are {known}")
            if count < 0:
                raise MaskError(f"{name!r}: expected a count >= 0, got {count}")
        plan = self._plan(index=True)
        return plan.growth(counts, images, labels, threads=self._threads)

    def evaluate(self, images: Array, labels: NDArray[np.int64]) -> tuple[float, int]:
        """Summed cross-entropy and number correct by running statistics, of N >= 1 samples."""
        return self._plan().evaluate(images, labels, threads=self._threads)

    def forward(self, images: Array) -> NDArray[np.float32]:
        """Logits [N, classes] by running statistics, of N >= 1 samples."""
        return self._plan().forward(images, threads=self._threads)

    def batch_norm_statistics(self, images: Array) -> dict[str, NDArray[np.float32]]:
        """What the running statistics of each batch norm stand for, exactly, over all images.

        In training mode, in batches of the batch size (the last may be smaller), each normalised by
        its own statistics; per-batch mean and variance are pooled in float64. Values stay as they
        are.

        Args:
            images: [N, *input_shape], N >= 1.

        Returns:
            Names of running means and variances -> float32 [channels]: mean and population
            variance of the norm's input over all samples and positions.

        Raises:
            SparseModelError: wrong images, or a batch in which a norm has one value a channel and
                so no variance.
        """
        return self._plan().statistics(images, threads=self._threads)

    def arena_bytes(self) -> int:
        """Bytes that the arena of a full training batch takes, known before it is made.

        Gradients and the index by input are made, as for a step.
        """
        return self._plan(training=True).arena_bytes()

    def held_bytes(self) -> dict[str, int]:
        """Bytes held now, by what they are for; the library's scratch memory is not among them."""
        own = self._structures.values()
        return {
            "values": self._values.nbytes(),
            "gradients": self._gradients.nbytes(),
            "momentum": self._momentum.nbytes(),
            "patterns": sum(structure.pattern.nbytes() for structure in own),
            "index": sum(structure.index_bytes() for structure in own),
            "arena": 0 if self._bound is None else self._bound.allocated_bytes(),
        }

    def release(self) -> None:
        """Free all that the next step would make again: gradients, arena, scratch memory."""
        self._gradients = NamedArrays({})
        self._bound = None
        native_library().release_scratch()

    def seconds(self) -> list[OperationSeconds]:
        """Time of each operation in the last run; the loss counts with the last one."""
        return self._plan().seconds()

    def _plan(
        self, *, index: bool = False, training: bool = False, momentum: bool = False
    ) -> BoundProgram:
        """The native plan, bound to what a run needs."""
        stale, self._stale = self._stale, False
        if training and not self._gradients:
            # Which parameters have gradients is settled when a plan is built.
            self._gradients = self._parameters_alike()
            stale, self._bound = True, None
        if momentum and not self._momentum:
            self._momentum = self._parameters_alike()
            stale = True
        if (index or training) and not self._indexed:
            self._indexed = stale = True
        if self._bound is None:
            plan = BoundProgram(self._program, **self._options)
            self._bind(plan)
            plan.build()
            self._bound = plan
        elif stale:
            self._bind(self._bound)
        return self._bound

    def _parameters_alike(self) -> NamedArrays:
        return NamedArrays({name: self._values[name].shape for name in self._trained})

    def _bind(self, plan: BoundProgram) -> None:
        for number, node in enumerate(self._program.nodes):
            if node.kind == "conv":
                own = self._structures[number]
                weight = self._parameter(node.weight)
                assert weight is not None, "a layer has a weight"
                plan.bind_layer(
                    number,
                    LayerArrays(
                        own.pattern.row_ptr, own.pattern.cols,
                        own.index() if self._indexed else None, weight,
                        self._parameter(node.bias),
                    ),
                )  # fmt: skip
            elif node.kind == "norm":
                statistics = (
                    self._values.get(node.mean),
                    self._values.get(node.variance),
                    self._batches.get(number),
                )
                weight, bias = self._parameter(node.weight), self._parameter(node.bias)
                plan.bind_norm(number, weight, bias, statistics)

    def _parameter(self, name: str | None) -> ParameterArrays | None:
        if name is None:
            return None
        return ParameterArrays(
            self._values[name], self._gradients.get(name), self._momentum.get(name)
        )

    def _update(self, sgd: Sgd) -> None:
        """The optimiser's step from the gradients as they are."""
        library = native_library()
        for name in self._trained:
            values = self._values[name]
            library.sgd_step(
                values.size, values, self._gradients[name],
                self._momentum.get(name) if sgd.momentum else None, sgd.lr, sgd.momentum,
                sgd.weight_decay, self._threads,
            )  # fmt: skip


def _check_patterns(program: Program, patterns: Patterns) -> None:
    shapes, layers = program.shapes(), program.layers()
    others = {name for node in program.nodes for name in node.tensors()} - layers.keys()
    for name, pattern in patterns.items():
        if name in others or shapes.get(name) != pattern.shape:
            raise MaskError(
                f"the pattern of {name!r} has shape {pattern.shape}; the program has no layer "
                f"whose weight is so called and of this shape (its layers are {list(layers)})"
            )
        check_pattern(name, pattern)


def _stored_shapes(program: Program, patterns: Patterns | None) -> dict[str, Shape]:
    """Name -> shape of the array that a state under some patterns holds."""
    shapes = program.shapes()
    if patterns is not None:
        shapes |= {name: (count,) for name, count in patterns.counts().items()}
    return shapes


def _check_values(values: Mapping[str, Array], shapes: Mapping[str, Shape]) -> None:
    if values.keys() != shapes.keys():
        missing, odd = (
            sorted(a.keys() - b.keys()) for a, b in ((shapes, values), (values, shapes))
        )
        raise SparseModelError(f"the state lacks {missing} and has {odd} besides the program's")
    for name, shape in shapes.items():
        array = values[name]
        if array.shape != shape or array.dtype != np.float32:
            raise SparseModelError(
                f"{name!r}: expected float32 of shape {shape}, got {array.dtype} of {array.shape}"
            )


def _structures(program: Program, patterns: Patterns | None) -> dict[int, Structure]:
    """The structure of each layer by the number of its node."""
    found = {}
    for name, number in program.layers().items():
        geometry = layer_geometry(program, number, 1)
        if patterns is not None and name in patterns:
            found[number] = shared_structures.masked(patterns, name, geometry)
        else:
            found[number] = shared_structures.full(program.shapes()[name], geometry)
    return found
