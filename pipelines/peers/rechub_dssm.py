"""torch-rechub's DSSM with its matching trainer, negatives from the batch, loss of a list."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
from bench import memory
from bench.timing import repeated

_BATCHES = 4


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Calls of ``MatchTrainer.train_one_epoch`` over a few batches each."""
    import torch
    from torch.utils.data import DataLoader
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.matching import DSSM
    from torch_rechub.trainers import MatchTrainer
    from torch_rechub.utils.data import TorchDataset

    dim, batch_size = task["dim"], task["batch_size"]
    model = DSSM(
        [SparseFeature("user", task["num_users"], dim)],
        [SparseFeature("item", task["num_items"], dim)],
        user_params={"dims": [dim]},
        item_params={"dims": [dim]},
        temperature=0.08,
    )
    trainer = MatchTrainer(
        model, mode=2, in_batch_neg=True, in_batch_neg_ratio=task["negatives"], n_epoch=1
    )
    users, items = (torch.from_numpy(np.load(task[name])).long() for name in ("users", "items"))
    dataset = TorchDataset({"user": users, "item": items}, torch.zeros(len(users)))

    def endless() -> Iterator[Any]:
        while True:
            yield from DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)

    batches = endless()

    def steps(number: int) -> None:
        # Its progress bar would fill the pipe.
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.train_one_epoch(islice(batches, _BATCHES))

    steps(0)
    memory.reset_peak()
    return repeated(steps, task["seconds"]) | {
        "amount": _BATCHES * batch_size,
        "unit": "positives/s",
        "version": version("torch-rechub"),
        "peak_memory_mb": memory.peak_mb(),
    }
