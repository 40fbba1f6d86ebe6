"""Launching the CUDA kernels on torch's current stream.

Nothing loads at import. The kernels are used where there are a GPU and what compiles them;
elsewhere callers compute by the reference. The environment variable SPARSEMODEL_CUDA turns them
"off", or with "on" asks for them: there is then one warning where they cannot run (no cuda-core,
an old driver, a GPU that NVRTC knows nothing of).
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from typing import Any, Protocol

import torch

from sparsemodel.errors import NativeLibraryWarning
from sparsemodel.kernels.cuda import build as cuda_build
from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.cuda import source as cuda_source

ENVIRONMENT = "SPARSEMODEL_CUDA"
EXTRA = 'pip install "fedprune[cuda]"'


class Runner(Protocol):
    """What runs kernels: a GPU, or in tests the host."""

    def launch(
        self,
        family: str,
        kernel: str,
        blocks: int,
        *arguments: Any,
        real: torch.dtype = torch.float32,
    ) -> None:
        """Run a kernel of csrc/cuda/`family`.cu in so many blocks; none is nothing to do.

        Args:
            arguments: a tensor or None for each pointer, a number for each number.
            real: the type that the kernel calls Real.
        """


class DeviceRunner:
    """Runs kernels on one GPU, on the stream that is torch's current one there."""

    def __init__(self, device: int) -> None:
        self._device = device
        major, minor = torch.cuda.get_device_capability(device)
        self._arch = f"sm_{major}{minor}"
        self._kernels: dict[tuple[str, str, torch.dtype], Any] = {}
        self._thread = threading.local()

    def launch(
        self,
        family: str,
        kernel: str,
        blocks: int,
        *arguments: Any,
        real: torch.dtype = torch.float32,
    ) -> None:
        from cuda.core import Device, LaunchConfig, launch  # noqa: PLC0415 - an optional package

        if blocks == 0:
            return
        with torch.cuda.device(self._device):
            if not hasattr(self._thread, "ready"):  # autograd has threads without a context
                Device(self._device).set_current()
                self._thread.ready = True
            compiled = self._kernel(family, kernel, real)
            config = LaunchConfig(grid=blocks, block=cuda_source.BLOCK)
            stream: Any = torch.cuda.current_stream(self._device)
            launch(stream, config, compiled, *cuda_source.arguments(family, kernel, arguments))

    def _kernel(self, family: str, kernel: str, real: torch.dtype) -> Any:
        key = family, kernel, real
        if key not in self._kernels:
            from cuda.core import Device, ObjectCode  # noqa: PLC0415 - an optional package

            Device(self._device).set_current()
            code = ObjectCode.from_cubin(cuda_build.compiled(family, real, self._arch))
            for name in cuda_source.kernels(family):
                self._kernels[family, name, real] = code.get_kernel(name)
        return self._kernels[key]


def enabled() -> bool:
    """Whether kernels may be used on a GPU."""
    return os.environ.get(ENVIRONMENT) != "off"


def runner_for(x: torch.Tensor) -> Runner | None:
    """What runs kernels of x's type, one of `cuda_source.REALS`; None where there is none."""
    return runner(x.device) if x.dtype in cuda_source.REALS else None


def runner(device: torch.device) -> Runner | None:
    """What runs kernels on tensors of `device`; None where they are off or cannot run."""
    if device.type != "cuda" or not enabled():
        return None
    found = _loaded(_index(device))
    if not isinstance(found, str):
        return found
    if os.environ.get(ENVIRONMENT) == "on":
        _warn_once(found)
    return None


def in_use(device: torch.device) -> str:
    """One line: what computes sparse layers on `device`; "" on a CPU."""
    if device.type != "cuda":
        return ""
    index = _index(device)
    found = _loaded(index) if enabled() else f"{ENVIRONMENT}=off"
    if isinstance(found, str):
        return f"plain torch on cuda:{index} ({found})"
    name, gpu = torch.cuda.get_device_name(index), measured.gpu_of(device)
    rule = "its own measurements" if gpu.name == name else f"measurements of an {gpu.name}"
    return f"CUDA kernels on cuda:{index} ({name}), chosen by {rule}"


def blocks_of(count: int, per_block: int = cuda_source.BLOCK) -> int:
    """How many blocks hold `count` pieces of work, `per_block` each."""
    return -(-count // per_block)


def _index(device: torch.device) -> int:
    current = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return current if device.index is None else device.index


@functools.cache
def _loaded(index: int) -> Runner | str:
    """What runs kernels on a GPU, or why nothing does."""
    why = obstacle()
    if why is not None:
        return why
    try:
        made = DeviceRunner(index)
        made._kernel("arrays", "sgd_step", torch.float32)
    except Exception as error:  # whatever driver and compiler raise, the reference still runs
        return f"they do not load on cuda:{index} ({error}); update the driver"
    return made


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"the CUDA kernels are not used, the reference computes instead: {why}",
        NativeLibraryWarning,
        stacklevel=3,
    )


def obstacle() -> str | None:
    """Why kernels cannot be compiled in this environment, and what to do; None where they can."""
    try:
        import cuda.core  # noqa: F401, PLC0415 - an optional package
    except ImportError as error:
        return f"cuda-core cannot be imported ({error}): {EXTRA}, beside a CUDA build of torch"
    try:
        cuda_build.nvrtc_version()
    except Exception as error:  # the bindings raise errors of many kinds where NVRTC is missing
        return f"NVRTC cannot be loaded ({error}); install a CUDA build of torch, which brings it"
    return None
