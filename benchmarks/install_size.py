"""What an installation takes: disk, packages, and the memory and time of a client's imports.

    python -m benchmarks.install_size [--quick] [--json]

makes an empty virtual environment for `pip install 'fedprune[device]'` and one for
'fedprune[sim]', the README's first command, from this checkout; pip itself is in neither. --quick
compares with the environment that runs it. Imports are those of a client of Flower's; of the peer
those of a client that computes with torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

from benchmarks.rows import Row, add_arguments, show

ROOT = Path(__file__).parent.parent
CLIENT = "import flwr.clientapp, fedprune.flower.client, fedprune.local.training"
TORCH_CLIENT = f"{CLIENT}, fedprune.local.torch_models"
MEASURE = """
import re, time
start = time.perf_counter()
{imports}
seconds = time.perf_counter() - start
print(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1], seconds)
"""
STARTS = 3  # processes of which the middle one counts; the first reads files into memory


@dataclass(frozen=True)
class Environment:
    """What an environment takes.

    Attributes:
        megabytes: of its packages, in units of 1,048,576 bytes, as `du -sm` has them.
        packages: distributions that are installed.
        client: resident memory, in MiB, of a process that has imported what a client needs.
        seconds: that these imports take.
    """

    megabytes: float
    packages: int
    client: float
    seconds: float

    @classmethod
    def of(cls, python: Path, imports: str) -> Environment:
        """Of the environment of an interpreter."""
        where = "import sysconfig; print(sysconfig.get_path('platlib'))"
        site = Path(_output(python, where).strip())
        starts = [_output(python, MEASURE.format(imports=imports)).split() for _ in range(STARTS)]
        return cls(
            _disk_bytes(site) / 2**20,
            sum(1 for _ in distributions(path=[str(site)])),
            median(int(kilobytes) / 1024 for kilobytes, _ in starts),
            median(float(seconds) for _, seconds in starts),
        )


def install(extra: str, folder: Path) -> Path:
    """The interpreter of a new environment with this checkout and an extra."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq"]
    subprocess.run([*pip, f"{ROOT}[{extra}]"], check=True)
    return python


def rows(*, quick: bool) -> Iterator[Row]:
    """A row for each thing that an environment takes."""
    with tempfile.TemporaryDirectory(prefix="fedprune-install-") as folder:
        device = Environment.of(install("device", Path(folder) / "device"), CLIENT)
        peer = Path(sys.executable) if quick else install("sim", Path(folder) / "sim")
        full = Environment.of(peer, TORCH_CLIENT)
    name = "this environment" if quick else "fedprune[sim]"
    for case, unit, ours, theirs in (
        ("disk", "MiB", device.megabytes, full.megabytes),
        ("packages", "", device.packages, full.packages),
        ("a client after its imports", "MiB", device.client, full.client),
        ("imports of a client", "s", device.seconds, full.seconds),
    ):
        yield Row("install_size", f"fedprune[device], {case}", 1.0, ours, theirs, name, unit)


def _output(python: Path, code: str) -> str:
    """What a fresh process prints that finds no package of this one."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", code],
        cwd="/", env=outside, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def _disk_bytes(folder: Path) -> int:
    """Blocks of all files; one with several names counts once."""
    stats = [path.lstat() for path in folder.rglob("*")]
    return sum({stat.st_ino: stat.st_blocks * 512 for stat in stats}.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.install_size")
    add_arguments(parser, quick="compare with the environment that runs this")
    arguments = parser.parse_args()
    show(rows(quick=arguments.quick), arguments)


if __name__ == "__main__":
    main()
