"""What the ranks of a step tell each other once their gradients are there.

One sum carries everything small: the gradients of dense layers, the loss, whether a signal came,
and how many table rows each rank has; one gather then carries the rows and their gradients. Through
memory that ranks share one message of each carries all of it. Every rank applies the same bits, so
weights stay equal without being sent; where ranks share the tables themselves (``host_tables``),
each moves its rows.

Shape letters: D dimension of a table, R rows of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recclr.distributed import Ranks
from recclr.host_memory import Message
from recclr.host_tables import HostTables, shared_tables
from recclr.kernels.native_rows import Part
from recclr.optim import RowGradients, Table, summed_rows
from recclr.optimizers import Optimizers
from recclr.step_stats import StepStats


class StepExchange:
    """Makes the gradients of one rank those of the whole batch.

    Costs, each step: a sum of all dense parameters, a gather of (8 + 4·D) bytes for each look-up of
    a rank (for each distinct row, where many come twice; where tables are shared, 16 for each
    look-up of a bag and 4·D for the bag), and a wait of the host, which must know those numbers.
    """

    def __init__(self, optimizers: Optimizers, ranks: Ranks) -> None:
        self.optimizers, self.ranks = optimizers, ranks
        self.shared: HostTables | None = None
        self._asked = False

    def share(self) -> None:
        """Before steps: let ranks share tables where they can, until ``give_back``.

        What a checkpoint holds is to be loaded before: each rank would write there.
        """
        if not self._asked:
            self.shared = shared_tables(self.optimizers.tables, self.ranks)
            self._asked = True

    def update(
        self, step: int, gradients: list[RowGradients], meanwhile: Callable[[], None]
    ) -> None:
        """Move every weight by what a call returned; wait until all have moved tables they share.

        Args:
            meanwhile: done where others are waited for, before that; reads no weights.
        """
        self.optimizers.step(step, gradients)
        if self.shared is not None:
            self.shared.moved(meanwhile)
            # A long wait leaves nobody to watch over what follows.
            self.ranks.watch()

    def give_back(self) -> None:
        """Tables are this rank's own again, for whoever writes to them other than by steps."""
        if self.shared is not None:
            self.shared.give_back()
        self.shared, self._asked = None, False

    def __call__(
        self, stats: StepStats, *, stopped: bool
    ) -> tuple[StepStats, list[RowGradients], bool]:
        """Sum dense gradients in place; merge those of tables.

        Args:
            stats: this rank's part of the step, after its backward pass.
            stopped: whether this rank was asked to end.

        Returns:
            the step of all ranks; gradients of tables for ``Optimizers.step``; whether any rank was
            asked to end.
        """
        dense = list(self.optimizers.dense.values())
        device = stats.loss.device
        tables = self.optimizers.tables.tables
        found = {name: table.take_lookups() for name, table in tables.items()}
        few = [float(stats.loss.detach()), float(stats.num_masked), float(stopped)]
        few += [float(loss) for loss in stats.auxiliary.values()]
        few += [float(p.grad is not None) for p in dense]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in dense]
        head = torch.tensor(few, device=device)
        flat = torch.cat([head, *(grad.reshape(-1) for grad in grads)])
        flat, every = self._through_memory(flat, found) or self._through_collectives(flat, found)
        merged = [(name, parts) for name, parts in every.items() if parts]
        head, rest = flat[: len(few)], flat[len(few) :]
        auxiliary = dict(zip(stats.auxiliary, head[3:], strict=False))
        present = head[3 + len(auxiliary) :].tolist()
        for p, grad, some in zip(
            dense, torch.split(rest, [p.numel() for p in dense]), present, strict=True
        ):
            # No gradient anywhere is not a gradient of zero: AdamW would decay the weight.
            p.grad = grad.view_as(p).to(p.dtype) if some else None
        loss, num_masked = head[0], int(head[1])
        self.ranks.watch()
        told = replace(stats, loss=loss, num_masked=num_masked, auxiliary=auxiliary)
        return told, merged, bool(head[2] > 0)

    def _through_memory(
        self, flat: Tensor, found: Mapping[str, list[Part]]
    ) -> tuple[Tensor, dict[str, list[Part]]] | None:
        """``flat`` summed over ranks, and gradients of all; None where ranks share no memory."""
        if flat.device.type != "cpu":
            return None
        # Whoever moves a row sums it: once in all, and of a bag of rows one vector is sent. Where
        # each rank moves every row, they share that work, and send sums.
        if self.shared is None:
            found = self._in_one(found)
        every = [part for parts in found.values() for part in parts]
        own = [
            torch.tensor([len(parts) for parts in found.values()], dtype=torch.int64),
            torch.tensor([(len(r), len(g), p is not None) for r, g, p in every]).long().reshape(-1),
            flat,
            *(each.contiguous() for part in every for each in part if each is not None),
        ]
        messages = self.ranks.gather_parts(own, "gradients")
        if messages is None:
            return None
        merged: dict[str, list[Part]] = {name: [] for name in found}
        total: Tensor | None = None
        for message in messages:
            numbers = message.take(torch.int64, len(found))
            sizes = message.take(torch.int64, int(numbers.sum()), 3).tolist()
            summand = message.take(flat.dtype, len(flat))
            # In the order of ranks, so that all have the same bits.
            total = summand.clone() if total is None else total.add_(summand)
            for (name, parts), number in zip(merged.items(), numbers.tolist(), strict=True):
                dim = self.optimizers.tables.tables[name].dim
                parts += [_taken(message, dim, *sizes.pop(0)) for _ in range(number)]
        assert total is not None
        return total, merged

    def _in_one(self, found: Mapping[str, list[Part]]) -> dict[str, list[Part]]:
        tables = self.optimizers.tables.tables
        return {name: _one_part(parts, tables[name]) for name, parts in found.items()}

    def _through_collectives(
        self, flat: Tensor, found: Mapping[str, list[Part]]
    ) -> tuple[Tensor, dict[str, list[Part]]]:
        """The same, in a sum that says how many rows each rank has, and a gather of these."""
        ranks, tables, found = self.ranks, self.optimizers.tables.tables, self._in_one(found)
        lengths = torch.zeros((len(tables), ranks.size), device=flat.device)
        for place, own in enumerate(found.values()):
            lengths[place, ranks.rank] = sum(len(rows) for rows, _, _ in own)
        whole = ranks.sum_(torch.cat([lengths.reshape(-1), flat]), "gradients")
        counts = whole[: lengths.numel()].view_as(lengths).long().tolist()
        flat = whole[lengths.numel() :]
        if not tables:
            return flat, {}
        dims = [table.dim for table in tables.values()]
        sizes = [_packed_sizes(of, dims) for of in zip(*counts, strict=True)]
        blocks = ranks.gather_blocks(
            _packed([part for own in found.values() for part in own], flat.device),
            [sum(of) for of in sizes],
            "gradients of tables",
        )
        merged: dict[str, list[Part]] = {name: [] for name in tables}
        for block, of in zip(blocks, sizes, strict=True):
            *parts, _ = torch.split(block, of)
            for name, dim, rows, grads in zip(
                tables, dims, parts[: len(dims)], parts[len(dims) :], strict=True
            ):
                if len(rows):
                    told = rows.view(torch.int64), grads.view(torch.float32).view(-1, dim), None
                    merged[name].append(told)
        return flat, merged


