"""What ``recclr check`` tells: everything a run would find in the data, before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recclr.config import Config, load_config, parse_config
from recclr.data.interactions import read_log
from recclr.data.prepare import prepare
from recclr.errors import ConfigError


def check_data(
    events: str | None,
    *,
    users: str | None = None,
    items: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Read, split and encode as a run would, and train nothing.

    Returns:
        JSON values: log, steps, quarantined, notes, split, encoded counts.

    Raises:
        ConfigError: neither or both of ``events`` and ``config``. DataError: the data are refused.
    """
    settings = _config(events, users, items, config, overrides)
    log = read_log(settings.data)
    split = log.split(settings.split)
    judged = split.valid if split.valid is not None else split.test
    prepared = prepare(split.train, judged, user=settings.user, item=settings.item)
    return {
        "log": repr(log),
        "steps": [asdict(step) for step in log.steps],
        "quarantined": log.bad_rows,
        "notes": list(log.notes),
        "split": {"by": split.by, "cutoffs": split.cutoffs, "counts": split.counts},
        "encoded": prepared.counts,
    }


def _config(
    events: str | None,
    users: str | None,
    items: str | None,
    config: Path | None,
    overrides: Sequence[str],
) -> Config:
    if (events is None) == (config is None):
        raise ConfigError("give either EVENTS or --config FILE")
    if config is not None:
        if users is not None or items is not None:
            raise ConfigError("--users and --items go with EVENTS; a --config names its own tables")
        return load_config(config, overrides)
    from recclr.config import apply_override

    tables = {"events": events, "users": users, "items": items}
    values: dict[str, Any] = {"data": {name: path for name, path in tables.items() if path}}
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, source="check")
