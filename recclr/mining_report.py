"""What a mining found, what each guard refused, and how far the negatives are from the positives.

Shape letters: Q queries, K ranks looked at, W taken for a query.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from recclr.distributed import Ranks

GUARDS = ("skip", "popular", "margin", "relative_margin", "share")
_WORDS = {
    "skip": "among the best ranks that are left out",
    "popular": "too popular",
    "margin": "too near the positive (margin)",
    "relative_margin": "too near the positive (relative_margin)",
    "share": "too near the positive (share)",
}
_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}
_QUANTILES |= {"max": 1.0}


@dataclass(frozen=True)
class MiningReport:
    """What a mining came to.

    Attributes:
        queries: users with train rows, or positives where each is a query of its own.
        candidates: items that were looked at: the best of each query, known positives left out.
        skipped: how many of them each guard refused, each under the first. candidates are these
            and ``kept``.
        kept: what passed. mined: what of it was chosen.
        short: queries with fewer kept than were wanted. empty: those with none.
        scores: "positive", "negative" and "difference" over all that was mined: mean and quantiles,
            to three digits (exact to a part in 256). Empty where nothing was mined.
        held_out_hits: mined items that are positives of their user in validation: false negatives
            that are known of. held_out_chance: how many they would be, were the items drawn by
            chance. None without validation.
        seconds: that it took, from the making of the tally.
    """

    queries: int
    candidates: int
    skipped: dict[str, int]
    kept: int
    mined: int
    short: int
    empty: int
    scores: dict[str, dict[str, float]]
    held_out_hits: int | None
    held_out_chance: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON values, with ``false_negatives``: held-out hits and chance as shares of mined."""
        found = asdict(self)
        hits, chance = found.pop("held_out_hits"), found.pop("held_out_chance")
        found["false_negatives"] = None
        if hits is not None and self.mined:
            found["false_negatives"] = {
                "hits": hits,
                "share": hits / self.mined,
                "chance": chance / self.mined,
            }
        return found

    def __str__(self) -> str:
        lines = [f"{'':<8}{'positive':>12}{'negative':>12}{'difference':>12}"]
        for name in ("mean", *_QUANTILES) if self.scores else ():
            cells = (self.scores[kind][name] for kind in ("positive", "negative", "difference"))
            lines.append(f"{name:<8}" + "".join(f"{cell:>12.4f}" for cell in cells))
        lines.append(
            f"{self.mined:,} negatives for {self.queries:,} queries, of {self.candidates:,} "
            f"candidates; {self.kept:,} passed all guards"
        )
        lines += [
            f"skipped {count:,} ({count / max(self.candidates, 1):.1%}): {_WORDS[name]}"
            for name, count in self.skipped.items()
            if count
        ]
        if self.short:
            lines.append(
                f"{self.short:,} queries have fewer than were wanted, {self.empty:,} of them none"
            )
        if self.held_out_hits is not None and self.held_out_chance is not None and self.mined:
            lines.append(
                f"{self.held_out_hits:,} ({self.held_out_hits / self.mined:.2%}) are positives in "
                f"validation; by chance {self.held_out_chance / self.mined:.2%} would be"
            )
        return "\n".join(lines)


class Spread:
    """Quantiles of any number of float32 values in fixed memory, and of several ranks alike.

    Values are counted by their 16 leading bits (sign, exponent, 7 of the mantissa), in an order
    that is that of the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(1 << 16, dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Float32 of any shape, finite."""
        bits = values.contiguous().view(torch.int32).flatten() >> 16
        # Negative numbers rise as their bits fall.
        places = torch.where(bits < 0, -1 - (bits & 0x7FFF), bits) + (1 << 15)
        self.counts += torch.bincount(places, minlength=1 << 16)
        self.total += values.double().sum()

    def summary(self) -> dict[str, float]:
        """Mean and quantiles; empty for no values."""
        ends, found = self.counts.cumsum(0), {}
        count = int(ends[-1])
        if not count:
            return {}
        found["mean"] = round(float(self.total) / count, 6)
        for name, level in _QUANTILES.items():
            place = int(torch.searchsorted(ends, min(int(level * count), count - 1), right=True))
            found[name] = _value_of(place)
        return found


