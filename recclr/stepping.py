"""What a training does over and over: batch, loss, gradients, update; captured where it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from recclr.batches import Batch, BatchSource
from recclr.data.log import Csr, EncodedLog
from recclr.distillation import Teacher
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError
from recclr.exchange import StepExchange
from recclr.graph_plan import plan_graph
from recclr.graphs import graph_of
from recclr.momentum import MomentumQueue
from recclr.negatives import most_candidates, require_negatives, require_sources
from recclr.objective import Objective
from recclr.optimizers import Optimizers
from recclr.pair_losses import require_objective
from recclr.parts import IdPart, StatisticsPart
from recclr.settings import (
    LossSettings,
    NegativesSettings,
    SelfSupervisionSettings,
    TrainSettings,
)
from recclr.step_stats import StepStats
from recclr.towers import TwoTower
from recclr.views import SelfSupervision
from recclr.watching import OnEvent
from recclr.within import require_groups

# Steps after which a capture as a CUDA graph is not waited for any more.
_LAST_WARM_UP = 9


def ignore(event: dict[str, Any]) -> None:
    """For trainings of which nobody wants to hear."""


class Steps(Protocol):
    """What the loop of a training runs; ``Stepper`` says what the methods do."""

    model: TwoTower
    optimizers: Optimizers
    num_steps: int

    @property
    def source(self) -> HasSteps: ...

    @property
    def objective(self) -> HasState: ...

    def __call__(
        self,
        step: int,
        *,
        check: Callable[[Tensor], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[StepStats, bool]: ...

    def look_again(self) -> None: ...

    def give_back(self) -> None: ...

    def close(self) -> None: ...


class HasSteps(Protocol):
    """Where the rows of a step come from."""

    steps_per_epoch: int


class HasState(Protocol):
    """What a loss carries from step to step, and the precision that it runs towers in."""

    state: dict[str, Tensor]
    bfloat16: bool


class Stepper:
    """Runs the steps of a training by number, in any order; each follows from (seed, step) alone.

    Args:
        model: in training mode. log: rows to learn from, on the device of the model, in memory or
            mapped.
        explicit: see ``own_negatives.OwnNegatives``.
        ranks: the processes that share every step.
        emit: told whether steps are captured as a CUDA graph, and how stale the queue is.
        item_group: int64 [num_items], see ``within.item_groups``.
        teacher: see ``Objective``; moved to the device of the log.

    Attributes:
        source, objective, optimizers: the parts. num_steps: of ``train.epochs``.

    Raises:
        ConfigError: the settings do not fit the log, the model or the device. DataError: no rows.
    """

    def __init__(
        self,
        model: TwoTower,
        log: EncodedLog,
        *,
        loss: LossSettings,
        negatives: NegativesSettings,
        train: TrainSettings,
        seed: int,
        self_supervision: SelfSupervisionSettings | None = None,
        explicit: Csr | None = None,
        ranks: Ranks = ALONE,
        emit: OnEvent = ignore,
        item_group: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        num_rows = min(train.batch_size, len(log))
        require_objective(loss, negatives, model.similarity, num_rows=num_rows)
        if loss.kind not in ("full_softmax", "alignment_uniformity"):
            require_negatives(negatives, log, batch_size=train.batch_size)
        self.model = model
        time_cells = _time_cells(model, train, negatives)
        require_sources(negatives, time_cells=time_cells)
        self.source = BatchSource(
            log, train, seed=seed, time_cells=time_cells, user_pools=loss.symmetric > 0
        )
        captured = plan_graph(
            model,
            loss=loss,
            negatives=negatives,
            train=train,
            batch_size=self.source.batch_size,
            device=log.device,
            ranks=ranks,
            emit=emit,
            self_supervision=self_supervision,
        )
        self.num_steps = max(1, round(train.epochs * self.source.steps_per_epoch))
        bfloat16 = use_bfloat16(train, log.device)
        queue = None
        if negatives.queue is not None and negatives.queue.size:
            warm_up = math.ceil(negatives.queue.warmup * self.num_steps)
            queue = MomentumQueue(
                model,
                negatives.queue,
                starts=self.source.first_batch(warm_up),
                time_cells=time_cells,
                bfloat16=bfloat16,
                chunk_size=train.chunk_size,
                ranks=ranks,
            )
        if negatives.within is not None:
            size = self.source.batch_size
            require_groups(
                negatives,
                item_group,
                num_rows=max(ranks.counts(size)),
                num_candidates=most_candidates(negatives, loss, log.num_items, size),
            )
        views = None
        if self_supervision is not None:
            views = SelfSupervision(self_supervision, model, log, seed=seed, ranks=ranks)
        self.objective = Objective(
            log,
            loss,
            negatives,
            seed=seed,
            bfloat16=bfloat16,
            chunk_size=train.chunk_size,
            explicit=explicit,
            ranks=ranks,
            fixed_shapes=captured,
            self_supervision=views,
            item_group=item_group if negatives.within is not None else None,
            queue=queue,
            teacher=None if teacher is None else teacher.to(log.device),
        )
        self.emit = emit
        # As often as there may be an evaluation.
        self.look_every = max(1, round(train.evaluate_every * self.source.steps_per_epoch))
        self.objective.num_batches = round(train.epochs * self.source.batches_per_epoch)
        self.optimizers = Optimizers(
            model,
            train,
            self.num_steps,
            fixed_shapes=captured,
            also=None if views is None else views.parameters(),
        )
        self.graph = graph_of(model, self.objective, self.optimizers, emit=emit)
        self.exchange = StepExchange(self.optimizers, ranks) if ranks.size > 1 else None
        # Made while other ranks were waited for: the number of a step, and its batches.
        self._ahead: tuple[int, dict[int, Batch]] | None = None

    def __call__(
        self,
        step: int,
        *,
        check: Callable[[Tensor], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[StepStats, bool]:
        """Train on the batches of a step.

        Args:
            check: gets each loss before it reaches a weight; not on a GPU, which it would wait for.
            stop: whether this process was asked to end.

        Returns:
            what the step came to, of all ranks; whether any of them was asked to end.
        """
        if self.graph is not None:
            stats = self.graph(self.source.batch(step), step)
            return stats, stop is not None and stop()
        check = check if self.objective.device.type == "cpu" else None
        batches = self._batches(step)
        if self.exchange is None:
            stats = self.objective.backward(self.model, batches, check)
            self.optimizers.step(step)
            self._fill_queue(step, batches)
            return stats, stop is not None and stop()
        self.exchange.share()
        stats = self.objective.backward(self.model, batches)
        asked = stop is not None and stop()
        stats, gradients, interrupted = self.exchange(stats, stopped=asked)
        if check is not None:
            check(stats.loss)
        self.exchange.update(step, gradients, partial(self._look_ahead, step + 1))
        self._fill_queue(step, batches)
        return stats, interrupted

    def _look_ahead(self, step: int) -> None:
        # Of a mapped log a thread reads ahead, which must not begin an epoch that never comes.
        if step < self.num_steps and self.source.log.mapped_for is None:
            self._ahead = step, self.source.step(step)

    def _batches(self, step: int) -> dict[int, Batch]:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == step else self.source.step(step)

    def _fill_queue(self, step: int, batches: Mapping[int, Batch]) -> None:
        """Push what an update learned from, and say now and then how old the vectors are."""
        queue = self.objective.queue
        if queue is None:
            return
        queue.advance(self.model, batches.values())
        if (step + 1) % self.look_every == 0:
            cosine = queue.staleness(self.model)
            said = {"step": step + 1, "filled": queue.num_filled, "cosine": cosine}
            self.emit({"kind": "queue", **said})

    def warm_up(self, step: int) -> int:
        """Train from ``step`` on until nothing is left to capture, or no longer to be waited for.

        Returns:
            the first step that was not run; ``step`` itself where nothing is captured.
        """
        last = step + _LAST_WARM_UP
        while self.graph is not None and not self.graph.settled and step < last:
            self(step)
            step += 1
        return step

    def look_again(self) -> None:
        """Go on with a model that somebody else had in the meantime."""
        self.optimizers.forget()
        self.model.train()
        if self.graph is not None:
            self.graph.look_again()

    def give_back(self) -> None:
        """Share no tables with other ranks from here on, for whoever writes to the weights.

        Not after an error, which copies could only hide.
        """
        if self.exchange is not None:
            self.exchange.give_back()

    def close(self) -> None:
        """End the thread that reads ahead, and drop what an unfinished step left."""
        self.source.close()
        self._ahead = None
        self.optimizers.forget()


def needs_time_cells(model: torch.nn.Module) -> bool:
    """Whether a part of the model shows items as they stood at a moment."""
    return any(
        isinstance(part, StatisticsPart)
        or (isinstance(part, IdPart) and part.first_seen is not None)
        for part in model.modules()
    )


def _time_cells(model: TwoTower, train: TrainSettings, negatives: NegativesSettings) -> bool:
    if train.time_cells is None:
        return needs_time_cells(model) or negatives.available
    if not train.time_cells and negatives.available:
        raise ConfigError(
            "train.time_cells = false, but negatives.available asks which items there were at the "
            "moment of a step, which its rows then have to share; leave one of the keys out"
        )
    if not train.time_cells and needs_time_cells(model.item_tower):
        raise ConfigError(
            "train.time_cells = false, but the item tower has statistics or an 'as_of' id, which "
            "are shown as of a moment that all items of a step share; leave the key out"
        )
    return train.time_cells


def use_bfloat16(train: TrainSettings, device: torch.device) -> bool:
    """On a GPU unless told otherwise; many CPUs emulate it, at many times the cost."""
    if train.precision == "auto":
        return device.type == "cuda"
    return train.precision == "bfloat16"
