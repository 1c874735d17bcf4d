"""The loss and the negatives it is computed against."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from recclr.settings.mining import ExplicitSettings, MinedSettings
from recclr.strict import STRICT
from recclr.strict import require_ranges as _check

LossKind = Literal[
    "infonce",
    "full_softmax",
    "bpr",
    "bce",
    "ccl",
    "margin",
    "triplet",
    "alignment_uniformity",
]
_SOFTMAX = ("infonce", "full_softmax")
WITH_TEMPERATURE = (*_SOFTMAX, "bpr", "bce")
"""Kinds whose scores are divided by the temperature."""
WHERE_LEARNED = ("initial_temperature", "min_temperature", "max_temperature")
"""Keys that are read of a learned temperature only."""
_WITH_NEGATIVES = (*WITH_TEMPERATURE, "ccl", "margin", "triplet")
# Which kinds read a key; anywhere else a value other than the default would do nothing.
_READ_BY: dict[str, tuple[str, ...]] = {
    "temperature": WITH_TEMPERATURE,
    "initial_temperature": WITH_TEMPERATURE,
    "min_temperature": WITH_TEMPERATURE,
    "max_temperature": WITH_TEMPERATURE,
    "second_temperature": _SOFTMAX,
    "log_q_strength": _WITH_NEGATIVES,
    "mask_known_positives": _WITH_NEGATIVES,
    "negative_weight": ("bce", "ccl"),
    "margin": ("ccl", "margin", "triplet"),
    "mining": ("triplet",),
    "log_q": _SOFTMAX,
    "decoupled": _SOFTMAX,
    "hardness": _SOFTMAX,
    "top_k": _SOFTMAX,
    "top_k_temperature": _SOFTMAX,
    "symmetric": _SOFTMAX,
    "positives": _SOFTMAX,
    "uniformity_weight": ("alignment_uniformity",),
}
# What a margin acts on must be what ranks: a cosine, or a distance.
_SIMILARITIES = {
    "ccl": ("cosine",),
    "margin": ("cosine", "euclidean"),
    "triplet": ("cosine", "euclidean"),
    "alignment_uniformity": ("cosine",),
}


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The objective."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: LossKind = "infonce"
    """A softmax over negatives (``losses``), or a sum over pairs (``pair_losses``,
    ``alignment``)."""
    temperature: float | Literal["auto", "learned"] = "auto"
    """``auto``: fixed, by the size of the catalogue (``losses.automatic_temperature``).
    ``learned``: with the weights, between the bounds below."""
    initial_temperature: float = 0.1
    min_temperature: float = 0.02
    max_temperature: float = 1.0
    second_temperature: float | None = None
    """BSL: exponent on the summed negatives; None for plain InfoNCE. Under cosine only: where
    scores have no bound, shifting all of them lowers the loss without end, and training diverges.
    """
    log_q_strength: float = 1.0
    """1 corrects the sampling bias in full, 0 not at all."""
    mask_known_positives: bool = True
    # The softmax family (``scoring``).
    log_q: Literal["corrected", "classic"] = "corrected"
    """The classic form corrects the logit of the positive as well, which no source drew."""
    decoupled: bool = False
    """DCL: the positive is left out of the denominator."""
    hardness: float = 0.0
    """Negatives are weighted by exp(hardness * logit), to a mean of 1; 0 for equal weights."""
    top_k: int | None = None
    """SL@K: a positive far below its row's top K items counts less; None for equal weights."""
    top_k_temperature: float = 1.0
    """Scores, not divided by the temperature, over which the weight of SL@K falls."""
    symmetric: float = 0.0
    """Share of the item -> user direction in the loss."""
    positives: int = 1
    """Items of its user that each row learns from: its own and others of train."""
    negative_weight: float | None = None
    """``bce``, ``ccl``: weight of the mean over negatives beside the positive; None: 1 for ``bce``,
    150 for ``ccl``."""
    margin: float | None = None
    """``ccl``: cosine from which a negative costs something, below 1. ``margin``: distance from
    which it costs nothing. ``triplet``: by how much a negative's distance is to exceed the
    positive's. None: 0.9, 1 and 0.2."""
    mining: Literal["all", "semi_hard", "distance_weighted", "hardest"] = "all"
    """``triplet``: which negatives count, and by how much; see ``pair_losses.Triplet``."""
    uniformity_weight: float | None = None
    """``alignment_uniformity``: weight of uniformity beside alignment; None: 1."""

    def __post_init__(self) -> None:
        _check(
            self,
            temperature=(1e-4, 1e4),
            initial_temperature=(1e-4, 1e4),
            min_temperature=(1e-4, 1e4),
            max_temperature=(1e-4, 1e4),
            second_temperature=(0.01, 100.0),
            log_q_strength=(0.0, 1.0),
            hardness=(0.0, 10.0),
            top_k=(1, 1 << 24),
            top_k_temperature=(1e-4, 1e4),
            symmetric=(0.0, 1.0),
            positives=(1, 64),
            negative_weight=(0.0, 1e6),
            margin=(0.0, 100.0),
            uniformity_weight=(0.0, 1e4),
        )
        self._check_softmax()
        self._check_kind()
        self._check_temperature()

    @property
    def is_plain(self) -> bool:
        """Whether the loss is InfoNCE, whatever its candidates: log(alternatives) bounds it."""
        return (
            self.kind in ("infonce", "full_softmax")
            and self.log_q == "corrected"
            and self.second_temperature is None
            and not self.decoupled
            and self.hardness == 0
            and self.top_k is None
            and self.symmetric == 0
        )

    def _check_temperature(self) -> None:
        if self.min_temperature > self.max_temperature:
            raise ValueError("min_temperature is above max_temperature")
        if self.temperature == "learned":
            return
        for each in fields(self):
            if each.name in WHERE_LEARNED and getattr(self, each.name) != each.default:
                raise ValueError(
                    f"{each.name} = {getattr(self, each.name)!r} is read with temperature = "
                    f"'learned', found {self.temperature!r}; leave one of them out"
                )

    def _check_softmax(self) -> None:
        if self.decoupled and self.second_temperature is not None:
            raise ValueError(
                "decoupled is second_temperature = 1, and both are set; leave one of them out"
            )
        if self.log_q == "classic" and (self.decoupled or self.second_temperature is not None):
            raise ValueError(
                'log_q = "classic" corrects the positive in the denominator, where decoupled and '
                'second_temperature have none; set log_q = "corrected"'
            )
        if self.log_q == "classic" and self.kind == "full_softmax":
            raise ValueError(
                'log_q = "classic" corrects what is sampled, and kind = "full_softmax" samples '
                'nothing; set log_q = "corrected"'
            )
        if self.positives > 1 and not self.mask_known_positives:
            raise ValueError(
                f"positives = {self.positives} takes other train items of a user for positives, "
                "which must not be its negatives; set mask_known_positives = true"
            )

    def _check_kind(self) -> None:
        for each in fields(self):
            kinds = _READ_BY.get(each.name, (self.kind,))
            if self.kind not in kinds and getattr(self, each.name) != each.default:
                raise ValueError(
                    f"{each.name} = {getattr(self, each.name)!r} does nothing with kind = "
                    f"{self.kind!r}; it is read with {' or '.join(map(repr, kinds))}: leave it out"
                )
        if self.kind == "ccl" and self.margin is not None and self.margin >= 1:
            raise ValueError(
                f"margin must be below 1 with kind = 'ccl', found {self.margin!r}: no cosine "
                "exceeds it, so negatives would never count"
            )
        if self.kind == "margin" and self.margin == 0:
            raise ValueError(
                "margin must be above 0 with kind = 'margin': negatives would never count"
            )


