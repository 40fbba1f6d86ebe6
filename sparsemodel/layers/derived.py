"""A tensor made of others, into which nobody can write: the dense weight of a sparse layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sparsemodel.errors import SparseModelError


class DerivedWeight(torch.Tensor):
    """A tensor whose writes are refused, its views' too; what is computed of it is plain.

    A write would be lost: the tensor is made anew at each access.
    """

    @classmethod
    def of(cls, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, differentiable as before; as it is while torch compiles or exports."""
        return tensor if torch.compiler.is_compiling() else tensor.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        written = args[:1] or tuple(named.values()) if _writes(name) else (named.get("out"),)
        if any(isinstance(tensor, cls) for tensor in written):
            raise SparseModelError(
                f"{name.strip('_') or 'this'}: the weight of a sparse layer is made of its values "
                "at each access, so that what is written into it would be lost; write to "
                "layer.values (in the order of weight[mask]), or densify the model first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            plain = (a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args)
            result = func(*plain, **named)
            places = {a.untyped_storage().data_ptr() for a in args if isinstance(a, cls)}
            return _guarded(result, places)


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    # Of operators: __iadd__ and the like, but not __index__, __int__ or __invert__.
    augmented = name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}")
    return in_place or augmented or name in {"__setitem__", "__set__"}


def _guarded(result: Any, places: set[int]) -> Any:
    """Views of the guarded memory are guarded as well."""
    if isinstance(result, list | tuple):
        parts = [_guarded(part, places) for part in result]
        return parts if isinstance(result, list) else type(result)(parts)
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
        return result
    if not isinstance(result, torch.Tensor) or result.layout is not torch.strided:
        return result
    shared = result.untyped_storage().data_ptr() in places and result.numel() > 0
    plain = result.as_subclass(torch.Tensor)
    return plain.as_subclass(DerivedWeight) if shared else plain
