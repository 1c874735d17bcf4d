"""Other trainers, one module each, measured by ``benchmark.py --peers``.

A module's ``measure(task)`` gets ``users`` and ``items`` (paths of .npy files of dense int32
indices), ``num_users``, ``num_items``, ``dim``, ``batch_size``, ``negatives`` (per positive),
``device``, ``threads`` and ``seconds``, and answers with ``seconds`` (of each repeat), ``amount``
(positives in a repeat), ``unit``, ``version`` and ``peak_memory_mb``. It runs in a process of its
own, under the first interpreter that has its library, and knows nothing of recclr. Tables of bags
have a task of their own (``bench.bags``).
"""

from __future__ import annotations

from typing import Any


def require_cpu(task: dict[str, Any]) -> None:
    """For those whose GPU code is not measured here: say so in their row of the table."""
    if task["device"] != "cpu":
        raise ValueError(f"measured on the CPU only, not on {task['device']}")