@dataclass(frozen=True, kw_only=True)
class PopularitySettings:
    """Negatives drawn in proportion to train count ** alpha."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    count: int
    alpha: float = 0.75

    def __post_init__(self) -> None:
        _check(self, count=(1, 1 << 24), alpha=(0.0, 2.0))


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """Positives of earlier steps as further negatives, without gradient (``momentum``)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    size: int = 4096
    """Vectors that are kept; the oldest go first. 0 for no queue."""
    momentum: float = 0.999
    """What is left of the old weights at each step of the average of the item tower that embeds
    them; 0 for the tower itself."""
    warmup: float = 0.05
    """Share of all steps in which the queue fills but is nobody's negative yet."""

    def __post_init__(self) -> None:
        _check(self, size=(0, 1 << 24), momentum=(0.0, 0.999999), warmup=(0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class NegativesSettings:
    """Sources of negatives, under one log_q: shared by all rows of a batch, but for the last two,
    which each row has for itself.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    in_batch: bool = False
    """The other rows' positives."""
    uniform: int = 1024
    """Drawn from the catalogue, each item alike."""
    popularity: PopularitySettings | None = None
    mined: MinedSettings | None = None
    explicit: ExplicitSettings | None = None
    queue: QueueSettings | None = None
    available: bool = False
    """Only items with a train event before the moment of the step; trains on time cells."""
    available_lead_d: float = 0.0
    """With ``available``: an item counts so many days before its first train event. With 0 an item
    without history is only ever a positive, so towers that see that it has none learn that what is
    new is always right; on MovieTweetings that ruins the ranking."""
    within: str | None = None
    """Categorical item feature: negatives are of the positive's own category. A positive without
    one meets all."""
    counts: Literal["static", "streaming"] = "static"
    """How often an item is expected among the positives: counted in the log, or estimated from the
    batches so far (``streaming``)."""

    def __post_init__(self) -> None:
        _check(self, uniform=(0, 1 << 24), available_lead_d=(0.0, 1e5))
        if self.available_lead_d and not self.available:
            raise ValueError("available_lead_d is read with available = true; leave it out")
        if self.counts == "streaming" and not (self.in_batch or self.queue):
            raise ValueError(
                "counts = 'streaming' is about positives that become negatives: set in_batch or "
                "queue, or leave counts out"
            )
        if not self.in_batch and self.uniform == 0 and self.popularity is None:
            raise ValueError(
                "no source of negatives is left: set in_batch, uniform or popularity (to a full "
                "softmax nothing is sampled, and [negatives] is left out)"
            )


def contradictions(loss: LossSettings, negatives: NegativesSettings, similarity: str) -> list[str]:
    """What of an objective does not go together, one sentence each; none where all does.

    Args:
        similarity: as in ``ModelSettings``.
    """
    found = []
    allowed = _SIMILARITIES.get(loss.kind, (similarity,))
    if loss.mining == "distance_weighted":
        allowed = ("cosine",)
    if similarity not in allowed:
        mined = loss.mining == "distance_weighted" and similarity in _SIMILARITIES["triplet"]
        what = f"mining = {loss.mining!r}" if mined else f"kind = {loss.kind!r}"
        found.append(
            f"loss.{what} needs model.similarity = {' or '.join(map(repr, allowed))}, "
            f"found {similarity!r}"
        )
    if loss.second_temperature not in (None, 1.0) and similarity != "cosine":
        found.append(
            f"loss.second_temperature = {loss.second_temperature:g} needs model.similarity = "
            f"'cosine', found {similarity!r}: of scores without a bound a shift of all lowers the "
            "loss without end; leave one of them out"
        )
    if loss.kind not in _WITH_NEGATIVES and negatives != NegativesSettings():
        found.append(
            f"loss.kind = {loss.kind!r} has no negatives, so nothing would read [negatives]; leave "
            "it out"
        )
    if negatives.mined is not None and loss.kind == "full_softmax":
        found.append(
            "negatives.mined: loss.kind = 'full_softmax' scores every item for every row, to which "
            "mined negatives add nothing; leave negatives.mined out, or set loss.kind = 'infonce'"
        )
    if loss.kind == "full_softmax":
        sampled = {"queue": negatives.queue is not None, "counts": negatives.counts != "static"}
        found += [
            f"negatives.{name} is about sampled negatives, but loss.kind = 'full_softmax' has "
            "every item as one; leave one of them out"
            for name, is_set in sampled.items()
            if is_set
        ]
    return found
