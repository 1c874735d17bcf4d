"""From logs in raw ids to the tensors that training and evaluation see.

Whatever is learned from data (features, counts, the cut-off) comes from the train rows alone; other
logs and the tables only say which ids exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from recclr.config import Config
from recclr.data.explicit import explicit_lists
from recclr.data.features import FeatureEncoder, count_missing, fit_encoders
from recclr.data.ids import align_ids
from recclr.data.interactions import Log, apply_decay, require_trainable
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.data.prepared import PreparedLog
from recclr.data.vocabulary import Vocabulary
from recclr.errors import ConfigError, DataError
from recclr.settings import TowerSettings

__all__ = ["PreparedLog", "encode_held_out", "prepare", "prepare_for"]


def prepare(
    train: Log,
    held_out: Log | None,
    *,
    user: TowerSettings,
    item: TowerSettings,
    vocabulary: tuple[Vocabulary, Vocabulary] | None = None,
    extra_ids: Sequence[Log] | None = None,
    whole_tables: bool = False,
) -> PreparedLog:
    """Encode a split.

    Indices follow the first appearance in train, then in ``extra_ids``, then the row of the table.
    The weights of train rows decay as ``train.settings.decay_half_life_d`` says.

    Args:
        train: the rows that everything is fitted on; its tables hold features and further ids.
        held_out: the rows to judge by. Items that are not in the vocabulary get index -1 and
            users that are not get indices from ``num_users`` on; both are counted.
        user, item: the towers, for their features.
        vocabulary: users and items of an earlier ``prepare``, to keep their indices.
        extra_ids: logs whose ids enter the vocabulary without anything being fitted on them.
        whole_tables: as ``fit_encoders`` has it.

    Raises:
        ConfigError: a feature needs a table or timestamps that are not there.
        DataError: the tables or ids are refused, or train is too small.
    """
    require_trainable(train)
    _check_time(train, user=user, item=item)
    tables = {"user": _table(train, "user"), "item": _table(train, "item")}
    if vocabulary is None:
        logs = [train, *(extra_ids or ())]
        users = _build_vocabulary(logs, tables["user"], "user_id")
        items = _build_vocabulary(logs, tables["item"], "item_id")
    else:
        users, items = vocabulary
    encoded = _encode_train(train, users, items)
    users = users.with_counts(encoded.user_counts().numpy())
    items = items.with_counts(encoded.item_counts().numpy())
    encoders = fit_encoders(
        tables["user"],
        tables["item"],
        user,
        item,
        train.events["user_id"],
        train.events["item_id"],
        whole_tables=whole_tables,
    )
    features = (
        _encode_features(encoders[0], tables["user"], users),
        _encode_features(encoders[1], tables["item"], items),
    )
    judged, counts = (None, {}) if held_out is None else encode_held_out(held_out, users, items)
    explicit = None
    if train.explicit is not None:
        explicit, found = explicit_lists(train, encoded, users, items)
        counts |= found
    cutoff = None if encoded.timestamp is None else int(encoded.timestamp.max()) + 1
    return PreparedLog(
        tensors=Prepared(encoded, features[0], features[1], judged, cutoff, explicit),
        users=users,
        items=items,
        user_encoder=encoders[0],
        item_encoder=encoders[1],
        counts=_train_counts(users, items, features) | counts,
    )


def prepare_for(
    config: Config, train: Log, held_out: Log | None, extra_ids: Sequence[Log]
) -> PreparedLog:
    """``prepare`` as a configuration wants it."""
    return prepare(
        train,
        held_out,
        user=config.user,
        item=config.item,
        extra_ids=extra_ids,
        whole_tables=config.taught_without_log,
    )


def _check_time(train: Log, **towers: TowerSettings) -> None:
    if train.has_time:
        return
    for side, tower in towers.items():
        needy = [
            f"{side}.features.{name} (kind 'statistics')"
            for name, settings in tower.features.items()
            if settings.kind == "statistics"
        ]
        if tower.id.as_of:
            needy.append(f"{side}.id.as_of")
        if needy:
            raise ConfigError(
                f"{needy[0]} needs timestamps, and the log has none; name their column in "
                "data.columns.timestamp, or leave the feature out"
            )


def _table(log: Log, side: str) -> pl.DataFrame | None:
    """The table of one side, refused where an entity has no id or two rows."""
    frame = log.users if side == "user" else log.items
    if frame is None:
        return None
    ids = frame[f"{side}_id"]
    bad = ids.is_null() | ids.is_duplicated()
    if bad.any():
        rows = np.flatnonzero(bad.to_numpy())
        raise DataError(
            f"{side}s table: {len(rows):,} rows have no {side}_id or share it with another row "
            f"(first rows {', '.join(str(row) for row in rows[:5])}); keep one row per {side}"
        )
    return frame


def _build_vocabulary(logs: Sequence[Log], table: pl.DataFrame | None, key: str) -> Vocabulary:
    columns = {f"the log {number} ({key})": log.events[key] for number, log in enumerate(logs)}
    if table is not None:
        columns[f"the table ({key})"] = table[key]
    ids = pl.concat([column.alias(key) for column in align_ids(columns).values()])
    return Vocabulary(ids.unique(maintain_order=True))


def _encode_train(train: Log, users: Vocabulary, items: Vocabulary) -> EncodedLog:
    encoded = {}
    for key, vocabulary in (("user_id", users), ("item_id", items)):
        idx = _column(train, key, np.int32, vocabulary.encode)
        if (idx < 0).any():
            outside = train.events[key].filter(pl.Series(idx < 0)).n_unique()
            raise DataError(
                f"train has {outside:,} values of {key} that the given vocabulary lacks; give the "
                "vocabulary of a log that held them, or none to make a new one"
            )
        encoded[key] = idx
    decayed = apply_decay(train, train.settings.decay_half_life_d)
    log = _encoded(decayed, encoded["user_id"], encoded["item_id"], users, items)
    return log if train.disk is None else replace(log, mapped_for=torch.device("cpu"))


def _column(
    log: Log, name: str, dtype: type[np.generic], values: Callable[[pl.Series], NDArray[Any]]
) -> NDArray[Any]:
    """What ``values`` makes of each row of a column, which lies where the log does."""
    if log.disk is None:
        return values(log.events[name])
    column, done = log.disk.array(len(log), dtype), 0
    # As many at once as may be: whoever looks ids up pays for the whole vocabulary each time.
    for rows in log.disk.stretches(log.events.select(name), log.disk.rows):
        column[done : done + rows.height] = values(rows.to_series())
        done += rows.height
    return column


def encode_held_out(
    held_out: Log, users: Vocabulary, items: Vocabulary
) -> tuple[EncodedLog, dict[str, int]]:
    """Held-out rows in the indices of given vocabularies, and how many are outside of them.

    Returns:
        The encoded log, whose unknown users have indices from ``len(users)`` on and whose unknown
        items are -1; counts by name.

    Raises:
        DataError: the ids are of another type than the vocabulary's.
    """
    user_idx = users.encode(held_out.events["user_id"])
    item_idx = items.encode(held_out.events["item_id"])
    new_users = Vocabulary.of(held_out.events["user_id"].filter(pl.Series(user_idx < 0)))
    if len(new_users):
        beyond = new_users.encode(held_out.events["user_id"]) + np.int32(len(users))
        user_idx = np.where(user_idx < 0, beyond, user_idx)
    missed = held_out.events["item_id"].filter(pl.Series(item_idx < 0))
    counts = {
        "held_out_rows": len(held_out),
        "held_out_users": held_out.num_users,
        "held_out_items": held_out.num_items,
        "held_out_users_outside": len(new_users),
        "held_out_items_outside_corpus": missed.n_unique(),
        "held_out_rows_outside_corpus": len(missed),
    }
    return _encoded(held_out, user_idx, item_idx, users, items), counts


def _encoded(
    log: Log,
    user_idx: NDArray[np.int32],
    item_idx: NDArray[np.int32],
    users: Vocabulary,
    items: Vocabulary,
) -> EncodedLog:
    return EncodedLog(
        user_idx=torch.from_numpy(user_idx),
        item_idx=torch.from_numpy(item_idx),
        num_users=len(users),
        num_items=len(items),
        timestamp=_optional(log, "timestamp", np.int64),
        weight=_optional(log, "weight", np.float32),
    )


def _optional(log: Log, name: str, dtype: type[np.generic]) -> Tensor | None:
    if name not in log.events.columns:
        return None
    # Copied, since torch must not write into memory that the data frame shares.
    return torch.from_numpy(
        _column(log, name, dtype, lambda values: np.array(values.to_numpy(), dtype=dtype))
    )


def _encode_features(
    encoder: FeatureEncoder, table: pl.DataFrame | None, vocabulary: Vocabulary
) -> FeatureTable:
    """One row per entity of the vocabulary; all-missing where the table has no row for it."""
    if table is None:
        return encoder.encode(None, np.full(len(vocabulary), -1, dtype=np.int64))
    rows = Vocabulary(table[f"{encoder.side}_id"]).encode(vocabulary.ids)
    return encoder.encode(table, rows.astype(np.int64))


def _train_counts(
    users: Vocabulary, items: Vocabulary, features: tuple[FeatureTable, FeatureTable]
) -> dict[str, int]:
    counts = {
        "train_rows": int(users.counts.sum()),
        "train_users": int((users.counts > 0).sum()),
        "train_items": int((items.counts > 0).sum()),
        "num_users": len(users),
        "num_items": len(items),
    }
    for side, table in zip(("user", "item"), features, strict=True):
        for name, column in table.columns.items():
            counts[f"{side}.features.{name}.missing"] = count_missing(column)
    return counts
