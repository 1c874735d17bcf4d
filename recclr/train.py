"""The one training loop.

``fit`` is handed what it must not know: how to evaluate, where events go, when to stop. All state
of the order is the step number, so a resumed run is the uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recclr.compiling import compile_layers
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError, DivergedError, InterruptedTraining
from recclr.files import fault_point
from recclr.keeping import Keeper, Progress
from recclr.settings import LossSettings, NegativesSettings, TrainSettings
from recclr.stepping import Stepper, ignore
from recclr.towers import TwoTower
from recclr.watching import Meter, OnEvent, require_finite

Evaluate = Callable[[TwoTower], dict[str, float]]


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Attributes:
        steps: run in all. best_step: step of the best evaluation, or ``steps`` without any.
        best_value: its metric; None without evaluation.
        evaluations: {"step", "epoch", "metrics"} each. seconds: of this call, evaluation included.
        steps_per_epoch: for translating between steps and epochs.
    """

    steps: int
    best_step: int
    best_value: float | None
    evaluations: list[dict[str, Any]]
    seconds: float
    steps_per_epoch: int


def fit(
    model: TwoTower,
    log: EncodedLog,
    *,
    loss: LossSettings,
    negatives: NegativesSettings,
    train: TrainSettings,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    select: str = "recall@20",
    checkpoints: Path | None = None,
    resume: bool = False,
    num_steps: int | None = None,
    device: torch.device | str = "cpu",
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
    item_group: Tensor | None = None,
) -> FitResult:
    """Train in place; with ``evaluate``, leave the model at its best evaluation.

    Args:
        model: moved to ``device``; its tables are whole or sharded as it was built (see
            ``sharded_tables.table_maker``). log: rows to learn from, in memory or mapped
            (``data.shards``), which changes no bit of the result.
        evaluate: metrics of the model on validation; called every ``train.evaluate_every`` epochs
            and at the end. The best by ``select`` is kept, ``train.patience`` counts the others.
        checkpoints: folder for ``step-N``, LAST, BEST. None: nothing is written, and the best
            weights are kept in memory.
        resume: go on from LAST if there is one.
        num_steps: end after so many steps while the schedule still spans ``train.epochs``, as a
            refit for a selected number of steps does.
        on_event: gets a dict for each logged step and each evaluation; on a GPU, whether steps are
            captured as a CUDA graph; why layers could not be compiled; how stale a queue is.
        stop: asked after every step; true writes a checkpoint and raises.
        ranks: the processes that share every step, all of which call this with the same arguments;
            ``evaluate`` must give all of them the same metrics. The weights are those of one
            process up to the order of sums, and the same bits on all ranks.
        item_group: int64 [num_items], of ``within.item_groups``, where ``negatives.within`` is set.

    Raises:
        DivergedError: the loss is not finite. InterruptedTraining: ``stop`` said so.
        CheckpointError: ``resume`` found checkpoints that are damaged or of another run.
        ConfigError: without ``resume``, ``checkpoints`` holds some; or the settings do not fit
        the log, the model or the device.
    """
    began = time.perf_counter()
    model, log, device = model.to(device), log.to(device), torch.device(device)
    emit = on_event or ignore
    stepper = Stepper(
        model,
        log,
        loss=loss,
        negatives=negatives,
        train=train,
        seed=seed,
        ranks=ranks,
        emit=emit,
        item_group=item_group,
    )
    optimizers, per_epoch = stepper.optimizers, stepper.source.steps_per_epoch
    end = stepper.num_steps if num_steps is None else min(num_steps, stepper.num_steps)
    keeper = Keeper(model, optimizers, checkpoints, ranks, stepper.objective.state)
    progress = keeper.begun(resume=resume)
    meter = Meter(emit, per_epoch, end)

    def require_finite_loss(loss: Tensor) -> None:
        require_finite(loss, model, progress.step + 1, weights=False)

    evaluate_every = max(1, round(train.evaluate_every * per_epoch))
    checkpoint_every = max(1, round(train.checkpoint_every * per_epoch))
    patience = train.patience or math.inf
    stepper.look_again()
    make_plain = compile_layers(model, train, bfloat16=stepper.objective.bfloat16, emit=emit)
    try:
        while progress.step < end and progress.bad_evaluations < patience:
            step = progress.step
            stats, interrupted = stepper(step, check=require_finite_loss, stop=stop)
            progress.step = step + 1
            meter.add(stats, model, progress.step, train.table_lr * optimizers.rate(step))
            fault_point("train.step")
            last = progress.step == end
            improved = False
            if evaluate is not None and (last or progress.step % evaluate_every == 0):
                ranks.unwatch()
                require_finite(stats.loss, model, progress.step)
                improved = _judge(evaluate(model), select, progress, meter)
                stepper.look_again()
            if improved or last or interrupted or progress.step % checkpoint_every == 0:
                require_finite(stats.loss, model, progress.step)
                keeper.keep(progress, best=improved)
            if interrupted and not last:
                raise InterruptedTraining(
                    f"stopped by a signal after step {progress.step} of {end}; "
                    "a checkpoint was written, and the same command with --resume goes on from it"
                )
    finally:
        stepper.close()
        ranks.unwatch()
        make_plain()
    if progress.best_value is not None:
        keeper.restore_best(progress.best_step)
    model.eval()
    return FitResult(
        steps=progress.step,
        best_step=progress.best_step if progress.best_value is not None else progress.step,
        best_value=progress.best_value,
        evaluations=progress.evaluations,
        seconds=time.perf_counter() - began,
        steps_per_epoch=per_epoch,
    )


def _judge(metrics: dict[str, float], select: str, progress: Progress, meter: Meter) -> bool:
    """Record an evaluation; true if it is the best so far."""
    if select not in metrics:
        raise ConfigError(
            f"evaluate.select = {select!r}, but the evaluation gave {', '.join(sorted(metrics))}"
        )
    odd = [name for name, found in metrics.items() if not math.isfinite(found)]
    if odd:
        raise DivergedError(f"{odd[0]} is {metrics[odd[0]]} at step {progress.step}")
    value = metrics[select]
    improved = progress.best_value is None or value > progress.best_value
    if improved:
        progress.best_value, progress.best_step = value, progress.step
    event = {"step": progress.step, "epoch": progress.step / meter.per_epoch, "metrics": metrics}
    progress.evaluations.append(event)
    progress.bad_evaluations = 0 if improved else progress.bad_evaluations + 1
    meter.emit({"kind": "evaluation", **event, "best": improved})
    return improved
