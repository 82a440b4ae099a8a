"""What the tests of sparse operations share."""

import os

import pytest

SWITCHES = ["on"] if os.environ.get("TRITON_INTERPRET") == "1" else ["on", "off"]
"""Of SAE_KERNELS; Triton's interpreter is there to test what is on."""


@pytest.fixture
def with_kernels(monkeypatch):
    """Switches the kernels on or off, as the environment does."""
    return lambda state: monkeypatch.setenv("SAE_KERNELS", state)
