"""Feature encoders of both tables, fitted together on train entities only.

Together, because features that share a table by name (``shared``) need one space of categories,
also across towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.column import Column, take_column
from recclr.data.dense import QuantileNumberEncoder, StandardNumberEncoder, VectorEncoder
from recclr.data.encoders import CategoryEncoder, CategorySpace, MultiHotEncoder, TextEncoder
from recclr.data.log import CategoricalColumn, FeatureColumn, FeatureTable, RaggedColumn
from recclr.data.vocabulary import Vocabulary
from recclr.errors import CheckpointError, ConfigError, DataError
from recclr.settings import FeatureSettings, TowerSettings

_SPACED = ("categorical", "multi_hot")


class ColumnEncoder(Protocol):
    """What one feature learned from train rows."""

    @property
    def kind(self) -> str: ...

    @property
    def column(self) -> str: ...

    def encode(self, column: Column) -> FeatureColumn: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """Encodes the table of one side, now or later, exactly as it was fitted.

    Attributes:
        side: ``user`` or ``item``.
        columns: by feature name, in the order of the settings. ``statistics`` have no column and
            are left out.
    """

    side: str
    columns: Mapping[str, ColumnEncoder]

    def encode(
        self, frame: pl.DataFrame | None, rows: NDArray[np.int64] | None = None
    ) -> FeatureTable:
        """Encode a table.

        Args:
            frame: the users or items; may be None where there are no columns to encode.
            rows: int64 [n], the row of ``frame`` of each entity, -1 for an entity that has none
                (all its features are missing); None for the rows of ``frame`` as they are.

        Returns:
            n rows.

        Raises:
            DataError: a column is missing, of the wrong type, or holds values that are refused.
        """
        if rows is None:
            rows = np.arange(0 if frame is None else frame.height)
        columns = {
            name: encoder.encode(
                take_column(
                    frame,
                    encoder.column,
                    feature=_setting(self.side, name),
                    kind=encoder.kind,
                    rows=rows,
                )
            )
            for name, encoder in self.columns.items()
        }
        return FeatureTable(len(rows), columns)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; floats survive exactly."""
        columns = {name: encoder.to_json() for name, encoder in self.columns.items()}
        return {"side": self.side, "columns": columns}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FeatureEncoder:
        """The encoder that ``to_json`` described.

        Raises:
            CheckpointError: the description is damaged.
        """
        try:
            columns = {name: _encoder(value) for name, value in data["columns"].items()}
            return cls(str(data["side"]), columns)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the description of the features is damaged: {error!r}") from (
                error
            )


def fit_encoders(
    user_frame: pl.DataFrame | None,
    item_frame: pl.DataFrame | None,
    user: TowerSettings,
    item: TowerSettings,
    train_user_ids: pl.Series,
    train_item_ids: pl.Series,
    *,
    whole_tables: bool = False,
) -> tuple[FeatureEncoder, FeatureEncoder]:
    """Fit the features of both towers on the rows of train entities.

    Args:
        user_frame, item_frame: tables with ``user_id`` / ``item_id``; None where there is none.
        train_user_ids, train_item_ids: ids with a train interaction; repeats are allowed.
        whole_tables: terms of texts are known from all rows, because their vectors are taught by
            more than the log.

    Returns:
        The encoders of users and of items.

    Raises:
        ConfigError: settings that contradict each other, or a feature of a table that is not there.
        DataError: a column is missing or unfit; see ``FeatureEncoder.encode``.
    """
    features = {
        (side, name): settings
        for side, tower in (("user", user), ("item", item))
        for name, settings in tower.features.items()
        if settings.kind != "statistics"
    }
    for (side, name), settings in features.items():
        _check(_setting(side, name), settings)
    frames = {"user": user_frame, "item": item_frame}
    rows = {
        "user": _train_rows(user_frame, "user", train_user_ids),
        "item": _train_rows(item_frame, "item", train_item_ids),
    }
    columns = {
        (side, name): take_column(
            frames[side],
            settings.column or name,
            feature=_setting(side, name),
            kind=settings.kind,
            rows=rows[side],
        )
        for (side, name), settings in features.items()
    }
    spaces = _fit_spaces(features, columns)
    texts = {key: column for key, column in columns.items() if features[key].kind == "text"}
    if whole_tables:
        texts = {key: _whole(frames[key[0]], column) for key, column in texts.items()}
    terms = _known_terms(features, texts)
    fitted = {
        key: _fit(settings, columns[key], spaces.get(key), terms.get(key))
        for key, settings in features.items()
    }
    sides = [
        FeatureEncoder(side, {name: value for (of, name), value in fitted.items() if of == side})
        for side in ("user", "item")
    ]
    return sides[0], sides[1]


def count_missing(column: FeatureColumn) -> int:
    """Entities without a (known) value of the feature."""
    if isinstance(column, CategoricalColumn):
        return int((column.idx == 0).sum())
    if isinstance(column, RaggedColumn):
        return int((column.csr.lengths() == 0).sum())
    return int((column.values[:, -1] == 1).sum())


_Key = tuple[str, str]


def _setting(side: str, name: str) -> str:
    return f"{side}.features.{name}"


