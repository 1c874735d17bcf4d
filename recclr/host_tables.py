"""Whole tables once on a machine instead of once a rank, each row moved by one rank.

With a copy on each rank all of them move every row that the step touched; ranks of one machine then
do the same work side by side, on the same memory bus. Here the ranks see one copy, in memory that
they share: each moves its rows, and all wait until the others have. Whoever moves a row sums all
its gradients, in the order of ranks, so weights are those of a copy on each rank up to the order of
sums. While steps run, the memory for weights and optimiser state is that of one process.

Nothing but an update writes to what is shared, so whoever reads between two updates needs no lock.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from recclr.distributed import Ranks
from recclr.kernels import native
from recclr.kernels.native_rows import ALL
from recclr.optim import TableOptimizer


class HostTables:
    """The tables of an optimiser while the ranks of one machine share them.

    Args:
        optimizer: whose tables and state lie in memory that all ranks see; it moves this rank's
            rows from here on.
    """

    def __init__(self, optimizer: TableOptimizer, ranks: Ranks) -> None:
        self.optimizer, self.ranks = optimizer, ranks
        optimizer.share = (ranks.rank, ranks.size)

    def moved(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait until all ranks have moved their rows; ``meanwhile`` must not look at these."""
        self.ranks.wait("the update of tables", meanwhile)

    def give_back(self) -> None:
        """Weights in memory of this rank's own, where it may write as it likes.

        Optimiser state stays where it is: nobody writes there but steps, which share anew.
        """
        for table in self.optimizer.tables.values():
            table.weight.data = table.weight.detach().clone()
        self.optimizer.share = ALL


def shared_tables(optimizer: TableOptimizer, ranks: Ranks) -> HostTables | None:
    """Put tables and their state where all ranks see them, if they can be moved in place there.

    All ranks must call this, with the same weights and state; all get None where one cannot share
    memory, or moments are rounded at random, which goes by all rows of a step.
    """
    weights = [table.weight for table in optimizer.tables.values()]
    if not weights or optimizer.draws or native.usable(*weights) is None:
        return None
    # One after another, so that no more than one tensor is there twice.
    if _replace(optimizer, lambda x: _shared(x, ranks)):
        return HostTables(optimizer, ranks)
    _replace(optimizer, Tensor.clone)
    return None


def _replace(optimizer: TableOptimizer, made: Callable[[Tensor], Tensor | None]) -> bool:
    """Put what is made of them in the place of tables and state; False: one came out as None."""
    for name, table in optimizer.tables.items():
        weight = made(table.weight.detach())
        if weight is None:
            return False
        table.weight.data = weight
        state = optimizer.state[name]
        for key, value in state.items():
            found = made(value)
            if found is None:
                return False
            state[key] = found
    return True


def _shared(x: Tensor, ranks: Ranks) -> Tensor | None:
    """The same numbers in memory that all ranks see; None where there is none."""
    room = ranks.room(x.numel() * x.element_size())
    if room is None:
        return None
    shared = room.view(x.dtype).view(x.shape)
    if ranks.first:
        shared.copy_(x)
    ranks.wait("sharing tables")
    return shared
