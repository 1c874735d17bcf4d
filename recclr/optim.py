"""Embedding tables and their optimisers: only touched rows move, duplicates are summed first.

A dense optimiser reads and writes the whole table in every step (32 bytes per row and dimension);
these cost what the batch touches. On a CPU every update is deterministic: gradients of one row are
summed in the order of the lookups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from recclr.distinct import padded_distinct
from recclr.errors import CheckpointError
from recclr.kernels import native, native_rows
from recclr.kernels.bags import owners_of, weighted_bags
from recclr.kernels.native_rows import Part, places_of
from recclr.order import mix

TableOptimizerKind = Literal["adam", "rowwise_adam", "rowwise_adagrad", "sgd"]
StateKind = Literal["float32", "bfloat16"]

# Name of a table, what it has to learn.
RowGradients = tuple[str, list[Part]]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
_ROUNDING = 31


@dataclass(frozen=True)
class Lookup:
    """Rows that a step asked for, and where their gradient arrives.

    Attributes:
        rows: int64 [n], repeats allowed. vectors: leaf [M, dim] that the model computed with.
        places: int64 [n], which of ``vectors`` each row is summed into; None where n = M and each
            row is its own.
    """

    rows: Tensor
    vectors: Tensor
    places: Tensor | None = None


class Table(nn.Module):
    """An embedding table whose gradient exists only for the rows that were looked up.

    Attributes:
        weight: float32 [num_rows, dim]. Autograd does not see it; ``lookups`` do.
        lookups: those of the current step, for the optimiser.
    """

    def __init__(self, num_rows: int, dim: int, *, std: float, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.empty(num_rows, dim).normal_(0.0, std, generator=generator)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lookups: list[Lookup] = []

    @property
    def num_rows(self) -> int:
        return int(self.weight.shape[0])

    @property
    def dim(self) -> int:
        return int(self.weight.shape[1])

    def forward(self, rows: Tensor) -> Tensor:
        """Vectors of ``rows`` (int64 [M], repeats allowed), float32 [M, dim]."""
        vectors = self._vectors(rows)
        if self._watched():
            vectors.requires_grad_(True)
            self.lookups.append(Lookup(rows, vectors))
        return vectors

    def bag(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Sum of the vectors of each bag, float32 [M, dim]; zero if empty.

        Args:
            values: int64 [n] row numbers. offsets: int64 [M] start of each bag, the first 0.
        """
        bags = self._sums(values, offsets)
        if len(values) and self._watched():
            # The gradient of a row is the sum of those of its bags, whatever else is in them, so
            # only the bags are kept: M vectors, not one for each value.
            bags.requires_grad_(True)
            self.lookups.append(Lookup(values, bags, owners_of(offsets, len(values))))
        return bags

    def padded_bag(self, values: Tensor, alive: Tensor) -> Tensor:
        """As ``bag`` at a fixed shape, float32 [M, dim]; nothing waits for a GPU.

        Args:
            values: int64 [M, W] row numbers. alive: bool [M, W], which of them count; the others
                get no gradient, but are looked up.
        """
        num_bags, width = values.shape
        numbers = torch.arange(num_bags + 1, device=values.device)
        flat = values.reshape(-1)
        weights = alive.reshape(-1).to(self.weight.dtype)
        # One more bag, always empty: it stands for all that do not count, and gets no gradient.
        bags = embedding_bag(
            flat, self.weight, numbers * width, mode="sum", per_sample_weights=weights
        )
        if self._watched():
            bags.requires_grad_(True)
            places = torch.where(alive, numbers[:-1, None], num_bags).reshape(-1)
            self.lookups.append(Lookup(flat, bags, places))
        return bags[:-1]

    def mean(self, keep: Tensor) -> Tensor:
        """Mean of the rows where ``keep`` (bool [num_rows], at least one), float32 [dim]."""
        return self.weight[keep].mean(0)

    def take_gradient(self, *, fixed_shape: bool = False) -> tuple[Tensor, Tensor] | None:
        """What the lookups have to teach, which are forgotten: distinct rows, rising, and the sum
        of each one's gradients; None where no gradient arrived.

        Args:
            fixed_shape: as many rows as there can be, see ``summed_rows``.
        """
        found = self.take_lookups()
        if not found:
            return None
        return summed_rows(found, num_rows=self.num_rows if fixed_shape else None)

    def take_lookups(self) -> list[Part]:
        """The same before anything is summed: look-ups that a gradient arrived at."""
        found = [
            (each.rows, each.vectors.grad, each.places)
            for each in self.lookups
            if each.vectors.grad is not None
        ]
        self.lookups.clear()
        return found

    def _vectors(self, rows: Tensor) -> Tensor:
        return self.weight.index_select(0, rows)

    def _sums(self, values: Tensor, offsets: Tensor) -> Tensor:
        if not len(values):
            return self.weight.new_zeros((len(offsets), self.dim))
        return weighted_bags(self.weight, values, offsets)

    def _watched(self) -> bool:
        return torch.is_grad_enabled() and self.training


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
        moments: what Adam's moments of a table's size are stored in; arithmetic is float32. In
            bfloat16 they are rounded at random (Gupta et al. 2015): to the nearest, a step of
            0.1 % would be lost, since two neighbours differ by 0.4 %.
        fixed_shapes: as many rows are written as were looked up, the last of them again where some
            were looked up twice; nothing then waits for a GPU.

    Attributes:
        share: the rows that this process moves, see ``native_rows.owned``; others move the rest.
            Not with fixed shapes, nor with moments in bfloat16, whose draws go by all rows of a
            step.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        kind: TableOptimizerKind,
        moments: StateKind = "float32",
        *,
        fixed_shapes: bool = False,
    ) -> None:
        self.tables = dict(tables)
        self.kind = kind
        self.fixed_shapes = fixed_shapes
        self.moments = {"float32": torch.float32, "bfloat16": torch.bfloat16}[moments]
        self.state = {name: self._fresh(table.weight) for name, table in self.tables.items()}
        self.share = native_rows.ALL
        self.draws: dict[str, torch.Generator] = {}
        self.renew_draws()

    def renew_draws(self) -> None:
        """Generators for the rounding of moments, of each table that needs one."""
        self.draws = {
            name: torch.Generator(self.tables[name].weight.device)
            for name, state in self.state.items()
            if any(value.dtype != torch.float32 for value in state.values())
        }

    def seed(self, number: int) -> None:
        """Make the draws those of step ``number``."""
        for place, name in enumerate(self.tables):
            if name in self.draws:
                self.draws[name].manual_seed(mix(number, place, _ROUNDING))

    def _fresh(self, weight: Tensor) -> dict[str, Tensor]:
        full, row = weight.shape, (weight.shape[0], 1)
        shapes: dict[TableOptimizerKind, dict[str, tuple[int, ...]]] = {
            "adam": {"first": full, "second": full, "count": row},
            "rowwise_adam": {"first": full, "second": row, "count": row},
            "rowwise_adagrad": {"second": row},
            "sgd": {},
        }
        # By identity: of tables with one column all shapes are equal, and a count in bfloat16 would
        # stand still at 256.
        return {
            name: weight.new_zeros(shape, dtype=self.moments if shape is full else None)
            for name, shape in shapes[self.kind].items()
        }

    def step(
        self,
        lr: float | Tensor,
        gradients: Iterable[RowGradients] | None = None,
        *,
        number: int = 0,
    ) -> None:
        """Apply and forget the lookups of this step.

        Args:
            lr: absolute learning rate, float32 scalar if it is a tensor.
            gradients: instead of the lookups' own, which were taken already; not with fixed shapes.
            number: of the step; keys the rounding of the moments.
        """
        self.seed(number)
        self.apply(lr, gradients)

    @torch.no_grad()
    def apply(self, lr: float | Tensor, gradients: Iterable[RowGradients] | None = None) -> None:
        """As ``step``, once ``seed`` was called: what runs on the device."""
        if self.fixed_shapes:
            for name, rows, grad in self.gradients():
                self._write(name, rows, grad, lr)
            return
        if gradients is None:
            gradients = ((name, table.take_lookups()) for name, table in self.tables.items())
        for name, parts in gradients:
            if parts and not self._moved_in_one_pass(name, parts, lr):
                rows, grad = summed_rows(parts)
                if self.share != native_rows.ALL:
                    own = native_rows.owned(rows, self.share)
                    rows, grad = rows[own], grad[own]
                self._write(name, rows, grad, lr)

    def _moved_in_one_pass(self, name: str, parts: list[Part], lr: float | Tensor) -> bool:
        """Sum and move by the compiled kernels, where they can."""
        weight = self.tables[name].weight
        kernels = None if isinstance(lr, Tensor) else native.usable(weight)
        if kernels is None:
            return False
        state, lr = self.state[name], float(lr)
        return native_rows.move(kernels, self.kind, parts, weight, state, lr, self.share)

    def _write(self, name: str, rows: Tensor, grad: Tensor, lr: float | Tensor) -> None:
        # Written back by copy: rows are distinct (or written the same again), and adding to
        # places is single-threaded.
        weight = self.tables[name].weight
        moved = weight.index_select(0, rows)
        self._move(moved, name, rows, grad, lr)
        weight.index_copy_(0, rows, moved)

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Take the lookups of this step: names of tables that had some, distinct rows int64 [R],
        rising, and the sum of each one's gradients, float32 [R, dim].
        """
        for name, table in self.tables.items():
            found = table.take_gradient(fixed_shape=self.fixed_shapes)
            if found is not None:
                yield name, *found

    def _move(
        self, weight: Tensor, name: str, rows: Tensor, grad: Tensor, lr: float | Tensor
    ) -> None:
        """Bring the state of ``rows`` up to date, and ``weight``, their vectors, in place."""
        state = self.state[name]
        if self.kind == "sgd":
            weight.sub_(grad * lr)
            return
        if self.kind == "rowwise_adagrad":
            second = state["second"].index_select(0, rows).add_(_mean_square(grad))
            state["second"].index_copy_(0, rows, second)
            weight.addcmul_(grad, second.sqrt_().add_(_EPSILON).reciprocal_().mul_(-lr))
            return
        count = state["count"].index_select(0, rows).add_(1)
        first = state["first"].index_select(0, rows).float().lerp_(grad, 1 - _BETA_1)
        second = state["second"].index_select(0, rows).float().mul_(_BETA_2)
        if self.kind == "rowwise_adam":
            second.add_(_mean_square(grad), alpha=1 - _BETA_2)
        else:
            second.addcmul_(grad, grad, value=1 - _BETA_2)
        state["count"].index_copy_(0, rows, count)
        for field, value in (("first", first), ("second", second)):
            stored, rounded = state[field], value
            if stored.dtype != value.dtype:
                rounded = self._rounded(value, name, rows)
            stored.index_copy_(0, rows, rounded)
        scale = _left(_BETA_2, count).sqrt_().div_(_left(_BETA_1, count)).mul_(-lr)
        weight.addcdiv_(first.mul_(scale), second.sqrt_().add_(_EPSILON))

    def _rounded(self, value: Tensor, name: str, rows: Tensor) -> Tensor:
        rounded = _rounded(value, self.draws[name])
        if self.fixed_shapes:
            # A row that comes again has another draw, and must be written as it was first.
            rounded = rounded.index_select(0, torch.searchsorted(rows, rows))
        return rounded

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
        load_state(self.state_dict(), state)


def load_state(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Copy the state of tables into ``own``: tensors, or what has their shape, dtype and copy_.

    Raises:
        CheckpointError: the state is of another optimiser or of other tables.
    """
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
        if own[name].dtype != value.dtype:
            raise CheckpointError(
                f"optimiser state {name}: expected {own[name].dtype}, found {value.dtype}; "
                "was train.table_moments changed?"
            )
        own[name].copy_(value)


