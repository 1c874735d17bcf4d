"""PyTorch's table: EmbeddingBag with sparse gradients, and torch.optim.Adagrad.

Its accumulator is of the table's size; PyTorch has none with one number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench import bags, memory
from bench.timing import repeated
from torch import nn


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Lookups, gradients and updates of bags; see ``bench.bags`` for the task."""
    device = task["device"]
    _, step = make_step(task)
    step(0)
    memory.reset_peak(device)
    return repeated(step, task["seconds"], device) | {
        "amount": task["num_bags"],
        "unit": "bags/s",
        "version": torch.__version__,
        "peak_memory_mb": memory.peak_mb(device),
    }


def make_step(task: dict[str, Any]) -> tuple[nn.EmbeddingBag, Callable[[int], None]]:
    """The table, and ``step(number)`` that trains it."""
    device = task["device"]
    drawn, starts, gradient = bags.draw(task)
    values = [torch.from_numpy(one).to(device) for one in drawn]
    offsets, grad = (torch.from_numpy(one).to(device) for one in (starts, gradient))
    table = nn.EmbeddingBag(task["num_rows"], task["dim"], mode="sum", sparse=True, device=device)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.01)

    def step(number: int) -> None:
        optimizer.zero_grad()
        table(values[number % len(values)], offsets).backward(grad)
        optimizer.step()

    return table, step
