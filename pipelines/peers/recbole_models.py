"""RecBole's BPR and SimpleX with its trainer: negatives of each row's own, drawn by its loader."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from bench import memory
from bench.timing import repeated


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Batches through ``Trainer._train_epoch``.

    Args:
        task: see the package, and ``model`` (``BPR`` or ``SimpleX``).
    """
    import recbole
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer
    from recbole.utils import get_model, init_seed

    with tempfile.TemporaryDirectory() as folder:
        write_atomic(task, Path(folder) / "log")
        config = Config(model=task["model"], dataset="log", config_dict=settings(task, folder))
        init_seed(1, True)
        train, _, _ = data_preparation(config, create_dataset(config))
        model = get_model(task["model"])(config, train.dataset)
        trainer = Trainer(config, model)

        def endless() -> Iterator[Any]:
            while True:
                yield from train

        batches = endless()

        def step(number: int) -> None:
            trainer._train_epoch(islice(batches, 1), 0)

        step(0)
        memory.reset_peak()
        return repeated(step, task["seconds"]) | {
            "amount": task["batch_size"],
            "unit": "positives/s",
            "version": recbole.__version__,
            "peak_memory_mb": memory.peak_mb(),
        }


def settings(task: dict[str, Any], folder: str) -> dict[str, Any]:
    """Everything is trained on; its batch size counts positives times negatives."""
    return {
        "data_path": folder,
        "checkpoint_dir": folder,
        "load_col": {"inter": ["user_id", "item_id"]},
        "embedding_size": task["dim"],
        "train_batch_size": task["batch_size"] * task["negatives"],
        "train_neg_sample_args": {
            "distribution": "uniform",
            "sample_num": task["negatives"],
            "alpha": 1.0,
            "dynamic": False,
            "candidate_num": 0,
        },
        "eval_args": {
            "split": {"RS": [1.0, 0.0, 0.0]},
            "order": "RO",
            "group_by": None,
            "mode": "full",
        },
        "device": "cpu",
        "gpu_id": "",
        "use_gpu": False,
        "state": "ERROR",
        "show_progress": False,
    }


def write_atomic(task: dict[str, Any], folder: Path) -> None:
    """The log as RecBole reads it: a text file with types in its header."""
    folder.mkdir()
    pairs = np.stack([np.load(task["users"]), np.load(task["items"])], axis=1)
    with (folder / "log.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\n")
        np.savetxt(file, pairs, fmt="%d", delimiter="\t")
