"""Learning from a teacher: the scores that another model gives to the candidates of a step.

Shape letters: B rows, C candidates, T dimension of the teacher.

The log tells of a row that one item was right. A teacher tells of every candidate how right it is,
so a step says a hundred times as much (Hinton, Vinyals and Dean 2015; for retrieval with towers
Tang and Wang 2018, "Ranking Distillation"). That a user's known positives are no negatives is of
the log's loss; here they are candidates like all others, of which the teacher knows how right they
are. (Without them Gowalla's validation has .1259 instead of .1297 NDCG@20, RESULTS.md.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.blending import Vectors, of_equal_spread
from recclr.kernels.distilled import total_distillation_loss
from recclr.scoring import Scored
from recclr.settings import DistillationSettings


@dataclass(frozen=True)
class Teacher:
    """Vectors whose dot product is a score over its temperature.

    Attributes:
        users: float32 [at least num_users, T]; a row of zeros teaches nothing. items: float32
            [num_items, T]; a row of zeros is nobody's candidate here. weight: share of the loss.
        known_users, known_items: bool, which rows are not all zeros.
    """

    users: Tensor
    items: Tensor
    weight: float
    known_users: Tensor
    known_items: Tensor

    @classmethod
    def of(cls, vectors: Vectors, settings: DistillationSettings, *, seed: int = 0) -> Teacher:
        """From what a run serves, whatever its similarity is.

        Args:
            seed: as ``blending.of_equal_spread`` has it.
        """
        even = of_equal_spread(vectors, seed=seed)
        return cls.of_scaled(even.users, even.items / settings.temperature, settings.weight)

    @classmethod
    def of_scaled(cls, users: Tensor, items: Tensor, weight: float) -> Teacher:
        """From vectors whose dot product is a score over its temperature already."""
        return cls(users, items, weight, (users != 0).any(1), (items != 0).any(1))

    def to(self, device: torch.device | str) -> Teacher:
        return Teacher(
            self.users.to(device),
            self.items.to(device),
            self.weight,
            self.known_users.to(device),
            self.known_items.to(device),
        )

    def loss(self, scored: Scored, candidate_idx: Tensor | None) -> Tensor:
        """How far the rows' ranking of their shared candidates is from the teacher's, in nats.

        Args:
            candidate_idx: int64 [C], items of ``scored.candidates``; None for all in order, which
                then need no copy.

        Returns:
            Σ row_weight · KL(teacher ‖ model), float32 scalar: of several ranks the part of this.
        """
        items, known = self.items, self.known_items
        if candidate_idx is not None:
            items, known = items[candidate_idx], known[candidate_idx]
        return total_distillation_loss(
            scored.queries / scored.temperature,
            scored.candidates,
            self.users[scored.user_idx],
            items,
            torch.where(known, scored.log_weights, -torch.inf),
            scored.row_weights * self.known_users[scored.user_idx],
        )
