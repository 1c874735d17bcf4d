"""Learning from a teacher: the scores that another model gives to the candidates of a step.

Shape letters: B rows, C candidates, T dimension of the teacher.

The log tells of a row that one item was right. A teacher tells of every candidate how right it is,
so a step says a hundred times as much (Hinton, Vinyals and Dean 2015; for retrieval with towers
Tang and Wang 2018, "Ranking Distillation"). What it teaches is what the student's small dimension
can hold of it, and no ranking of known positives, which no candidate is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    users: Tensor
    items: Tensor
    weight: float

    @classmethod
    def of(cls, vectors: Vectors, settings: DistillationSettings, *, seed: int = 0) -> Teacher:
        """From what a run serves, whatever its similarity is.

        Args:
            seed: as ``blending.of_equal_spread`` has it.
        """
        even = of_equal_spread(vectors, seed=seed)
        return cls(even.users, even.items / settings.temperature, settings.weight)

    def to(self, device: torch.device | str) -> Teacher:
        return replace(self, users=self.users.to(device), items=self.items.to(device))

    def loss(self, scored: Scored, candidate_idx: Tensor) -> Tensor:
        """How far the rows' ranking of their shared candidates is from the teacher's, in nats.

        Args:
            candidate_idx: int64 [C], items of ``scored.candidates``.

        Returns:
            Σ row_weight · KL(teacher ‖ model), float32 scalar: of several ranks the part of this.
        """
        users, items = self.users[scored.user_idx], self.items[candidate_idx]
        known = (items != 0).any(1)
        return total_distillation_loss(
            scored.queries / scored.temperature,
            scored.candidates,
            users,
            items,
            torch.where(known, scored.log_weights, -torch.inf),
            scored.row_weights * (users != 0).any(1),
            scored.mask,
        )
