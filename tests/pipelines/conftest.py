"""The modules of pipelines/ are imported as the scripts beside them import each other."""

import sys
from pathlib import Path

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"
# Before the test modules are read, so no fixture.
sys.path.insert(0, str(PIPELINES))


@pytest.fixture(scope="session")
def pipelines() -> Path:
    return PIPELINES
