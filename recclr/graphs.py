"""A training step as one CUDA graph: captured once, then replayed with other rows in it.

Launching a step's kernels one by one takes longer than running them (performance.md §3). A graph
replays fixed work on fixed addresses, so what differs from step to step stays outside of it: the
batch is copied over the one that was captured, rates go to tensors and seeds to generators that the
graph knows (``prepare``). A replayed step draws what an eager one draws. Which trainings can be
captured is in ``graph_plan``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from recclr.batches import Batch
from recclr.objective import Objective
from recclr.optimizers import Optimizers
from recclr.step_stats import StepStats
from recclr.towers import TwoTower
from recclr.watching import OnEvent

# Steps before the capture, in which kernels are compiled and optimisers make their state.
_WARM_UP = 3

Shapes = tuple[tuple[int, ...] | None, ...]
Replay = Callable[[], StepStats]


class Device(Protocol):
    """What a graph needs of a device; ``CudaDevice``, or a test's stand-in."""

    def aside(self, step: Callable[[], StepStats]) -> StepStats:
        """Run a step where captured ones will run."""

    def capture(
        self, step: Callable[[], StepStats], generators: Sequence[torch.Generator]
    ) -> Replay:
        """Record a step, which runs with each call of what is returned, and not before."""


class StepGraph:
    """Whole steps, from candidates to updated weights; most of them replayed.

    The first steps run eagerly, and so does every step whose batch has other shapes than the
    captured one: the last of an epoch, and time cells at the ends of the log. All of them train.

    Args:
        objective, optimizers: both with fixed shapes.
        emit: told once whether steps are captured: {"kind": "graph", "captured", "reason"}.
    """

    def __init__(
        self,
        model: TwoTower,
        objective: Objective,
        optimizers: Optimizers,
        *,
        emit: OnEvent,
        device: Device,
    ) -> None:
        self.model, self.objective, self.optimizers = model, objective, optimizers
        self.emit, self.device = emit, device
        self.seen: Counter[Shapes] = Counter()
        self.failed = self.told = False
        self.batch: Batch | None = None
        self.replay: Replay | None = None
        self.addresses: tuple[int, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether steps go on as they are now: replayed, or eagerly after a capture that failed."""
        return self.failed or self.replay is not None

    def __call__(self, batch: Batch, step: int) -> StepStats:
        """Train on a batch; the numbers of the result are overwritten by the next call."""
        self._prepare(step)
        if self.failed:
            return self._train(batch)
        shapes = _shapes(batch)
        if self.replay is None:
            self.seen[shapes] += 1
            if self.seen[shapes] <= _WARM_UP:
                return self.device.aside(lambda: self._train(batch))
            if not self._capture(batch):
                self._prepare(step)
                return self._train(batch)
        assert self.batch is not None
        assert self.replay is not None
        if shapes != _shapes(self.batch):
            return self._train(batch)
        for old, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            if old is not None and new is not None:
                old.copy_(new, non_blocking=True)
        return self.replay()

    def look_again(self) -> None:
        """Capture anew if somebody who had the model moved something that the graph works on."""
        if self.replay is not None and self._addresses() != self.addresses:
            self.replay = self.batch = None

    def _prepare(self, step: int) -> None:
        self.objective.prepare(step)
        self.optimizers.prepare(step)

    def _train(self, batch: Batch) -> StepStats:
        stats = self.objective.backward(self.model, {0: batch})
        self.optimizers.apply()
        return stats

    def _capture(self, batch: Batch) -> bool:
        kept = _copied(batch)
        generators = [*self.objective.draws.values(), *self.optimizers.tables.draws.values()]
        try:
            self.replay = self.device.capture(lambda: self._train(kept), generators)
        except RuntimeError as error:
            # What ran was recorded and not carried out: weights are as they were.
            self.failed = True
            self.optimizers.forget()
            self.objective.renew_draws()
            self.optimizers.tables.renew_draws()
            self._tell(str(error).strip().split("\n")[0] or type(error).__name__)
            return False
        self.batch, self.addresses = kept, self._addresses()
        self._tell(None)
        return True

    def _tell(self, reason: str | None) -> None:
        """Once that steps are captured; a capture that fails is the last there is."""
        if reason is not None or not self.told:
            self.emit(graph_event(reason))
        self.told = True

    def _addresses(self) -> tuple[int, ...]:
        held = [*self.model.parameters(), *self.model.buffers()]
        held += self.optimizers.state_dict().values()
        return tuple(each.data_ptr() for each in held)


class CudaDevice:
    """Capture and replay on one GPU, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def aside(self, step: Callable[[], StepStats]) -> StepStats:
        """Run a step on the stream of the capture, after and before all on the current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            stats = step()
        current.wait_stream(self.stream)
        return stats

    def capture(
        self, step: Callable[[], StepStats], generators: Sequence[torch.Generator]
    ) -> Replay:
        """Record a step.

        Raises:
            RuntimeError: something in it cannot be captured, or memory does not suffice.
        """
        graph = torch.cuda.CUDAGraph()
        for each in generators:
            graph.register_generator_state(each)
        current = torch.cuda.current_stream(self.device)
        try:
            # Other threads may go on with what a capture forbids, such as pinning memory.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                stats = step()
        finally:
            # A capture that fails leaves its own stream the current one.
            torch.cuda.set_stream(current)

        def replay() -> StepStats:
            graph.replay()
            return stats

        return replay


def graph_of(
    model: TwoTower, objective: Objective, optimizers: Optimizers, *, emit: OnEvent
) -> StepGraph | None:
    """What runs the steps of a training with fixed shapes; None for one without."""
    if not objective.fixed_shapes:
        return None
    return StepGraph(model, objective, optimizers, emit=emit, device=CudaDevice(objective.device))


def graph_event(reason: str | None) -> dict[str, object]:
    """What a log is told: steps are captured, or the reason why they are not."""
    return {"kind": "graph", "captured": reason is None, "reason": reason}


def _tensors(batch: Batch) -> list[Tensor | None]:
    return [getattr(batch, field.name) for field in fields(batch)]


def _shapes(batch: Batch) -> Shapes:
    return tuple(None if each is None else tuple(each.shape) for each in _tensors(batch))


def _copied(batch: Batch) -> Batch:
    """The same in memory of its own."""
    return Batch(*(None if each is None else each.clone() for each in _tensors(batch)))  # type: ignore[arg-type]
