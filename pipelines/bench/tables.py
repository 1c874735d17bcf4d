"""recclr's table alone: sums of bags of rows, their gradient and the row-wise update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import bags, machine, memory
from bench.floors import Work, table_bytes
from bench.timing import repeated
from recclr.optim import Table, TableOptimizer

_LR = 0.01


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One row of the benchmark.

    Args:
        task: what ``bags.draw`` is told, and ``optimizer``, ``device``, ``seconds``, ``gemm_size``.
    """
    device, dim = task["device"], task["dim"]
    conditions = machine.conditions(device, task["gemm_size"])
    values, _, step = make_step(task)
    step(0)
    memory.reset_peak(device)
    times = repeated(step, task["seconds"], device)
    row_bytes = table_bytes(
        dim=dim,
        num_vectors=task["num_bags"],
        num_touched=len(values[0].unique()),
        optimizer=task["optimizer"],
    )
    work = Work(0.0, row_bytes)
    return times | {
        "amount": task["num_bags"],
        "unit": "bags/s",
        "flop": work.flop,
        "row_bytes": work.row_bytes,
        "peak_memory_mb": memory.peak_mb(device),
        **conditions,
    }


def make_step(task: dict[str, Any]) -> tuple[list[Tensor], Table, Callable[[int], None]]:
    """The rows of each batch of bags, the table, and ``step(number)`` that trains it."""
    device = task["device"]
    drawn, starts, gradient = bags.draw(task)
    values = [torch.from_numpy(one).to(device) for one in drawn]
    offsets, grad = (torch.from_numpy(one).to(device) for one in (starts, gradient))
    draws = torch.Generator().manual_seed(0)
    table = Table(task["num_rows"], task["dim"], std=0.1, generator=draws).to(device)
    optimizer = TableOptimizer({"table": table}, task["optimizer"])

    def step(number: int) -> None:
        table.bag(values[number % len(values)], offsets).backward(grad)
        optimizer.step(_LR, number=number)

    return values, table, step
