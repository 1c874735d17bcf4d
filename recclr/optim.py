"""Embedding tables and their optimisers: only touched rows move, duplicates are summed first.

A dense optimiser reads and writes the whole table in every step (32 bytes per row and dimension);
these cost what the batch touches. On a CPU every update is deterministic: gradients of one row are
summed in the order of the lookups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from recclr.errors import CheckpointError

TableOptimizerKind = Literal["adam", "rowwise_adam", "rowwise_adagrad", "sgd"]

# Name of a table, distinct rows int64 [R], the sum of each one's gradients [R, dim].
RowGradients = tuple[str, Tensor, Tensor]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


class Table(nn.Module):
    """An embedding table whose gradient exists only for the rows that were looked up.

    Attributes:
        weight: float32 [num_rows, dim]. Autograd does not see it; ``lookups`` do.
        lookups: (row numbers int64 [M], leaf [M, dim]) of the current step, for the optimiser.
    """

    def __init__(self, num_rows: int, dim: int, *, std: float, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.empty(num_rows, dim).normal_(0.0, std, generator=generator)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lookups: list[tuple[Tensor, Tensor]] = []

    @property
    def dim(self) -> int:
        return int(self.weight.shape[1])

    def forward(self, rows: Tensor) -> Tensor:
        """Vectors of ``rows`` (int64 [M], repeats allowed), float32 [M, dim]."""
        vectors = self.weight.index_select(0, rows)
        if torch.is_grad_enabled() and self.training:
            vectors.requires_grad_(True)
            self.lookups.append((rows, vectors))
        return vectors

    def bag(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Sum of the vectors of each bag, float32 [M, dim]; zero if empty.

        Args:
            values: int64 [nnz] row numbers. offsets: int64 [M] start of each bag.
        """
        rows, inverse = torch.unique(values, return_inverse=True)
        vectors: Tensor = self(rows)
        if not len(values):
            return vectors.new_zeros((len(offsets), self.dim))
        bags: Tensor = embedding_bag(inverse, vectors, offsets, mode="sum")
        return bags


class TableOptimizer:
    """Row-wise optimiser of several tables.

    * ``adam``: Adam (Kingma and Ba 2015) on touched rows; moments and the bias correction count a
      row's own updates, so a rare row's first step has the size of any first step. Epsilon joins
      the uncorrected root of the second moment (the paper's ε̂), which damps first steps on
      gradients below 1e-6.
    * ``rowwise_adam``: as above with one second moment per row (mean square over the row).
    * ``rowwise_adagrad``: one accumulator per row, the default of large recommenders (DLRM).
    * ``sgd``: none.

    Args:
        tables: by name; names key the state of ``state_dict``.
    """

    def __init__(self, tables: Mapping[str, Table], kind: TableOptimizerKind) -> None:
        self.tables = dict(tables)
        self.kind = kind
        self.state = {name: self._fresh(table.weight) for name, table in self.tables.items()}

    def _fresh(self, weight: Tensor) -> dict[str, Tensor]:
        full, row = weight.shape, (weight.shape[0], 1)
        shapes: dict[TableOptimizerKind, dict[str, tuple[int, ...]]] = {
            "adam": {"first": full, "second": full, "count": row},
            "rowwise_adam": {"first": full, "second": row, "count": row},
            "rowwise_adagrad": {"second": row},
            "sgd": {},
        }
        return {name: weight.new_zeros(shape) for name, shape in shapes[self.kind].items()}

    @torch.no_grad()
    def step(self, lr: float, gradients: Iterable[RowGradients] | None = None) -> None:
        """Apply and forget the lookups of this step.

        Args:
            lr: absolute learning rate.
            gradients: instead of the lookups' own, which were taken already.
        """
        for name, rows, grad in self.gradients() if gradients is None else gradients:
            self._update(self.tables[name].weight, self.state[name], rows, grad, lr)

    def gradients(self) -> Iterator[RowGradients]:
        """Take the lookups of this step: what each table that had some has to learn."""
        for name, table in self.tables.items():
            found = [(rows, v.grad) for rows, v in table.lookups if v.grad is not None]
            table.lookups.clear()
            if found:
                yield name, *summed_rows(found)

    def _update(
        self, weight: Tensor, state: dict[str, Tensor], rows: Tensor, grad: Tensor, lr: float
    ) -> None:
        if self.kind == "sgd":
            weight.index_add_(0, rows, grad, alpha=-lr)
            return
        if self.kind == "rowwise_adagrad":
            second = state["second"].index_select(0, rows) + grad.square().mean(1, keepdim=True)
            state["second"].index_copy_(0, rows, second)
            moved = weight.index_select(0, rows)
            weight.index_copy_(
                0, rows, moved.addcdiv_(grad, second.sqrt_().add_(_EPSILON), value=-lr)
            )
            return
        # Written back by copy: rows are distinct, and adding to places is single-threaded.
        count = state["count"].index_select(0, rows).add_(1)
        first = state["first"].index_select(0, rows).lerp_(grad, 1 - _BETA_1)
        second = state["second"].index_select(0, rows).mul_(_BETA_2)
        if self.kind == "rowwise_adam":
            second.add_(grad.square().mean(1, keepdim=True), alpha=1 - _BETA_2)
        else:
            second.addcmul_(grad, grad, value=1 - _BETA_2)
        state["count"].index_copy_(0, rows, count)
        state["first"].index_copy_(0, rows, first)
        state["second"].index_copy_(0, rows, second)
        scale = _left(_BETA_2, count).sqrt_().div_(_left(_BETA_1, count)).mul_(-lr)
        moved = weight.index_select(0, rows)
        moved.addcdiv_(first.mul_(scale), second.sqrt_().add_(_EPSILON))
        weight.index_copy_(0, rows, moved)

    def forget(self) -> None:
        """Drop lookups without a step (an evaluation that tracked gradients, an aborted step)."""
        for table in self.tables.values():
            table.lookups.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, "table/field"."""
        return {
            f"{name}/{key}": value
            for name, part in self.state.items()
            for key, value in part.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore in place.

        Raises:
            CheckpointError: the state is of another optimiser or of other tables.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise CheckpointError(
                f"the checkpoint holds optimiser state {sorted(state)}, this run needs "
                f"{sorted(own)}; was train.table_optimizer changed?"
            )
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise CheckpointError(
                    f"optimiser state {name}: expected shape {tuple(own[name].shape)}, found "
                    f"{tuple(value.shape)}"
                )
            own[name].copy_(value)


def _left(beta: float, count: Tensor) -> Tensor:
    """1 - beta ** count, without the cancellation that costs float32 its last digits."""
    return torch.expm1(count * math.log(beta)).neg_()


def summed_rows(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Distinct rows, rising, and the sum of each one's gradients in the order of ``parts``.

    Args:
        parts: one or more of (rows int64 [R], gradients [R, dim]).
    """
    if len(parts) == 1 and bool((parts[0][0][1:] > parts[0][0][:-1]).all()):
        return parts[0]
    grads = torch.cat([grad for _, grad in parts])
    rows, order = torch.cat([rows for rows, _ in parts]).sort(stable=True)
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    if len(distinct) == len(rows):
        return distinct, grads.index_select(0, order)
    # Sums each row's gradients in the order of the lookups, on all cores.
    starts = counts.cumsum(0) - counts
    return distinct, embedding_bag(order, grads, starts, mode="sum")
