"""What the ranks of a step tell each other once their gradients are there.

One sum carries everything small: the gradients of dense layers, the loss, whether a signal came,
and how many table rows each rank has; one gather then carries the rows and their gradients. Every
rank applies the same bits, so weights stay equal without being sent.

Shape letters: D dimension of a table, R rows of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recclr.distributed import Ranks
from recclr.kernels.native_rows import Part
from recclr.optim import RowGradients, Table, summed_rows
from recclr.optimizers import Optimizers
from recclr.step_stats import StepStats


class StepExchange:
    """Makes the gradients of one rank those of the whole batch.

    Costs, each step: a sum of all dense parameters, a gather of (8 + 4·D) bytes for each look-up of
    a rank (for each distinct row, where many come twice), and a wait of the host, which must know
    those numbers.
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
        ranks, dense = self.ranks, list(self.optimizers.dense.values())
        device = stats.loss.device
        tables = self.optimizers.tables.tables
        lengths = torch.zeros((len(tables), ranks.size), device=device)
        found = {name: sent for name, table in tables.items() if (sent := _sent_of(table))}
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
        dims = [table.dim for table in tables.values()]
        device = next(iter(tables.values())).weight.device
        sizes = [_packed_sizes(of, dims) for of in zip(*counts, strict=True)]
        blocks = self.ranks.gather_blocks(
            _packed([found[name] for name in tables if name in found], device),
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
        return [(name, parts) for name, parts in merged.items() if parts]


def _sent_of(table: Table) -> tuple[Tensor, Tensor] | None:
    """Rows and gradients as they are sent; None where there are none."""
    parts = table.take_lookups()
    if not parts:
        return None
    rows, grads, places = parts[0]
    if len(parts) == 1 and places is None and 2 * len(rows) <= table.num_rows:
        # Few come twice, and all are summed again where they arrive.
        return rows, grads
    return summed_rows(parts)


def _packed(own: list[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Rows of tables, then their gradients, in one vector int32 [n]; see ``_packed_sizes``."""
    words = [rows.contiguous().view(torch.int32) for rows, _ in own]
    words += [grads.contiguous().view(torch.int32).reshape(-1) for _, grads in own]
    length = sum(map(len, words))
    return torch.cat([*words, torch.zeros(length % 2, dtype=torch.int32, device=device)])


def _packed_sizes(counts: Sequence[int], dims: Sequence[int]) -> list[int]:
    """Words of what one rank sends: the rows of each table, the gradients of each, a filler."""
    rows, grads = [2 * n for n in counts], [n * dim for n, dim in zip(counts, dims, strict=True)]
    # Row numbers are two words each, and have to start where two words do, on every rank.
    return [*rows, *grads, sum(grads) % 2]
