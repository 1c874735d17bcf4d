"""Losses of pairs of items, which are no softmax: what a row pays for its positive and negatives.

Shape letters: R rows, K negatives, D dimension.

With s the score of a pair, τ the temperature, and E_j the mean over the negatives of a row (see
``kernels.pairwise``: over all items that are no known positives, as far as the draws tell):

* ``bpr``: E_j softplus((s_j - s⁺) / τ) (Rendle et al., UAI 2009, equation 4 without its prior).
* ``bce``: softplus(-s⁺ / τ) + w·E_j softplus(s_j / τ), the cross-entropy of both answers.
* ``ccl``: 1 - s⁺ + w·E_j max(0, s_j - m), cosine contrastive loss (SimpleX, Mao et al., CIKM 2021,
  equation 3).
* ``margin``: d⁺² + E_j max(0, m - d_j)², with d the Euclidean distance (Hadsell et al., CVPR 2006,
  equation 4, where each term has a factor of ½).
* ``triplet``: E_j max(0, m + d⁺ - d_j) over the negatives that ``mining`` selects.

τ divides scores where a method has a scale to choose (the first two). Margins act on cosines or
distances as they are. Distances are those of ``model.similarity``: between unit vectors for
``cosine``, between the towers' outputs for ``euclidean``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recclr.errors import ConfigError
from recclr.kernels.pairwise import PairFunction, total_pair_loss
from recclr.settings import WITH_TEMPERATURE, LossSettings, NegativesSettings, contradictions

if TYPE_CHECKING:
    from recclr.scoring import Scored

_WEIGHTS = {"bce": 1.0, "ccl": 150.0}
_MARGINS = {"ccl": 0.9, "margin": 1.0, "triplet": 0.2}
# A distance has no slope below: where it is 0 there is no direction.
_SMALLEST_SQUARE = 1e-8
# From here to √2, the distance of orthogonal vectors, weights follow the density on the sphere.
_NEAREST = 0.5


def pair_loss(scored: Scored, loss: LossSettings) -> Tensor:
    """The loss of a step, float32 scalar.

    Args:
        loss: of a kind named above. All products are in float32.
    """
    queries = scored.queries
    if loss.kind in WITH_TEMPERATURE:
        queries = queries / scored.temperature
    positives = (queries * scored.items.index_select(0, scored.positive_row)).sum(1)
    function, own, anchors, weight = _terms(loss, scored.similarity, positives, queries.shape[1])
    negatives = total_pair_loss(
        queries,
        scored.candidates,
        scored.log_weights,
        anchors,
        scored.row_weights,
        function,
        scored.mask,
        own_scores=scored.own_scores(queries),
        own_log_weights=scored.own_log_weights,
    )
    return (
        weight * negatives if own is None else (own * scored.row_weights).sum() + weight * negatives
    )


def _terms(
    loss: LossSettings, similarity: str, positives: Tensor, dim: int
) -> tuple[PairFunction, Tensor | None, Tensor, float]:
    """Cost of a negative, cost of each positive (None for none), anchors, weight of negatives."""
    weight = _WEIGHTS.get(loss.kind, 1.0) if loss.negative_weight is None else loss.negative_weight
    margin = _MARGINS.get(loss.kind, 0.0) if loss.margin is None else loss.margin
    distances = Distances(similarity)
    if loss.kind == "bpr":
        return Ranking(), None, positives, weight
    if loss.kind == "bce":
        return Unlikely(), softplus(-positives), positives.detach(), weight
    if loss.kind == "ccl":
        return Above(margin), 1 - positives, positives.detach(), weight
    if loss.kind == "margin":
        return Within(margin, distances), distances.squared(positives), positives.detach(), weight
    return Triplet(margin, distances, loss.mining, dim), None, distances.of(positives), weight


@dataclass(frozen=True)
class Distances:
    """Euclidean distances from scores: ‖u - v‖² is 2 - 2·cosine, and minus the score of
    ``similarity``'s "euclidean".
    """

    similarity: str

    def squared(self, scores: Tensor) -> Tensor:
        return 2 - 2 * scores if self.similarity == "cosine" else -scores

    def of(self, scores: Tensor) -> Tensor:
        """Distance, with no slope below 1e-4, where rounding has left no direction."""
        return self.squared(scores).clamp_min(_SMALLEST_SQUARE).sqrt()

    def with_slopes(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``of``, and its derivative by the score."""
        squares, distances = self.squared(scores), self.of(scores)
        factor = -1.0 if self.similarity == "cosine" else -0.5
        return distances, torch.where(squares >= _SMALLEST_SQUARE, factor / distances, 0.0)


class _All:
    """Every negative counts by its weight."""

    def selected(self, weights: Tensor, scores: Tensor, anchors: Tensor) -> Tensor:
        return weights


