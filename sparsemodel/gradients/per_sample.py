"""Norms and dot products of per-sample gradients, all from one backward pass of the summed loss.

No gradient of a parameter is stored for a sample: layers are watched as they are called, and what
comes in together with the gradient of what goes out tells their parameters' gradients apart by
sample ("ghost" norms).
Source: Goodfellow, Efficient Per-Example Gradient Computations (2015); Li et al., Large Language
Models Can Be Strong Differentially Private Learners (ICLR 2022), section 4; Bu et al., Scalable
and Efficient Training of Large Convolutional Neural Networks with DP (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from sparsemodel.errors import SparseModelError
from sparsemodel.gradients.layer_gradients import Call, mixing_layer, obstacle, recompute, rule_of
from sparsemodel.gradients.sample_gradients import SampleGradient, square_norms
from sparsemodel.masks.probe import differentiable

Tensor = torch.Tensor
Losses = Callable[[nn.Module], Tensor]
"""Takes the model and returns the loss of each sample, [num_samples]."""

_CURE = "leave it out by naming the others: parameters=[...]"
# Their inputs say which dimension is the batch; elsewhere a position may be taken for it.
_BATCH_IS_KNOWN = (nn.Conv2d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def gradient_norms(
    model: nn.Module,
    losses: Losses,
    *,
    num_samples: int,
    parameters: Iterable[str] | None = None,
) -> Tensor:
    """‖∇θ ℓ_i‖₂ of each sample i, over all chosen parameters θ.

    Exact: a parameter used several times (a layer called twice, tied weights) counts with its
    cross terms. Linear, Conv2d, Embedding, LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval
    mode, the sparse layers (their active values alone) and transformers' Conv1D have rules of
    their own; any other layer without layers inside is differentiated anew by torch.func.vmap, a
    few samples at a time. Memory beyond the backward pass does not grow with parameters × batch.
    The model is left as it was.

    Args:
        model: in eval mode as far as it has batch norm.
        losses: the loss of each sample, which must not depend on other samples.
        num_samples: the batch, the first dimension of what layers take and return; where a layer
            returns 1 (embedded positions) that is taken for every sample.
        parameters: their names; None: all that require a gradient.

    Returns:
        float64 [num_samples], on the model's device.

    Raises:
        MaskError: no parameter, or an unknown name.
        SparseModelError: a layer that mixes samples, or whose parameters' gradients cannot be
            told apart by sample; a loss of another shape.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> gradient_norms(layer, lambda m: m(x).squeeze(1), num_samples=2)
    tensor([5., 1.], dtype=torch.float64)
    """
    return _run(model, losses, num_samples, parameters, None).sqrt()


def gradient_dots(
    model: nn.Module,
    losses: Losses,
    direction: Mapping[str, Tensor],
    *,
    num_samples: int,
) -> Tensor:
    """⟨∇θ ℓ_i, direction⟩ of each sample i, at about the cost of a forward pass more.

    Args:
        direction: parameter name -> tensor of its shape (of a sparse layer: its values').
        model, losses, num_samples: as in `gradient_norms`.

    Returns:
        float64 [num_samples], on the model's device.

    Raises:
        MaskError, SparseModelError: as in `gradient_norms`, or a direction of another shape.
    """
    return _run(model, losses, num_samples, direction, direction)


def _run(
    model: nn.Module,
    losses: Losses,
    num_samples: int,
    names: Iterable[str] | None,
    direction: Mapping[str, Tensor] | None,
) -> Tensor:
    mixing = mixing_layer(model)
    if mixing is not None:
        raise SparseModelError(f"layer {mixing[0]!r}: {mixing[1]}")
    if names is None:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
    with differentiable(model, names) as selected, ExitStack() as hooks:
        watch = _Watch(model, selected, num_samples, direction)
        for layer in watch.layers:
            hooks.callback(layer.register_forward_pre_hook(watch.before).remove)
            hook = layer.register_forward_hook(watch.after, with_kwargs=True)
            hooks.callback(hook.remove)
        return watch.total(losses(model))


class _Watch:
    """Records the calls of layers in a forward pass; adds up results in the backward pass."""

    def __init__(
        self,
        model: nn.Module,
        selected: Mapping[str, nn.Parameter],
        num_samples: int,
        direction: Mapping[str, Tensor] | None,
    ) -> None:
        self.num_samples, self.selected = num_samples, selected
        self.names = {id(p): name for name, p in selected.items()}
        self.layers: dict[nn.Module, tuple[str, dict[str, str]]] = {}
        for path, layer in model.named_modules():
            own = {local: self.names.get(id(p)) for local, p in layer._parameters.items()}
            chosen = {local: name for local, name in own.items() if name is not None}
            if chosen:
                self.layers[layer] = path, chosen
                why = obstacle(layer, set(chosen))
                if why is not None:
                    raise SparseModelError(f"layer {path!r}: {why}; {_CURE}")
        self.direction = None if direction is None else self._checked(direction)
        self.starts: list[Tensor] = []
        self.doubtful: list[tuple[str, Tensor]] = []
        self.pending = dict.fromkeys(selected, 0)
        self.uses: dict[str, list[SampleGradient]] = {name: [] for name in selected}
        self.result: Tensor | None = None
        self.in_backward = self.computing = False

    def before(self, layer: nn.Module, _: Any) -> None:
        """Inside its layer a parameter is a constant; a use elsewhere will be found by autograd."""
        if self.computing:  # a rule calls its layer
            return
        for name in self.layers[layer][1].values():
            self.selected[name].requires_grad_(False)

    def after(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Record a call; the output is returned in a form whose gradient will be seen."""
        path, chosen = self.layers[layer]
        if self.computing:
            return output
        for name in chosen.values():
            self.selected[name].requires_grad_(True)
        call = self._recorded(path, args, kwargs, output)
        version = call.input._version
        for name in chosen.values():
            self.pending[name] += 1

        def arrived(gradient: Tensor) -> None:
            if not self.in_backward:  # only a check
                return
            if call.input._version != version:
                raise SparseModelError(
                    f"layer {path!r}: its input was changed in place after the call; {_CURE}"
                )
            call.gradient = gradient
            self._add(layer, call, chosen)
            call.args, call.kwargs = (), {}  # the graph holds this closure until it is freed
            call.output = call.gradient = gradient.new_empty(0)

        call.output.register_hook(arrived)
        if self.num_samples > 1 and not isinstance(layer, _BATCH_IS_KNOWN):
            flat = isinstance(layer, nn.Embedding) and call.input.dim() == 1
            if flat or (call.output.dim() > 2 and call.output.shape[1] == self.num_samples):
                self.doubtful.append((path, call.output))
        return call.output

    def total(self, losses: Tensor) -> Tensor:
        """The sum over parameters of squared norms or dot products, float64 [num_samples]."""
        if losses.shape != (self.num_samples,):
            raise SparseModelError(
                f"expected the loss of each of {self.num_samples} samples, not averaged; got "
                f"shape {tuple(losses.shape)}"
            )
        if not losses.requires_grad:
            raise SparseModelError(
                f"the loss does not depend on any of {list(self.selected)[:5]}; compute it "
                "without no_grad or detach on the way"
            )
        self._check_uses(losses)
        self._check_samples(losses)
        self.in_backward = True
        torch.autograd.grad(losses.sum(), self.starts, allow_unused=True)
        for name in self.uses:  # those with a call that the loss does not depend on
            self._finish(name)
        assert self.result is not None
        return self.result

    def _recorded(self, path: str, args: Any, kwargs: Any, output: Any) -> Call:
        if self.in_backward:
            raise SparseModelError(
                f"layer {path!r} is called again in the backward pass: switch off activation "
                "checkpointing"
            )
        single = isinstance(output, Tensor) and output.dim() > 0 and len(output) == 1
        if single and self.num_samples > 1:
            values = self._repeated(kwargs.values())
            args, kwargs = self._repeated(args), dict(zip(kwargs, values, strict=True))
            output = output.expand(self.num_samples, *output.shape[1:])
        if not isinstance(output, Tensor) or output.shape[:1] != (self.num_samples,):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise SparseModelError(
                f"layer {path!r} returns {shape}, expected a tensor whose first dimension are "
                f"the {self.num_samples} samples; {_CURE}"
            )
        if not output.requires_grad:
            # Watched from here on. A copy, because leaves must not be changed in place.
            start = output.detach().requires_grad_()
            self.starts.append(start)
            output = start.clone()
        return Call(args, kwargs, output)

    def _repeated(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """What goes with the one sample of a batch of one, for each sample."""
        return tuple(
            x.expand(self.num_samples, *x.shape[1:])
            if isinstance(x, Tensor) and x.dim() > 0 and len(x) == 1
            else x
            for x in values
        )

    @torch.no_grad()
    def _add(self, layer: nn.Module, call: Call, chosen: dict[str, str]) -> None:
        rule = rule_of(layer) or recompute
        for local, gradient in rule(layer, call, set(chosen)).items():
            name = chosen[local]
            self.uses[name].append(gradient)
            if len(self.uses[name]) == self.pending[name]:
                self._finish(name)

    @torch.no_grad()
    def _finish(self, name: str) -> None:
        """Add what a parameter contributes, now that all its uses are known."""
        uses, self.uses[name] = self.uses[name], []
        if not uses:
            return
        self.computing = True
        if self.direction is None:
            part = square_norms(uses)
        else:
            direction = self.direction[name]
            part = torch.stack([use.dot(direction) for use in uses]).sum(0)
        self.result = part if self.result is None else self.result + part
        self.computing = False

    def _checked(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, p in self.selected.items():
            if direction[name].shape != p.shape:
                raise SparseModelError(
                    f"{name!r} has shape {tuple(p.shape)}, the direction "
                    f"{tuple(direction[name].shape)}"
                )
        return {
            name: direction[name].detach().to(p.device, torch.promote_types(p.dtype, torch.float32))
            for name, p in self.selected.items()
        }

    def _check_uses(self, losses: Tensor) -> None:
        """Refuse parameters that are used other than by a call of the layer that has them."""
        found = torch.autograd.grad(
            losses.sum(), list(self.selected.values()), retain_graph=True, allow_unused=True
        )
        used = [name for name, g in zip(self.selected, found, strict=True) if g is not None]
        if used:
            raise SparseModelError(
                f"parameter {used[0]!r} is used outside the forward call of its layer, where its "
                f"gradients cannot be told apart by sample; {_CURE}"
            )

    def _check_samples(self, losses: Tensor) -> None:
        """Refuse outputs of which several samples share a row: positions come first there."""
        if not self.doubtful:
            return
        outputs = [output for _, output in self.doubtful]
        found = torch.autograd.grad(losses[0], outputs, retain_graph=True, allow_unused=True)
        for (path, _), gradient in zip(self.doubtful, found, strict=True):
            if gradient is not None and gradient[1:].any():
                raise SparseModelError(
                    f"layer {path!r}: the loss of one sample depends on several rows of its "
                    f"output, whose first dimension should be the samples; {_CURE}"
                )
