"""Jobs in several processes, one at a time in each; which one does a job changes nothing.

A worker is ``python -m recclr.tune.worker``: it reads the prepared log once, takes a job as a line
of JSON on its stdin, and answers with a line when the job's file is written. It ends when its stdin
does, and after the step it is at when the process that started it is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from recclr.errors import ConfigError, InterruptedTraining, PeerError, RankError, RecclrError
from recclr.tune.bench import Bench, Job

WORKERS_LOCK = ".workers.lock"
_POLL_S = 0.2
_ORPHANS_S = 60.0


class Runner(Protocol):
    """What trains the jobs of a round."""

    def __call__(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> None: ...


class Alone:
    """All jobs in this process, in order."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __call__(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> None:
        """Run them; ``done`` hears of each."""
        for job in jobs:
            if self.bench.place.stop():
                raise InterruptedTraining(STOPPED)
            self.bench.run(job)
            done(job)


STOPPED = (
    "stopped by a signal; what is finished is kept, and the same command with --resume goes on"
)


class Workers:
    """As many processes as were asked for, kept until the block ends.

    Args:
        out: folder with what ``worker`` reads. threads: of each. stop: whether a signal asked to
            end.
    """

    def __init__(
        self, out: Path, processes: int, device: str, threads: int, stop: Callable[[], bool]
    ) -> None:
        self.out, self.processes, self.device = out, processes, device
        self.threads, self.stop = threads, stop
        self.running: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> Workers:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "recclr.tune.worker", str(self.out), self.device]
        for number in range(self.processes):
            self.running[number] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                # The terminal's ^C goes to all; this process says when they end.
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.running.values():
            if error is not None:
                process.terminate()
            assert process.stdin is not None
            # One that was killed has not read its last line.
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.running.values():
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def __call__(self, jobs: Sequence[Job], done: Callable[[Job], None]) -> None:
        """Run the jobs; ``done`` hears of each, in the order in which they end.

        Raises:
            InterruptedTraining: a signal asked to end; the workers end after their steps.
            PeerError: a worker failed, and has said why. RankError: it was killed.
        """
        waiting, busy = list(jobs), dict[int, Job]()
        with selectors.DefaultSelector() as selector:
            for number, process in self.running.items():
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, number)
                self._give(number, waiting, busy)
            while busy:
                if self.stop():
                    raise InterruptedTraining(STOPPED)
                for key, _ in selector.select(_POLL_S):
                    number = key.data
                    if not self.running[number].stdout.readline():  # type: ignore[union-attr]
                        raise self._failed(number)
                    done(busy.pop(number))
                    self._give(number, waiting, busy)

    def _give(self, number: int, waiting: list[Job], busy: dict[int, Job]) -> None:
        if not waiting:
            return
        job = waiting.pop(0)
        stdin = self.running[number].stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(asdict(job)) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failed(number) from None
        busy[number] = job

    def _failed(self, number: int) -> RecclrError:
        code = self.running[number].wait()
        if code > 0:
            return PeerError("a worker failed, and has said why", exit_code=code)
        return RankError(
            f"a worker was ended by signal {-code} (out of memory?); the same command with "
            "--resume goes on, with fewer --processes if memory is short"
        )


def hold_as_worker(out: Path) -> Any:
    """What ``wait_for_orphans`` waits for: a lock that workers share until they end."""
    file = (out / WORKERS_LOCK).open("a+b", buffering=0)
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def wait_for_orphans(out: Path) -> None:
    """Wait until no worker of a killed process is at work: two would share checkpoints.

    Raises:
        ConfigError: one still is, after a minute.
    """
    end = time.monotonic() + _ORPHANS_S
    with (out / WORKERS_LOCK).open("a+b", buffering=0) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"a worker of an earlier call still works in {out}; wait until it ends, or "
                        "end it"
                    ) from None
                time.sleep(_POLL_S)
