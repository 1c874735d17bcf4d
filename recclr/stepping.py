"""What a training does over and over: batch, loss, gradients, update; captured where it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recclr.batches import BatchSource
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError
from recclr.exchange import StepExchange
from recclr.graph_plan import plan_graph
from recclr.graphs import graph_of
from recclr.negatives import require_negatives
from recclr.objective import Objective, StepStats
from recclr.optimizers import Optimizers
from recclr.parts import IdPart, StatisticsPart
from recclr.settings import LossSettings, NegativesSettings, TrainSettings
from recclr.towers import TwoTower
from recclr.watching import OnEvent

# Steps after which a capture as a CUDA graph is not waited for any more.
_LAST_WARM_UP = 9


def ignore(event: dict[str, Any]) -> None:
    """For trainings of which nobody wants to hear."""


class Stepper:
    """Runs the steps of a training by number, in any order; each follows from (seed, step) alone.

    Args:
        model: in training mode. log: rows to learn from, on the device of the model, in memory or
            mapped.
        ranks: the processes that share every step.
        emit: told whether steps are captured as a CUDA graph.

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
        ranks: Ranks = ALONE,
        emit: OnEvent = ignore,
    ) -> None:
        if loss.kind != "full_softmax":
            require_negatives(negatives, log, batch_size=train.batch_size)
        self.model = model
        self.source = BatchSource(
            log,
            train,
            seed=seed,
            time_cells=_time_cells(model, train),
            user_pools=loss.symmetric > 0,
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
        )
        self.objective = Objective(
            log,
            loss,
            negatives,
            seed=seed,
            bfloat16=_use_bfloat16(train, log.device),
            chunk_size=train.chunk_size,
            ranks=ranks,
            fixed_shapes=captured,
        )
        self.num_steps = max(1, round(train.epochs * self.source.steps_per_epoch))
        self.optimizers = Optimizers(model, train, self.num_steps, fixed_shapes=captured)
        self.graph = graph_of(model, self.objective, self.optimizers, emit=emit)
        self.exchange = StepExchange(self.optimizers, ranks) if ranks.size > 1 else None

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
        if self.exchange is None:
            stats = self.objective.backward(self.model, self.source.step(step), check)
            self.optimizers.step(step)
            return stats, stop is not None and stop()
        stats = self.objective.backward(self.model, self.source.step(step))
        asked = stop is not None and stop()
        stats, gradients, interrupted = self.exchange(stats, stopped=asked)
        if check is not None:
            check(stats.loss)
        self.optimizers.step(step, gradients)
        return stats, interrupted

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

    def close(self) -> None:
        """End the thread that reads ahead, and drop what an unfinished step left."""
        self.source.close()
        self.optimizers.forget()


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


def _use_bfloat16(train: TrainSettings, device: torch.device) -> bool:
    """On a GPU unless told otherwise; many CPUs emulate it, at many times the cost."""
    if train.precision == "auto":
        return device.type == "cuda"
    return train.precision == "bfloat16"
