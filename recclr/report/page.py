"""Reads a run folder and lays out the page."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from recclr.files import write_bytes_atomic
from recclr.report import background, vectors
from recclr.report.markup import document, paragraph
from recclr.report.results import (
    Results,
    comparison,
    difference_table,
    headline,
    slices,
    warnings,
)
from recclr.run_folder import (
    CONFIG,
    DATA,
    ENVIRONMENT,
    LOG,
    METRICS,
    REPORT,
    read_config,
    read_json,
)


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what else is in the run folder; files that are missing are said.

    Raises:
        ConfigError: ``run`` is no run folder. CheckpointError: a file of it is no JSON.
    """
    config = read_config(run)
    metrics = _optional(run / METRICS)
    judging = config.evaluate
    results = Results(metrics, judging.select, judging.ks, judging.select_slice)
    data = _optional(run / DATA)
    steps, log = metrics.get("selected_steps"), _log(run / LOG)
    # A run is often called "run": the folder it stands in tells it from others.
    title = Path(*run.resolve().parts[-2:]).as_posix()
    names = (METRICS, DATA, LOG, ENVIRONMENT)
    missing = ", ".join(name for name in names if not (run / name).exists())
    body = "".join(
        [
            f"<h1>{escape(title)}</h1>\n",
            paragraph(data["log"], "soft") if data.get("log") else "",
            headline(results),
            paragraph(f"Not in the run folder: {missing}.", "note") if missing else "",
            warnings(results),
            comparison(results, "test"),
            slices(results),
            difference_table(results),
            comparison(results, "valid"),
            background.training(log, results.select, steps),
            vectors.section_of(log, metrics.get("monitors", {})),
            background.baselines(
                metrics.get("baselines", {}), validated=bool(metrics.get("valid"))
            ),
            background.data(data),
            background.definitions(metrics.get("definitions", {})),
            background.configuration((run / CONFIG).read_text("utf-8")),
            background.environment(_optional(run / ENVIRONMENT)),
        ]
    )
    write_bytes_atomic(run / REPORT, document(title, body).encode("utf-8"))
    return run / REPORT


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _log(path: Path) -> list[dict[str, Any]]:
    """Lines of log.jsonl in order; a resumed run repeats steps, of which the last count.

    The last line of a killed run may be cut off; it is passed over. So are the lines of further
    seeds (``blend.seeds``), whose trainings are not shown.
    """
    if not path.exists():
        return []
    events: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict) or "seed" in event:
            continue
        if isinstance(event.get("step"), int):
            names = (event.get(name) for name in ("kind", "stage", "step", "cause"))
            events[tuple(map(str, names))] = event
    return sorted(events.values(), key=lambda event: int(event["step"]))
