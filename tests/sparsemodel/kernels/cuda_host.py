"""Runs the CUDA kernels as C++ on the CPU: the same text, argument table and drivers."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from sparsemodel.kernels.cuda import source as cuda_source

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
_HEADER = cuda_source.FOLDER / "host" / "cuda_host.h"


class HostRunner:
    """A runner (kernels.cuda.launch) that builds each kernel file once with the host compiler.

    Args:
        folder: where libraries are built; several processes may use one.
    """

    def __init__(self, folder: Path) -> None:
        self.seed = 0
        self._folder = folder
        self._libraries: dict[tuple[str, torch.dtype], ctypes.CDLL] = {}

    def launch(
        self,
        family: str,
        kernel: str,
        blocks: int,
        *arguments: Any,
        real: torch.dtype = torch.float32,
    ) -> None:
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                assert argument.device.type == "cpu"
        if blocks == 0:
            return
        numbers = cuda_source.arguments(family, kernel, arguments)
        numbers = [ctypes.c_void_p(n) if isinstance(n, int) else n for n in numbers]
        addresses = (ctypes.c_void_p * len(numbers))(*(ctypes.addressof(n) for n in numbers))
        launch = getattr(self._library(family, real), f"host_{kernel}")
        launch(blocks, cuda_source.BLOCK, addresses, self.seed)

    def _library(self, family: str, real: torch.dtype) -> ctypes.CDLL:
        if (family, real) not in self._libraries:
            self._libraries[family, real] = self._built(family, real)
        return self._libraries[family, real]

    def _built(self, family: str, real: torch.dtype) -> ctypes.CDLL:
        text = f'#include "{_HEADER}"\n{cuda_source.source(family)}\n'
        text += "".join(_launcher(*item) for item in cuda_source.kernels(family).items())
        name = hashlib.sha256(f"{text}{real}".encode()).hexdigest()[:16]
        code, library = self._folder / f"{name}.cpp", self._folder / f"{name}.so"
        with FileLock(self._folder / f"{name}.lock"):
            if not library.exists():
                code.write_text(text)
                self._compile(code, library, real)
        return ctypes.CDLL(str(library))

    @staticmethod
    def _compile(code: Path, library: Path, real: torch.dtype) -> None:
        defines = [f"-D{define}" for define in cuda_source.REALS[real]]
        assert COMPILER is not None
        flags = os.environ.get("CXXFLAGS", "").split()  # such as sanitizers
        command = [
            *(COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", *flags, *defines),
            *("-o", str(library), str(code)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _launcher(kernel: str, parameters: cuda_source.Parameters) -> str:
    """C++ that takes a kernel's arguments by address and runs it."""
    unpacked = ", ".join(
        f"host_argument<{i}>(&{kernel}, arguments)" for i in range(len(parameters))
    )
    return f"""
extern "C" void host_{kernel}(unsigned blocks, unsigned threads, void** arguments, unsigned seed) {{
  host::run([](void** arguments) {{ {kernel}({unpacked}); }}, blocks, threads, arguments, seed);
}}
"""
