"""Prints what train.py is to be given for one line of a sweep, each word with a NUL behind it.

    python scripts/slurm/sweep_line.py 3 sweep.txt --config layer12.yaml

Used by sweep.sbatch. Words are split as a shell would, but nothing is expanded and nothing runs.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT_DIR = "--trainer.default_root_dir"


def arguments(number: int, file: Path, common: list[str]) -> list[str]:
    """What train.py gets for line `number` (from 1); nothing for an empty line or a comment.

    Raises:
        ValueError: if there is no such line, or it does not parse.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    if not 1 <= number <= len(lines):
        raise ValueError(
            f"{file} has {len(lines)} lines and no line {number}; submit with --array=1-{len(lines)}"
        )
    line = lines[number - 1]
    if line.lstrip().startswith("#"):
        return []
    try:
        words = shlex.split(line)  # a # within a line is kept: dataset names may have one
    except ValueError as error:
        raise ValueError(f"line {number} of {file}: {str(error).lower()}: {line}") from error
    if not words:
        return []
    if not words[0].startswith("-"):
        words.insert(0, "--config")
    given = any(word == ROOT_DIR or word.startswith(f"{ROOT_DIR}=") for word in words)
    # The folder comes last: a configuration in the line has its own, which is the same for all lines.
    return [*common, *words, *([] if given else [ROOT_DIR, f"runs/{file.stem}/{number}"])]


def main() -> None:
    """Reads the command line; errors are one line and status 2."""
    try:
        words = arguments(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except (OSError, ValueError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    sys.stdout.write("".join(f"{word}\0" for word in words))


if __name__ == "__main__":
    main()
