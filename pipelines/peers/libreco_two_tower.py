"""LibRecommender's TwoTower (TensorFlow) with its trainer: softmax over the batch, corrected."""

from __future__ import annotations

import contextlib
import io
from importlib.metadata import version
from typing import Any

import numpy as np
from bench import memory
from bench.timing import repeated

# Its trainer makes a loader anew in each run; over so many batches that is nothing.
_BATCHES = 16


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Runs of its trainer over a few batches each."""
    import pandas as pd
    from libreco.algorithms import TwoTower
    from libreco.data import DatasetFeat, TransformedSet
    from libreco.training.dispatch import get_trainer

    users, items = np.load(task["users"]), np.load(task["items"])
    frame = pd.DataFrame({"user": users, "item": items, "label": 1})
    log, info = DatasetFeat.build_trainset(
        frame, user_col=[], item_col=[], sparse_col=[], dense_col=[], shuffle=True
    )
    num_threads = task["threads"]
    model = TwoTower(
        "ranking",
        info,
        loss_type="softmax",
        embed_size=task["dim"],
        norm_embed=True,
        n_epochs=1,
        batch_size=task["batch_size"],
        use_bn=False,
        hidden_units=(task["dim"],),
        temperature=0.08,
        tf_sess_config={
            "intra_op_parallelism_threads": num_threads,
            "inter_op_parallelism_threads": num_threads,
        },
    )
    # What fit does before it hands over to the trainer: the shares that correct the softmax.
    model.item_corrections = np.bincount(log.item_indices, minlength=model.n_items) / len(users)
    model.build_model()
    trainer = get_trainer(model)
    size = min(_BATCHES * task["batch_size"], len(users))
    parts = [
        TransformedSet(log.user_indices[rows], log.item_indices[rows], log.labels[rows])
        for rows in (slice(start, start + size) for start in range(0, len(users) - size + 1, size))
    ]

    def steps(number: int) -> None:
        part = parts[number % len(parts)]
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.run(part, True, 0, True, None, None, 10, 8192, None, 0)

    steps(0)
    memory.reset_peak()
    return repeated(steps, task["seconds"]) | {
        "amount": size,
        "unit": "positives/s",
        "version": version("LibRecommender"),
        "peak_memory_mb": memory.peak_mb(),
    }
