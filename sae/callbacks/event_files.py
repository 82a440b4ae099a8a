"""TensorBoard's event files as they were when a checkpoint was taken."""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard.writer import SummaryWriter

_PATTERN = "events.out.tfevents*"


def event_file_sizes(writer: SummaryWriter) -> dict[str, int]:
    """Bytes of each event file of a run, all that was logged until now included."""
    writer.flush()
    return {path.name: path.stat().st_size for path in sorted(Path(writer.get_logdir()).glob(_PATTERN))}


def cut_event_files(writer: SummaryWriter, sizes: dict[str, int], step: int) -> None:
    """Takes from the run's event files what was logged after a checkpoint: it will be logged again.

    Args:
        writer: of the session that continues; its own file is left alone.
        sizes: what `event_file_sizes` said at the checkpoint.
        step: of the checkpoint; a TensorBoard that is open forgets what it read of later ones.
    """
    own = Path(writer.file_writer.event_writer._file_name).name  # pyright: ignore[reportOptionalMemberAccess]
    for path in sorted(Path(writer.get_logdir()).glob(_PATTERN)):
        if path.name == own:
            continue
        if path.name not in sizes:
            path.unlink()
        elif path.stat().st_size > sizes[path.name]:
            with path.open("r+b") as file:
                file.truncate(sizes[path.name])
    start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    writer.file_writer.add_event(start)  # pyright: ignore[reportOptionalMemberAccess]
