"""Which baselines the data allow, and their settings, chosen on validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from recclr.baselines.popularity import BackedRanker, PopularityRanker, popularity
from recclr.data.log import Prepared
from recclr.data.sharding import fits_in_memory
from recclr.errors import ConfigError, MissingExtraError, require
from recclr.ranking import Ranker
from recclr.settings.baselines import BaselineSettings

_FALLBACK = "fallback_half_life_d"
_GRIDS: dict[str, dict[str, dict[str, list[Any]]]] = {
    "popularity": {"small": {}, "full": {}},
    "recent_popularity": {
        "small": {"half_life_d": [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 120.0]},
        "full": {"half_life_d": [0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 14.0, 30.0, 60.0, 120.0]},
    },
    "item_knn": {
        "small": {"neighbours": [200], "shrink": [0.0, 10.0], "norm": [0.5]},
        "full": {"neighbours": [50, 200, 1000], "shrink": [0.0, 10.0, 50.0], "norm": [0.3, 0.5]},
    },
    "recent_item_knn": {
        "small": {
            "neighbours": [1000],
            "shrink": [0.0],
            "norm": [0.0, 0.5],
            "half_life_d": [2.0, 10.0, 50.0],
        },
        "full": {
            "neighbours": [200, 1000],
            "shrink": [0.0, 10.0],
            "norm": [0.0, 0.3, 0.5],
            "half_life_d": [2.0, 5.0, 10.0, 20.0, 50.0, 120.0],
        },
    },
    "als": {
        "small": {"regularization": [0.1, 3.0], "alpha": [2.0, 20.0], "iterations": [10]},
        "full": {
            "regularization": [0.03, 0.3, 3.0, 30.0],
            "alpha": [1.0, 4.0, 16.0, 64.0],
            "iterations": [15],
        },
    },
    "bpr": {
        "small": {"learning_rate": [0.05], "regularization": [0.003, 0.03], "iterations": [100]},
        "full": {
            "learning_rate": [0.02, 0.1],
            "regularization": [0.001, 0.01, 0.03, 0.1],
            "iterations": [100, 300],
        },
    },
    "spectral": {
        "small": {"item_power": [0.3, 0.5]},
        "full": {"item_power": [0.2, 0.3, 0.4, 0.5, 0.6]},
    },
    "ease": {
        "small": {"regularization": [30.0, 300.0]},
        "full": {"regularization": [10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]},
    },
    "content": {
        "small": {"half_life_d": [None, 30.0]},
        "full": {"half_life_d": [None, 3.0, 10.0, 30.0, 100.0]},
    },
}


@dataclass(frozen=True)
class BaselineChoice:
    """A baseline with the settings that did best on validation.

    Attributes:
        settings: keyword arguments, JSON values only. score: the metric of selection; 0 where
            there is no validation and the first settings were taken.
    """

    name: str
    settings: dict[str, Any]
    score: float


def build_baselines(
    prepared: Prepared,
    *,
    settings: BaselineSettings,
    judge: Callable[[Ranker], float],
    seed: int,
    embedding_dim: int,
) -> tuple[list[BaselineChoice], dict[str, str]]:
    """Choose the settings of every baseline that the data allow.

    Args:
        judge: value on validation, larger is better.
        embedding_dim: size of the factorisations, that of the model they stand beside.

    Returns:
        The choices in the order of ``settings.names``, and by name why the rest was left out.
        Recent popularity is chosen first, since the others fall back to its half-life.
    """
    names = sorted(settings.names, key=lambda name: name != "recent_popularity")
    choices: dict[str, BaselineChoice] = {}
    skipped: dict[str, str] = {}
    for name in names:
        reason = _obstacle(name, prepared, settings)
        if reason is None:
            fallback = choices.get("recent_popularity")
            half_life_d = fallback.settings["half_life_d"] if fallback else None
            try:
                choices[name] = _best(
                    name,
                    _candidates(name, prepared, settings.budget, embedding_dim, half_life_d),
                    lambda choice: judge(refit_baseline(choice, prepared, seed)),
                )
                continue
            except MissingExtraError as error:
                reason = str(error)
        skipped[name] = reason
    return [choices[name] for name in settings.names if name in choices], skipped


def refit_baseline(choice: BaselineChoice, prepared: Prepared, seed: int) -> Ranker:
    """Fit a baseline with its chosen settings on ``prepared.train``.

    Raises:
        MissingExtraError: its library is not installed. ConfigError: no such baseline.
    """
    if choice.name not in _GRIDS:
        raise ConfigError(f"unknown baseline {choice.name!r}; known: {', '.join(_GRIDS)}")
    train = prepared.train
    settings = dict(choice.settings)
    half_life_d = settings.pop(_FALLBACK, None)
    if choice.name == "popularity":
        return PopularityRanker("popularity", popularity(train, None, None))
    if choice.name == "recent_popularity":
        recent = popularity(train, prepared.cutoff, **settings)
        return PopularityRanker("recent_popularity", recent)
    scores = popularity(train, prepared.cutoff, half_life_d)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ranker = _fitted(choice.name, prepared, seed, settings, scores)
    fallback = PopularityRanker("recent_popularity", scores)
    return BackedRanker(ranker, fallback, train.user_counts() > 0)


def _fitted(
    name: str, prepared: Prepared, seed: int, settings: dict[str, Any], scores: Tensor
) -> Ranker:
    # Imported here: popularity stands beside the model where these libraries are missing.
    require("scipy.sparse", "baselines")
    from recclr.baselines.content import content
    from recclr.baselines.ease import ease
    from recclr.baselines.factors import als, bpr, spectral
    from recclr.baselines.neighbours import item_knn

    if name in ("item_knn", "recent_item_knn"):
        return item_knn(name, prepared, scores, **settings)
    if name == "ease":
        return ease(prepared, **settings)
    if name == "content":
        return content(prepared, **settings)
    factorise: dict[str, Callable[..., Ranker]] = {"als": als, "bpr": bpr, "spectral": spectral}
    return factorise[name](prepared, seed=seed, **settings)


def _obstacle(name: str, prepared: Prepared, settings: BaselineSettings) -> str | None:
    """Why the data do not allow a baseline, or None."""
    log = prepared.train
    on_disk = log.mapped_for is not None and not fits_in_memory(len(log))
    if on_disk and name not in ("popularity", "recent_popularity"):
        return f"its {len(log):,} train rows do not fit in the memory that is free"
    if name.startswith("recent") and log.timestamp is None:
        return "the log has no timestamps"
    if name == "ease" and log.num_items > settings.ease_max_items:
        return (
            f"{log.num_items:,} items are more than baselines.ease_max_items = "
            f"{settings.ease_max_items:,}"
        )
    if name == "content" and not prepared.items.columns:
        return "there are no item features"
    if name in ("als", "bpr", "spectral") and min(log.num_users, log.num_items) < 3:
        return "a factorisation needs at least 3 users and 3 items"
    return None


def _candidates(
    name: str, prepared: Prepared, budget: str, dim: int, fallback: float | None
) -> Iterator[dict[str, Any]]:
    grid = _GRIDS[name][budget]
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        if prepared.train.timestamp is None and settings.get("half_life_d") is not None:
            continue
        if name in ("als", "bpr", "spectral"):
            settings["dim"] = dim
        if name not in ("popularity", "recent_popularity"):
            settings[_FALLBACK] = fallback
        yield settings


def _best(
    name: str,
    candidates: Iterator[dict[str, Any]],
    value: Callable[[BaselineChoice], float],
) -> BaselineChoice:
    """The first of the best, so that the order of the grid settles ties."""
    best: BaselineChoice | None = None
    for settings in candidates:
        score = value(BaselineChoice(name, settings, 0.0))
        if best is None or score > best.score:
            best = BaselineChoice(name, settings, score)
    assert best is not None, f"the grid of {name} is empty"
    return best
