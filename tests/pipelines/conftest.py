"""The modules of pipelines/ are imported as the scripts beside them import each other."""

from pathlib import Path

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture(scope="session")
def pipelines() -> Path:
    return PIPELINES


@pytest.fixture(scope="session", autouse=True)
def _importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PIPELINES)
        yield
