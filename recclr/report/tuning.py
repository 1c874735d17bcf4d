"""The page of a search: what was tried, what it came to, what mattered, winner against default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from recclr.config import Config, dump_toml, with_changes
from recclr.report import background
from recclr.report.charts import Bar, Line, bar_chart, line_chart
from recclr.report.markup import Cell, document, figure, folded, pairs, paragraph, section, table
from recclr.report.results import SLICE_NAMES, among, verdict_of

_FEW = 0.1


def tuning_page(found: Mapping[str, Any], config: Config, name: str) -> str:
    """HTML of contents of tune.json.

    Args:
        config: that the search started from. name: of the folder.
    """
    winner = with_changes(config, found["winner"]["params"])
    body = "".join(
        [
            f"<h1>{escape(name)}: search of settings</h1>\n",
            _headline(found),
            _notes(found),
            _winner(found),
            _by_slice(found),
            _progress(found),
            _importance(found),
            _trials(found),
            _rungs(found),
            background.definitions(found["definitions"]),
            background.configuration(dump_toml(winner)),
        ]
    )
    return document(f"{name}, search", body)


def _headline(found: Mapping[str, Any]) -> str:
    select, final = found["select"], found["final"]
    number = found["winner"]["number"]
    if number == 0:
        text = f"Nothing that was tried beats the default in {select} on validation."
        return paragraph(text, "lead")
    part = found["select_slice"]
    tuned, default = (final["metrics"][n][part][select] for n in ("tuned", "default"))
    text = (
        f"Trial {number} has a {select} on validation{among(part)} of {tuned:.4f}, the default "
        f"{default:.4f}, each a mean over {len(final['seeds'])} seeds"
    )
    difference = final["difference"].get(part, {}).get(select)
    if difference:
        text += (
            f": {difference['difference']:+.4f} ({difference['low']:+.4f} to "
            f"{difference['high']:+.4f}, 95 % over users)"
        )
    return paragraph(text + ".", "lead")


def _notes(found: Mapping[str, Any]) -> str:
    notes = [
        "The winner was chosen on these validation rows, so its figures flatter it; "
        "`recclr train --config best.toml` judges it on test, once."
    ]
    if found["stopped_by_budget"]:
        notes.append("The budget ended the search before all trials were trained.")
    failed = sum(rung["failed"] for rung in found["rungs"])
    if failed:
        notes.append(f"{failed:,} trainings came to nothing; why is in the table of trials.")
    return "".join(paragraph(note, "note") for note in notes)


def _winner(found: Mapping[str, Any]) -> str:
    params = found["winner"]["params"]
    rows = [
        ("", [Cell(key), Cell(_value(found["default"][key])), Cell(_value(params[key]))])
        for key in params
    ]
    final, select, part = found["final"], found["select"], found["select_slice"]
    seeds = [
        (
            "",
            [
                Cell(name),
                *(Cell(f"{metrics[select]:.4f}") for metrics in final["by_seed"][name]),
                Cell(f"{final['metrics'][name][part][select]:.4f}"),
                Cell(", ".join(f"{steps:,}" for steps in final["best_steps"][name])),
            ],
        )
        for name in ("tuned", "default")
    ]
    heads = ["", *(f"seed {seed}" for seed in final["seeds"]), "mean", "selected steps"]
    return section(
        "Winner and default",
        table(["setting", "default", "winner"], rows, "What the winner changes (best.toml)"),
        table(heads, seeds, f"{select} on validation{among(part)}, trained in full"),
    )


def _by_slice(found: Mapping[str, Any]) -> str:
    final, select = found["final"], found["select"]
    rows = []
    for part, label in SLICE_NAMES.items():
        if part not in final["counts"]:
            continue
        values = [final["metrics"][name][part][select] for name in ("tuned", "default")]
        difference = final["difference"].get(part, {}).get(select)
        cells = [Cell(label), Cell(f"{final['counts'][part]['users']:,}")]
        cells += [Cell(f"{value:.4f}") for value in values]
        rows.append(("", cells + difference_cells(difference)))
    columns = ["slice", "users", "tuned", "default", "tuned minus default", "95 % interval"]
    caption = f"{select} on validation, means over seeds; intervals are over users"
    return section("Where it is better, and where not", table(columns, rows, caption))


def difference_cells(difference: Mapping[str, float] | None) -> list[Cell]:
    """A difference, coloured where its interval leaves out 0, and the interval."""
    if difference is None:
        return [Cell("n/a"), Cell("")]
    verdict = verdict_of(difference)
    return [
        Cell(f"{difference['difference']:+.4f}", css="" if verdict == "none" else verdict),
        Cell(f"{difference['low']:+.4f} to {difference['high']:+.4f}"),
    ]


def _progress(found: Mapping[str, Any]) -> str:
    select = found["select"]
    lines = [
        Line(_share(rung), [(x, y) for x, y in points])
        for rung, points in zip(found["rungs"], found["best_so_far"], strict=True)
    ]
    chart = line_chart(
        # The last rungs are the ones to see, where there are more than colours.
        lines[-3:],
        title=f"Best {select} so far, by rung",
        x_label="trainings",
        y_label=select,
    )
    caption = f"Best {select} on validation so far at each rung; rungs are not to be compared."
    return section("Progress", figure(chart, caption))


def _share(rung: Mapping[str, Any]) -> str:
    return f"{rung['epochs']:.0%} epochs, {rung['rows']:.0%} rows"


def _importance(found: Mapping[str, Any]) -> str:
    importance = found["importance"]
    if not importance:
        return section("What mattered", paragraph("Too few trials, or all alike, to say.", "soft"))
    values = dict(sorted(importance["values"].items(), key=lambda pair: -pair[1]))
    bars = [Bar(key, value, strong=value > _FEW) for key, value in values.items()]
    what = {
        "fanova": "share of the variance of the metric that each setting explains (fANOVA)",
        "rank": "strength of the rank correlation of each setting with the metric",
    }[importance["method"]]
    chart = bar_chart(bars, title="Importance of each setting", x_label="importance")
    direction = [
        (key, f"{importance['direction'][key]:+.2f}")
        for key in values
        if key in importance["direction"]
    ]
    return section(
        "What mattered",
        figure(chart, f"At the first rung: {what}. Few trials say little."),
        pairs(direction, "Rank correlation with the metric: above 0, more is better"),
    )


def _trials(found: Mapping[str, Any]) -> str:
    keys = list(found["space"])
    best = found["winner"]["number"]
    numbers: dict[int, list[Mapping[str, Any]]] = {}
    for trained in found["trainings"]:
        numbers.setdefault(trained["number"], []).append(trained)
    # The furthest first, and of those the best.
    order = sorted(numbers, key=lambda n: (-numbers[n][-1]["rung"], -_worth(numbers[n][-1]), n))
    rows = []
    for number in order:
        last = numbers[number][-1]
        params = last["params"] or found["default"]
        cells = [Cell(f"{number}" + (" (default)" if number == 0 else ""), last["reason"][:200])]
        cells += [Cell(_value(params[key])) for key in keys]
        cells += _rung_cells(numbers[number], len(found["rungs"]))
        rows.append(("model" if number == best else "", cells))
    columns = ["trial", *keys, *map(_share, found["rungs"]), "s"]
    shown, rest = rows[:20], rows[20:]
    caption = f"{found['select']} on validation at each rung; the winner in bold"
    return section(
        "Trials",
        table(columns, shown, caption),
        folded(f"{len(rest):,} more", table(columns, rest)) if rest else "",
    )


def _rung_cells(trainings: Sequence[Mapping[str, Any]], num_rungs: int) -> list[Cell]:
    at = {trained["rung"]: trained for trained in trainings}
    cells = []
    for rung in range(num_rungs):
        value = at[rung]["value"] if rung in at else None
        text = "" if rung not in at else "nothing" if value is None else f"{value:.4f}"
        cells.append(Cell(text))
    return [*cells, Cell(f"{sum(trained['seconds'] for trained in trainings):,.1f}")]


def _worth(trained: Mapping[str, Any]) -> float:
    return -1.0 if trained["value"] is None else float(trained["value"])


def _rungs(found: Mapping[str, Any]) -> str:
    rows = [
        ("", [Cell(_share(rung)), Cell(f"{rung['trained']:,}"), Cell(f"{rung['failed']:,}")])
        for rung in found["rungs"]
    ]
    facts = [
        ("search", f"{found['search_s']:,.1f} s, each round as long as its longest training"),
        ("seed of the search", str(found["seed"])),
        ("sampler", f"TPE, optuna {found['optuna']}"),
    ]
    return section("Rungs", table(["training", "trained", "came to nothing"], rows), pairs(facts))


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
