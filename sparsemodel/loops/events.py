"""One callback for transformers' Trainer and for Lightning's, with neither of them imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    _Callback = Any  # stands in their lists of callbacks
else:
    _Callback = object


class LoopCallback(_Callback):  # type: ignore[misc]
    """What both trainers call by name, told as `begin` and `end`.

    Both call every event of every callback and ask for no base class; events that nobody here
    listens to do nothing. Give it in a list: Lightning takes a single callback of its own alone.
    """

    def begin(self, model: nn.Module, optimizers: Iterable[Optimizer], *, resumed: bool) -> None:
        """Weights and optimisers are made, on their device, and read from a checkpoint if asked.

        Args:
            model: without what wraps it for several processes.
            resumed: whether training goes on from a checkpoint.
        """

    def end(self, model: nn.Module) -> None:
        """The training is over, or was broken off."""

    @property
    def state_key(self) -> str:
        """What Lightning keeps the state of a callback under."""
        return type(self).__qualname__

    @property
    def _legacy_state_key(self) -> type:
        return type(self)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps in checkpoints; nothing here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave, when Lightning resumes."""

    def setup(self, *_: Any, **__: Any) -> None: ...

    def teardown(self, *_: Any, **__: Any) -> None: ...

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        """Of transformers."""
        while not hasattr(optimizer, "_optimizer_step_post_hooks"):  # accelerate's wraps torch's
            optimizer = optimizer.optimizer
        self.begin(model, [optimizer], resumed=state.global_step > 0)

    def on_fit_start(self, trainer: Any, module: nn.Module) -> None:
        """Of Lightning."""
        self.begin(module, trainer.optimizers, resumed=trainer.ckpt_path is not None)

    def on_train_end(self, *given: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Of both: (args, state, control, model=...) or (trainer, module)."""
        self.end(given[1] if model is None else model)

    def on_exception(self, trainer: Any, module: nn.Module, error: BaseException) -> None:
        """Of Lightning."""
        self.end(module)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nothing(*_: Any, **__: Any) -> None:
    """An event that nobody listens to."""
