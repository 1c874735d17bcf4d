"""Settings that a configuration gives and that nothing reads, said instead of ignored.

Each key that is read in some configurations only stands in ``READ_WHERE`` with what it takes; a
test holds that every key is either there or read in any. They are no mistake that a run is refused
for: a file that others start from may well hold a rate for a schedule that is switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from recclr.config import Config, toml_value
from recclr.settings import TowerSettings

_SIDES = ("user", "item")


@dataclass(frozen=True)
class Where:
    """What it takes for a key to be read.

    Attributes:
        why: why nothing reads it, in words. holds: of a configuration, and of whether the log has
            times.
    """

    why: str
    holds: Callable[[Config, bool], bool]


def unread_settings(config: Config, *, timed: bool) -> list[str]:
    """One sentence for each key that has another value than its default and that nothing reads.

    Args:
        timed: whether the log has times.
    """
    found = [
        (key, value, where.why)
        for section in type(config).model_fields
        if is_dataclass(settings := getattr(config, section))
        for key, value in _given(settings, section)
        if (where := READ_WHERE.get(key)) is not None and not where.holds(config, timed)
    ]
    found += [entry for side in _SIDES for entry in _of_features(side, _tower(side, config))]
    return [f"{key} = {toml_value(value)} does nothing here: {why}" for key, value, why in found]


def _given(settings: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each key whose value is not its default, with the value; features are left out."""
    for setting in fields(settings):
        key, value = f"{path}.{setting.name}", getattr(settings, setting.name)
        default = setting.default
        if default is MISSING and setting.default_factory is not MISSING:
            default = setting.default_factory()
        if is_dataclass(value) and not isinstance(value, type):
            if default is None:
                yield key, asdict(value)
            yield from _given(value, key)
        elif default is not MISSING and value != default and not isinstance(value, Mapping):
            yield key, value


def _of_features(side: str, tower: TowerSettings) -> Iterator[tuple[str, Any, str]]:
    for name, feature in tower.features.items():
        for key, value in _given(feature, f"{side}.features.{name}"):
            kinds = BY_KIND.get(key.rpartition(".")[2], (feature.kind,))
            if feature.kind not in kinds:
                yield key, value, f"kind is {feature.kind!r}, not {' or '.join(map(repr, kinds))}"


def _timed(_: Config, timed: bool) -> bool:
    return timed


def _samples(config: Config, _: bool = False) -> bool:
    return config.loss.kind != "full_softmax"


def _validates(config: Config, _: bool = False) -> bool:
    return config.split.valid > 0 or config.split.valid_events is not None


def _is_dense(config: Config, _: bool = False) -> bool:
    """Whether anything is trained that is no table."""
    towers = (config.item,) if config.model.mode == "item_item" else (config.user, config.item)
    views = config.self_supervision
    heads = () if views is None else (views.item, views.user)
    return (
        any(tower.part_names() != ("id",) or tower.mlp for tower in towers)
        or config.loss.temperature == "learned"
        or any(view is not None and view.projection > 0 for view in heads)
    )


def _is_decayed(config: Config, _: bool = False) -> bool:
    """Whether any of it is a matrix, which alone is decayed."""
    towers = (config.item,) if config.model.mode == "item_item" else (config.user, config.item)
    views = config.self_supervision
    heads = () if views is None else (views.item, views.user)
    wide = ("numeric", "vector", "statistics")
    return any(
        bool(tower.mlp) or any(feature.kind in wide for feature in tower.features.values())
        for tower in towers
    ) or any(view is not None and view.projection > 0 for view in heads)


def _shows_moments(config: Config, timed: bool) -> bool:
    """Whether a vector depends on the moment that it is seen at."""
    towers = (config.item,) if config.model.mode == "item_item" else (config.user, config.item)
    return timed and any(
        tower.id.as_of
        or tower.history is not None
        or any(feature.kind == "statistics" for feature in tower.features.values())
        for tower in towers
    )


