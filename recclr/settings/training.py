"""The loop: batches, rates, updates, devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check

# Whose fused updates are those of ``optim``; FBGEMM's Adams count the steps of the whole table.
SHARDED_OPTIMIZERS = ("rowwise_adagrad", "sgd")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The loop."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    batch_size: int = 2048
    chunk_size: int | None = None
    """Encode at most so many rows at once, in two passes (gradient caching): the same gradients in
    less memory, for one more forward pass of the towers. None: all rows of a batch at once."""
    accumulate: int = 1
    """Batches whose gradients make one update. Each row still meets the negatives of its own batch
    only; ``chunk_size`` with a larger ``batch_size`` is what adds in-batch negatives."""
    epochs: float = 30.0
    table_optimizer: Literal["adam", "rowwise_adam", "rowwise_adagrad", "sgd"] = "adam"
    table_moments: Literal["float32", "bfloat16"] = "float32"
    """What Adam's moments of the tables are stored in; bfloat16 halves their memory in one process.
    Processes of one machine share tables with float32 moments, and with others have a copy each."""
    table_lr: float = 0.02
    dense_lr: float = 0.003
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Both rates times (batch_size · accumulate / base_batch_size) to the power 0, 1/2 (Adam) or 1
    (SGD)."""
    base_batch_size: int = 2048
    weight_decay: float = 0.01
    """Decoupled decay of the dense layers; tables have none."""
    warmup: float = 0.02
    """Share of all steps in which the rate rises from zero."""
    decay: Literal["linear", "cosine", "none"] = "cosine"
    final_lr: float = 0.0
    """Rate at the end, as a share of the peak."""
    clip_norm: float | None = None
    """Largest gradient norm of the dense layers."""
    patience: int = 0
    """Evaluations without improvement before stopping; 0 never stops early."""
    evaluate_every: float = 1.0
    """Epochs between evaluations on validation."""
    checkpoint_every: float = 1.0
    """Epochs between checkpoints; one is also written at every best evaluation and at the end."""
    refit: bool = False
    """After selection, train afresh on train + validation for the selected number of steps."""
    time_cells: bool | None = None
    """Make each batch from neighbouring rows in time, and show items as they stood when it began.
    None: on where a feature needs it (statistics, ``as_of`` ids)."""
    staleness_d: float = 0.0
    """Show users and items as they stood up to so many days before the event, drawn uniformly, as
    at an evaluation that freezes them at the cut-off."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """``bfloat16``: towers and, on a GPU, the products of the loss; sums and the loss itself are in
    float32. On a CPU the loss takes it where compiled kernels, which are faster in float32, are
    missing. ``auto``: on a GPU only."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Capture a step as a CUDA graph and replay it: on a GPU, where nothing stands against it."""
    compile: bool | Literal["auto"] = "auto"
    """Dense layers by ``torch.compile``; ``auto``: on a GPU. What fails to compile runs plain."""
    sharded_tables: int | Literal["none", "all"] = "none"
    """With several processes: tables of at least so many rows are split by rows among them; each
    holds its part of the table and of the optimiser's state (see ``sharded_tables``)."""
    collective_timeout_s: float = 120.0
    """With several processes: how long each waits for the others before it gives up."""

    def __post_init__(self) -> None:
        _check(
            self,
            batch_size=(1, 1 << 24),
            chunk_size=(1, 1 << 24),
            accumulate=(1, 1 << 16),
            base_batch_size=(1, 1 << 24),
            epochs=(0.001, 1e6),
            table_lr=(0.0, 1e4),
            dense_lr=(0.0, 1e3),
            weight_decay=(0.0, 10.0),
            warmup=(0.0, 1.0),
            final_lr=(0.0, 1.0),
            clip_norm=(1e-9, 1e9),
            patience=(0, 1 << 20),
            evaluate_every=(0.001, 1e6),
            checkpoint_every=(0.001, 1e6),
            staleness_d=(0.0, 1e5),
            sharded_tables=(1, 1 << 40),
            collective_timeout_s=(1.0, 1e6),
        )
        if self.sharded_tables != "none" and self.table_optimizer not in SHARDED_OPTIMIZERS:
            raise ValueError(
                f"sharded_tables = {self.sharded_tables!r} needs a table_optimizer that does the "
                f"same on a part of a table, {' or '.join(SHARDED_OPTIMIZERS)}; found "
                f"{self.table_optimizer!r}"
            )
