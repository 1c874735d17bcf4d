"""recclr: train, judge and ship two-tower retrieval models from interaction logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from recclr.api import TwoTower
    from recclr.data.interactions import Log
    from recclr.data.reading import read

__all__ = ["Log", "TwoTower", "__version__", "read"]

_HOMES = {
    "TwoTower": "recclr.api",
    "Log": "recclr.data.interactions",
    "read": "recclr.data.reading",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Loaded on first use: `recclr --help`, and a bare PyTorch container that needs the trainer
    # alone, do without data frames.
    if name not in _HOMES:
        raise AttributeError(f"module 'recclr' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