def _taken(message: Message, dim: int, num_rows: int, num_grads: int, placed: int) -> Part:
    """A part as it was sent: so many rows, so many gradients, and whether there are places."""
    rows = message.take(torch.int64, num_rows)
    grads = message.take(torch.float32, num_grads, dim)
    return rows, grads, message.take(torch.int64, num_rows) if placed else None


def _one_part(parts: list[Part], table: Table) -> list[Part]:
    """The same as one part without places, or none."""
    if not parts:
        return []
    rows, _, places = parts[0]
    if len(parts) == 1 and places is None and 2 * len(rows) <= table.num_rows:
        # Few come twice, and all are summed again where they arrive.
        return parts
    return [(*summed_rows(parts), None)]


def _packed(own: list[Part], device: torch.device) -> Tensor:
    """Rows of tables, then their gradients, in one vector int32 [n]; see ``_packed_sizes``."""
    words = [rows.contiguous().view(torch.int32) for rows, _, _ in own]
    words += [grads.contiguous().view(torch.int32).reshape(-1) for _, grads, _ in own]
    length = sum(map(len, words))
    return torch.cat([*words, torch.zeros(length % 2, dtype=torch.int32, device=device)])


def _packed_sizes(counts: Sequence[int], dims: Sequence[int]) -> list[int]:
    """Words of what one rank sends: the rows of each table, the gradients of each, a filler."""
    rows, grads = [2 * n for n in counts], [n * dim for n, dim in zip(counts, dims, strict=True)]
    # Row numbers are two words each, and have to start where two words do, on every rank.
    return [*rows, *grads, sum(grads) % 2]
