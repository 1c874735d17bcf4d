"""TorchRec's fused table (fbgemm): row-wise Adagrad within the backward pass."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from bench import bags, memory
from bench.timing import repeated


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Lookups, gradients and updates of bags; see ``bench.bags`` for the task."""
    from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim import RowWiseAdagrad

    device = torch.device(task["device"])
    drawn, starts, gradient = bags.draw(task)
    offsets = torch.tensor([*starts, len(drawn[0])], device=device)
    looked_up = [
        KeyedJaggedTensor.from_offsets_sync(["rows"], torch.from_numpy(one).to(device), offsets)
        for one in drawn
    ]
    config = EmbeddingBagConfig(
        name="table",
        num_embeddings=task["num_rows"],
        embedding_dim=task["dim"],
        feature_names=["rows"],
        pooling=PoolingType.SUM,
    )
    table = FusedEmbeddingBagCollection(
        [config], optimizer_type=RowWiseAdagrad, optimizer_kwargs={"lr": 0.01}, device=device
    )
    grad = torch.from_numpy(gradient).to(device)

    def step(number: int) -> None:
        table(looked_up[number % len(looked_up)]).values().backward(grad)

    step(0)
    memory.reset_peak(task["device"])
    return repeated(step, task["seconds"], task["device"]) | {
        "amount": task["num_bags"],
        "unit": "bags/s",
        "version": f"{version('torchrec')}, fbgemm {_fbgemm()}",
        "peak_memory_mb": memory.peak_mb(task["device"]),
    }


def _fbgemm() -> str:
    import fbgemm_gpu

    return str(fbgemm_gpu.__version__)
