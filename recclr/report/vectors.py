"""What the vectors looked like during training and in the end, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recclr.report.charts import Line, line_chart
from recclr.report.markup import figure, folded, pairs, paragraph, section

Events = Sequence[Mapping[str, Any]]

# Title, label of the axis, lines as name -> figure, caption.
_CHARTS: tuple[tuple[str, str, dict[str, str], str], ...] = (
    (
        "Alignment by epoch",
        "alignment",
        {"held-out pairs": "alignment", "train pairs": "alignment_train"},
        "Mean squared distance between a user and an item that belong together; lower is closer. "
        "Train pairs that draw near while held-out ones do not are learned by heart.",
    ),
    (
        "Uniformity by epoch",
        "uniformity",
        {"users": "user_uniformity", "items": "item_uniformity"},
        "How evenly the vectors are spread; lower is more even, 0 is all in one place.",
    ),
    (
        "Effective rank by epoch",
        "effective rank",
        {"users": "user_rank", "items": "item_rank"},
        "How many directions the vectors use.",
    ),
    (
        "Concentration of the recommendations by epoch",
        "share",
        {"top 1 % of items": "top_percent_share", "common to two users": "overlap"},
        "Share of all recommended slots that the 1 % most recommended items take (or as many as a "
        "user is shown), and share of their lists that two users have in common.",
    ),
)
_FACTS: tuple[tuple[str, str, str], ...] = (
    ("alignment of held-out pairs", "alignment", ".3f"),
    ("alignment of train pairs", "alignment_train", ".3f"),
    ("uniformity of users", "user_uniformity", ".3f"),
    ("uniformity of items", "item_uniformity", ".3f"),
    ("variance of users", "user_variance", ".3f"),
    ("variance of items", "item_variance", ".3f"),
    ("squared length of users in the first direction", "user_first_share", ".1%"),
    ("squared length of items in the first direction", "item_first_share", ".1%"),
    ("correlation of an item's length with log popularity", "norm_popularity", "+.3f"),
    ("slots of the most recommended item", "top_item_share", ".2%"),
    ("slots of the 1 % most recommended items", "top_percent_share", ".1%"),
    ("rows of as many most taken items", "demand_share", ".1%"),
    ("distinct items recommended", "distinct_items", ",.0f"),
    ("to so many users", "num_queries", ",.0f"),
    ("share of their lists that two users have in common", "overlap", ".1%"),
    ("temperature", "temperature", ".4g"),
)


def section_of(log: Events, final: Mapping[str, Any]) -> str:
    """Named causes, figures over training, figures of the final model.

    Args:
        log: lines of log.jsonl, those of ``monitor`` and ``warning`` among others.
        final: "monitors" of metrics.json; empty for a run that has none.
    """
    figures: Mapping[str, float] = final.get("figures", {})
    return section(
        "The vectors",
        *(_note("The final model", cause) for cause in final.get("causes", ())),
        *(
            _note(f"At epoch {event['epoch']:.1f}", event)
            for event in log
            if event.get("kind") == "warning" and event.get("stage") == "selection"
        ),
        *_charts(log),
        pairs(_facts(figures), "The final model"),
        folded("What these figures mean", pairs(final.get("definitions", {}).items())),
    )


def _note(when: str, cause: Mapping[str, Any]) -> str:
    return paragraph(f"{when}: {cause['text']}. What to do: {cause['advice']}.", "note")


def _charts(log: Events) -> list[str]:
    looked = [e for e in log if e.get("kind") == "monitor" and e.get("stage") == "selection"]
    found = []
    for title, axis, names, caption in _CHARTS:
        lines = [
            Line(name, [(e["epoch"], e["figures"][key]) for e in looked if key in e["figures"]])
            for name, key in names.items()
        ]
        chart = line_chart(lines, title=title, x_label="epoch", y_label=axis)
        found.append(figure(chart, caption))
    return found


def _facts(figures: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = [(name, format(figures[key], shape)) for name, key, shape in _FACTS if key in figures]
    for side in ("user", "item"):
        if f"{side}_rank" in figures:
            rank, limit = figures[f"{side}_rank"], figures[f"{side}_rank_limit"]
            rows.append((f"effective rank of {side}s", f"{rank:.1f} of at most {limit:.0f}"))
            low, middle, high = (figures[f"{side}_norm_{q}"] for q in ("q1", "median", "q3"))
            rows.append((f"quartiles of {side}s' lengths", f"{low:.3g}, {middle:.3g}, {high:.3g}"))
    return rows
