"""When data are little: whether a model is worth training, and settings that suit it.

The criteria are stated figures, not a guess: every one that was met is said with what was found.
What the settings are for stands beside each; ``recclr curve`` shows what they come to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recclr.config import Config, allows, dump_toml, with_changes
from recclr.data.infer import infer_features
from recclr.data.interactions import Log
from recclr.data.log import EncodedLog
from recclr.evaluate import EvaluationSet
from recclr.toml_text import toml_value

# Too little: below any of these nothing that a model learns can be told from chance.
_LEAST_ROWS, _LEAST_ENTITIES, _LEAST_JUDGED = 1_000, 50, 100
# Little: below any of these in the median, or above this share of held-out rows.
_FEW_ROWS, _FEW_EACH, _MANY_COLD = 50_000, 5, 0.2
# Rows of each user and item that one coordinate of their vectors should rest on, at least.
_ROWS_PER_COORDINATE, _LEAST_DIM = 0.1, 16
# Steps in an epoch; fewer leave a training of some epochs unfinished.
_STEPS = 64
_DAY_S = 86_400


@dataclass(frozen=True)
class Facts:
    """What the criteria look at.

    Attributes:
        rows: of train. users, items: with train rows. per_user, per_item: median of their rows.
        judged: users of validation; None without validation. cold: share of its rows whose item
            has no train row; None likewise.
        has_features: whether a table of items or users has, or is configured to have, features.
    """

    rows: int
    users: int
    items: int
    per_user: float
    per_item: float
    judged: int | None
    cold: float | None
    has_features: bool


@dataclass(frozen=True)
class Line:
    """A proposed setting: dotted key, its value (plain, as in TOML), and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        verdict: ``plenty``, ``little`` or ``too_little``. reasons: criteria that were met.
        profile: proposed settings; empty where data are plenty.
    """

    verdict: str
    reasons: tuple[str, ...]
    profile: tuple[Line, ...]

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        return {
            "plenty": "data are plenty: the defaults will do",
            "little": "data are little: the settings below suit them better than the defaults",
            "too_little": "too little data: baselines suffice; a model may be trained, but do not "
            "expect to see that it is better",
        }[self.verdict]

    def toml(self) -> str:
        """The profile as sections of a configuration, each line with its reason."""
        sections: dict[str, list[str]] = {}
        for line in self.profile:
            section, _, name = line.key.rpartition(".")
            text = f"{name} = {toml_value(line.value)}"
            sections.setdefault(section, []).append(f"# {line.reason}\n{text}")
        return "\n\n".join(f"[{name}]\n" + "\n".join(found) for name, found in sections.items())

    def configuration(self, config: Config) -> str:
        """The whole of ``config`` with the profile, as TOML; reasons in the lines before it."""
        said = ["Every key with its value, by recclr check."]
        said += [f"{line.key}: {line.reason}" for line in self.profile]
        changed = with_changes(config, {line.key: line.value for line in self.profile})
        return "".join(f"# {line}\n" for line in said) + "\n" + dump_toml(changed)

    def to_json(self) -> dict[str, Any]:
        """For ``recclr check --json``."""
        lines = [{"key": p.key, "value": p.value, "reason": p.reason} for p in self.profile]
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "profile": lines,
            "toml": self.toml(),
        }


def advise(log: Log, train: EncodedLog, examples: EvaluationSet | None, config: Config) -> Advice:
    """Judge how much data there are for a model of ``config``.

    Args:
        log: for the columns of its tables. train: the rows to learn from.
        examples: validation, of which is counted who can be judged; None without any.
    """
    facts = facts_of(log, train, examples, config)
    if reasons := _too_little(facts):
        verdict = "too_little"
    elif reasons := _little(facts):
        verdict = "little"
    else:
        verdict = "plenty"
    profile = () if verdict == "plenty" else _fitting(_profile(facts, log, train, config), config)
    return Advice(verdict, tuple(reasons), profile)


def _fitting(lines: Iterable[Line], config: Config) -> tuple[Line, ...]:
    """Those that the configuration allows, together with those before: it may have one tower only,
    or say that batches are no time cells.
    """
    kept: list[Line] = []
    for line in lines:
        if allows(config, {each.key: each.value for each in (*kept, line)}):
            kept.append(line)
    return tuple(kept)


def facts_of(log: Log, train: EncodedLog, examples: EvaluationSet | None, config: Config) -> Facts:
    """The figures that the criteria look at; arguments as of ``advise``."""
    users, items = train.user_counts(), train.item_counts()
    judged = cold = None
    if examples is not None:
        judged = len(examples.user_idx)
        wanted = examples.relevant.values.long()
        known = items[wanted.clamp(min=0)].gt(0) & wanted.ge(0)
        cold = 1 - float(known.double().mean())
    configured = bool(config.item.features or config.user.features)
    return Facts(
        rows=len(train),
        users=int((users > 0).sum()),
        items=int((items > 0).sum()),
        per_user=_median(users),
        per_item=_median(items),
        judged=judged,
        cold=cold,
        has_features=configured or any(_inferred(log, side) for side in ("item", "user")),
    )


def _median(counts: Tensor) -> float:
    return float(torch.quantile(counts[counts > 0].sort().values[:: _stride(counts)].double(), 0.5))


def _stride(counts: Tensor) -> int:
    """``torch.quantile`` takes 16 million values; of more, every so many sorted ones will do."""
    return max(1, math.ceil(len(counts) / (1 << 23)))


def _inferred(log: Log, side: str) -> dict[str, dict[str, Any]]:
    """Features that the columns of a table would make."""
    table = log.items if side == "item" else log.users
    return {} if table is None else infer_features(table, key=f"{side}_id")


def _too_little(facts: Facts) -> list[str]:
    found = []
    if facts.rows < _LEAST_ROWS:
        found.append(f"{facts.rows:,} train rows, fewer than {_LEAST_ROWS:,}")
    for count, what in ((facts.users, "users"), (facts.items, "items")):
        if count < _LEAST_ENTITIES:
            found.append(f"{count:,} {what} with train rows, fewer than {_LEAST_ENTITIES}")
    if facts.judged is not None and facts.judged < _LEAST_JUDGED:
        found.append(
            f"{facts.judged:,} users to judge by, fewer than {_LEAST_JUDGED}: intervals of recall "
            "are wider than the differences between good rankers"
        )
    if facts.per_user < 2 and facts.per_item < 2 and not facts.has_features:
        found.append(
            "the median user and the median item have one row, and there are no features: nothing "
            "joins one row to another"
        )
    return found


def _little(facts: Facts) -> list[str]:
    found = []
    if facts.rows < _FEW_ROWS:
        found.append(f"{facts.rows:,} train rows, fewer than {_FEW_ROWS:,}")
    for median, what in ((facts.per_user, "user"), (facts.per_item, "item")):
        if median < _FEW_EACH:
            found.append(f"the median {what} has {median:g} train rows, fewer than {_FEW_EACH}")
    if facts.cold is not None and facts.cold > _MANY_COLD:
        found.append(
            f"{facts.cold:.0%} of what is to be found are items without train rows, more than "
            f"{_MANY_COLD:.0%}"
        )
    return found


def _profile(facts: Facts, log: Log, train: EncodedLog, config: Config) -> Iterator[Line]:
    """Settings that differ from those of ``config``."""
    features = _fitting((Line(key, *found) for key, found in _features(log, train, config)), config)
    yield from features
    has = {
        side: bool(getattr(config, side).features)
        or any(line.key.startswith(f"{side}.features.") for line in features)
        for side in ("item", "user")
    }
    yield from _ids(facts, config, has)
    for side in ("user", "item"):
        if getattr(config, side).dropout < 0.1:
            yield Line(
                f"{side}.dropout", 0.1, "stronger dropout: few rows are soon learned by heart"
            )
    if (dim := _dimension(facts)) < config.model.embedding_dim:
        yield Line(
            "model.embedding_dim",
            dim,
            f"a vector of {config.model.embedding_dim} coordinates asks for more rows than "
            f"{facts.rows:,} in all",
        )
    views = config.self_supervision
    if has["item"] and (views is None or views.item is None):
        yield Line(
            "self_supervision.item",
            {"weight": 0.1},
            "two views of each item, told from all others: features are learned without rows",
        )
    yield from _loop(facts, config)


def _features(log: Log, train: EncodedLog, config: Config) -> Iterator[tuple[str, tuple[Any, str]]]:
    for side in ("item", "user"):
        if not getattr(config, side).features:
            for name, value in _inferred(log, side).items():
                reason = f"features over ids: {side}s of few rows borrow from those alike"
                yield f"{side}.features.{name}", (value, reason)
    kinds = {feature.kind for feature in config.item.features.values()}
    times = train.timestamp
    if times is not None and len(times) and "statistics" not in kinds:
        span_d = max(1.0, float(times.max() - times.min()) / _DAY_S)
        windows = [round(span_d / share, 2) for share in (90, 30, 9)]
        yield (
            "item.features.popularity_prior",
            (
                {"kind": "statistics", "windows_d": windows},
                "popularity prior: what was taken of late is the best guess where taste is unknown",
            ),
        )


def _ids(facts: Facts, config: Config, has: Mapping[str, bool]) -> Iterator[Line]:
    user, item = config.user, config.item
    history: dict[str, Any] = {"length": 50} | ({"use": "both"} if has["item"] else {})
    if user.history is None:
        yield Line("user.history", history, "a user of few rows is known by the items taken")
    elif has["item"] and user.history.use == "ids":
        yield Line("user.history.use", "both", "features let a history of rare items speak")
    without_id = facts.per_user < _FEW_EACH
    if user.id.enabled and without_id:
        yield Line(
            "user.id.enabled",
            False,
            f"{facts.per_user:g} rows teach no vector of a user's own; the history serves instead",
        )
    elif user.id.enabled and user.id.dropout < 0.3:
        yield Line("user.id.dropout", 0.3, "the other parts learn to do without the id")
    if item.id.enabled and has["item"] and item.id.dropout < 0.3:
        yield Line("item.id.dropout", 0.3, "features learn to do without the id, as new items must")
    some_id = item.id.enabled or (user.id.enabled and not without_id)
    by_default = config.spectral_by_default and not without_id
    if some_id and config.model.init != "spectral" and not by_default:
        yield Line("model.init", "spectral", "ids start from an SVD of all rows, not from noise")


def _dimension(facts: Facts) -> int:
    """The largest power of two that the mean entity's rows support, 16 at least."""
    rows_each = 2 * facts.rows / max(facts.users + facts.items, 1)
    most = max(rows_each / _ROWS_PER_COORDINATE, _LEAST_DIM)
    return 1 << int(math.log2(most))


def _loop(facts: Facts, config: Config) -> Iterator[Line]:
    size = max(32, 1 << int(math.log2(max(facts.rows / _STEPS, 1))))
    if size < config.train.batch_size:
        yield Line(
            "train.batch_size",
            size,
            f"{facts.rows:,} rows in batches of {config.train.batch_size:,} are "
            f"{math.ceil(facts.rows / config.train.batch_size)} steps an epoch, too few",
        )
    if config.train.patience == 0 and facts.judged is not None:
        yield Line("train.patience", 3, "stop when validation says that nothing more is learned")
    if not config.train.refit and facts.judged is not None:
        yield Line("train.refit", True, "the rows of validation are too many to do without")
