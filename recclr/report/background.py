"""What stands behind the figures: training, data, definitions, configuration, machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from recclr.report.charts import Line, line_chart
from recclr.report.markup import Cell, figure, pairs, paragraph, section, table

_STAGES = ("selection", "refit")
_IN_OUT = ("rows_in", "rows_out")
_SHARES = {
    "duplicate_share": "rows of a batch whose item an earlier row has",
    "masked_share": "scored pairs left out as known positives",
}


def training(log: Sequence[Mapping[str, Any]], select: str, steps: int | None) -> str:
    """Loss, metric over time and temperature, from the lines of log.jsonl."""
    steps_of = _by_stage(log, "step")
    stages = [stage for stage in _STAGES if stage in steps_of]
    loss = line_chart(
        [Line(stage, [(e["epoch"], e["loss"]) for e in steps_of[stage]]) for stage in stages],
        title="Training loss by epoch",
        x_label="epoch",
        y_label="loss",
    )
    evaluations = _by_stage(log, "evaluation").get("selection", [])
    points = [
        (e["epoch"], e["metrics"][select])
        for e in evaluations
        if math.isfinite(e.get("metrics", {}).get(select, math.nan))
    ]
    best = max(points, key=lambda point: point[1])[0] if points else None
    metric = line_chart(
        [Line(select, points, best)],
        title=f"{select} on validation by epoch",
        x_label="epoch",
        y_label=select,
    )
    temperature = line_chart(
        [
            Line(stage, [(e["epoch"], e["temperature"]) for e in steps_of[stage]])
            for stage in stages
        ],
        title="Temperature by epoch",
        x_label="epoch",
        y_label="temperature",
    )
    return section(
        "Training",
        figure(metric, f"{select} on validation; the marked point was selected."),
        figure(loss, "Training loss, mean over positives of a batch."),
        figure(temperature, "Temperature that divides the scores."),
        pairs(_pace(steps_of, steps)),
    )


def _by_stage(log: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for event in log:
        if event.get("kind") == kind:
            found.setdefault(str(event.get("stage")), []).append(event)
    return found


def _pace(
    steps: Mapping[str, list[Mapping[str, Any]]], selected: int | None
) -> list[tuple[str, str]]:
    rows = [] if selected is None else [("selected steps", f"{selected:,}")]
    for stage, events in steps.items():
        rates = sorted(e["positives_per_s"] for e in events if e.get("positives_per_s"))
        if rates:
            median = rates[len(rates) // 2]
            rows.append((f"{stage}: positives per second, median", f"{median:,.0f}"))
        for key, text in _SHARES.items():
            found = sorted(e[key] for e in events if key in e)
            if found:
                rows.append((f"{stage}: {text}, median", f"{found[len(found) // 2]:.2%}"))
    return rows


def data(found: Mapping[str, Any]) -> str:
    """Rows by step, bad rows, split, inputs, from data.json."""
    steps = table(
        ["step", "rows in", "rows out"],
        [
            ("", [Cell(_words(step["name"])), *(Cell(_count(step, key)) for key in _IN_OUT)])
            for step in found.get("steps", [])
        ],
        "Rows that each step was given and left",
    )
    split = found.get("split", {})
    keys = ("rows", "users", "items")
    parts = table(
        ["part", *keys, "rows of unknown users", "rows of unknown items"],
        [
            (
                "",
                [
                    Cell(_words(name)),
                    *(Cell(_count(counts, key)) for key in keys),
                    Cell(_count(counts, "rows_of_unknown_users")),
                    Cell(_count(counts, "rows_of_unknown_items")),
                ],
            )
            for name, counts in split.get("counts", {}).items()
        ],
        f"Split by {split.get('by', 'nothing')}",
    )
    cutoffs = [
        (f"{name} begins", datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
        for name, second in split.get("cutoffs", {}).items()
    ]
    bad = [(reason, f"{count:,}") for reason, count in found.get("quarantined", {}).items()]
    inputs = [
        (name, f"{facts['bytes']:,} bytes, tail sha256 {facts['tail_sha256'][:16]}")
        for name, facts in found.get("inputs", {}).items()
    ]
    return section(
        "Data",
        steps,
        pairs(bad, "Bad rows, in quarantine.parquet"),
        parts,
        pairs(cutoffs),
        "".join(paragraph(note, "soft") for note in found.get("notes", [])),
        pairs(inputs, "Inputs"),
    )


def baselines(found: Mapping[str, Any], *, validated: bool) -> str:
    """The settings that validation chose, or the first where there was none."""
    rows = []
    for name, choice in found.items():
        settings = ", ".join(f"{key} = {value}" for key, value in choice["settings"].items())
        score = f"validation {choice['score']:.4f}" if validated else "not chosen: no validation"
        rows.append((name, f"{settings or 'no settings'} ({score})"))
    return section("Settings of the baselines", pairs(rows))


def definitions(found: Mapping[str, str]) -> str:
    """What every figure means."""
    return section("Definitions", pairs(found.items()))


def configuration(text: str) -> str:
    """The complete configuration, re-runnable."""
    return section("Configuration", f"<pre>{escape(text)}</pre>\n") if text else ""


def environment(found: Mapping[str, Any]) -> str:
    """Machine and versions."""
    rows = [
        (
            name,
            ", ".join(f"{k} {v}" for k, v in value.items())
            if isinstance(value, dict)
            else str(value),
        )
        for name, value in found.items()
    ]
    return section("Machine", pairs(rows))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(counts: Mapping[str, Any], key: str) -> str:
    return f"{counts[key]:,}" if key in counts else ""
