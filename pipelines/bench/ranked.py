"""Steps of one process, or of the ranks that torchrun started; the first writes how long they took.

``python -m bench.ranked TASK.json RESULT.json``. Ranks wait for each other in every step, so the
first one's times are those of all.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import data
from bench.training import make_step
from recclr.joining import joined

_WARM_UPS = 10


def main(task_file: str, result_file: str) -> None:
    """Train as the task says.

    Args:
        task_file: of ``training.make_step``'s task, with ``threads`` of all ranks together and
            ``steps``.
    """
    task = json.loads(Path(task_file).read_text("utf-8"))
    with joined() as ranks:
        torch.set_num_threads(max(1, task["threads"] // ranks.size))
        ranks.start("cpu", 120.0)
        _, step = make_step(task, data.make_log(data.LogSpec(**task["log"])), ranks)
        seconds = timed_steps(step, task["steps"])
        if ranks.first:
            Path(result_file).write_text(json.dumps({"seconds": seconds}), "utf-8")


def timed_steps(step: Any, count: int) -> list[float]:
    """Of each step, after a few that nobody counts."""
    times = []
    for number in range(_WARM_UPS + count):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    return times[_WARM_UPS:]


if __name__ == "__main__":
    main(*sys.argv[1:])
