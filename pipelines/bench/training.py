"""Whole training steps of recclr: batch, draws, towers, masks, loss, backward, update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bench import data, machine, memory
from bench.floors import training_work
from bench.timing import repeated
from recclr.building import build_model
from recclr.distributed import ALONE, Ranks
from recclr.settings import LossSettings, ModelSettings, NegativesSettings, TrainSettings
from recclr.stepping import Stepper
from recclr.towers import TwoTower


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One row of the benchmark.

    Args:
        task: ``log`` (fields of LogSpec), ``dim``, ``batch_size``, ``negatives`` (uniform draws;
            None: the full catalogue), ``in_batch`` (the batch's other items instead), ``features``,
            ``optimizer``, ``device``, ``seconds``, ``gemm_size``.
    """
    device = task["device"]
    conditions = machine.conditions(device, task["gemm_size"])
    memory.reset_peak(device)
    model, step = make_step(task, data.make_log(data.LogSpec(**task["log"])))
    counts: dict[str, int] = {}
    step(0, counts)
    preparation_mb = memory.peak_mb(device)
    memory.reset_peak(device)
    times = repeated(lambda number: step(number + 1), task["seconds"], device)
    work = training_work(
        batch_size=counts["batch_size"],
        num_candidates=counts["num_candidates"],
        dim=task["dim"],
        num_vectors=counts["num_vectors"],
        num_touched=counts["num_touched"],
        optimizer=task["optimizer"],
    )
    measured = {
        "amount": counts["batch_size"],
        "unit": "positives/s",
        "flop": work.flop,
        "row_bytes": work.row_bytes,
        "peak_memory_mb": memory.peak_mb(device),
        "preparation_peak_mb": preparation_mb,
        **conditions,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return times | measured | counts


def make_step(
    task: dict[str, Any], log: data.EncodedLog, ranks: Ranks = ALONE
) -> tuple[TwoTower, Any]:
    """The model, and ``step(number, counts)`` that trains it and fills counts where asked.

    Of several ranks none can be asked for counts.
    """
    device = task["device"]
    full = task["negatives"] is None
    loss = LossSettings(temperature=0.08, kind="full_softmax" if full else "infonce")
    in_batch = task["in_batch"]
    uniform = 0 if full or in_batch else task["negatives"]
    negatives = NegativesSettings(in_batch=in_batch or full, uniform=uniform)
    train = TrainSettings(
        batch_size=task["batch_size"],
        table_optimizer=task["optimizer"],
        precision=task.get("precision", "auto"),
    )
    model = make_model(task, log, loss).to(device).train()
    parts = {"loss": loss, "negatives": negatives, "seed": 0, "ranks": ranks}
    stepper = Stepper(model, log.to(device), train=train, **parts)
    # A captured step cannot be looked into, so the first one, which is counted, is not.
    first = stepper
    if stepper.graph is not None:
        first = Stepper(model, stepper.source.log, train=replace(train, cuda_graph=False), **parts)

    def step(number: int, counts: dict[str, int] | None = None) -> None:
        if counts is None:
            stepper(number)
            return
        stats = first.objective.backward(model, first.source.step(number))
        counts |= {"batch_size": stats.num_rows, "num_candidates": int(stats.num_candidates)}
        counts |= count_rows(model)
        first.optimizers.step(number)
        stepper.warm_up(number + 1)

    return model, step


def count_rows(model: TwoTower) -> dict[str, int]:
    """Vectors that the tables gave to the step under way, and the distinct rows behind them."""
    tables = [table for table in model.tables().values() if table.lookups]
    rows = [torch.cat([lookup.rows for lookup in table.lookups]).unique() for table in tables]
    return {
        "num_vectors": sum(len(lookup.vectors) for table in tables for lookup in table.lookups),
        "num_touched": sum(map(len, rows)),
    }


def make_model(task: dict[str, Any], log: data.EncodedLog, loss: LossSettings) -> TwoTower:
    """Fresh towers, on the CPU."""
    prepared, user, item = (data.with_features if task["features"] else data.ids_only)(log)
    model = ModelSettings(embedding_dim=task["dim"])
    return build_model(prepared, user=user, item=item, model=model, loss=loss, seed=0)