def _check(feature: str, settings: FeatureSettings) -> None:
    """Refuse settings that would have no effect, rather than ignore them."""
    hashes = settings.kind in (*_SPACED, "text")
    if settings.shared is not None and not hashes:
        raise ConfigError(
            f"{feature}.shared = {settings.shared!r}: a {settings.kind} feature has no table to "
            "share; only categorical, multi_hot and text have"
        )
    if settings.buckets is not None and not hashes:
        raise ConfigError(
            f"{feature}.buckets: a {settings.kind} feature has no buckets; leave them out, or "
            "choose kind categorical, multi_hot or text"
        )
    counted = settings.kind == "text" or (hashes and settings.buckets is None)
    if settings.min_count > 1 and not counted:
        raise ConfigError(
            f"{feature}.min_count = {settings.min_count} needs a vocabulary, and there is none "
            f"(kind {settings.kind!r}, buckets = {settings.buckets}); leave one of them out"
        )


def _train_rows(frame: pl.DataFrame | None, side: str, train_ids: pl.Series) -> NDArray[np.int64]:
    """Rows of the table that belong to train entities, ascending."""
    if frame is None:
        return np.zeros(0, dtype=np.int64)
    if f"{side}_id" not in frame.columns:
        raise DataError(f"{side}s table: no column '{side}_id'; found {frame.columns}")
    # Distinct ones first: all rows of a log that lies on the disk do not fit.
    known = Vocabulary.of(train_ids.unique(maintain_order=True))
    return np.flatnonzero(known.encode(frame[f"{side}_id"]) >= 0)


def _fit_spaces(
    features: Mapping[_Key, FeatureSettings], columns: Mapping[_Key, Column]
) -> dict[_Key, CategorySpace]:
    """One space of categories per shared name, or per feature that shares none."""
    spaces: dict[_Key, CategorySpace] = {}
    for keys in _tables(features):
        first = features[keys[0]]
        _check_alike(features, keys)
        if first.kind == "text":
            continue
        if first.buckets is not None:
            space = CategorySpace.hashed(first.buckets)
        else:
            space = CategorySpace.fit([columns[key] for key in keys], min_count=first.min_count)
        spaces |= dict.fromkeys(keys, space)
    return spaces


def _known_terms(
    features: Mapping[_Key, FeatureSettings], texts: Mapping[_Key, Column]
) -> dict[_Key, NDArray[np.bool_]]:
    """The buckets of texts that count, likewise."""
    terms: dict[_Key, NDArray[np.bool_]] = {}
    for keys in _tables({key: features[key] for key in texts}):
        first = features[keys[0]]
        assert first.buckets is not None, "required by the settings"
        together = [texts[key] for key in keys]
        known = TextEncoder.known_terms(together, first.buckets, min_count=first.min_count)
        terms |= dict.fromkeys(keys, known)
    return terms


def _tables(features: Mapping[_Key, FeatureSettings]) -> list[list[_Key]]:
    """Features that use one table together."""
    groups: dict[tuple[str, ...], list[_Key]] = {}
    for key, settings in features.items():
        if settings.kind in (*_SPACED, "text"):
            group = key if settings.shared is None else (settings.shared,)
            groups.setdefault(group, []).append(key)
    return list(groups.values())


def _whole(frame: pl.DataFrame | None, column: Column) -> Column:
    """The same column, of all rows of its table."""
    rows = np.arange(0 if frame is None else frame.height)
    return take_column(frame, column.name, feature=column.feature, kind=column.kind, rows=rows)


def _check_alike(features: Mapping[_Key, FeatureSettings], keys: list[_Key]) -> None:
    def traits(key: _Key) -> tuple[bool, int | None, int]:
        settings = features[key]
        return settings.kind == "text", settings.buckets, settings.min_count

    for key in keys[1:]:
        if traits(key) != traits(keys[0]):
            raise ConfigError(
                f"{_setting(*key)} and {_setting(*keys[0])} share the table "
                f"{features[key].shared!r} and must have the same buckets and min_count, and be "
                "either both text or both categorical or multi_hot"
            )


def _fit(
    settings: FeatureSettings,
    column: Column,
    space: CategorySpace | None,
    terms: NDArray[np.bool_] | None,
) -> ColumnEncoder:
    if settings.kind == "text":
        assert settings.buckets is not None, "required by the settings"
        return TextEncoder(column.name, settings.buckets, terms)
    if settings.kind == "vector":
        return VectorEncoder.fit(column)
    if settings.kind == "numeric":
        if settings.transform == "quantile":
            return QuantileNumberEncoder.fit(column)
        return StandardNumberEncoder.fit(column)
    assert space is not None, "every categorical feature has a space"
    if settings.kind == "multi_hot":
        return MultiHotEncoder(column.name, space)
    return CategoryEncoder(column.name, space)


def _encoder(data: Mapping[str, Any]) -> ColumnEncoder:
    """The encoder of one column, by its kind."""
    kind = data["kind"]
    if kind == "categorical":
        return CategoryEncoder.from_json(data)
    if kind == "multi_hot":
        return MultiHotEncoder.from_json(data)
    if kind == "text":
        return TextEncoder.from_json(data)
    if kind == "vector":
        return VectorEncoder.from_json(data)
    if kind == "numeric":
        return (QuantileNumberEncoder if "knots" in data else StandardNumberEncoder).from_json(data)
    raise ValueError(f"unknown kind {kind!r}")
