"""How settings are searched: what may vary, and how training is spent; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check


@dataclass(frozen=True, kw_only=True)
class RangeSettings:
    """Numbers between two ends, both included."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    low: float
    high: float
    log: bool = False
    """Vary the logarithm: from 0.01 to 1, as many below 0.1 as above."""
    int: bool = False
    """Whole numbers only."""
    step: float | None = None
    """Distance of neighbours, counted from ``low``; None for any (of whole numbers, 1)."""

    def __post_init__(self) -> None:
        _check(self, low=(-1e12, 1e12), high=(-1e12, 1e12), step=(1e-12, 1e12))
        if not self.low < self.high:
            raise ValueError(f"low must be below high, found {self.low!r} and {self.high!r}")
        if self.log and self.low <= 0:
            raise ValueError(f"log = true needs a low above 0, found {self.low!r}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; leave one out")
        whole = (self.low, self.high, self.step or 1)
        if self.int and any(value % 1 for value in whole):
            raise ValueError(f"int = true needs whole numbers, found {list(whole)}")


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """Some values, in no order."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    choices: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise ValueError(f"choices needs at least two values, found {list(self.choices)}")
        if len({repr(choice) for choice in self.choices}) < len(self.choices):
            raise ValueError(f"choices has a value twice: {list(self.choices)}")


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How many configurations are tried, and how much training each gets.

    Successive halving (Jamieson & Talwalkar 2016; in brackets, as Li et al. 2018 do): of the
    configurations of a bracket, all are trained for a little, the best 1/``eta`` of them afresh for
    more, and so on up to a whole training.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    trials: int = 27
    """Configurations in all; the first is the one given."""
    bracket: int = 9
    """Configurations that compete with each other; the last bracket takes what is left."""
    eta: int = 3
    """Of so many, one goes on."""
    epochs: tuple[float, ...] = (0.2, 0.5, 1.0)
    """Share of ``train.epochs`` at each rung."""
    rows: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Share of the train rows at each rung, drawn at random; a higher rung keeps those of a lower
    one. Validation is judged in full at every rung."""
    startup: int = 8
    """Configurations drawn at random before the results of others say where to look."""

    def __post_init__(self) -> None:
        _check(self, trials=(1, 100_000), bracket=(1, 100_000), eta=(2, 1000), startup=(1, 100_000))
        if len(self.epochs) != len(self.rows):
            raise ValueError(
                f"epochs and rows have one share for each rung, found {len(self.epochs)} and "
                f"{len(self.rows)}"
            )
        for name in ("epochs", "rows"):
            shares = getattr(self, name)
            if not shares or shares[-1] != 1 or min(shares) <= 0 or list(shares) != sorted(shares):
                raise ValueError(
                    f"{name} must be shares above 0 that never fall and end with 1.0, found "
                    f"{list(shares)}"
                )
