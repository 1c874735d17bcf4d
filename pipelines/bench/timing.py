"""How long calls take. Needs torch on a GPU only, so that it serves interpreters of peers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_WARM_UPS = 10


def timed(work: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call, to the end of its work on the device."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - began


def repeated(work: Callable[[int], Any], seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Time calls ``work(number)`` after warm-up, for about ``seconds``.

    At least three calls, or one where three would take six times as long as asked.

    Returns:
        ``seconds`` of each call, and ``cores``: seconds of processors used per second, which shows
        a library that takes more threads than it was given.
    """
    number, began = 0, time.perf_counter()
    while not number or (number < _WARM_UPS and time.perf_counter() - began < 0.3 * seconds):
        timed(lambda number=number: work(number), device)
        number += 1
    times: list[float] = []
    began, used = time.perf_counter(), time.process_time()
    while True:
        times.append(timed(lambda number=number: work(number), device))
        number += 1
        elapsed = time.perf_counter() - began
        if elapsed >= seconds and (len(times) >= 3 or elapsed >= 6 * seconds):
            return {"seconds": times, "cores": (time.process_time() - used) / elapsed}