def _mean_square(grad: Tensor) -> Tensor:
    """Of each row, [n, 1]."""
    squares: Tensor = torch.linalg.vecdot(grad, grad, dim=1)
    return squares.div_(grad.shape[1]).unsqueeze(1)


def _rounded(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to one of its two bfloat16 neighbours, the nearer more often; exact on average."""
    noise = torch.randint(
        1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32
    )
    # The upper half of a float32 is a bfloat16; noise carries into it as often as it should.
    mixed = (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16))
    return mixed.view(torch.float32).bfloat16()


def _left(beta: float, count: Tensor) -> Tensor:
    """1 - beta ** count, without the cancellation that costs float32 its last digits."""
    return torch.expm1(count * math.log(beta)).neg_()


def summed_rows(parts: Sequence[Part], *, num_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Distinct rows, rising, and the sum of each one's gradients in the order of ``parts``.

    Args:
        parts: one or more of (rows int64 [n], gradients [M, dim], places int64 [n]): which gradient
            each row has; None where n = M and each row has its own.
        num_rows: of the table. With it the shape is fixed: of n rows in all min(n, num_rows) are
            given, the last distinct one again with its sum until there are so many, and nothing
            waits for a GPU.
    """
    first_rows, first_grads, first_places = parts[0]
    single = len(parts) == 1 and first_places is None and num_rows is None
    if single and bool((first_rows.diff() > 0).all()):
        return first_rows, first_grads
    kernels = native.usable(first_rows) if num_rows is None else None
    found = None if kernels is None else native_rows.summed(kernels, parts)
    if found is not None:
        return found
    grads = torch.cat([grad for _, grad, _ in parts])
    rows, places = torch.cat([rows for rows, _, _ in parts]), places_of(parts)
    if num_rows is not None:
        padded = padded_distinct(rows, num_rows)
        sums = embedding_bag(places[padded.order], grads, padded.starts(), mode="sum")
        return padded.values, sums.index_select(0, padded.places)
    rows, order = rows.sort(stable=True)
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    # Sums each row's gradients in the order of the lookups, on all cores.
    starts = counts.cumsum(0) - counts
    return distinct, embedding_bag(places[order], grads, starts, mode="sum")