def _value_of(place: int) -> float:
    """The middle of the numbers that a place stands for."""
    place -= 1 << 15
    bits = place if place >= 0 else (-1 - place) | 0x8000
    raw = torch.tensor([(bits << 16) | 0x8000]).to(torch.int32)
    return round(float(raw.view(torch.float32)), 6)


class Tally:
    """Counts of a mining, on its device, as blocks of queries come in.

    Args:
        count: negatives wanted for a query.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.began = count, time.perf_counter()
        names = ("queries", "candidates", "kept", "mined", "short", "empty", "hits", *GUARDS)
        zero = torch.zeros(len(names), dtype=torch.int64, device=device)
        self.counts, self.place = zero, {name: n for n, name in enumerate(names)}
        self.chance = torch.zeros((), dtype=torch.float64, device=device)
        self.judged = False
        self.spreads = {kind: Spread(device) for kind in ("positive", "negative", "difference")}

    def _add(self, name: str, number: Tensor) -> None:
        self.counts[self.place[name]] += number

    def add_candidates(self, alive: Tensor, asked: Tensor) -> None:
        """Bool [Q, K], items that are looked at; bool [Q], queries that count."""
        self._add("queries", asked.sum())
        self._add("candidates", alive.sum())

    def add_skipped(self, guard: str, refused: Tensor) -> None:
        """Bool [Q, K], what a guard of ``GUARDS`` refuses of what is left."""
        self._add(guard, refused.sum())

    def add_kept(self, alive: Tensor, asked: Tensor) -> None:
        """Bool [Q, K], what passed all guards."""
        per_query = alive.sum(1)
        self._add("kept", per_query.sum())
        self._add("short", ((per_query < self.count) & asked).sum())
        self._add("empty", ((per_query == 0) & asked).sum())

    def add_taken(self, positives: Tensor, scores: Tensor, here: Tensor) -> None:
        """Float32 [Q] and [Q, W], and where of these an item was chosen."""
        self._add("mined", here.sum())
        positives, scores = positives.unsqueeze(1).expand(scores.shape)[here], scores[here]
        for kind, values in zip(self.spreads, (positives, scores, positives - scores), strict=True):
            self.spreads[kind].add(values)

    def add_held_out(self, hits: Tensor, chance: Tensor) -> None:
        """Number of mined items that are held-out positives, and its expectation by chance."""
        self.judged = True
        self._add("hits", hits)
        self.chance += chance

    def sum_over(self, ranks: Ranks) -> None:
        """Make this the tally of all ranks; each has been given its own part."""
        judged = torch.tensor(int(self.judged), device=self.counts.device)
        self.judged = bool(ranks.sum_(judged, "the report of mining"))
        for part in (self.counts, self.chance):
            ranks.sum_(part, "the report of mining")
        for spread in self.spreads.values():
            ranks.sum_(spread.counts, "the report of mining")
            ranks.sum_(spread.total, "the report of mining")

    def report(self) -> MiningReport:
        """What it all came to."""
        found = dict(zip(self.place, self.counts.tolist(), strict=True))
        scores = {kind: spread.summary() for kind, spread in self.spreads.items()}
        return MiningReport(
            queries=found["queries"],
            candidates=found["candidates"],
            skipped={name: found[name] for name in GUARDS},
            kept=found["kept"],
            mined=found["mined"],
            short=found["short"],
            empty=found["empty"],
            scores={kind: each for kind, each in scores.items() if each},
            held_out_hits=found["hits"] if self.judged else None,
            held_out_chance=float(self.chance) if self.judged else None,
            seconds=time.perf_counter() - self.began,
        )
