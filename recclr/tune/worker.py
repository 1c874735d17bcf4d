"""``python -m recclr.tune.worker OUT DEVICE``: trains what it is told on stdin; see ``workers``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from recclr.data.prepare import PreparedLog
from recclr.errors import RecclrError
from recclr.evaluate import EvaluationSet
from recclr.run_folder import read_config, read_json
from recclr.stopping import signals
from recclr.trials import Place
from recclr.tune.bench import FINAL, PREPARED, Bench, Job
from recclr.tune.space import tune_settings
from recclr.tune.workers import hold_as_worker
from recclr.work_folder import DECLARED, RUNNING


def main(out: Path, device: str) -> int:
    """Work until stdin ends; the exit code of what went wrong, else 0."""
    lock, parent = hold_as_worker(out), os.getppid()
    # What a library prints is no answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(read_json(out / DECLARED)["threads"])
    try:
        with signals() as asked:
            bench = open_bench(
                out,
                Place(
                    running=out / RUNNING,
                    finished=out / FINAL,
                    device=device,
                    # A process whose parent was killed gets another one.
                    stop=lambda: asked() or os.getppid() != parent,
                    on_event=lambda event: None,
                ),
            )
            for line in sys.stdin:
                bench.run(Job(**json.loads(line)))
                answers.write("done\n")
                answers.flush()
    except RecclrError as error:
        if not asked():
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    finally:
        lock.close()
    return 0


def open_bench(out: Path, place: Place) -> Bench:
    """What ``study`` wrote for its workers."""
    config, declared = read_config(out), read_json(out / DECLARED)
    prepared = PreparedLog.load(out / PREPARED).tensors
    examples = EvaluationSet.from_prepared(prepared, keep_seen=config.evaluate.keep_seen)
    settings = tune_settings(declared["tune"], DECLARED)
    return Bench(config, prepared, examples, settings, declared["seed"], place)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
