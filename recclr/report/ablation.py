"""The page of an ablation: what each part is worth, and where."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from recclr.config import Config, dump_toml
from recclr.report import background
from recclr.report.charts import Bar, difference_chart
from recclr.report.markup import Cell, document, figure, paragraph, section, table
from recclr.report.results import SLICE_NAMES, among, verdict_of
from recclr.report.tuning import difference_cells
from recclr.settings.judging import leading_slice

_SPLITS = {"valid": "validation", "test": "test"}


def ablation_page(found: Mapping[str, Any], config: Config, name: str) -> str:
    """HTML of contents of ablation.json.

    Args:
        config: of the base. name: of the folder.
    """
    body = "".join(
        [
            f"<h1>{escape(name)}: what each part is worth</h1>\n",
            _lead(found),
            "".join(paragraph(note, "note") for note in found["notes"]),
            *(_comparison(found, split) for split in found["counts"]),
            *(_slices(found, split) for split in found["counts"]),
            background.definitions(found["definitions"]),
            background.configuration(dump_toml(config)),
        ]
    )
    return document(f"{name}, ablation", body)


def _lead(found: Mapping[str, Any]) -> str:
    base, count = found["rows"][0], len(found["seeds"])
    select, part = found["select"], found["select_slice"]
    value = base["metrics"]["valid"][part][select]
    text = (
        f"The base has a {select} on validation{among(part)} of {value:.4f}, "
        f"a mean over {count} seeds. Each other row is the base with one part changed, trained "
        "with the same seeds; a difference below 0 says that the base is better."
    )
    return paragraph(text, "lead")


def _comparison(found: Mapping[str, Any], split: str) -> str:
    select, spoken = found["select"], _SPLITS[split]
    part = leading_slice(found["counts"][split], found["select_slice"])
    rows, bars = [], []
    for row in found["rows"]:
        if "reason" in row:
            rows.append(("", [Cell(row["name"], row["reason"][:200]), *[Cell("")] * 6]))
            continue
        value = row["metrics"][split][part][select]
        difference = row["differences"][split].get(part, {}).get(select)
        by_seed = "  ".join(f"{metrics[select]:.4f}" for metrics in row["by_seed"][split])
        base = row is found["rows"][0]
        cells = [Cell(row["name"], "" if base else _changes(row)), Cell(f"{value:.4f}", by_seed)]
        cells += [Cell(""), Cell("")] if base else difference_cells(difference)
        cells.append(Cell(f"{difference['p_value']:.3f}" if difference else ""))
        cells.append(Cell(", ".join(f"{steps:,}" for steps in row["best_steps"])))
        cells.append(Cell(f"{row['seconds']:,.1f}"))
        rows.append(("model" if base else "", cells))
        if difference:
            bars.append(_bar(row["name"], difference))
    counts = found["counts"][split][part]
    chart = difference_chart(
        bars, title=f"Difference from the base in {select} on {spoken}", x_label=f"Δ {select}"
    )
    heads = ["row", select, "row minus base", "95 % interval", "p", "selected steps", "s"]
    caption = (
        f"{spoken}{among(part)}: mean over {len(found['seeds'])} seeds and "
        f"{counts['users']:,} users; small: by seed. Intervals are over users, of the mean over "
        "seeds; p from random sign flips, not corrected for the number of rows"
    )
    return section(
        f"Rows, on {spoken}",
        figure(chart, f"{select}, row minus base, with 95 % intervals over users."),
        table(heads, rows, caption),
    )


def _bar(name: str, difference: Mapping[str, float]) -> Bar:
    strong = verdict_of(difference) != "none"
    shown = name if len(name) <= 34 else f"{name[:33]}…"
    return Bar(shown, difference["difference"], difference["low"], difference["high"], strong)


def _changes(row: Mapping[str, Any]) -> str:
    values = [f"{key} = {value}" for key, value in row["values"].items()]
    return ", ".join([*values, *(f"{key} at its default" for key in row["without"])])


def _slices(found: Mapping[str, Any], split: str) -> str:
    select, counts = found["select"], found["counts"][split]
    lead = leading_slice(counts, found["select_slice"])
    parts = [part for part in SLICE_NAMES if part in counts and part != lead]
    rows = []
    for row in found["rows"]:
        if "reason" in row:
            continue
        cells = [Cell(row["name"])]
        for part in parts:
            difference = row["differences"][split].get(part, {}).get(select)
            verdict = "none" if difference is None else verdict_of(difference)
            small = "" if difference is None else f"{difference['difference']:+.4f}"
            value = row["metrics"][split][part][select]
            cells.append(Cell(f"{value:.4f}", small, "" if verdict == "none" else verdict))
        rows.append(("model" if row is found["rows"][0] else "", cells))
    heads = ["row", *(f"{SLICE_NAMES[p]}, {counts[p]['users']:,} users" for p in parts)]
    caption = f"{select}; small: row minus base, coloured where the interval leaves out 0"
    return section(f"By slice, on {_SPLITS[split]}", table(heads, rows, caption) if parts else "")
