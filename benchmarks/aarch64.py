"""Training on 64-bit ARM, in an emulator, against the same steps on this machine.

    python -m benchmarks.aarch64 [--quick] [--folder FOLDER]

Needs Debian's qemu-user, g++-aarch64-linux-gnu and cmake. It fetches Debian's Python and the wheels
of what a device installs (but for Flower) into a folder, cross-builds the native library, and
trains resnet8 and resnet18 at density .01: three steps, growth and a forward pass, by
`sparsemodel.runtime.Trainer` alone. Losses, logits, weights, momentum's effect on them and growth
must be those of this machine up to rounding. `fedprune device bench` then runs in the emulator,
where there is one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.message_bytes import pruned
from benchmarks.sparse_step import INPUT_SHAPE
from prunelab.errors import RunError
from prunelab.networks import build_model
from sparsemodel.kernels.cpu.library import ENVIRONMENT
from sparsemodel.plans.program import program_of
from sparsemodel.storage.state_file import save_state

ROOT = Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"
DENSITY, BATCH, CLASSES = 0.01, 16, 10
MODELS = ("resnet8", "resnet18")
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
WHEELS = ("numpy", "safetensors", "typer", "rich", "filelock", "tomli-w")
PACKAGES = ("sparsemodel", "prunelab", "datapruning", "fedprune", "benchmarks")
BUDGET = "128MB"
ROUNDING = 64  # last places
Arrays = Mapping[str, Any]


def check(name: str, folder: Path, python: Path) -> str:
    """A line on a network: how far ARM is from this machine.

    Raises:
        RunError: further than rounding explains, or growth has chosen other places.
    """
    work = folder / name
    lay_out(name, work)
    arm = trained([str(python)], work, "neon", cwd=folder / "packages")
    best = trained([sys.executable], work, "best", cwd=ROOT)
    line = f"{name}: {arm['isa']} on ARM against {best['isa']} here {differences(arm, best)}"
    places = [key for key in best if key.startswith("places")]
    if not all(np.array_equal(arm[key], best[key]) for key in places):
        raise RunError(f"{line}; growth has chosen other places")
    if largest_difference(arm, best) > ROUNDING:
        raise RunError(f"{line}; expected at most {ROUNDING}")
    return line


def differences(found: Arrays, wanted: Arrays) -> str:
    """In words."""
    floats = [key for key in wanted if wanted[key].dtype == np.float32]
    other = [key for key in floats if not np.array_equal(found[key], wanted[key])]
    if not other:
        return f"gives the same bits in all of {len(floats)} arrays"
    largest = largest_difference(found, wanted)
    return f"differs in {len(other)} of {len(floats)} arrays, by at most {largest:.1f} last places"


def largest_difference(found: Arrays, wanted: Arrays) -> float:
    """Of all arrays, in float32's last place of the largest value of each."""
    return max(
        float(np.abs(found[key] - value).max() / np.spacing(np.abs(value).max()))
        for key, value in wanted.items()
        if value.dtype == np.float32 and value.size
    )


def lay_out(name: str, folder: Path) -> None:
    """A network's program, its pruned state and samples, for `aarch64_process`."""
    folder.mkdir(exist_ok=True)
    model = build_model(name, num_classes=CLASSES, input_shape=INPUT_SHAPE, seed=0)
    (folder / "program.json").write_text(program_of(model, INPUT_SHAPE).text())
    save_state(folder / "state.safetensors", pruned(model, DENSITY), metadata={})
    random = np.random.default_rng(0)
    np.savez(
        folder / "samples.npz",
        images=random.standard_normal((3 * BATCH, *INPUT_SHAPE), np.float32),
        labels=random.integers(0, CLASSES, 3 * BATCH),
    )


def trained(python: list[str], folder: Path, isa: str, *, cwd: Path) -> Arrays:
    """What `aarch64_process` leaves."""
    out = folder / f"{isa}.npz"
    command = [*python, "-m", "benchmarks.aarch64_process", str(folder), str(out)]
    subprocess.run(command, cwd=cwd, env={**os.environ, ENVIRONMENT: isa}, check=True)
    with np.load(out) as found:
        return dict(found)


def emulated_python(folder: Path) -> Path:
    """A command that is Python on 64-bit ARM, with this checkout and its native library.

    Raises:
        RunError: a program that is needed is not installed.
    """
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    missing = [name for name in (COMPILER, "cmake", "apt-get", "dpkg") if not shutil.which(name)]
    if qemu is None or missing:
        raise RunError(
            f"not installed: {', '.join([*missing, *['qemu-aarch64'] * (qemu is None)])}; "
            "apt-get install qemu-user g++-aarch64-linux-gnu cmake"
        )
    folder.mkdir(parents=True, exist_ok=True)
    system, wheels = folder / "system", folder / "wheels"
    if not system.exists():
        _fetch_system(folder, system)
    if not wheels.exists():
        _fetch_wheels(wheels)
    packages = folder / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    for name in PACKAGES:
        shutil.copytree(
            ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    shutil.copy(_built_library(folder / "build"), packages / "sparsemodel" / "kernels" / "cpu")
    python = folder / "python"
    # Its name is that of the emulated interpreter, so that processes which that starts are, too.
    python.write_text(
        f"#!/bin/sh\nexport PYTHONHOME='{system}/usr' PYTHONPATH='{packages}:{wheels}'\n"
        f"exec {qemu} -0 '{python}' -L '{system}' '{system}/usr/bin/python3' \"$@\"\n"
    )
    python.chmod(0o755)
    return python


def _fetch_system(folder: Path, system: Path) -> None:
    """Debian's Python for ARM, unpacked; apt's lists and archives lie in the folder, too."""
    apt, part = folder / "apt", folder / "system.part"
    shutil.rmtree(part, ignore_errors=True)
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = {
        "Dir::State": apt / "state", "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache", "APT::Architecture": "arm64", "APT::Architectures": "arm64",
        "APT::Sandbox::User": "", "Debug::NoLocking": "1",
    }  # fmt: skip
    command = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    subprocess.run([*command, "update"], check=True)
    install = ["install", "--yes", "--no-install-recommends", "--download-only", *DEBIAN]
    subprocess.run([*command, *install], check=True)
    for archive in sorted((apt / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(archive), str(part)], check=True)
    part.rename(system)


def _fetch_wheels(folder: Path) -> None:
    """What a device installs, in the versions of this environment."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    command = [
        *(sys.executable, "-m", "pip", "install", "-qq", "--target", str(part)),
        *("--python-version", "3.11", "--only-binary=:all:", *platforms),
        *(f"{name}=={version(name)}" for name in WHEELS),
    ]
    subprocess.run(command, check=True)
    part.rename(folder)


def _built_library(folder: Path) -> Path:
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder)]
    configure += [f"-D{key}={value}" for key, value in options.items()]
    for command in (configure, ["cmake", "--build", str(folder), "--target", "sparse_cpu"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "libsparse_cpu.so"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aarch64")
    parser.add_argument("--quick", action="store_true", help="resnet8 only")
    cache = Path.home() / ".cache" / "fedprune" / "aarch64"
    parser.add_argument("--folder", type=Path, default=cache, help=f"default: {cache}")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    python = emulated_python(folder)
    for name in MODELS[:1] if arguments.quick else MODELS:
        print(check(name, folder, python), flush=True)
    if find_spec("fedprune.device.commands") is not None:
        command = [str(python), "-m", "fedprune", "device", "bench", "--budget", BUDGET]
        subprocess.run(command, check=True, cwd=folder)  # not where another library may lie


if __name__ == "__main__":
    main()
