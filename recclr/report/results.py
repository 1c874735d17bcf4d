"""What a run came to: headline, warnings, tables against the baselines, slices, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recclr.evaluate import left_out
from recclr.report.charts import Bar, bar_chart
from recclr.report.markup import Cell, figure, folded, paragraph, section, table
from recclr.settings.judging import leading_slice

_FEW_USERS = 200
# Of the test behind a verdict.
_LEVEL = 0.05
_SPLIT_NAMES = {"test": "test", "valid": "validation"}
SLICE_NAMES = {
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
        select_slice: whose figure selects, and comes first.
    """

    metrics: Mapping[str, Any]
    select: str
    ks: Sequence[int]
    select_slice: str = "all"

    @property
    def split(self) -> str | None:
        """``test`` where there is one, else ``valid``, else None."""
        return next((s for s in ("test", "valid") if s in self.metrics), None)

    def lead(self, split: str) -> str:
        """The slice that comes first: the one that selects, where a split has it."""
        return leading_slice(self.metrics.get("counts", {}).get(split, {}), self.select_slice)

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
        part = self.lead(split)
        names.sort(key=lambda name: -(self.value(split, name, part, self.select) or 0.0))
        return (["model"] if "model" in self.metrics.get(split, {}) else []) + names

    def difference(self, split: str, baseline: str) -> dict[str, float] | None:
        """Model minus baseline in the metric of selection, or None."""
        found = self.metrics.get("differences", {}).get(split, {}).get(baseline, {})
        value: dict[str, float] | None = found.get(self.lead(split), {}).get(self.select)
        return value


def headline(results: Results) -> str:
    """The run in one paragraph."""
    split = results.split
    if split is None and not results.metrics:
        return paragraph("The run is not finished: it has no metrics.json yet.", "lead")
    if split is None:
        return paragraph("Nothing was held out, so there is nothing to report.", "lead")
    part = results.lead(split)
    value = results.value(split, "model", part, results.select)
    counts = results.metrics["counts"][split][part]
    text = f"On {_SPLIT_NAMES[split]}{among(part)}, the model's {results.select} is "
    text += _figure(value)
    interval = results.interval(split, "model", part, results.select)
    if interval:
        text += f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})"
    text += f", over {counts['users']:,} users and {counts['candidates']:,} candidates."
    others = results.rankers(split)[1:]
    if others:
        text += " " + _against(results, split, others[0])
    return paragraph(text, "lead")


def _against(results: Results, split: str, best: str) -> str:
    theirs = results.value(split, best, results.lead(split), results.select)
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
    """``better`` or ``worse`` where the interval leaves out 0 and the test agrees, else ``none``.

    Of few users the two may differ.
    """
    if difference.get("p_value", 0.0) > _LEVEL:
        return "none"
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "none"


def warnings(results: Results) -> str:
    """What a reader must not overlook."""
    split = results.split
    if split is None:
        return ""
    notes = []
    part = results.lead(split)
    value = results.value(split, "model", part, results.select) or 0.0
    for name in results.rankers(split)[1:]:
        theirs = results.value(split, name, part, results.select) or 0.0
        if theirs > value:
            notes.append(f"The baseline {name} has a higher {results.select} than the model.")
    counts = results.metrics["counts"][split]
    users = counts[part]["users"]
    if users < _FEW_USERS:
        notes.append(f"Only {users:,} users were judged; small differences mean nothing.")
    notes += left_out(counts)
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
    spoken, part = _SPLIT_NAMES[split], results.lead(split)
    bars = [_bar(results, split, name) for name in rankers]
    chart = bar_chart(bars, title=f"{results.select} on {spoken}", x_label=results.select)
    metrics = [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in results.ks]
    best = {
        m: max((results.value(split, r, part, m) or 0.0 for r in rankers), default=0.0)
        for m in metrics
    }
    rows = []
    for name in rankers:
        cells = [Cell(name)]
        for metric in metrics:
            found = results.value(split, name, part, metric)
            span = results.interval(split, name, part, metric)
            small = f"{span[0]:.4f}\N{EN DASH}{span[1]:.4f}" if span else ""
            cells.append(Cell(_figure(found), small, "best" if found == best[metric] else ""))
        rows.append(("model" if name == "model" else "", cells))
    counts = results.metrics["counts"][split][part]
    caption = (
        f"{spoken}{among(part)}: mean over {counts['users']:,} users with "
        f"{counts['relevant']:,} relevant items, ranked among {counts['candidates']:,} candidates"
    )
    drawn = results.select
    if results.metrics.get("intervals", {}).get(split, {}).get("model"):
        caption += "; small: 95 % intervals over users"
        drawn += " with 95 % intervals over users"
    chosen = "chosen on validation" if results.metrics.get("valid") else "not chosen: no validation"
    return section(
        f"Against the baselines, on {spoken}{among(part)}",
        figure(chart, f"{drawn}; settings of the baselines were {chosen}."),
        table(["ranker", *metrics], rows, caption),
    )


