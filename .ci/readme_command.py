"""Prints the README's own command that runs a given program, so that CI runs what readers are told to.

python .ci/readme_command.py pytest
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Looks at the indented lines; prints what follows the install step."""
    program = sys.argv[1]
    lines = Path("README.md").read_text().splitlines()
    commands = [line.strip() for line in lines if line.startswith("    ") and "pip install" in line]
    found = [c.partition("&&")[2].strip() for c in commands if program in c]
    if len(found) != 1:
        sys.exit(f"README.md should have one command line with an install step and {program}, found {found}")
    print(found[0])


if __name__ == "__main__":
    main()
