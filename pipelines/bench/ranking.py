"""Exact top-k over the whole catalogue, what a user already has left out."""

from __future__ import annotations

from typing import Any

import torch

from bench import data, machine, memory
from bench.floors import ranking_work
from bench.timing import repeated
from recclr.topk import top_k


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One row of the benchmark.

    Args:
        task: ``log`` (fields of LogSpec), ``dim``, ``k``, ``num_queries`` (the first so many users;
            None for all), ``device``, ``seconds``, ``gemm_size``.
    """
    device, dim = task["device"], task["dim"]
    conditions = machine.conditions(device, task["gemm_size"])
    memory.reset_peak(device)
    log = data.make_log(data.LogSpec(**task["log"]))
    num_queries = min(task["num_queries"] or log.num_users, log.num_users)
    seen = log.user_items().take(torch.arange(num_queries)).to(device)
    draws = torch.Generator().manual_seed(0)
    queries = torch.randn(num_queries, dim, generator=draws).to(device)
    corpus = torch.randn(log.num_items, dim, generator=draws).to(device)
    preparation_mb = memory.peak_mb(device)
    memory.reset_peak(device)
    times = repeated(
        lambda number: top_k(queries, corpus, task["k"], seen=seen), task["seconds"], device
    )
    work = ranking_work(num_queries=num_queries, num_items=log.num_items, dim=dim)
    return times | {
        "amount": num_queries,
        "unit": "users/s",
        "flop": work.flop,
        "row_bytes": work.row_bytes,
        "peak_memory_mb": memory.peak_mb(device),
        "preparation_peak_mb": preparation_mb,
        **conditions,
    }
