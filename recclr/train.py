"""The one training loop.

``fit`` is handed what it must not know: how to evaluate, where events go, when to stop. All state
of the order is the step number, so a resumed run is the uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recclr.batches import BatchSource
from recclr.checkpoint import find_checkpoint, load_checkpoint, require_match, save_checkpoint
from recclr.data.log import EncodedLog
from recclr.errors import CheckpointError, ConfigError, DivergedError, InterruptedTraining
from recclr.files import fault_point
from recclr.negatives import require_negatives
from recclr.objective import Objective, StepStats
from recclr.optimizers import Optimizers
from recclr.parts import IdPart, StatisticsPart
from recclr.settings import LossSettings, NegativesSettings, TrainSettings
from recclr.towers import TwoTower

_LOG_EVERY_S = 2.0

Evaluate = Callable[[TwoTower], dict[str, float]]
OnEvent = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_value: float | None = None
    bad_evaluations: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)


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
) -> FitResult:
    """Train in place; with ``evaluate``, leave the model at its best evaluation.

    Args:
        model: moved to ``device``. log: rows to learn from.
        evaluate: metrics of the model on validation; called every ``train.evaluate_every`` epochs
            and at the end. The best by ``select`` is kept, ``train.patience`` counts the others.
        checkpoints: folder for ``step-N``, LAST, BEST. None: nothing is written, and the best
            weights are kept in memory.
        resume: go on from LAST if there is one.
        num_steps: end after so many steps while the schedule still spans ``train.epochs``, as a
            refit for a selected number of steps does.
        on_event: gets a dict for each logged step and each evaluation.
        stop: asked after every step; true writes a checkpoint and raises.

    Raises:
        DivergedError: the loss is not finite. InterruptedTraining: ``stop`` said so.
        CheckpointError: ``resume`` found checkpoints that are damaged or of another run.
        ConfigError: without ``resume``, ``checkpoints`` holds some; or the settings do not fit
        the log or the model.
    """
    began = time.perf_counter()
    model, log = model.to(device), log.to(device)
    if loss.kind != "full_softmax":
        require_negatives(negatives, log, batch_size=train.batch_size)
    cells = _time_cells(model, train)
    source = BatchSource(log, train, seed=seed, time_cells=cells)
    per_epoch = source.steps_per_epoch
    total = max(1, round(train.epochs * per_epoch))
    end = total if num_steps is None else min(num_steps, total)
    optimizers = Optimizers(model, train, total)
    bfloat16 = _use_bfloat16(train, torch.device(device))
    objective = Objective(log, loss, negatives, seed=seed, bfloat16=bfloat16)
    keeper = _Keeper(model, optimizers, checkpoints)
    progress = keeper.begun(resume=resume)
    meter = _Meter(on_event or (lambda event: None), per_epoch, end)
    # Reading the loss waits for a GPU; elsewhere each one is checked before it reaches a weight.
    watched = torch.device(device).type == "cpu"

    evaluate_every = max(1, round(train.evaluate_every * per_epoch))
    checkpoint_every = max(1, round(train.checkpoint_every * per_epoch))
    patience = train.patience or math.inf
    optimizers.forget()
    model.train()
    try:
        while progress.step < end and progress.bad_evaluations < patience:
            step = progress.step
            stats = objective(model, source.batch(step), step)
            if watched:
                _require_finite(stats.loss, model, step + 1, weights=False)
            stats.loss.backward()  # type: ignore[no-untyped-call]
            optimizers.step(step)
            progress.step = step + 1
            meter.add(stats, model, progress.step, train.table_lr * optimizers.rate(step))
            fault_point("train.step")
            last = progress.step == end
            improved = False
            if evaluate is not None and (last or progress.step % evaluate_every == 0):
                _require_finite(stats.loss, model, progress.step)
                improved = _judge(evaluate(model), select, progress, meter)
                optimizers.forget()
                model.train()
            interrupted = stop is not None and stop()
            if improved or last or interrupted or progress.step % checkpoint_every == 0:
                _require_finite(stats.loss, model, progress.step)
                keeper.keep(progress, best=improved)
            if interrupted and not last:
                raise InterruptedTraining(
                    f"stopped by a signal after step {progress.step} of {end}; "
                    "a checkpoint was written, and the same command with --resume goes on from it"
                )
    finally:
        optimizers.forget()
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


def needs_time_cells(model: torch.nn.Module) -> bool:
    """Whether a part of the model shows items as they stood at a moment."""
    return any(
        isinstance(part, StatisticsPart)
        or (isinstance(part, IdPart) and part.first_seen is not None)
        for part in model.modules()
    )


def _time_cells(model: TwoTower, train: TrainSettings) -> bool:
    if train.time_cells is None:
        return needs_time_cells(model)
    if not train.time_cells and needs_time_cells(model.item_tower):
        raise ConfigError(
            "train.time_cells = false, but the item tower has statistics or an 'as_of' id, which "
            "are shown as of a moment that all items of a step share; leave the key out"
        )
    return train.time_cells


def load_weights(model: TwoTower, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's weights into a model of the same configuration and data.

    Args:
        tensors: as ``checkpoint.Checkpoint.tensors``; optimiser state in it is ignored.

    Raises:
        CheckpointError: names or shapes differ, or a weight is not finite; nothing is loaded.
    """
    weights = {
        name.removeprefix("model/"): value
        for name, value in tensors.items()
        if name.startswith("model/")
    }
    own = model.weights()
    require_match(own, weights, "the checkpoint")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _use_bfloat16(train: TrainSettings, device: torch.device) -> bool:
    """On a GPU unless told otherwise; on a CPU the towers are bound by memory, not arithmetic."""
    if train.precision == "auto":
        return device.type == "cuda"
    return train.precision == "bfloat16"


