"""From rows without mistakes to those that count: weights, order, duplicates, k-core, caps.

The order of the steps is that of the settings.
"""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from recclr.data.check import CleanEvents
from recclr.data.filters import (
    Steps,
    cap_users,
    deduplicate,
    in_log_order,
    k_core,
    refuse_unknown_events,
    weigh_events,
)
from recclr.errors import DataError
from recclr.settings import DataSettings

_LARGEST = 3.4e38


def filter_events(clean: CleanEvents, settings: DataSettings) -> CleanEvents:
    """The steps after the bad rows: weights, order, duplicates, k-core, caps.

    Args:
        clean: as ``check_events`` returns it. Whoever holds it meanwhile keeps its rows in memory
            beside those that are sorted.

    Raises:
        DataError: a step left nothing, or a weight is beyond float32; the message names it.
    """
    rows, steps, found = [clean.frame], Steps(clean.steps), replace(clean, frame=pl.DataFrame())
    del clean
    if settings.event_weights:
        refuse_unknown_events(rows[0], settings.event_weights)
    frame = one_row_per_pair(rows.pop(), settings, steps)
    if core := core_setting(settings):
        before, least = frame.height, settings.k_core_item
        frame = k_core(frame, min_per_user=settings.k_core_user, min_per_item=least)
        steps.record("k_core", before, frame.height, setting=core)
    frame = capped(frame, settings, steps)
    kept = frame.select(name for name in frame.columns if not name.startswith("_"))
    return replace(found, frame=kept, steps=steps.counts)


def one_row_per_pair(frame: pl.DataFrame, settings: DataSettings, steps: Steps) -> pl.DataFrame:
    """Rows weighed by their event type, in log order, without duplicates; all of some users."""
    if settings.event_weights:
        before = frame.height
        frame = weigh_events(frame, settings.event_weights)
        steps.record("event_weights", before, frame.height, setting="data.event_weights")
    frame = in_log_order(frame, heavy_first=settings.deduplicate == "first")
    if settings.deduplicate != "none":
        before = frame.height
        frame = deduplicate(frame, settings.deduplicate)
        steps.record("deduplicate", before, frame.height, setting="data.deduplicate")
    return frame


def core_setting(settings: DataSettings) -> str | None:
    """The k-core that is asked for, by the names of its settings; None for none."""
    if max(settings.k_core_user, settings.k_core_item) <= 1:
        return None
    return f"data.k_core_user = {settings.k_core_user}, k_core_item = {settings.k_core_item}"


def capped(frame: pl.DataFrame, settings: DataSettings, steps: Steps) -> pl.DataFrame:
    """As many rows of each user as are wanted, of rows in log order, all of some users.

    Raises:
        DataError: a weight is beyond float32.
    """
    if settings.max_per_user is not None:
        most, before = settings.max_per_user, frame.height
        frame = cap_users(frame, most)
        steps.record("max_per_user", before, frame.height, setting=f"data.max_per_user = {most}")
    if "weight" in frame.columns and not frame["weight"].is_between(0, _LARGEST, "right").all():
        raise DataError(
            "a weight times its data.event_weights, or a sum of weights, is beyond float32; scale "
            "the weights down"
        )
    return frame
