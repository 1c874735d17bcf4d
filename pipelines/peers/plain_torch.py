"""A two-tower model in plain PyTorch, as people write it: a table each, dense logits, autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from bench import memory
from bench.timing import repeated
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

_TEMPERATURE = 0.08


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Steps of one variant.

    Args:
        task: see the package, and ``in_batch`` (the batch's other items as negatives, else
            ``negatives`` uniform draws for the whole batch), ``optimizer`` (``sparse_adam``,
            ``adam`` or ``fused_adam``), ``loader`` (``dataloader``, or ``slices`` of a permuted
            tensor).
    """
    pairs = [torch.from_numpy(np.load(task[name])).long() for name in ("users", "items")]
    model = TwoTower(
        task["num_users"], task["num_items"], task["dim"], sparse=task["optimizer"] == "sparse_adam"
    )
    optimizer = make_optimizer(model, task["optimizer"])
    batches = (from_loader if task["loader"] == "dataloader" else from_slices)(
        *pairs, task["batch_size"]
    )

    def step(number: int) -> None:
        users, items = next(batches)
        logits, labels = model(users, items, None if task["in_batch"] else task["negatives"])
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step(0)
    memory.reset_peak()
    return repeated(step, task["seconds"]) | {
        "amount": task["batch_size"],
        "unit": "positives/s",
        "version": torch.__version__,
        "peak_memory_mb": memory.peak_mb(),
    }


class TwoTower(nn.Module):
    """Cosine of a user's and an item's vector."""

    def __init__(self, num_users: int, num_items: int, dim: int, *, sparse: bool) -> None:
        super().__init__()
        self.users = nn.Embedding(num_users, dim, sparse=sparse)
        self.items = nn.Embedding(num_items, dim, sparse=sparse)

    def forward(
        self, users: Tensor, items: Tensor, num_negatives: int | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, candidates] and the candidate that is each row's positive, int64 [B]."""
        queries = functional.normalize(self.users(users))
        positives = functional.normalize(self.items(items))
        if num_negatives is None:
            return queries @ positives.T / _TEMPERATURE, torch.arange(len(users))
        drawn = torch.randint(self.items.num_embeddings, (num_negatives,))
        negatives = functional.normalize(self.items(drawn))
        own = (queries * positives).sum(1, keepdim=True)
        logits = torch.cat([own, queries @ negatives.T], dim=1) / _TEMPERATURE
        return logits, torch.zeros(len(users), dtype=torch.int64)


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sparse_adam":
        return torch.optim.SparseAdam(model.parameters(), lr=0.005)
    return torch.optim.Adam(model.parameters(), lr=0.005, fused=name == "fused_adam")


def from_loader(users: Tensor, items: Tensor, batch_size: int) -> Iterator[list[Tensor]]:
    """Batches of a DataLoader, epoch after epoch; the last, smaller one is left out."""
    loader = DataLoader(
        TensorDataset(users, items), batch_size=batch_size, shuffle=True, drop_last=True
    )
    while True:
        yield from loader


def from_slices(users: Tensor, items: Tensor, batch_size: int) -> Iterator[list[Tensor]]:
    """The same without a DataLoader, whose collation of single rows costs more than the step."""
    while True:
        order = torch.randperm(len(users))
        for start in range(0, len(users) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield [users[rows], items[rows]]
