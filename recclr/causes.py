"""Named causes: from figures of ``monitors`` to plain sentences that say what to do.

A rule is sure before it speaks: collapse of a tower, for example, has to show in the rankings as
well. The thresholds stand beside the rules; figures that a rule misses keep it silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = Mapping[str, float]

# Below this variance all vectors are one; what two users' rankings then share at least.
_CONSTANT, _SAME_LISTS = 0.01, 0.3
# Norms whose middle half differs by more of the median are no constant tower.
_SAME_NORMS = 0.1
# Share of the squared singular values in one direction.
_ONE_DIRECTION = 0.98
# Effective rank as a share of what it could be, and the least dimension that is looked at.
_LOW_RANK, _FEW_DIMENSIONS = 0.1, 8
# Slots that the most recommended items take, what two users' lists share, and rows that as many
# most taken items have at most: where few items are new or wanted, lists are rightly alike.
_CONCENTRATED, _ALIKE, _SPREAD_DEMAND = 0.9, 0.8, 0.4
# By how much the third quartile of items' lengths exceeds the first where they decide, not angles.
_NORMS_APART = 10.0
# A learned temperature within this factor of a bound stands at it.
_AT_BOUND = 1.001
# Evaluations in a row that have to show a cause while the training lasts.
_EVALUATIONS = 3


@dataclass(frozen=True)
class Cause:
    """What is wrong. name: of the rule. text: what was found. advice: what to try."""

    name: str
    text: str
    advice: str

    def to_json(self) -> dict[str, str]:
        """As the log and metrics.json have it."""
        return {"cause": self.name, "text": self.text, "advice": self.advice}


def causes(history: Sequence[Figures], *, final: bool = False) -> list[Cause]:
    """What the figures of a training say is wrong, most basic first; empty for a healthy model.

    A constant tower, or one along one direction, is the cause of rankings that are alike and of a
    low rank of its own, which are then not named as well.

    Args:
        history: figures of each evaluation in order. A cause is named when each of the last three
            shows it: popularity is learned first, so that in the beginning lists are alike and
            vectors are near each other in a healthy training as well. May be empty.
        final: the training is over, and its last figures speak for themselves.
    """
    last = history[-1:] if final else history[-_EVALUATIONS:]
    if len(last) < (1 if final else _EVALUATIONS):
        return []
    *before, found = [_named(figures) for figures in last]
    names = [{cause.name for cause in earlier} for earlier in before]
    return [cause for cause in found if all(cause.name in earlier for earlier in names)]


def _named(figures: Figures) -> list[Cause]:
    """Every rule on the figures of one evaluation."""
    found: list[Cause] = []
    collapsed = False
    for side in ("user", "item"):
        named = _constant(side, figures) or _one_direction(side, figures)
        collapsed |= named is not None
        found += _spoken(named or _low_rank(side, figures))
    if not collapsed:
        found += _spoken(_concentrated(figures))
    return found + _spoken(_norms_apart(figures)) + _spoken(_saturated(figures))


def _spoken(cause: Cause | None) -> list[Cause]:
    return [] if cause is None else [cause]


def _known(figures: Figures, *names: str) -> bool:
    return all(name in figures for name in names)


def _constant(side: str, figures: Figures) -> Cause | None:
    if not _known(figures, f"{side}_variance", "overlap"):
        return None
    variance, overlap = figures[f"{side}_variance"], figures["overlap"]
    if variance >= _CONSTANT or overlap < _SAME_LISTS:
        return None
    if side == "user":
        return Cause(
            "constant_user_tower",
            "the user tower gives nearly the same vector to everybody: the variance of unit "
            f"vectors is {variance:.2g} of at most 1, and two users' lists share {overlap:.0%}",
            "give the tower what tells users apart (user.id, user.history, user.features), look "
            "whether those columns are filled, lower their dropout, or lower train.dense_lr",
        )
    low, median, high = (figures[f"item_norm_{name}"] for name in ("q1", "median", "q3"))
    if high - low > _SAME_NORMS * median:
        return None
    return Cause(
        "constant_item_tower",
        "the item tower gives nearly the same vector to every item: the variance of unit vectors "
        f"is {variance:.2g} of at most 1",
        "give the tower what tells items apart (item.id, item.features), look whether those "
        "columns are filled, lower their dropout, or lower train.table_lr and train.dense_lr",
    )


def _one_direction(side: str, figures: Figures) -> Cause | None:
    if not _known(figures, f"{side}_first_share", "overlap"):
        return None
    share, limit = figures[f"{side}_first_share"], figures[f"{side}_rank_limit"]
    if limit <= 2 or share <= _ONE_DIRECTION or figures["overlap"] < _SAME_LISTS:
        return None
    return Cause(
        f"one_direction_{side}s",
        f"the vectors of {side}s lie along one line: {share:.1%} of their squared length is in one "
        f"direction of {limit:.0f}, so that there are one or two rankings for everybody",
        "lower the learning rates, raise the temperature (loss.temperature or "
        'loss.min_temperature), use more negatives, or set model.init = "spectral"',
    )


def _low_rank(side: str, figures: Figures) -> Cause | None:
    if not _known(figures, f"{side}_rank"):
        return None
    rank, limit = figures[f"{side}_rank"], figures[f"{side}_rank_limit"]
    if limit < _FEW_DIMENSIONS or rank >= _LOW_RANK * limit:
        return None
    return Cause(
        f"low_rank_{side}s",
        f"the vectors of {side}s use only {rank:.1f} of {limit:.0f} dimensions (effective rank)",
        "a smaller model.embedding_dim would do as well; to make use of all, train longer, lower "
        f"the temperature, use more negatives, or give {side}s an id or more features",
    )


def _concentrated(figures: Figures) -> Cause | None:
    if not _known(figures, "top_percent_share", "overlap"):
        return None
    share, demand = figures["top_percent_share"], figures["demand_share"]
    if share < _CONCENTRATED or figures["overlap"] < _ALIKE or demand > _SPREAD_DEMAND:
        return None
    return Cause(
        "popularity_only",
        f"the {figures['top_items']:,.0f} most recommended items take {share:.0%} of all slots, "
        f"while as many most taken items have {demand:.0%} of the rows, and two users' lists "
        f"share {figures['overlap']:.0%}: everybody gets nearly the same",
        "train longer or with a lower temperature, give users a history or features, or, where "
        "loss.log_q_strength is 1, lower it, which holds popular items back",
    )


def _norms_apart(figures: Figures) -> Cause | None:
    if not _known(figures, "item_norm_q1", "item_norm_q3"):
        return None
    low, high = figures["item_norm_q1"], figures["item_norm_q3"]
    if high <= _NORMS_APART * low:
        return None
    times = f"{high / low:.0f} times the first" if low > 0 else "above a first of 0"
    return Cause(
        "item_norms_apart",
        f"the vectors of items differ more in length than they could in angle: the third quartile "
        f"of their lengths is {times}, so that the long ones are first for everybody, or last",
        'set model.similarity = "cosine", under which all have length 1, lower train.table_lr and '
        "train.dense_lr, or raise loss.temperature if the loss has one",
    )


def _saturated(figures: Figures) -> Cause | None:
    if not _known(figures, "temperature_low"):
        return None
    low, high, value = (figures[f"temperature{name}"] for name in ("_low", "_high", ""))
    if high <= low * _AT_BOUND**2:
        return None
    if value <= low * _AT_BOUND:
        return Cause(
            "temperature_at_lower_bound",
            f"the learned temperature stands at its lower bound, {value:.3g}: the loss asks for "
            "sharper distinctions than it may make, as when it learns train rows by heart",
            "if recall on validation still rises, lower loss.min_temperature; if not, set "
            "loss.temperature to a number such as 0.1, or use more negatives and dropout",
        )
    if value * _AT_BOUND >= high:
        return Cause(
            "temperature_at_upper_bound",
            f"the learned temperature stands at its upper bound, {value:.3g}: the scores are too "
            "far apart for the loss, or too many rows are noise",
            "raise loss.max_temperature (under dot product scores have no bound), lower the "
            "learning rates, or look at what the rows are",
        )
    return None