@dataclass(frozen=True)
class Ranking(_All):
    """softplus(s - anchor), the anchor the positive's score."""

    def value(self, scores: Tensor, anchors: Tensor) -> Tensor:
        return softplus(scores - anchors)

    def slopes(self, scores: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        by_score = (scores - anchors).sigmoid_()
        return by_score, -by_score


@dataclass(frozen=True)
class Unlikely(_All):
    """softplus(s), the cross-entropy of a pair that is none."""

    def value(self, scores: Tensor, anchors: Tensor) -> Tensor:
        return softplus(scores)

    def slopes(self, scores: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        return scores.sigmoid(), None


@dataclass(frozen=True)
class Above(_All):
    """max(0, s - margin)."""

    margin: float

    def value(self, scores: Tensor, anchors: Tensor) -> Tensor:
        return (scores - self.margin).clamp_min(0.0)

    def slopes(self, scores: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        return (scores > self.margin).float(), None


@dataclass(frozen=True)
class Within(_All):
    """max(0, margin - d)²."""

    margin: float
    distances: Distances

    def value(self, scores: Tensor, anchors: Tensor) -> Tensor:
        return (self.margin - self.distances.of(scores)).clamp_min(0.0).square()

    def slopes(self, scores: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        distances, slopes = self.distances.with_slopes(scores)
        inside = (self.margin - distances).clamp_min_(0.0)
        return slopes.mul_(inside).mul_(-2), None


@dataclass(frozen=True)
class Triplet:
    """max(0, margin + anchor - d), the anchor the positive's distance.

    Args:
        mining: which of a row's negatives count.

            * ``all``: each by its weight.
            * ``semi_hard``: those farther than the positive by less than the margin (Schroff et
              al., CVPR 2015); a row without any costs nothing.
            * ``distance_weighted``: each by its weight over the density of its distance between
              random points of the sphere, q(d) ∝ d^(D-2)·(1 - d²/4)^((D-3)/2), as Wu et al. (ICCV
              2017) sample them; here the mean over that distribution, without the draw. Their bound
              on the weights is that distances below 0.5 weigh as 0.5 does; beyond √2, where the
              density falls again, they weigh as √2 does.
            * ``hardest``: the nearest one, whatever its weight; the first of equal ones.
        dim: D, of unit vectors; read by ``distance_weighted``.
    """

    margin: float
    distances: Distances
    mining: str
    dim: int

    def value(self, scores: Tensor, anchors: Tensor) -> Tensor:
        return (self.margin + anchors - self.distances.of(scores)).clamp_min(0.0)

    def slopes(self, scores: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        distances, slopes = self.distances.with_slopes(scores)
        active = (self.margin + anchors - distances > 0).float()
        return slopes.mul_(-active), active

    def selected(self, weights: Tensor, scores: Tensor, anchors: Tensor) -> Tensor:
        if self.mining == "hardest":
            living = scores.masked_fill(weights <= 0, -torch.inf)
            nearest = living.argmax(1, keepdim=True)
            some = (weights > 0).any(1, keepdim=True).float()
            return weights.zero_().scatter_(1, nearest, some)
        if self.mining == "semi_hard":
            distances = self.distances.of(scores)
            return weights.mul_((distances > anchors) & (distances < anchors + self.margin))
        if self.mining == "distance_weighted":
            rarity = self.log_rarity(self.distances.squared(scores))
            rarity.masked_fill_(weights <= 0, -torch.inf)
            largest = rarity.amax(1, keepdim=True)
            rarity.sub_(torch.where(largest > -torch.inf, largest, 0.0)).exp_()
            return weights.mul_(rarity)
        return weights

    def log_rarity(self, squares: Tensor) -> Tensor:
        """Minus log q(d) up to a constant, of squared distances between unit vectors."""
        squares = squares.clamp(_NEAREST**2, 2.0)
        power = (2 - self.dim) / 2
        return power * squares.log() - (self.dim - 3) / 2 * torch.log1p(-squares / 4)


def require_objective(
    loss: LossSettings, negatives: NegativesSettings, similarity: str, *, num_rows: int
) -> None:
    """Refuse an objective whose settings contradict each other, or that no batch can have.

    Args:
        similarity: of the model. num_rows: of a batch.

    Raises:
        ConfigError: says which, and what to do.
    """
    problems = contradictions(loss, negatives, similarity)
    if loss.kind == "alignment_uniformity" and num_rows < 2:
        problems.append(
            f"loss.kind = {loss.kind!r} spreads the rows of a batch apart, of which there must be "
            f"at least 2, found {num_rows}; raise train.batch_size"
        )
    if problems:
        raise ConfigError("; ".join(problems))