def _judge(metrics: dict[str, float], select: str, progress: Progress, meter: _Meter) -> bool:
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


class _Keeper:
    """Where states go: a folder of checkpoints, or memory for the best weights."""

    def __init__(self, model: TwoTower, optimizers: Optimizers, root: Path | None) -> None:
        self.model, self.optimizers, self.root = model, optimizers, root
        self.best: dict[str, Tensor] = {}

    def keep(self, progress: Progress, *, best: bool) -> None:
        if self.root is None:
            if best:
                self.best = {name: value.clone() for name, value in self._weights().items()}
            return
        tensors = self._weights()
        state = self.optimizers.state_dict()
        tensors.update({f"optimizers/{name}": value for name, value in state.items()})
        save_checkpoint(self.root, tensors, asdict(progress), best=best)

    def _weights(self) -> dict[str, Tensor]:
        return {f"model/{name}": value.detach() for name, value in self.model.weights().items()}

    def begun(self, *, resume: bool) -> Progress:
        """State of the last checkpoint, loaded; a fresh one where there is none."""
        if self.root is not None and not resume and any(self.root.glob("step-*")):
            # Pruning, and the fallback from a damaged LAST, would mix up the two runs.
            raise ConfigError(
                f"{self.root} holds checkpoints of an earlier run; resume it, or name a new folder"
            )
        found = find_checkpoint(self.root) if self.root is not None and resume else None
        if found is None:
            return Progress()
        load_weights(self.model, found.tensors)
        prefix = "optimizers/"
        self.optimizers.load_state_dict(
            {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
        )
        try:
            return Progress(**found.state)
        except TypeError as error:
            raise CheckpointError(f"{found.folder} is of another program: {error}") from error

    def restore_best(self, step: int) -> None:
        best = self.best
        if self.root is not None:
            best = load_checkpoint(self.root / f"step-{step}").tensors
        load_weights(self.model, best)


class _Meter:
    """Logs steps every few seconds and watches for losses that are not finite."""

    def __init__(self, emit: OnEvent, per_epoch: int, num_steps: int) -> None:
        self.emit, self.per_epoch, self.num_steps = emit, per_epoch, num_steps
        self.since, self.rows = time.perf_counter(), 0

    def add(self, stats: StepStats, model: TwoTower, step: int, lr: float) -> None:
        self.rows += stats.num_rows
        now = time.perf_counter()
        if now - self.since < _LOG_EVERY_S and step != 1:
            return
        # Waits for a GPU, once per logged step.
        _require_finite(stats.loss, model, step, weights=False)
        pairs = max(stats.num_rows * stats.num_candidates, 1)
        self.emit(
            {
                "kind": "step",
                "step": step,
                "num_steps": self.num_steps,
                "epoch": step / self.per_epoch,
                "loss": float(stats.loss.detach()),
                "lr": lr,
                "temperature": float(model.temperature().detach()),
                "positives_per_s": self.rows / max(now - self.since, 1e-9),
                "masked_share": stats.num_masked / pairs,
                "num_candidates": stats.num_candidates,
            }
        )
        self.since, self.rows = time.perf_counter(), 0


def _require_finite(loss: Tensor, model: TwoTower, step: int, *, weights: bool = True) -> None:
    """Look at the loss, and at the weights as well: a gradient may overflow where no loss did."""
    value = loss.item()
    fine = math.isfinite(value)
    broken = _broken(model) if weights or not fine else []
    if fine and not broken:
        return
    what = "the update overflowed" if fine else f"the loss is {value}"
    raise DivergedError(
        f"{what} at step {step}: {_cause(model, broken)}; the last checkpoint is untouched"
    )


def _broken(model: TwoTower) -> list[str]:
    """Names of weights that are not finite."""
    return [name for name, p in model.weights().items() if not torch.isfinite(p).all()]


def _cause(model: TwoTower, broken: list[str]) -> str:
    """The likeliest reason for a loss that is not finite, in words that name a setting."""
    tables = [name for name in broken if name in {f"{t}.weight" for t in model.tables()}]
    layers = [name for name in broken if name not in tables and name != "log_temperature"]
    if tables and layers:
        return (
            f"embedding table {tables[0]} and layer {layers[0]} are not finite; lower "
            "train.table_lr and train.dense_lr, or set train.clip_norm"
        )
    if tables:
        return f"embedding table {tables[0]} is not finite; lower train.table_lr"
    if layers:
        return f"layer {layers[0]} is not finite; lower train.dense_lr or set train.clip_norm"
    if broken:
        return "the learned temperature is not finite; set loss.temperature to a number"
    if float(model.temperature().detach()) < 0.01:
        return f"the temperature is {float(model.temperature().detach()):.2g}; raise it"
    return "all weights are finite, so a feature or a score overflowed; check numeric features"
