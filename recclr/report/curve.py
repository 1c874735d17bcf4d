"""curve.html: what model and baselines come to with more rows, on one page with one chart."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from recclr.files import write_bytes_atomic
from recclr.report.charts import Line, line_chart
from recclr.report.markup import Cell, document, figure, paragraph, table
from recclr.report.results import among

CURVE_PAGE = "curve.html"


def write_curve_page(out: Path, curve: Mapping[str, Any]) -> Path:
    """Write OUT/curve.html.

    Args:
        curve: contents of curve.json (``curves.learning_curve``).
    """
    title, select = Path(*out.resolve().parts[-2:]).as_posix(), curve["select"]
    chart = line_chart(
        _lines(curve),
        title=f"{select} on validation by share of the train rows",
        x_label="share of the train rows",
        y_label=select,
        log_x=True,
    )
    body = [
        f"<h1>{escape(title)}</h1>\n",
        paragraph(_headline(curve), "lead"),
        paragraph(curve["sampling"], "soft"),
        figure(
            chart,
            f"{select} on validation, with 95 % intervals over users where there are any. "
            "Checkpoints and the settings of baselines were chosen on the same rows.",
        ),
        table(["ranker", *(_heading(point) for point in curve["shares"])], _rows(curve)),
    ]
    write_bytes_atomic(out / CURVE_PAGE, document(title, "".join(body)).encode("utf-8"))
    return out / CURVE_PAGE


def names(curve: Mapping[str, Any]) -> list[str]:
    """The model, then the baselines, best at the largest share first."""
    found = dict.fromkeys(name for point in curve["shares"] for name in point["rankers"])
    last = curve["shares"][-1]["rankers"]
    return sorted(
        found, key=lambda name: (name != "model", -last.get(name, {"value": -1.0})["value"])
    )


def _lines(curve: Mapping[str, Any]) -> list[Line]:
    lines = []
    for name in names(curve):
        points, intervals = [], {}
        for point in curve["shares"]:
            if (found := point["rankers"].get(name)) is not None:
                points.append((point["rows_share"], found["value"]))
                if "low" in found:
                    intervals[point["rows_share"]] = found["low"], found["high"]
        lines.append(Line(name, points, intervals=intervals))
    return lines


def _headline(curve: Mapping[str, Any]) -> str:
    """Where the model stands beside the best baseline, share by share."""
    told = []
    for point in curve["shares"]:
        model = point["rankers"]["model"]["value"]
        others = {n: f["value"] for n, f in point["rankers"].items() if n != "model"}
        if not others:
            continue
        best = max(others, key=lambda name: others[name])
        told.append(
            f"{point['rows_share']:.1%} of the rows: model {model:.4f}, best baseline {best} "
            f"{others[best]:.4f}"
        )
    whose = among(curve["select_slice"])
    return f"{curve['select']} on validation{whose}. " + "; ".join(told) + ("." if told else "")


def _heading(point: Mapping[str, Any]) -> str:
    return f"{point['rows_share']:.1%} ({point['rows']:,} rows)"


def _rows(curve: Mapping[str, Any]) -> list[tuple[str, list[Cell]]]:
    rows = []
    for name in names(curve):
        cells = [Cell(name)]
        for point in curve["shares"]:
            found = point["rankers"].get(name)
            if found is None:
                cells.append(Cell("n/a"))
                continue
            dash = "\N{EN DASH}"
            small = f"{found['low']:.4f}{dash}{found['high']:.4f}" if "low" in found else ""
            cells.append(Cell(f"{found['value']:.4f}", small))
        rows.append(("model" if name == "model" else "", cells))
    return rows
