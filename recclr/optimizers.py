"""Row-wise updates for tables, AdamW for dense layers, one learning-rate schedule over both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from recclr.errors import CheckpointError
from recclr.optim import RowGradients, TableOptimizer, load_state
from recclr.settings import TrainSettings
from recclr.sharded_tables import RowShard, ShardedTable
from recclr.towers import TwoTower


class Optimizers:
    """Row-wise updates for tables, AdamW for the rest, one schedule over both.

    Args:
        model: on the training device. total_steps: what the schedule spans.
        fixed_shapes: nothing waits for a GPU, and all that differs from step to step is in tensors
            that stay where they are, so that ``apply`` can be captured as a CUDA graph.
        also: dense parameters that are no part of the model, by name, such as those of a loss.
    """

    def __init__(
        self,
        model: TwoTower,
        settings: TrainSettings,
        total_steps: int,
        *,
        fixed_shapes: bool = False,
        also: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.model, self.settings, self.total_steps = model, settings, total_steps
        self.fixed_shapes = fixed_shapes
        tables = model.tables()
        self.sharded = {n: table for n, table in tables.items() if isinstance(table, ShardedTable)}
        self.tables = TableOptimizer(
            {name: table for name, table in tables.items() if name not in self.sharded},
            settings.table_optimizer,
            settings.table_moments,
            fixed_shapes=fixed_shapes,
        )
        device = model.log_temperature.device
        self.table_rate: float | Tensor = torch.zeros((), device=device) if fixed_shapes else 0.0
        self.dense_rate: float | Tensor = torch.zeros((), device=device) if fixed_shapes else 0.0
        self.dense = {**model.dense_parameters(), **(also or {})}
        self.adamw = None
        if self.dense:
            # The temperature is a scale, not a weight: decay would pull it towards 1.
            decayed = [p for name, p in self.dense.items() if p.ndim > 1]
            plain = [p for name, p in self.dense.items() if p.ndim <= 1]
            groups = [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ]
            # Fused, AdamW counts its steps on the device and takes its rate from there.
            self.adamw = torch.optim.AdamW(
                [g for g in groups if g["params"]],
                lr=self.dense_rate,
                fused=fixed_shapes or None,
                capturable=fixed_shapes and device.type == "cuda",
            )

    def rate(self, step: int) -> float:
        """What the given rates are multiplied by at a step: linear warm-up, decay, batch size."""
        return self._schedule(step) * _batch_scale(self.settings)

    def _schedule(self, step: int) -> float:
        """Share of the peak rate: linear warm-up, then decay to ``final_lr``."""
        settings = self.settings
        warmup = settings.warmup * self.total_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        left = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "none": 1.0,
        }[settings.decay]
        return settings.final_lr + (1 - settings.final_lr) * left

    def step(self, step: int, gradients: Iterable[RowGradients] | None = None) -> None:
        """Move every weight.

        Args:
            gradients: those of whole tables, where they are not the lookups' own.
        """
        self.prepare(step)
        self.apply(gradients)

    def prepare(self, step: int) -> None:
        """Set what follows from the number of a step: rates, and draws for rounding."""
        rate = self.rate(step)
        self.tables.seed(step)
        table_rate, dense_rate = self.settings.table_lr * rate, self.settings.dense_lr * rate
        if isinstance(self.table_rate, Tensor) and isinstance(self.dense_rate, Tensor):
            self.table_rate.fill_(table_rate)
            self.dense_rate.fill_(dense_rate)
            return
        self.table_rate, self.dense_rate = table_rate, dense_rate
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = dense_rate

    def apply(self, gradients: Iterable[RowGradients] | None = None) -> None:
        """As ``step``, once ``prepare`` was called: what runs on the device."""
        self.tables.apply(self.table_rate, gradients)
        for table in self.sharded.values():
            table.update(float(self.table_rate))
        if self.adamw is not None:
            if self.settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.dense.values(), self.settings.clip_norm)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
            self.model.clamp_temperature()

    def forget(self) -> None:
        """Drop what a step that was not finished left: lookups and gradients."""
        self.tables.forget()
        for table in self.sharded.values():
            table.lookups.clear()
        if self.adamw is not None:
            self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors: whole tables, and AdamW's moments by parameter name."""
        state = {f"tables/{name}": value for name, value in self.tables.state_dict().items()}
        if self.adamw is not None:
            for name, parameter in self.dense.items():
                for key, value in self.adamw.state.get(parameter, {}).items():
                    state[f"dense/{name}/{key}"] = torch.as_tensor(value)
        return state

    def shards(self) -> dict[str, RowShard]:
        """State of sharded tables, by the names that that of whole ones has in ``state_dict``."""
        return {
            f"tables/{name}/{key}": shard
            for name, table in self.sharded.items()
            for key, shard in table.state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave, and of sharded tables this rank's part.

        Raises:
            CheckpointError: the state is of another optimiser or of another model.
        """
        prefix = "tables/"
        dense = self._moments({k: v for k, v in state.items() if not k.startswith(prefix)})
        own = {f"{prefix}{name}": value for name, value in self.tables.state_dict().items()}
        load_state(own | self.shards(), {k: v for k, v in state.items() if k.startswith(prefix)})
        if self.adamw is None:
            return
        for name, parameter in self.dense.items():
            self.adamw.state.pop(parameter, None)
            if name in dense:
                self.adamw.state[parameter] = {
                    key: value.to(self._device(key, parameter), copy=True)
                    for key, value in dense[name].items()
                }

    def _device(self, key: str, parameter: Tensor) -> torch.device | str:
        """Where AdamW keeps a value: its steps it counts on the CPU unless it is fused."""
        return "cpu" if key == "step" and not self.fixed_shapes else parameter.device

    def _moments(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """AdamW's state by parameter name; a parameter that never had a gradient has none."""
        found: dict[str, dict[str, Tensor]] = {}
        for full_name, value in state.items():
            name, _, key = full_name.removeprefix("dense/").rpartition("/")
            found.setdefault(name, {})[key] = value
        for name, moments in found.items():
            shape = self.dense[name].shape if name in self.dense else None
            wanted = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            shapes = {key: value.shape for key, value in moments.items()}
            if shape is None or shapes != wanted:
                raise CheckpointError(
                    f"optimiser state dense/{name}: expected "
                    f"{'none' if shape is None else wanted}, found {shapes}; was the model changed?"
                )
        return found


def _batch_scale(settings: TrainSettings) -> float:
    """Linear for SGD (Goyal et al. 2017), square root for Adam (Krizhevsky 2014; Malladi 2022).

    By the rows of an update, however many batches they are in.
    """
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[settings.lr_scaling]
    rows = settings.batch_size * settings.accumulate
    return float((rows / settings.base_batch_size) ** power)
