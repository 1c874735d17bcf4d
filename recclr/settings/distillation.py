"""Settings of learning from another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """A second term of the loss: the ranking of candidates that a finished run, the teacher, would
    give. A small model comes closer to a large one, or to several side by side, than it comes by
    the log alone.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    run: str
    """Folder of a finished run on the same data and split. What it serves is what teaches."""
    weight: float = 0.9
    """Share of the loss; what is left is that of the log."""
    temperature: float = 1.0
    """What the teacher's scores are divided by, in standard deviations of a user's scores over the
    catalogue. The model's own are divided by ``loss.temperature``."""

    def __post_init__(self) -> None:
        _check(self, weight=(0.0, 1.0), temperature=(1e-3, 1e3))
        if not self.run:
            raise ValueError("run must name the folder of a finished run")
