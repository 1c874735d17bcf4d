"""How the processes that torchrun started become the ``Ranks`` of one run, and end together."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from recclr.distributed import ALONE, JOIN_S, Ranks, first_line
from recclr.errors import ConfigError, PeerError, RankError, RecclrError


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started together with this one; ``ALONE`` without it.

    However the block ends, it ends for all: an error of one rank gets its number and is raised
    there; the others raise ``PeerError`` with the same exit code.

    Raises:
        ConfigError: torchrun's environment is incomplete. RankError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    ranks = _join()
    try:
        yield ranks
    except Exception as error:
        peer = _ended_by(ranks, error)
        if peer is None and isinstance(error, RecclrError):
            error.args = (f"rank {ranks.rank}: {error}",)
        if peer is None or isinstance(error, PeerError):
            raise
        raise peer from error
    except KeyboardInterrupt as error:
        _ended_by(ranks, error)
        raise
    else:
        ranks.close(wait=False)


def _ended_by(ranks: Ranks, error: BaseException) -> PeerError | None:
    """Tell the others and wait until they have heard; the failure that came before this one."""
    if threading.current_thread() is threading.main_thread():
        # torchrun ends the others at the first exit, and they shall have their own exit codes.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert ranks.notices is not None
    peer = ranks.notices.fail(error)
    ranks.close(wait=True)
    return peer


def _join() -> Ranks:
    """Meet the others at the address that torchrun gave."""
    place = os.environ
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in place]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {place['WORLD_SIZE']}, but {', '.join(missing)} is not set; start "
            "several processes with torchrun, or unset WORLD_SIZE"
        )
    if place.get("LOCAL_WORLD_SIZE") == place["WORLD_SIZE"]:
        # On one machine no name has to resolve and nobody outside can connect.
        names = [name for _, name in socket.if_nameindex()]
        if "lo" in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            f"the processes cannot meet at {place['MASTER_ADDR']}:{place['MASTER_PORT']} "
            f"({first_line(error)}); is the port taken, or the name unknown?"
        ) from error
    attempt = place.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"recclr/{attempt}", store)
    local = int(place["LOCAL_RANK"]), int(place.get("LOCAL_WORLD_SIZE", size))
    return Ranks(rank, size, local_rank=local[0], local_size=local[1], store=store)


def restarts_are_safe() -> bool:
    """Whether processes that torchrun restarts can meet again.

    Through the store of its agent they may find the addresses of those before them and hang
    (pytorch #135712); ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` beside torchrun gives them their
    own.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return restarts == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
