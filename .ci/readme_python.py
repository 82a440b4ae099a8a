"""Runs the README's Python, block after block, in the folder of its quickstart.

python .ci/readme_python.py
"""

from __future__ import annotations

import re
from pathlib import Path


def main() -> None:
    """Any exception is the README's fault."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, "README.md", "exec"), names)


if __name__ == "__main__":
    main()