def _draws_split(config: Config, timed: bool) -> bool:
    split = config.split
    cuts_valid = split.by == "given" and split.valid_events is None and split.valid > 0
    at_random = split.by in ("random", "items") or (
        not timed and (split.by == "auto" or cuts_valid)
    )
    return at_random or split.train_share < 1


def _has_views(side: str, config: Config, _: bool = False) -> bool:
    return config.self_supervision is not None and (
        getattr(config.self_supervision, side) is not None
    )


def _tower(side: str, config: Config) -> TowerSettings:
    tower: TowerSettings = getattr(config, side)
    return tower


def _has_id(side: str, config: Config, _: bool = False) -> bool:
    return _tower(side, config).id.enabled


def _halves(side: str, config: Config, _: bool = False) -> bool:
    return _tower(side, config).augment.mode != "independent"


def _hides_halves(side: str, config: Config, _: bool = False) -> bool:
    return any(_tower(side, config).augment.rates()) or _has_views(side, config)


def _augments(side: str, config: Config, _: bool = False) -> bool:
    augment = _tower(side, config).augment
    return bool(any(augment.rates()) or augment.dimension_mask or augment.noise)


def _views_only(side: str, config: Config, _: bool = False) -> bool:
    return not _tower(side, config).augment.views_only or _has_views(side, config)


def _has_rates(side: str, config: Config, _: bool = False) -> bool:
    """Whether a tower loses or blurs anything in training."""
    tower = _tower(side, config)
    history = tower.history
    return bool(
        _augments(side, config)
        or tower.dropout
        or (tower.id.enabled and tower.id.dropout)
        or any(f.dropout or f.swap or f.jitter or f.subsample < 1 for f in tower.features.values())
        or (
            history is not None
            and (history.dropout or history.crop < 1 or history.mask or history.reorder)
        )
        or (side == "user" and history is not None and _has_rates("item", config))
    )


def _of_tower(side: str) -> Iterator[tuple[str, Where]]:
    its_id = Where(f"{side}.id.enabled is false", partial(_has_id, side))
    yield f"{side}.id.dropout", its_id
    yield f"{side}.id.as_of", its_id
    rates = Where(
        f"no part of the {side} tower has a rate that it could change", partial(_has_rates, side)
    )
    yield f"{side}.augment.start", rates
    yield f"{side}.augment.end", rates
    views = f"and self_supervision.{side}, which has such views, is not set"
    yield (
        f"{side}.augment.mode",
        Where(f"{side}.augment.dropout is 0, {views}", partial(_hides_halves, side)),
    )
    yield (
        f"{side}.augment.share",
        Where(f'{side}.augment.mode is "independent"', partial(_halves, side)),
    )
    only = f"{side}.augment.views_only leaves the rows of a step alone, {views}"
    for name in ("dropout", "groups", "dimension_mask", "noise"):
        yield f"{side}.augment.{name}", Where(only, partial(_views_only, side))
    yield (
        f"{side}.augment.views_only",
        Where(f"{side}.augment has no dropout, dimension_mask or noise", partial(_augments, side)),
    )


def _where(
    why: str, holds: Callable[[Config, bool], bool], *keys: str
) -> Iterator[tuple[str, Where]]:
    return ((key, Where(why, holds)) for key in keys)


