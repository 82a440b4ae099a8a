"""Checkpoint files: written whole or not at all, checked before they are used, the one before kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from sae.errors import InputError, RunError
from sae.files import format_bytes

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_PARTS = ("state_dict", "loops", "dictionary", "generators", "pytorch-lightning_version")


class WholeCheckpoints(CheckpointIO):
    """Writes beside the file, syncs, renames; the last checkpoint becomes the previous one.

    Nothing that is read can run code: tensors and plain values only (`weights_only=True`).
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes one file.

        Raises:
            RunError: where the disk is full; what was there before is untouched.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
            temporary.unlink(missing_ok=True)
            raise RunError(_why_not_written(path, error)) from error
        if path.name == LAST and path.is_file():
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
        _sync_folder(path.parent)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Reads one file, onto the CPU unless told otherwise."""
        return read_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes one file."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint.

    Raises:
        InputError: if it is torn, or holds more than tensors and plain values.
    """
    if not is_whole(path):
        raise InputError(f"the checkpoint {path} is torn or missing; use {PREVIOUS} beside it, or `--fresh`.")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        lacking = [name for name in _PARTS if name not in checkpoint]
        if lacking:
            raise KeyError(f"it lacks {', '.join(lacking)}.")
        return checkpoint
    except Exception as error:
        raise InputError(
            f"{path} is not a checkpoint of ours: {str(error).splitlines()[0][:200]} Nothing of it was run;"
            " remove it, or start over with `--fresh`."
        ) from error


def is_whole(path: Path) -> bool:
    """Whether every byte is there and right, by the CRC that each entry of the archive has."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError):
        return False


def newest_whole(folder: Path) -> Path | None:
    """The last checkpoint in a folder, or the one before where that is torn; None if there is none.

    Raises:
        InputError: if there are checkpoints and all are torn.
    """
    there = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in there:
        if is_whole(path):
            if path != there[0]:
                print(f"{there[0]} is torn; continuing from {path.name}, the one before.", file=sys.stderr)
            return path
    if there:
        names = " and ".join(path.name for path in there)
        raise InputError(f"{names} in {folder} cannot be used: torn. `--fresh` starts over.")
    return None


def link(path: Path, other: Path) -> None:
    """Makes `other` the same file as `path`, atomically; a copy where the file system has no links."""
    temporary = other.with_name(other.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def _why_not_written(path: Path, error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free
    kept = "the last checkpoint is intact" if (path.parent / LAST).is_file() else "none was written before"
    return (
        f"the checkpoint {path} could not be written: {str(error).splitlines()[0][:200]}"
        f" ({format_bytes(free)} are free there); {kept}. Make room and run the same command again."
    )


def _sync_folder(folder: Path) -> None:
    """So that the rename survives a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