def _bar(results: Results, split: str, name: str) -> Bar:
    part = results.lead(split)
    value = results.value(split, name, part, results.select) or 0.0
    low, high = results.interval(split, name, part, results.select) or (None, None)
    return Bar(name, value, low, high, strong=name == "model")


def slices(results: Results) -> str:
    """The metric of selection of every ranker on every slice of the main split; chance beside."""
    split = results.split
    if split is None:
        return ""
    counts = results.metrics["counts"][split]
    rankers = results.rankers(split)
    rows = []
    for part, label in SLICE_NAMES.items():
        if part not in counts:
            continue
        values = {r: results.value(split, r, part, results.select) for r in rankers}
        top = max((v for v in values.values() if v is not None), default=0.0) or 1.0
        chance = counts[part].get(f"chance_{results.select}")
        small = "" if chance is None else f"by chance {chance:.4f}"
        cells = [Cell(label, small), Cell(f"{counts[part]['users']:,}")]
        for ranker in rankers:
            value = values[ranker]
            shade = None if value is None else value / top
            cells.append(Cell(_figure(value), shade=shade))
        rows.append(("", cells))
    caption = f"{results.select} by slice of {_SPLIT_NAMES[split]}; a row is shaded by its own best"
    return section(
        "Where it is good, and where not", table(["slice", "users", *rankers], rows, caption)
    )


def difference_table(results: Results) -> str:
    """The model minus each baseline, with interval and p-value: the slice that leads, then by
    slice.
    """
    split = results.split
    lead = results.lead(split) if split else "all"
    found = results.metrics.get("differences", {}).get(split, {}) if split else {}
    # As in the other tables, best first; chance, which is no ranker, comes last.
    order = [name for name in (results.rankers(split) if split else []) if name in found]
    order += [name for name in found if name not in order]
    rows = {
        (name, part): _difference_row(name, part, found[name][part][results.select])
        for name in order
        for part in SLICE_NAMES
        if results.select in found[name].get(part, {})
    }
    columns = ["baseline", "slice", "model minus baseline", "95 % interval", "p", "the model is"]
    caption = (
        f"{results.select} on {_SPLIT_NAMES.get(split or '', '')}; p from random sign flips, not "
        "corrected for the number of rows"
    )
    leading = [row for (_, part), row in rows.items() if part == lead]
    by_slice = [row for (_, part), row in rows.items() if part != lead]
    return section(
        "Differences, paired by user",
        table(columns, leading, caption),
        folded("By slice", table(columns, by_slice, caption)),
    )


def _difference_row(
    name: str, part: str, difference: Mapping[str, float]
) -> tuple[str, Sequence[Cell]]:
    verdict = verdict_of(difference)
    shown = "no difference shown" if verdict == "none" else verdict
    return "", [
        Cell(name),
        Cell(SLICE_NAMES[part], css="text"),
        Cell(f"{difference['difference']:+.4f}", css="" if verdict == "none" else verdict),
        Cell(f"{difference['low']:+.4f} to {difference['high']:+.4f}"),
        Cell(f"{difference['p_value']:.3f}"),
        Cell(shown, css="text"),
    ]


def among(part: str) -> str:
    """Whose figures these are, for a sentence; nothing where they are everybody's."""
    return "" if part == "all" else f" ({SLICE_NAMES[part]})"


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
