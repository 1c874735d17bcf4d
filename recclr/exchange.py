"""What the ranks of a step tell each other once their gradients are there.

One sum carries everything small: the gradients of dense layers, the loss, whether a signal came,
and how many table rows each rank has; two gathers then carry the rows and their gradients. Every
rank applies the same bits, so weights stay equal without being sent.

Shape letters: D dimension of a table, R rows of one rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from recclr.distributed import Ranks
from recclr.optim import RowGradients, summed_rows
from recclr.optimizers import Optimizers
from recclr.step_stats import StepStats


class StepExchange:
    """Makes the gradients of one rank those of the whole batch.

    Costs, each step: a sum of all dense parameters, a gather of (8 + 4·D) bytes for each table row
    that a rank touched, and a wait of the host, which must know those numbers.
    """

    def __init__(self, optimizers: Optimizers, ranks: Ranks) -> None:
        self.optimizers, self.ranks = optimizers, ranks

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
        ranks, own = self.ranks, list(self.optimizers.tables.gradients())
        dense = list(self.optimizers.dense.values())
        device = stats.loss.device
        tables = self.optimizers.tables.tables
        lengths = torch.zeros((len(tables), ranks.size), device=device)
        found = {name: (rows, grads) for name, rows, grads in own}
        for place, name in enumerate(tables):
            lengths[place, ranks.rank] = len(found[name][0]) if name in found else 0
        few = [float(stats.loss.detach()), float(stats.num_masked), float(stopped)]
        few += [float(loss) for loss in stats.auxiliary.values()]
        few += [float(p.grad is not None) for p in dense]
        head = torch.tensor(few, device=device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in dense]
        flat = torch.cat([head, lengths.reshape(-1), *(grad.reshape(-1) for grad in grads)])
        ranks.sum_(flat, "gradients")
        head, rest = flat[: len(few)], flat[len(few) + lengths.numel() :]
        counts = flat[len(few) : len(few) + lengths.numel()].view_as(lengths).long().tolist()
        auxiliary = dict(zip(stats.auxiliary, head[3:], strict=False))
        present = head[3 + len(auxiliary) :].tolist()
        for p, grad, some in zip(
            dense, torch.split(rest, [p.numel() for p in dense]), present, strict=True
        ):
            # No gradient anywhere is not a gradient of zero: AdamW would decay the weight.
            p.grad = grad.view_as(p) if some else None
        loss, num_masked = head[0], int(head[1])
        merged = self._merged(found, counts)
        ranks.watch()
        told = replace(stats, loss=loss, num_masked=num_masked, auxiliary=auxiliary)
        return told, merged, bool(head[2] > 0)

    def _merged(
        self, found: dict[str, tuple[Tensor, Tensor]], counts: list[list[int]]
    ) -> list[RowGradients]:
        """Gradients of all ranks; counts: rows by table and rank."""
        tables = self.optimizers.tables.tables
        if not tables:
            return []
        device = next(iter(tables.values())).weight.device
        none = torch.empty(0, dtype=torch.int64, device=device)
        for name, table in tables.items():
            found.setdefault(name, (none, table.weight.new_empty((0, table.dim))))
        by_rank = list(zip(*counts, strict=True))
        own_rows = torch.cat([found[name][0] for name in tables])
        own_grads = torch.cat([found[name][1].reshape(-1) for name in tables])
        dims = [table.dim for table in tables.values()]
        sizes = [[n * dim for n, dim in zip(of, dims, strict=True)] for of in by_rank]
        rows = self._gathered(own_rows, [list(of) for of in by_rank], "rows of tables")
        grads = self._gathered(own_grads, sizes, "gradients of tables")
        merged: list[RowGradients] = []
        for place, (name, dim) in enumerate(zip(tables, dims, strict=True)):
            parts = [
                (rows[rank][place], grads[rank][place].view(-1, dim), None)
                for rank in range(self.ranks.size)
                if counts[place][rank]
            ]
            if parts:
                merged.append((name, *summed_rows(parts)))
        return merged

    def _gathered(self, own: Tensor, lengths: list[list[int]], name: str) -> list[list[Tensor]]:
        """By rank and table, from what each rank has of all tables in one vector."""
        totals = [sum(of) for of in lengths]
        whole = self.ranks.gather(own, totals, name)
        parts = torch.split(whole, totals)
        return [list(torch.split(part, of)) for part, of in zip(parts, lengths, strict=True)]
