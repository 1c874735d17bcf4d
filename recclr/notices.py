"""What the processes of a run tell each other in a few bytes, through the store that they met in.

Who failed and how, who has arrived at a meeting that may take long, who waited too long, and who
has ended. Unlike a collective, a word waits for those who come late, and reaches who is busy.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence

from torch._C._distributed_c10d import Store

from recclr.errors import PeerError, RankError, RecclrError

# How long an end waits for the others, who may be busy; torchrun ends those.
_GRACE_S = 5.0
_FAILURE, _LATE, _ENDED, _LEFT = "failure", "late", "ended", "left"


class Notices:
    """Words of one of ``size`` ranks, and those of the others.

    The store's own errors, when it went with its host, are RuntimeErrors.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._meetings = 0

    def meet(self, name: str, limit_s: float) -> None:
        """Go on when all ranks are here.

        Raises:
            PeerError: a rank failed. RankError: some are missing after ``limit_s``.
        """
        keys = [f"meeting/{self._meetings}/{rank}" for rank in range(self.size)]
        self._meetings += 1
        self.store.set(keys[self.rank], "here")
        end, pause_s = time.monotonic() + limit_s, 0.005
        while not self.store.check(keys):
            self.heed()
            if time.monotonic() > end:
                missing = [r for r, key in enumerate(keys) if not self.store.check([key])]
                raise late(missing, name, limit_s)
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.5)

    def heed(self) -> None:
        """End as the rank that failed did, if one did.

        Raises:
            PeerError: it did.
        """
        if self.store.check([_FAILURE]):
            raise _peer(self.store.get(_FAILURE).decode())

    def not_waiting(self, name: str) -> list[int]:
        """Ranks that did not time out at ``name`` as well: they never arrived."""
        keys = [f"{_LATE}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], name)
        end = time.monotonic() + 1.0
        while True:
            missing = [r for r, key in enumerate(keys) if not self.store.check([key])]
            if len(missing) <= 1 or time.monotonic() > end:
                return missing
            time.sleep(0.05)

    def fail(self, error: BaseException) -> PeerError | None:
        """Leave word of a failure; that of another rank, if it was the first to fail."""
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, RecclrError):
            code = error.exit_code
        word = json.dumps({"rank": self.rank, "exit_code": code})
        with contextlib.suppress(RuntimeError):
            found = self.store.compare_set(_FAILURE, "", word).decode()
            if found != word:
                return _peer(found)
        return None

    def leave(self, *, wait: bool) -> None:
        """Be counted as ended; with ``wait``, go once all ranks are."""
        with contextlib.suppress(RuntimeError):
            end = time.monotonic() + _GRACE_S
            self._count(_ENDED, self.size if wait else 0, end)
            # Rank 0 may be the store's host, so it leaves last.
            self._count(_LEFT, 0 if self.rank else self.size, end + 1.0)

    def _count(self, key: str, enough: int, end: float) -> None:
        """Be counted, and wait until ``enough`` ranks are or the time is over."""
        count = self.store.add(key, 1)
        while count < enough and time.monotonic() < end:
            time.sleep(0.01)
            count = self.store.add(key, 0)


def late(missing: Sequence[int], name: str, limit_s: float) -> RankError:
    """The error of who waited in vain."""
    who = ranks_named(missing) if missing else "another process"
    return RankError(
        f"waited {limit_s:g} s at '{name}' for {who}; see what it did, raise "
        "train.collective_timeout_s if it was only slow, and run the command again (training: with "
        "--resume)"
    )


def ranks_named(numbers: Sequence[int]) -> str:
    """For messages."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _peer(word: str) -> PeerError:
    found = json.loads(word)
    return PeerError(f"rank {found['rank']} failed", exit_code=int(found["exit_code"]))
