"""A process that trains on a generated log, in memory or in shards, in bursts when it is told to.

``python -m bench.bursts TASK.json``: one JSON object per line on stdin asks for a burst, one on
stdout answers. Two such processes can take turns, so that both meet the machine's good and bad
moments, while each has its memory to itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import data, memory
from bench.training import make_step
from recclr.data.log import Csr, EncodedLog
from recclr.data.shards import open_shards, write_shards
from recclr.keeping import digest_of

PIECE = 1 << 22
_DONTNEED = 4


def main(task_file: str) -> None:
    """Make ready, say so, and train as asked until stdin ends."""
    task = json.loads(Path(task_file).read_text("utf-8"))
    began = time.perf_counter()
    log = make_log(task)
    model, step = make_step(task, log)
    ready = {"ready_s": time.perf_counter() - began, "ready_peak_mb": memory.peak_mb()}
    print(json.dumps(ready), flush=True)
    number = 0
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["cold"]:
            forget(log, Path(task["shards"]))
        memory.reset_peak()
        began = time.perf_counter()
        for _ in range(asked["steps"]):
            step(number)
            number += 1
        seconds, peak_mb = time.perf_counter() - began, memory.peak_mb()
        found = {"seconds": seconds, "peak_mb": peak_mb, "weights": digest_of(model.weights())}
        print(json.dumps(found), flush=True)


def make_log(task: dict[str, Any]) -> EncodedLog:
    """The log in memory, or from the folder ``shards``, which is written if it is not there."""
    pieces = data.make_pieces(data.LogSpec(**task["log"]), task["piece"])
    if task["shards"] is None:
        whole = list(pieces)
        users, items = (torch.cat([getattr(p, n) for p in whole]) for n in ("user_idx", "item_idx"))
        return EncodedLog(users, items, whole[0].num_users, whole[0].num_items)
    folder = Path(task["shards"])
    if not folder.exists():
        write_shards(folder, pieces, groups=("known",))
    return open_shards(folder, verify=False)


def forget(log: EncodedLog, folder: Path) -> None:
    """Put the files out of memory: out of this process first, since what is mapped stays cached."""
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors_of(log):
        where, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        # Of a private mapping that was never written to, this drops no data.
        if libc.madvise(where, size, _DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def tensors_of(log: EncodedLog) -> list[torch.Tensor]:
    """Every tensor that lies in a file."""
    found = [column for _, column in log.columns()]
    for name in asdict(log.groups):
        value = getattr(log.groups, name)
        if isinstance(value, Csr):
            found += [value.offsets, value.values]
        elif value is not None:
            found.append(value)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
