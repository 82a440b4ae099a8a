"""A run folder belongs to one live process: lock.json says to which, and a heartbeat that it lives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sae.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows; `O_EXCL` alone decides there
    fcntl = None

LOCK = "lock.json"
BEAT_S = 10.0
"""Seconds between two heartbeats: the modification time of lock.json."""
SILENT_S = 60.0
"""Seconds without a heartbeat after which an owner on another host counts as dead."""
SETTLE_S = 1.0
"""Seconds given to a lock that is being written."""


@dataclass(frozen=True)
class Owner:
    """Who lock.json names."""

    host: str | None
    """None where the file cannot be read."""
    pid: int | None
    since: float | None
    """Unix time, by the owner's clock."""
    age_s: float
    """Seconds since its last heartbeat, by the file system's clock."""
    alive: bool

    def __str__(self) -> str:
        if self.host is None:
            return f"a process that its {LOCK} does not tell"
        since = (
            "" if self.since is None else time.strftime(" since %Y-%m-%d %H:%M", time.localtime(self.since))
        )
        return f"process {self.pid} on {self.host}{since}"


def read_lock(folder: Path) -> Owner | None:
    """Whom the folder belongs or belonged to, dead or alive; None where there is no lock."""
    path = folder / LOCK
    try:
        beat = path.stat().st_mtime
        try:
            content = _parse(path.read_bytes())
        except PermissionError:
            content = None
    except (FileNotFoundError, NotADirectoryError):
        return None
    age = max(0.0, _now(folder) - beat)
    if content is None:
        return Owner(None, None, None, age, age < SILENT_S)
    if content["host"] == socket.gethostname() and content.get("namespace") == _namespace():
        alive = _lives(content["pid"], content.get("process_started"))
    else:
        alive = age < SILENT_S
    since = content.get("since")
    return Owner(content["host"], content["pid"], None if since is None else float(since), age, alive)


def owner_of(folder: Path) -> Owner | None:
    """The live process that the folder belongs to; None where there is none, or it has died."""
    owner = read_lock(folder)
    return owner if owner is not None and owner.alive else None


class RunLock:
    """Owns a run folder from `acquire` to `release`, or to the death of the process.

    Whoever creates lock.json owns the folder (`O_EXCL`). A lock whose owner died is taken over by writing
    into that same file while holding `flock` on it: of two that find it dead, the second waits, and then
    reads the first one's name. The file is never moved away, so nobody can remove a lock newly made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK
        self._mine: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Makes this process the owner; the folder is made if it is missing.

        Raises:
            InputError: if a live process owns it: names host, process and since when; or if nothing can be
                written there.
        """
        if self._mine is not None:
            return
        try:
            self._acquire()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise InputError(
                f"nothing can be written into {self.folder} ({error.strerror}); give another"
                " `trainer.default_root_dir`. Runs of others are read with scripts/inspect_features.py."
            ) from error

    def _acquire(self) -> None:
        made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = made
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "namespace": _namespace(),
            "since": time.time(),
        }
        while not self._take(mine):
            pass
        self._mine, self._stop = mine, threading.Event()
        beating = threading.Thread(target=self._beat, args=(mine, self._stop), name="run lock", daemon=True)
        beating.start()

    def release(self) -> None:
        """Removes the lock, if it is still this one's."""
        mine, self._mine = self._mine, None
        self._stop.set()
        if mine is None or mine["pid"] != os.getpid():  # a forked child does not own what its parent owns
            return
        with contextlib.suppress(OSError), _locked(self.path) as (file, _):
            if _parse(_content(file)) == mine and _is_at(file, self.path):
                self.path.unlink()
        with contextlib.suppress(OSError):  # folders made for the lock that nothing else went into
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self, mine: dict[str, Any]) -> bool:
        """Creates the file or takes it over; False if it changed hands meanwhile, so look again."""
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            created = True
        except FileExistsError:
            created = False
        try:
            with _locked(self.path) as (file, alone):
                if not _is_at(file, self.path) or (created and _content(file)):
                    return False
                if not created and not self._is_free():
                    return False
                os.ftruncate(file, 0)
                os.pwrite(file, (json.dumps(mine) + "\n").encode(), 0)
                os.fsync(file)
            if not alone:  # two may have written: the last one has it
                time.sleep(SETTLE_S)
                return _parse(self.path.read_bytes()) == mine
        except FileNotFoundError:  # released between the two steps
            return False
        return True

    def _is_free(self) -> bool:
        """Whether the owner has died; False where the lock is gone, or is being written."""
        owner = read_lock(self.folder)
        if owner is None:
            return False
        if owner.host is None and owner.age_s < SETTLE_S:
            time.sleep(SETTLE_S / 10)
            return False
        if owner.alive:
            raise InputError(_refusal(self.folder, owner))
        return True

    def _beat(self, mine: dict[str, Any], stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if _parse(self.path.read_bytes()) != mine:
                    return  # taken over while this host was cut off; another's heartbeat is not ours to keep
                os.utime(self.path)


def _refusal(folder: Path, owner: Owner) -> str:
    if owner.host is None:
        what = f"If it runs no more, wait until {LOCK} is {SILENT_S:.0f} s old, or remove it."
    elif owner.pid == os.getpid() and owner.host == socket.gethostname():
        what = "That is this very process; finish the first run before the second."
    else:
        what = (
            "Wait for it, stop it, or give another `trainer.default_root_dir`; a process that died is noticed"
            f" by itself, on another host after {SILENT_S:.0f} s."
        )
    return f"{folder} belongs to {owner}, which is running. {what}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[tuple[int, bool]]:
    """The file opened, and whether it is locked against others that decide about it.

    Some network file systems know no such lock.
    """
    file = os.open(path, os.O_RDWR)
    try:
        alone = fcntl is not None
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                alone = False
        yield file, alone
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the opened file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _content(file: int) -> bytes:
    return os.pread(file, 10_000, 0)


def _parse(data: bytes) -> dict[str, Any] | None:
    """What the lock says; None if that is no lock."""
    try:
        content = json.loads(data)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("host"), str):
        return None
    pid, since = content.get("pid"), content.get("since")
    if type(pid) is not int or pid <= 0 or not isinstance(since, (int, float, type(None))):
        return None
    return content


def _now(folder: Path) -> float:
    """Unix time by the clock of the file system, which stamps the heartbeats of other hosts too."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # a folder that may only be read
        return time.time()


def _lives(pid: int, started: int | None) -> bool:
    """Whether the process is there, and not another one with a number used again."""
    now = _process_started(pid)
    if now is not None:
        return now >= 0 and started in (None, now)
    if Path("/proc/self/stat").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and someone else's
        return True
    return True


def _process_started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; -1 for a zombie, None where /proc has none."""
    try:
        # The name, in parentheses, may hold anything, so count from its end.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _namespace() -> str | None:
    """Which numbering of processes this one is in: containers of one host name may each have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
