"""The one training loop.

``fit`` is handed what it must not know: how to evaluate, where events go, when to stop. All state
of the order is the step number, so a resumed run is the uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recclr.compiling import compile_layers
from recclr.data.log import Csr, EncodedLog
from recclr.distillation import Teacher
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError, DivergedError, InterruptedTraining
from recclr.files import fault_point
from recclr.keeping import Keeper, Progress
from recclr.settings import (
    LossSettings,
    MinedSettings,
    NegativesSettings,
    SelfSupervisionSettings,
    TrainSettings,
)
from recclr.stepping import Stepper, Steps, ignore
from recclr.towers import TwoTower
from recclr.watching import Meter, OnEvent, require_finite, tell_figures

Evaluate = Callable[[TwoTower], dict[str, float]]
# From the model and the steps it was trained for: mined items by user, and a report as JSON values.
RefreshNegatives = Callable[[TwoTower, int], tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Attributes:
        steps: run in all. best_step: step of the best evaluation, or ``steps`` without any.
        best_value: its metric; None without evaluation.
        evaluations: {"step", "epoch", "metrics"} each, and with ``monitor`` its "monitors" and the
            names of the "causes" they point to. seconds: of this call, evaluation included.
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
    self_supervision: SelfSupervisionSettings | None = None,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    monitor: Evaluate | None = None,
    refresh_negatives: RefreshNegatives | None = None,
    explicit: Csr | None = None,
    select: str = "recall@20",
    checkpoints: Path | None = None,
    resume: bool = False,
    num_steps: int | None = None,
    device: torch.device | str = "cpu",
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
    item_group: Tensor | None = None,
    teacher: Teacher | None = None,
) -> FitResult:
    """Train in place; with ``evaluate``, leave the model at its best evaluation.

    Args:
        model: moved to ``device``; its tables are whole or sharded as it was built (see
            ``sharded_tables.table_maker``). log: rows to learn from, in memory or mapped
            (``data.shards``), which changes no bit of the result.
        evaluate: metrics of the model on validation; called every ``train.evaluate_every`` epochs
            and at the end. The best by ``select`` is kept, ``train.patience`` counts the others.
        monitor: figures of the model (see ``monitors``), asked for after each evaluation; they
            change nothing of the training.
        refresh_negatives: mines the items of ``OwnNegatives.mined``, the same on all ranks; called
            before the first step after ``negatives.mined.warmup_epochs``, and then every
            ``refresh_epochs``. Needed where ``negatives.mined`` is set.
        explicit: items of each user that are negatives, as ``OwnNegatives`` takes them.
        checkpoints: folder for ``step-N``, LAST, BEST. None: nothing is written, and the best
            weights are kept in memory.
        resume: go on from LAST if there is one.
        num_steps: end after so many steps while the schedule still spans ``train.epochs``, as a
            refit for a selected number of steps does.
        on_event: gets a dict for each logged step, each evaluation and each mining, and for how
            stale a queue is; on a GPU, whether steps are captured as a CUDA graph; and why layers
            could not be compiled.
        stop: asked after every step; true writes a checkpoint and raises.
        ranks: the processes that share every step, all of which call this with the same arguments;
            ``evaluate`` must give all of them the same metrics. The weights are those of one
            process up to the order of sums, and the same bits on all ranks.
        item_group: int64 [num_items], of ``within.item_groups``, where ``negatives.within`` is set.
        teacher: another model, whose ranking this one is to come near (``distillation``).

    Raises:
        DivergedError: the loss is not finite. InterruptedTraining: ``stop`` said so.
        CheckpointError: ``resume`` found checkpoints that are damaged or of another run.
        ConfigError: without ``resume``, ``checkpoints`` holds some; or the settings do not fit
        the log, the model or the device.
    """
    began = time.perf_counter()
    if negatives.mined is not None and refresh_negatives is None:
        raise ConfigError(
            "negatives.mined needs somebody who mines; give refresh_negatives, for example a "
            "mining.Refresher, or leave negatives.mined out"
        )
    model, log, device = model.to(device), log.to(device), torch.device(device)
    stepper = Stepper(
        model,
        log,
        loss=loss,
        negatives=negatives,
        train=train,
        self_supervision=self_supervision,
        seed=seed,
        explicit=explicit,
        ranks=ranks,
        emit=on_event or ignore,
        item_group=item_group,
        teacher=teacher,
    )

    def mine_if_due(step: int, meter: Meter) -> None:
        assert negatives.mined is not None
        assert refresh_negatives is not None
        if _mining_is_due(step, negatives.mined, meter.per_epoch):
            ranks.unwatch()
            _refresh(stepper, refresh_negatives, step, meter)

    result = run_steps(
        stepper,
        train=train,
        before_step=None if negatives.mined is None else mine_if_due,
        evaluate=evaluate,
        monitor=monitor,
        select=select,
        checkpoints=checkpoints,
        resume=resume,
        num_steps=num_steps,
        emit=on_event or ignore,
        stop=stop,
        ranks=ranks,
    )
    return replace(result, seconds=time.perf_counter() - began)


def run_steps(
    stepper: Steps,
    *,
    train: TrainSettings,
    emit: OnEvent,
    before_step: Callable[[int, Meter], None] | None = None,
    evaluate: Evaluate | None = None,
    monitor: Evaluate | None = None,
    select: str = "recall@20",
    checkpoints: Path | None = None,
    resume: bool = False,
    num_steps: int | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
) -> FitResult:
    """The loop of ``fit``, which has the other arguments, over steps of any kind.

    Args:
        emit: as ``on_event``. before_step: told the number of every step that is about to run.
    """
    began = time.perf_counter()
    model = stepper.model
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
            if before_step is not None:
                before_step(step, meter)
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
                if monitor is not None:
                    tell_figures(monitor(model), progress.evaluations, emit)
                stepper.look_again()
            if improved or last or interrupted or progress.step % checkpoint_every == 0:
                ranks.unwatch()
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
    stepper.give_back()
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


def _mining_is_due(step: int, mined: MinedSettings, per_epoch: int) -> bool:
    """Whether mined negatives are to be found anew before a step, counted from 0."""
    since = step - round(mined.warmup_epochs * per_epoch)
    return since >= 0 and since % max(1, round(mined.refresh_epochs * per_epoch)) == 0


def _refresh(stepper: Stepper, mine: RefreshNegatives, step: int, meter: Meter) -> None:
    """Mine with the model as it stands. A run resumed at this step does it again, alike."""
    table, report = mine(stepper.model, step)
    stepper.objective.own.refill(table)
    stepper.look_again()
    meter.emit({"kind": "mining", "step": step, "epoch": step / meter.per_epoch, **report})


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
