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

_FLAGS = ("-O3", "-march=native", "-std=c11", "-fno-math-errno", "-ffp-contract=fast")
_AS_LIBRARY = ("-shared", "-fPIC", "-fopenmp")
_SECONDS = 120


class NotBuilt(Exception):
    """There is no such library; the message says why."""


def built(source: Path) -> ctypes.CDLL:
    """The library of a C file, from the user's cache folder if it has been compiled before.

    Its name there has a digest of the source, the compiler and the processor, for machines that differ may
    share a home folder. Processes that compile at the same time each write a file of their own, and rename
    it. Beside it lies its own digest: a file that is torn is made again, never loaded. Where there is no
    folder that is the user's alone to write in, or none to load from, it is compiled for this process.

    Raises:
        NotBuilt: without a compiler, or where it fails.
    """
    compiler = _compiler()
    asked = [source.read_text(), compiler, *_FLAGS, *_AS_LIBRARY, _processor()]
    name = f"{source.stem}-{_digest(chr(0).join(asked).encode())[:24]}.so"
    if (folder := _folder()) is not None:
        try:
            return _kept(compiler, source, folder / name)
        except OSError:
            pass  # a full disk, or one that nothing can be run from
    try:
        with tempfile.TemporaryDirectory(prefix="sae-") as own:  # what is loaded stays, its file or not
            _compile(compiler, source, Path(own) / name)
            return ctypes.CDLL(str(Path(own) / name))
    except OSError as error:
        raise NotBuilt(f"the compiled kernels cannot be loaded ({error})") from error


def _kept(compiler: str, source: Path, target: Path) -> ctypes.CDLL:
    known = target.with_suffix(".sha256")
    if not (target.exists() and known.exists() and known.read_text() == _digest(target.read_bytes())):
        handle, aside = tempfile.mkstemp(dir=target.parent, suffix=".so")
        os.close(handle)
        try:
            _compile(compiler, source, Path(aside))
            digest = _digest(Path(aside).read_bytes())
            os.replace(aside, target)
            known.write_text(digest)
        finally:
            Path(aside).unlink(missing_ok=True)
    return ctypes.CDLL(str(target))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        if (found := shutil.which(name)) is not None:
            return found
    raise NotBuilt("there is no C compiler (`cc`, or what CC names)")


def _compile(compiler: str, source: Path, target: Path) -> None:
    command = [compiler, *_FLAGS, *_AS_LIBRARY, str(source), "-lm", "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{compiler} cannot compile the kernels ({error})") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise NotBuilt(f"{compiler} cannot compile the kernels ({said})")


def _folder() -> Path | None:
    """Where compiled files are kept; None if nobody or somebody else can write there."""
    if not hasattr(os, "getuid"):
        return None
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (asked if asked.is_absolute() else Path("~/.cache").expanduser()) / "sae"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_ours and os.access(folder, os.W_OK) else None


def _processor() -> str:
    """What -march=native depends on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    known = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(
        [platform.machine(), platform.processor(), *sorted({s for s in lines if s.startswith(known)})]
    )
