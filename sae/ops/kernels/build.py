"""Compiles a C file for this very processor, once, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c11", "-fno-math-errno", "-shared", "-fPIC", "-fopenmp")
_SECONDS = 120


class NotBuilt(Exception):
    """There is no such library; the message says why."""


def built(source: Path) -> ctypes.CDLL:
    """The library of a C file, from the user's cache folder if it has been compiled before.

    Its name there has a digest of the source, the compiler and the processor, for machines that differ may
    share a home folder. Processes that compile at the same time each write a file of their own, and rename
    it; a file that cannot be loaded is made again.

    Raises:
        NotBuilt: without a compiler, or where it fails.
    """
    compiler = _compiler()
    digest = hashlib.sha256(
        "\0".join([source.read_text(), compiler, *_FLAGS, _processor()]).encode()
    ).hexdigest()
    name = f"{source.stem}-{digest[:24]}.so"
    if (folder := _folder()) is not None:
        return _loaded(compiler, source, folder / name)
    with tempfile.TemporaryDirectory(prefix="sae-") as own:  # what is loaded stays, its file or not
        return _loaded(compiler, source, Path(own) / name)


def _loaded(compiler: str, source: Path, target: Path) -> ctypes.CDLL:
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError:
            pass  # torn, or of another C library: made again
    _compile(compiler, source, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NotBuilt(f"the compiled kernels cannot be loaded ({error})") from error


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        if (found := shutil.which(name)) is not None:
            return found
    raise NotBuilt("there is no C compiler (`cc`, or what CC names)")


def _compile(compiler: str, source: Path, target: Path) -> None:
    handle, aside = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, str(source), "-o", aside]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode != 0:
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise NotBuilt(f"{compiler} cannot compile the kernels ({said})")
        os.replace(aside, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{compiler} cannot compile the kernels ({error})") from error
    finally:
        Path(aside).unlink(missing_ok=True)


def _folder() -> Path | None:
    """Where compiled files are kept; None if nothing can be written there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "sae"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _processor() -> str:
    """What -march=native depends on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    known = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(
        [platform.machine(), platform.processor(), *sorted({s for s in lines if s.startswith(known)})]
    )