def _table() -> Iterator[tuple[str, Where]]:
    for side in _SIDES:
        yield from _of_tower(side)
    no_times = "the log has no times (data.columns.timestamp)"
    yield from _where(no_times, _timed, "data.time_unit", "user.history.half_life_d")
    yield from _where(
        'data.bad_rows is "refuse"', lambda c, _: c.data.bad_rows == "drop", "data.max_bad_share"
    )
    yield from _where(
        "neither data.event_weights nor negatives.explicit names an event type",
        lambda c, _: bool(c.data.event_weights) or c.negatives.explicit is not None,
        "data.columns.event",
    )
    yield from _where("nothing is drawn in this split", _draws_split, "split.seed")
    yield from _where(
        "the split is given, and has its validation in split.valid_events",
        lambda c, _: c.split.by != "given" or c.split.valid_events is None,
        "split.valid",
    )
    yield from _where(
        "the split is given, and has its test in split.test_events",
        lambda c, _: c.split.by != "given",
        "split.test",
    )
    pairs = ("window", "half_life", "query_length")
    yield from _where(
        'model.mode is "user_item"',
        lambda c, _: c.model.mode == "item_item",
        *(f"model.pairs.{name}" for name in pairs),
    )
    yield from _where(
        'it takes model.mode = "item_item" and a log with times',
        lambda c, timed: timed and c.model.mode == "item_item",
        "model.pairs.within_d",
    )
    yield from _of_objective()
    yield from _of_loop()
    yield from _where(
        "blend.spectral is 0", lambda c, _: bool(c.blend.spectral), "blend.spectral_item_power"
    )
    yield from _where(
        "blend names neither spectral nor runs", lambda c, _: bool(c.blend.parts), "blend.weights"
    )
    yield from _where(
        'baselines.names does not have "ease"',
        lambda c, _: "ease" in c.baselines.names,
        "baselines.ease_max_items",
    )
    yield from _where(
        "baselines.names is empty, or there is no validation to choose by",
        lambda c, _: bool(c.baselines.names) and _validates(c),
        "baselines.budget",
    )


def _of_objective() -> Iterator[tuple[str, Where]]:
    yield from _where(
        "loss.top_k is not set", lambda c, _: c.loss.top_k is not None, "loss.top_k_temperature"
    )
    full = 'loss.kind = "full_softmax" scores every item and samples none'
    yield from _where(
        f"{full}, and loss.symmetric is 0",
        lambda c, _: _samples(c) or c.loss.symmetric > 0,
        "loss.log_q_strength",
    )
    sampled = ("in_batch", "uniform", "popularity")
    yield from _where(full, _samples, *(f"negatives.{name}" for name in sampled))
    yield from _where(
        "negatives.queue.size is 0",
        lambda c, _: c.negatives.queue is None or c.negatives.queue.size > 0,
        "negatives.queue.momentum",
        "negatives.queue.warmup",
    )
    yield from _where(
        "distillation.weight is 0",
        lambda c, _: c.distillation is None or c.distillation.weight > 0,
        "distillation.temperature",
    )


def _of_loop() -> Iterator[tuple[str, Where]]:
    yield from _where(
        'train.lr_scaling is "none"',
        lambda c, _: c.train.lr_scaling != "none",
        "train.base_batch_size",
    )
    yield from _where(
        'train.decay is "none"', lambda c, _: c.train.decay != "none", "train.final_lr"
    )
    yield from _where(
        "train.table_optimizer is not Adam",
        lambda c, _: c.train.table_optimizer in ("adam", "rowwise_adam"),
        "train.table_moments",
    )
    yield from _where(
        "there is no validation to stop by; set split.valid", _validates, "train.patience"
    )
    yield from _where(
        "there is no validation to look at, and no queue whose age is told",
        lambda c, _: _validates(c) or c.negatives.queue is not None,
        "train.evaluate_every",
    )
    yield from _where(
        "nothing but tables of ids is trained", _is_dense, "train.dense_lr", "train.clip_norm"
    )
    yield from _where(
        "no layer has a matrix that could decay, and tables have none",
        _is_decayed,
        "train.weight_decay",
    )
    yield from _where(
        "no vector depends on when it is seen: it takes a log with times, and a history, "
        "statistics or an as_of id",
        _shows_moments,
        "train.staleness_d",
    )


READ_WHERE: Mapping[str, Where] = dict(_table())
"""Keys that are not read in any configuration, and what each takes."""

BY_KIND: Mapping[str, tuple[str, ...]] = {
    "column": ("categorical", "multi_hot", "numeric", "vector", "text"),
    "transform": ("numeric",),
    "windows_d": ("statistics",),
    "age": ("statistics",),
}
"""Settings of a feature that some kinds read; the others either all do, or are refused."""
