"""A small generated log and a finished run on it, shared by the tests of whole commands."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from recclr.kernels import native

# An example that takes long on a busy machine is no failure.
settings.register_profile("recclr", deadline=None)
settings.load_profile("recclr")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as tests of hangs and of killed processes mostly wait."""
    cores = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return min(len(cores) + 1, 8)


if not torch.cuda.is_available():
    # Read when a kernel is defined, those of Triton's own library included, and TorchRec, which
    # some tests import first, imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def plain_kernels():
    """The twins in PyTorch, where compiled kernels would run."""
    with native.turned_off():
        yield


@pytest.fixture(scope="module", params=["compiled", "plain"])
def both_kernels(request):
    """Everything once with the compiled kernels and once with their twins in PyTorch."""
    if request.param == "plain":
        request.getfixturevalue("plain_kernels")
    elif native.library() is None:
        pytest.skip(str(native.why_not()))


SMALL = """
seed = 3

[data]
events = "{data}/events.parquet"
users = "{data}/users.parquet"
items = "{data}/items.parquet"

[item.features]
category = {{ kind = "categorical", dropout = 0.2 }}
recent = {{ kind = "statistics", windows_d = [3.0, 10.0] }}

[user]
history = {{ length = 10, half_life_d = 10.0, dropout = 0.1 }}

[user.id]
dropout = 0.2

[model]
embedding_dim = 8

[negatives]
uniform = 32

[train]
batch_size = 64
epochs = 3
refit = true

[evaluate]
ks = [5, 10]
select = "recall@10"
num_bootstrap = 50

[baselines]
names = ["popularity", "recent_popularity", "item_knn"]
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code and both streams."""

    code: int
    out: str
    err: str


def run_command(*arguments: object) -> Outcome:
    """The command line in this process, as ``recclr ARGUMENTS`` would run it."""
    from recclr.cli import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["recclr", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue())


def without_fsync(patch: pytest.MonkeyPatch) -> None:
    """Tests end processes and never machines; waiting for the disk would be most of some."""
    patch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    without_fsync(monkeypatch)


@pytest.fixture(scope="session")
def recclr():
    return run_command


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """Folder with events, users and items as Parquet: about a thousand rows."""
    from recclr.data.synthetic import generate_log

    folder = tmp_path_factory.mktemp("data")
    log = generate_log(num_users=60, num_items=70, num_events=1200, num_days=30, seed=4)
    log.write(folder)
    return folder


@pytest.fixture(scope="session")
def small_config(small_data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL.format(data=small_data), "utf-8")
    return path


@pytest.fixture(scope="session")
def small_run(small_config, tmp_path_factory) -> Path:
    """A finished run folder; tests read it and never write into it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        without_fsync(patch)
        done = run_command("train", "--config", small_config, "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    return out
