"""Signals that ask for an end: the work ends where nothing is lost, not where it happens to be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask the loop to end after its step; a second one ends at once.

    Yields:
        Whether one has come. Outside of the main thread, which alone gets signals, none does.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
