"""Where a cache lies: a folder of this machine, or any URL that fsspec knows (s3://, gs://, ...)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sae.errors import InputError
from sae.files import format_bytes

FETCHED_BYTES = 50 * 10**9
"""Disk of this machine that files fetched from a URL may take, where nothing else is said."""
Chunks = Iterable[bytes | memoryview]


class Place(ABC):
    """A flat folder of files, each of which is there whole or not at all."""

    location: str
    """As the user names it: a path or a URL."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is there; empty where the place does not exist yet."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a file."""

    @abstractmethod
    def write(self, name: str, chunks: Chunks) -> None:
        """Writes a file so that nobody ever sees half of it, replacing the one that was there."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""

    @abstractmethod
    def local(self, name: str) -> Path:
        """A path of this machine where the file can be read, fetched if need be."""

    def refetch(self, name: str) -> bool:
        """Fetches a file once more, if what `local` gives is a copy; returns whether it is."""
        return False

    def release(self, name: str) -> None:  # noqa: B027 - most places keep everything
        """Says that a local path is not read any more; a fetched copy may go if room is short."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where there is no such limit."""

    def __str__(self) -> str:
        return self.location


class LocalPlace(Place):
    """A folder of this machine, or of a file system that it shares with others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def sizes(self) -> dict[str, int]:
        """Unfinished files (.tmp) are not counted as there."""
        if not self.folder.is_dir():
            return {}
        found = {}
        for entry in os.scandir(self.folder):
            try:
                if not entry.name.endswith(".tmp"):
                    found[entry.name] = entry.stat().st_size
            except FileNotFoundError:  # removed by another rank meanwhile
                continue
        return found

    def size(self, name: str) -> int | None:
        """One call of `stat`."""
        try:
            return (self.folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        """All of a file."""
        return (self.folder / name).read_bytes()

    def write(self, name: str, chunks: Chunks) -> None:
        """Under a temporary name first, synced, then renamed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"`cache` {self.folder} cannot be made a folder: {error}.") from error
        temporary = self.folder / f"{name}.tmp"
        try:
            with temporary.open("wb", buffering=0) as file:
                for chunk in chunks:
                    _write_all(file, chunk)
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk, every byte counts
            raise
        os.replace(temporary, self.folder / name)

    def remove(self, name: str) -> None:
        """Removes a file."""
        (self.folder / name).unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        """The file itself."""
        return self.folder / name

    def free_bytes(self) -> int | None:
        """Of the disk that the folder lies on, or will lie on."""
        existing = self.folder.absolute()
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free


class RemotePlace(Place):
    """A folder behind a URL; files are fetched whole into a folder of this machine to be read."""

    def __init__(self, url: str, limit: int = FETCHED_BYTES, fetched: Path | None = None) -> None:
        """Connects.

        Args:
            url: e.g. `s3://bucket/caches/gpt2`.
            limit: bytes of fetched files above which those that are not read any more are removed.
            fetched: where fetched files lie; None = a folder in the system's temporary folder.

        Raises:
            InputError: if fsspec does not know the protocol, or the package for it is missing.
        """
        import fsspec

        self.location = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            extra = "; for s3:// install the extra: pip install 'sae[s3]'" if url.startswith("s3:") else ""
            raise InputError(f"`cache` {url} cannot be reached: {error}{extra}.") from error
        self._root = root.rstrip("/")
        digest = hashlib.sha256(self.location.encode()).hexdigest()[:12]
        self.limit = limit
        self._copies = fetched or Path(tempfile.gettempdir()) / f"sae-{os.getuid()}" / digest
        self.fetched = self._copies

    def keep_copies_of(self, version: str) -> None:
        """Fetches into a folder for this version of what lies there; copies of others are not used."""
        self.fetched = self._copies / version

    def sizes(self) -> dict[str, int]:
        """One listing."""
        self._fs.invalidate_cache()
        try:
            entries: list[dict[str, Any]] = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}

    def size(self, name: str) -> int | None:
        """One request."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.info(f"{self._root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """One request."""
        return self._fs.cat_file(f"{self._root}/{name}")

    def write(self, name: str, chunks: Chunks) -> None:
        """Gathered in a local file first; an upload becomes visible only as a whole."""
        self.fetched.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.fetched, suffix=".tmp") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.put_file(file.name, f"{self._root}/{name}")
        (self.fetched / name).unlink(missing_ok=True)  # a copy of what was there before

    def remove(self, name: str) -> None:
        """Removes a file and its copy."""
        (self.fetched / name).unlink(missing_ok=True)
        if self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")

    def local(self, name: str) -> Path:
        """A fetched copy as long as the one there; fetched again when they differ in length."""
        path = self.fetched / name
        if not path.is_file() or path.stat().st_size != self.size(name):
            self.fetch(name)
        return path

    def fetch(self, name: str) -> None:
        """Fetches a file, replacing an earlier copy; whole or not at all."""
        self.fetched.mkdir(parents=True, exist_ok=True)
        path = self.fetched / name
        temporary = path.with_name(f"{name}.{os.getpid()}.tmp")
        try:
            self._fs.get_file(f"{self._root}/{name}", str(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def refetch(self, name: str) -> bool:
        """Replaces the copy."""
        self.fetch(name)
        return True

    def release(self, name: str) -> None:
        """Removes the copy if all copies take more than the limit."""
        if self.fetched.is_dir() and sum(LocalPlace(self.fetched).sizes().values()) > self.limit:
            (self.fetched / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Object stores have no limit that could be asked for."""
        return None


def is_url(location: str | Path) -> bool:
    """Whether it names a place elsewhere, not a path of this machine."""
    return "://" in str(location) and not str(location).startswith(("file://", "local://"))


def place_at(location: str | Path | Place, limit: int = FETCHED_BYTES) -> Place:
    """The place of a path or a URL; one that is a place already is returned as it is.

    Args:
        location: path, URL or place.
        limit: of a URL: bytes of this machine's disk that fetched files may take.
    """
    if isinstance(location, Place):
        return location
    if is_url(location):
        return RemotePlace(str(location), limit)
    text = str(location)
    return LocalPlace(Path(text.partition("://")[2] if "://" in text else text))


@contextlib.contextmanager
def explaining_a_full_disk(place: Place, to_come: Callable[[], int] | None = None) -> Iterator[None]:
    """Turns a full disk into an `InputError` that says how much is missing.

    Args:
        place: that is written to.
        to_come: bytes that are still to be written, counted when the disk is full; None = not known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = place.free_bytes() or 0
        missing = ""
        if to_come is not None and (needed := to_come()) > free:
            missing = (
                f" of {format_bytes(needed)} that are to come, so {format_bytes(needed - free)} are missing"
            )
        raise InputError(
            f"the disk of {place} became full: {format_bytes(free)} are free{missing}. Finished shards are"
            " kept: make room and run the same command again."
        ) from error


def _write_all(file: Any, chunk: bytes | memoryview) -> None:
    """An unbuffered write may take only a part of what it is given."""
    left = memoryview(chunk)
    while left.nbytes:
        left = left[file.write(left) :]
