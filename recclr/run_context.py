"""What every stage of a run needs: where it goes, who shares it, and whether it is to end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recclr.config import Config
from recclr.distributed import ALONE, Ranks
from recclr.errors import InterruptedTraining
from recclr.files import clear_errors
from recclr.run_folder import LOG
from recclr.watching import OnEvent


@dataclass
class Context:
    """What every stage needs.

    Attributes:
        out: the run folder. device: where the model lives. on_event: progress, one dict each.
        stop: whether a signal asked to end. ranks: the processes of the run; the first of them
            writes and shows, and does alone what is not shared.
        judge_test: look at test in the end.
    """

    config: Config
    out: Path
    device: str
    on_event: OnEvent
    resume: bool = False
    stop: Callable[[], bool] = field(default=lambda: False)
    ranks: Ranks = ALONE
    judge_test: bool = True

    def log(self, event: dict[str, Any]) -> None:
        """One line of log.jsonl, and the progress display."""
        if not self.ranks.first:
            return
        line = json.dumps({"time": round(time.time(), 3), **event}) + "\n"
        with clear_errors(self.out / LOG), (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(line)
        self.on_event(event)

    def enter(self, stage: str) -> None:
        """Announce a stage, unless a signal asked to end before it."""
        self.end_if_asked()
        self.on_event({"kind": "stage", "name": stage})

    def end_if_asked(self) -> None:
        """End here if a signal asked for it: what is done so far is in the folder."""
        # The others notice when the first one ends.
        if self.ranks.first and self.stop():
            raise InterruptedTraining(
                "stopped by a signal between two steps of the work; the same command with "
                "--resume goes on from there"
            )
