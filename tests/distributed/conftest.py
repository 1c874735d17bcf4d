"""Starts ranks without torchrun, in processes that do not have to import PyTorch again."""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

WORK = Path(__file__).with_name("work.py")
PRELOADED = ["torch._dynamo", "recclr.cli", "recclr.run", "recclr.report", "recclr.evaluate"]
# Not an error where they are not installed.
PRELOADED += ["torchrec.distributed.embedding", "torchrec.distributed.shard"]
# Environment, stderr and function of one rank.
PROGRAM = """
import os, runpy, sys
os.environ.update({environment!r})
os.fsync = lambda descriptor: None
os.dup2(os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
runpy.run_path({work!r})["main"]({function!r}, {folder!r}, {timeout_s!r}, {arguments!r})
"""


# Runs the command line with a fault on one rank of the first attempt only.
COMMAND = """
import os, sys
os.fsync = lambda descriptor: None
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
{fault}
from recclr.cli import main
main()
"""


@dataclass(frozen=True)
class Ended:
    """Exit code and stderr of every rank."""

    codes: list[int | None]
    texts: list[str]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def work():
    """The functions of ``work.py``, for one process."""
    return SimpleNamespace(**runpy.run_path(str(WORK)))


@pytest.fixture(scope="session")
def spread():
    """Runs a function of ``work.py`` on several ranks and waits for all.

    They exchange tensors through shared memory, or, with ``sockets``, through gloo's.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)

    def begin(function, size, folder, *, timeout_s=30.0, ends_s=60.0, sockets=False, **arguments):
        folder.mkdir(exist_ok=True)
        port, processes = free_port(), []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "CUDA_VISIBLE_DEVICES": "",
            }
            if sockets:
                # Ranks wait for each other in shared memory by a compiled kernel.
                environment["RECCLR_NATIVE"] = "0"
            program = PROGRAM.format(
                environment=environment,
                log=str(folder / f"stderr-{rank}.txt"),
                work=str(WORK),
                function=function,
                folder=str(folder),
                timeout_s=timeout_s,
                arguments=json.loads(json.dumps(arguments)),
            )
            processes.append(server.Process(target=exec, args=(program, {})))
            processes[-1].start()
        end = time.monotonic() + ends_s
        for process in processes:
            process.join(max(end - time.monotonic(), 0.01))
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.exitcode is None:
                process.kill()
                process.join()
        texts = [(folder / f"stderr-{rank}.txt").read_text() for rank in range(size)]
        return Ended(codes, texts)

    return begin


@pytest.fixture
def torchrun(tmp_path):
    """A command under torchrun to its end; ``fault`` is Python that every rank runs first."""

    def run(*arguments, size=2, restarts=0, fault="", limit_s=120):
        script = tmp_path / "command.py"
        script.write_text(COMMAND.format(fault=fault))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(size), "--max-restarts", str(restarts), str(script)]
        command += map(str, arguments)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )

    return run
