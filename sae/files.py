"""Writing files so that nobody ever sees a half-written one, and naming their sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Writes under a temporary name, syncs, renames: the file is the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; NaN is refused, null is what has no meaning."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def format_bytes(n_bytes: int) -> str:
    """E.g. `3.2 GB`; decimal units."""
    size = float(n_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
