"""Tabulates runs: where each stands, how fast it goes, how long it still takes, its last scores.

    python scripts/status.py runs/
    python scripts/status.py runs/ /shared/sweep --watch 10
    python scripts/status.py runs/ --json

States: starting, running, finished, stopped (by hand or by a signal), failed (the reason is below the line),
dead (killed, or its machine is gone; the same train.py command continues it). FVU, L0 and dead are those of
the last training steps, `val` those on held-out rows; `seen` is the time since the last sign of life.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from sae.errors import InputError
from sae.status import WIDTH, as_json, rows_of, table


def main() -> None:
    """Prints the table, once or again and again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, help="Folders that hold runs, at any of a few levels."
    )
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="Show it again every so often.")
    parser.add_argument("--json", action="store_true", help="Print the rows as JSON.")
    arguments = parser.parse_args()
    if arguments.watch is not None and not 0 < arguments.watch < float("inf"):
        parser.error(f"`--watch` takes seconds above 0, got {arguments.watch:g}")
    while True:
        rows = rows_of(arguments.folders)
        width = max(100, shutil.get_terminal_size((WIDTH, 0)).columns)
        text = as_json(rows) if arguments.json else table(rows, min(WIDTH, width))
        if arguments.watch is not None and sys.stdout.isatty():
            text = "\033[H\033[2J" + text  # from the top of an empty screen
        print(text, flush=True)
        if arguments.watch is None:
            return
        time.sleep(arguments.watch)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has enough of it, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:  # the way to end --watch
        print()
