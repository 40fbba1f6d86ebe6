"""What changes when named data do; without torch."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from prunelab.runs.imported import source_digest


def stamp_of(name: str | Path) -> str:
    """Hexadecimal digits that change with data of a name; "" where nothing can be told.

    Of a file or folder names, sizes and times of the files; of "module:function" the source of its
    package, not what the function reads.
    """
    path = Path(name)
    if not path.exists():
        return source_digest(str(name)) if ":" in str(name) else ""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    lines = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in found]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]
