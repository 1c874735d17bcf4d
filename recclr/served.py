"""What a finished run serves, to the processes of torchrun that share a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recclr.config import Config
from recclr.console import say_if_unfinished, working
from recclr.data.prepared import PreparedLog
from recclr.distributed import Ranks
from recclr.joining import joined
from recclr.load import load_ranker
from recclr.topk import EmbeddingRanker


@dataclass(frozen=True)
class Served:
    """A run on one of the processes.

    Attributes:
        progress: to be called with (done, in all).
    """

    config: Config
    prepared: PreparedLog
    ranker: EmbeddingRanker
    ranks: Ranks
    progress: Callable[[int, int], None]


@contextmanager
def served_by(
    run: Path, doing: str, refuse: Callable[[], object] | None = None
) -> Iterator[Served]:
    """Load what a run serves, all processes together; says so where its training has not ended.

    Args:
        doing: shown at a terminal meanwhile.
        refuse: called first; what it raises is told once, whatever the number of processes.

    Raises:
        RecclrError: as ``load.load_ranker`` and ``joining.joined``.
    """
    with joined() as ranks, working(doing, quiet=not ranks.first) as progress:
        if refuse is not None:
            refuse()
        config, prepared, ranker = load_ranker(run, ranks)
        if ranks.first:
            say_if_unfinished(run)
        yield Served(config, prepared, ranker, ranks, progress)
