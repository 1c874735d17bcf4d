"""What a run came to: headline, warnings, tables against the baselines, slices, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recclr.report.charts import Bar, bar_chart
from recclr.report.markup import Cell, figure, paragraph, section, table

_FEW_USERS = 200
_SLICE_NAMES = {
    "all": "all users",
    "warm_items": "warm items",
    "cold_items": "cold items, in the full ranking",
    "cold_items_among_cold": "cold items, among cold candidates",
    "warm_users": "warm users",
    "cold_users": "cold users",
    "head": "head (top 20 % of interactions)",
    "torso": "torso (next 60 %)",
    "tail": "tail (last 20 %)",
}


@dataclass(frozen=True)
class Results:
    """metrics.json with the names that the page needs.

    Attributes:
        metrics: contents of metrics.json; an empty mapping for a run that has none.
        select: metric of selection, such as recall@20. ks: cut-offs.
    """

    metrics: Mapping[str, Any]
    select: str
    ks: Sequence[int]

    @property
    def split(self) -> str | None:
        """``test`` where there is one, else ``valid``, else None."""
        return next((s for s in ("test", "valid") if s in self.metrics), None)

    def value(self, split: str, ranker: str, part: str, metric: str) -> float | None:
        """A figure, or None where the ranker or slice is not there."""
        found = self.metrics.get(split, {}).get(ranker, {}).get(part, {}).get(metric)
        return None if found is None else float(found)

    def interval(
        self, split: str, ranker: str, part: str, metric: str
    ) -> tuple[float, float] | None:
        """Its interval, or None."""
        intervals = self.metrics.get("intervals", {}).get(split, {})
        found = intervals.get(ranker, {}).get(part, {}).get(metric)
        return None if found is None else (float(found[0]), float(found[1]))

    def rankers(self, split: str) -> list[str]:
        """The model first, then the baselines, best first."""
        names = [name for name in self.metrics.get(split, {}) if name != "model"]
        names.sort(key=lambda name: -(self.value(split, name, "all", self.select) or 0.0))
        return (["model"] if "model" in self.metrics.get(split, {}) else []) + names

    def difference(self, split: str, baseline: str, part: str = "all") -> dict[str, float] | None:
        """Model minus baseline in the metric of selection, or None."""
        found = self.metrics.get("differences", {}).get(split, {})
        value: dict[str, float] | None = found.get(baseline, {}).get(part, {}).get(self.select)
        return value


def headline(results: Results) -> str:
    """The run in one paragraph."""
    split = results.split
    if split is None:
        return paragraph("Nothing was held out, so there is nothing to report.", "lead")
    value = results.value(split, "model", "all", results.select)
    counts = results.metrics["counts"][split]["all"]
    text = f"On {split}, the model's {results.select} is {_figure(value)}"
    interval = results.interval(split, "model", "all", results.select)
    if interval:
        text += f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})"
    text += f", over {counts['users']:,} users and {counts['candidates']:,} candidates."
    others = results.rankers(split)[1:]
    if others:
        text += " " + _against(results, split, others[0])
    return paragraph(text, "lead")


def _against(results: Results, split: str, best: str) -> str:
    theirs = results.value(split, best, "all", results.select)
    text = f"The best baseline, {best}, has {_figure(theirs)}"
    difference = results.difference(split, best)
    if difference is None:
        return text + "."
    low, high = difference["low"], difference["high"]
    verdict = {
        "better": "the model is better",
        "worse": "the model is worse",
        "none": "no difference is shown",
    }[verdict_of(difference)]
    return text + f": {verdict} ({difference['difference']:+.4f}, {low:+.4f} to {high:+.4f})."


def verdict_of(difference: Mapping[str, float]) -> str:
    """``better`` or ``worse`` where the interval leaves out 0, else ``none``."""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "none"


def warnings(results: Results) -> str:
    """What a reader must not overlook."""
    split = results.split
    if split is None:
        return ""
    notes = []
    value = results.value(split, "model", "all", results.select) or 0.0
    for name in results.rankers(split)[1:]:
        theirs = results.value(split, name, "all", results.select) or 0.0
        if theirs > value:
            notes.append(f"The baseline {name} has a higher {results.select} than the model.")
    counts = results.metrics["counts"][split]
    users = counts["all"]["users"]
    if users < _FEW_USERS:
        notes.append(f"Only {users:,} users were judged; small differences mean nothing.")
    if counts["all"].get("dropped_users"):
        notes.append(
            f"{counts['all']['dropped_users']:,} held-out users are not in the figures: they had "
            "all their held-out items before."
        )
    if "cold_items" not in counts:
        notes.append("No held-out item is cold: these figures say nothing about new items.")
    for name, reason in results.metrics.get("skipped_baselines", {}).items():
        notes.append(f"Baseline {name} was left out: {reason}.")
    return "".join(paragraph(note, "note") for note in notes)


def comparison(results: Results, split: str) -> str:
    """Chart and table of all rankers on one split."""
    rankers = results.rankers(split)
    if not rankers:
        return ""
    bars = [_bar(results, split, name) for name in rankers]
    chart = bar_chart(bars, title=f"{results.select} by ranker on {split}", x_label=results.select)
    metrics = [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in results.ks]
    best = {
        m: max((results.value(split, r, "all", m) or 0.0 for r in rankers), default=0.0)
        for m in metrics
    }
    rows = []
    for name in rankers:
        cells = [Cell(name)]
        for metric in metrics:
            found = results.value(split, name, "all", metric)
            span = results.interval(split, name, "all", metric)
            small = f"{span[0]:.4f} to {span[1]:.4f}" if span else ""
            cells.append(Cell(_figure(found), small, "best" if found == best[metric] else ""))
        rows.append(("model" if name == "model" else "", cells))
    counts = results.metrics["counts"][split]["all"]
    caption = (
        f"{split}: mean over {counts['users']:,} users with {counts['relevant']:,} relevant items, "
        f"ranked among {counts['candidates']:,} candidates; 95 % intervals over users"
    )
    return section(
        f"Against the baselines, on {split}",
        figure(
            chart,
            f"{results.select} with 95 % intervals; settings of the baselines were "
            "chosen on validation.",
        ),
        table(["ranker", *metrics], rows, caption),
    )


def _bar(results: Results, split: str, name: str) -> Bar:
    value = results.value(split, name, "all", results.select) or 0.0
    low, high = results.interval(split, name, "all", results.select) or (None, None)
    return Bar(name, value, low, high, strong=name == "model")


def slices(results: Results) -> str:
    """The metric of selection of every ranker on every slice of the main split."""
    split = results.split
    if split is None:
        return ""
    counts = results.metrics["counts"][split]
    rankers = results.rankers(split)
    rows = []
    for part, label in _SLICE_NAMES.items():
        if part not in counts:
            continue
        values = {r: results.value(split, r, part, results.select) for r in rankers}
        top = max((v for v in values.values() if v is not None), default=0.0) or 1.0
        cells = [Cell(label), Cell(f"{counts[part]['users']:,}")]
        for ranker in rankers:
            value = values[ranker]
            shade = None if value is None else value / top
            cells.append(Cell(_figure(value), shade=shade))
        rows.append(("", cells))
    caption = f"{results.select} by slice; a row is shaded by its own best"
    return section(
        "Where it is good, and where not", table(["slice", "users", *rankers], rows, caption)
    )


def difference_table(results: Results) -> str:
    """The model minus each baseline, on each slice, with interval and p-value."""
    split = results.split
    found = results.metrics.get("differences", {}).get(split, {}) if split else {}
    rows = []
    for name, parts in found.items():
        for part in _SLICE_NAMES:
            difference = parts.get(part, {}).get(results.select)
            if difference is None:
                continue
            verdict = verdict_of(difference)
            cells = [
                Cell(name),
                Cell(_SLICE_NAMES[part]),
                Cell(f"{difference['difference']:+.4f}", css="" if verdict == "none" else verdict),
                Cell(f"{difference['low']:+.4f} to {difference['high']:+.4f}"),
                Cell(f"{difference['p_value']:.3f}"),
                Cell({"none": "no difference shown"}.get(verdict, verdict)),
            ]
            rows.append(("", cells))
    if not rows:
        return ""
    columns = ["baseline", "slice", "model minus baseline", "95 % interval", "p", "the model is"]
    return section(
        "Differences, paired by user",
        table(
            columns,
            rows,
            f"{results.select}; p from random sign flips, not corrected for the number of rows",
        ),
    )


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
