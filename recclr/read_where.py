"""Which settings are read in some configurations only, and what that takes.

``READ_WHERE`` has each of these keys; a test holds that every key is either there or read in any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from recclr.config import Config
from recclr.settings import TowerSettings

SIDES = ("user", "item")


@dataclass(frozen=True)
class Facts:
    """What says whether a key is read.

    Attributes:
        timed: whether the log has times. validates: whether rows are held out for validation.
    """

    config: Config
    timed: bool
    validates: bool

    @property
    def towers(self) -> tuple[TowerSettings, ...]:
        config = self.config
        return (config.item,) if config.model.mode == "item_item" else (config.user, config.item)

    @property
    def has_head(self) -> bool:
        """Whether views go through a layer of their own."""
        views = self.config.self_supervision
        sides = () if views is None else (views.item, views.user)
        return any(view is not None and view.projection > 0 for view in sides)

    def has_kind(self, *kinds: str) -> bool:
        """Whether any tower has a feature of one of the kinds."""
        features = (feature for tower in self.towers for feature in tower.features.values())
        return any(feature.kind in kinds for feature in features)


@dataclass(frozen=True)
class Where:
    """What it takes for a key to be read.

    Attributes:
        why: why nothing reads it, in words. holds: whether something does.
    """

    why: str
    holds: Callable[[Facts], bool]


def _draws_split(facts: Facts) -> bool:
    split = facts.config.split
    cuts_valid = split.by == "given" and split.valid_events is None and split.valid > 0
    at_random = split.by in ("random", "items") or (
        not facts.timed and (split.by == "auto" or cuts_valid)
    )
    return at_random or split.train_share < 1


def tower_of(side: str, config: Config) -> TowerSettings:
    """The settings of the user or of the item tower."""
    tower: TowerSettings = getattr(config, side)
    return tower


def _has_views(side: str, facts: Facts) -> bool:
    views = facts.config.self_supervision
    return views is not None and getattr(views, side) is not None


def _acts(side: str, facts: Facts) -> bool:
    """Whether what a tower hides and blurs as a whole reaches any row."""
    return not tower_of(side, facts.config).augment.views_only or _has_views(side, facts)


def _hides_units(side: str, facts: Facts) -> bool:
    """Whether groups of parts, or halves, are ever hidden."""
    augment = tower_of(side, facts.config).augment
    hides = any(augment.rates())
    if _has_views(side, facts):
        return hides or augment.mode != "independent"
    return hides and not augment.views_only


def _augments(side: str, facts: Facts) -> bool:
    augment = tower_of(side, facts.config).augment
    return bool(any(augment.rates()) or augment.dimension_mask or augment.noise)


def _reads_dropout(side: str, facts: Facts) -> bool:
    """Two views lack one half each, whatever the rate."""
    augment = tower_of(side, facts.config).augment
    return not augment.views_only or (augment.mode == "independent" and _has_views(side, facts))


def _has_rates(side: str, facts: Facts) -> bool:
    """Whether a tower loses or blurs anything in training."""
    tower = tower_of(side, facts.config)
    history = tower.history
    whole = _augments(side, facts) and _acts(side, facts)
    own = whole or tower.dropout or _parts_lose(tower)
    if history is None:
        return bool(own)
    pooled = _parts_lose(
        facts.config.item, ids=history.use != "features", features=history.use != "ids"
    )
    loses = history.dropout or history.crop < 1 or history.mask or history.reorder
    return bool(own or loses or pooled)


def _parts_lose(tower: TowerSettings, *, ids: bool = True, features: bool = True) -> bool:
    """Whether the id, or a feature that a history may pool too, has a rate of its own."""
    of_id = ids and tower.id.enabled and tower.id.dropout > 0
    return of_id or (
        features
        and any(f.dropout or f.swap or f.jitter or f.subsample < 1 for f in tower.features.values())
    )


def _of_tower(side: str) -> Iterator[tuple[str, Where]]:
    own, views = f"{side}.augment", f"self_supervision.{side}, which has views, is not set"
    yield from _where(
        f"{side}.id.enabled is false",
        lambda f: tower_of(side, f.config).id.enabled,
        f"{side}.id.dropout",
        f"{side}.id.as_of",
    )
    yield from _where(
        f"no part of the {side} tower has a rate that it could change",
        partial(_has_rates, side),
        f"{own}.start",
        f"{own}.end",
    )
    yield from _where(
        f"{own} hides nothing in the rows of a step, and {views}",
        partial(_hides_units, side),
        f"{own}.mode",
        f"{own}.groups",
    )
    yield from _where(
        f'{own}.mode is "independent", or hides nothing in the rows of a step, and {views}',
        lambda f: tower_of(side, f.config).augment.mode != "independent" and _hides_units(side, f),
        f"{own}.share",
    )
    yield from _where(
        f"{own}.views_only leaves the rows of a step alone, and {views}, or each lacks its half",
        partial(_reads_dropout, side),
        f"{own}.dropout",
    )
    yield from _where(
        f"{own}.views_only leaves the rows of a step alone, and {views}",
        partial(_acts, side),
        f"{own}.dimension_mask",
        f"{own}.noise",
    )
    yield from _where(
        f"{own} has no dropout, dimension_mask or noise",
        partial(_augments, side),
        f"{own}.views_only",
    )


def _where(why: str, holds: Callable[[Facts], bool], *keys: str) -> Iterator[tuple[str, Where]]:
    return ((key, Where(why, holds)) for key in keys)


def _table() -> Iterator[tuple[str, Where]]:
    for side in SIDES:
        yield from _of_tower(side)
    yield from _of_rows()
    yield from _of_objective()
    yield from _of_loop()
    yield from _where(
        "blend.spectral is 0", lambda f: bool(f.config.blend.spectral), "blend.spectral_item_power"
    )
    yield from _where(
        "blend names neither spectral nor runs",
        lambda f: bool(f.config.blend.parts),
        "blend.weights",
    )
    yield from _where(
        'baselines.names does not have "ease"',
        lambda f: "ease" in f.config.baselines.names,
        "baselines.ease_max_items",
    )
    yield from _where(
        "baselines.names is empty, or there is no validation to choose by",
        lambda f: bool(f.config.baselines.names) and f.validates,
        "baselines.budget",
    )


def _of_rows() -> Iterator[tuple[str, Where]]:
    yield from _where(
        "the log has no times (data.columns.timestamp)",
        lambda f: f.timed,
        "data.time_unit",
        "user.history.half_life_d",
    )
    yield from _where(
        'data.bad_rows is "refuse"',
        lambda f: f.config.data.bad_rows == "drop",
        "data.max_bad_share",
    )
    yield from _where(
        "neither data.event_weights nor negatives.explicit names an event type",
        lambda f: bool(f.config.data.event_weights) or f.config.negatives.explicit is not None,
        "data.columns.event",
    )
    yield from _where("nothing is drawn in this split", _draws_split, "split.seed")
    yield from _where(
        "the split is given, and has its validation in split.valid_events",
        lambda f: f.config.split.by != "given" or f.config.split.valid_events is None,
        "split.valid",
    )
    yield from _where(
        "the split is given, and has its test in split.test_events",
        lambda f: f.config.split.by != "given",
        "split.test",
    )
    yield from _where(
        'model.mode is "user_item"',
        lambda f: f.config.model.mode == "item_item",
        *(f"model.pairs.{name}" for name in ("window", "half_life", "query_length")),
    )
    yield from _where(
        'it takes model.mode = "item_item" and a log with times',
        lambda f: f.timed and f.config.model.mode == "item_item",
        "model.pairs.within_d",
    )


def _reads_log_q(facts: Facts) -> bool:
    loss = facts.config.loss
    if loss.kind == "full_softmax":
        return loss.symmetric > 0 or facts.config.negatives.explicit is not None
    return loss.mining != "hardest"


def _has_queue(facts: Facts) -> bool:
    queue = facts.config.negatives.queue
    return queue is not None and queue.size > 0


def _of_objective() -> Iterator[tuple[str, Where]]:
    yield from _where(
        "loss.top_k is not set",
        lambda f: f.config.loss.top_k is not None,
        "loss.top_k_temperature",
    )
    full = 'loss.kind = "full_softmax" scores every item and samples none'
    yield from _where(
        f'{full}, and has neither loss.symmetric nor negatives.explicit; or loss.mining = "hardest"'
        " takes the nearest, however often it was drawn",
        _reads_log_q,
        "loss.log_q_strength",
    )
    yield from _where(
        full,
        lambda f: f.config.loss.kind != "full_softmax",
        *(f"negatives.{name}" for name in ("in_batch", "uniform", "popularity")),
    )
    yield from _where(
        "negatives.queue.size is 0",
        _has_queue,
        "negatives.queue.momentum",
        "negatives.queue.warmup",
    )
    yield from _where(
        "negatives.queue.size is 0, and no positive becomes a negative",
        lambda f: f.config.negatives.in_batch or _has_queue(f),
        "negatives.counts",
    )
    yield from _where(
        "distillation.weight is 0",
        lambda f: f.config.distillation is None or f.config.distillation.weight > 0,
        "distillation.temperature",
    )


def _has_tables(facts: Facts) -> bool:
    ids = any(tower.id.enabled for tower in facts.towers)
    return ids or facts.has_kind("categorical", "multi_hot", "text")


def _is_dense(facts: Facts) -> bool:
    """Whether anything is trained that is no table."""
    return (
        any(tower.part_names() != ("id",) or tower.mlp for tower in facts.towers)
        or facts.config.loss.temperature == "learned"
        or facts.has_head
    )


def _is_decayed(facts: Facts) -> bool:
    """Whether any of it is a matrix, which alone is decayed."""
    deep = any(tower.mlp for tower in facts.towers)
    return deep or facts.has_kind("numeric", "vector", "statistics") or facts.has_head


def _shows_moments(facts: Facts) -> bool:
    """Whether a vector, or who is a negative, depends on a moment."""
    by_tower = any(tower.id.as_of or tower.history is not None for tower in facts.towers)
    asked = by_tower or facts.has_kind("statistics") or facts.config.negatives.available
    return facts.timed and asked


def _of_loop() -> Iterator[tuple[str, Where]]:
    yield from _where(
        'train.lr_scaling is "none"',
        lambda f: f.config.train.lr_scaling != "none",
        "train.base_batch_size",
    )
    yield from _where(
        'train.decay is "none"', lambda f: f.config.train.decay != "none", "train.final_lr"
    )
    yield from _where(
        "train.table_optimizer is not Adam, or there is no table",
        lambda f: f.config.train.table_optimizer in ("adam", "rowwise_adam") and _has_tables(f),
        "train.table_moments",
    )
    yield from _where(
        "towers without ids and categories have no table",
        _has_tables,
        "train.table_optimizer",
        "train.table_lr",
        "model.init_std",
    )
    yield from _where("there is no validation to stop by", lambda f: f.validates, "train.patience")
    yield from _where(
        "there is no validation to look at, and no queue whose age is told",
        lambda f: f.validates or _has_queue(f),
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
        "statistics, an as_of id or negatives.available",
        _shows_moments,
        "train.staleness_d",
    )


READ_WHERE: Mapping[str, Where] = dict(_table())
"""Keys that are not read in any configuration, and what each takes."""
