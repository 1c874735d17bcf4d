"""The benchmark of shards trains the same twice, and its cold files are cold."""

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("no_power_cut")


@pytest.fixture(scope="module")
def bench():
    import benchmark_shards
    from bench import bursts, data

    return SimpleNamespace(script=benchmark_shards, bursts=bursts, data=data)


@pytest.fixture
def task(bench):
    return {
        "log": asdict(bench.data.LogSpec(num_users=70, num_items=50, num_rows=900)),
        "dim": 8,
        "batch_size": 64,
        "negatives": 20,
        "in_batch": False,
        "features": False,
        "optimizer": "rowwise_adagrad",
        "device": "cpu",
        "piece": 128,
    }


def test_a_log_in_pieces_is_one_log(bench):
    spec = bench.data.LogSpec(num_users=70, num_items=50, num_rows=900)
    pieces = list(bench.data.make_pieces(spec, 256))
    assert [len(piece) for piece in pieces] == [256, 256, 256, 132]
    again = list(bench.data.make_pieces(spec, 256))
    for one, other in zip(pieces, again, strict=True):
        assert torch.equal(one.user_idx, other.user_idx)
        assert torch.equal(one.item_idx, other.item_idx)
    # Pieces differ, and each has popular and rare items.
    assert not torch.equal(pieces[0].user_idx, pieces[1].user_idx)
    counts = sum(piece.item_counts() for piece in pieces)
    assert counts[:10].sum() > 2 * counts[-10:].sum() > 0


def test_both_sides_train_on_the_same_rows(bench, task, tmp_path):
    shards = str(tmp_path / "log")
    resident = bench.bursts.make_log(task | {"shards": None})
    mapped = bench.bursts.make_log(task | {"shards": shards})
    assert resident.mapped_for is None
    assert mapped.mapped_for is not None
    assert torch.equal(resident.user_idx, mapped.user_idx)
    assert torch.equal(resident.item_idx, mapped.item_idx)
    # Opened, not written again.
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "log").iterdir()}
    bench.bursts.make_log(task | {"shards": shards})
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "log").iterdir()} == before
    assert len(bench.bursts.tensors_of(mapped)) == 6
    assert len(bench.bursts.tensors_of(resident)) == 2


def cached_pages(path):
    """How many pages of a file the kernel holds (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), found)
        del view
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(value & 1 for value in found), pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what it has cached")
def test_cold_files_are_out_of_memory_and_read_as_before(bench, task, tmp_path, monkeypatch):
    monkeypatch.undo()  # what is not on the disk cannot be forgotten
    spec = bench.data.LogSpec(num_users=900, num_items=70, num_rows=60_000)
    folder = tmp_path / "log"
    log = bench.bursts.make_log(task | {"log": asdict(spec), "shards": str(folder)})
    counts = log.user_counts(), log.item_counts()
    path = folder / "user_idx.bin"
    assert cached_pages(path) == (59, 59)
    # A copy that nobody has mapped goes at a word, where the file system lets anything go.
    copy = tmp_path / "copy"
    shutil.copyfile(path, copy)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(copy)[0] > 30:
        pytest.skip("this file system keeps its files in memory")
    bench.bursts.forget(log, folder)
    assert cached_pages(path)[0] <= 30
    assert torch.equal(log.user_counts(), counts[0])
    assert torch.equal(log.item_counts(), counts[1])


def test_a_round_takes_turns_and_adds_them_up(bench):
    asked = []

    def side(name):
        def burst(ask):
            asked.append((name, ask["steps"], ask["cold"]))
            number = len(asked)
            return {"seconds": number, "peak_mb": -abs(number - 4), "weights": str(number)}

        return burst

    ask = {"steps": 7, "cold": False}
    ours, theirs = bench.script.one_round(side("resident"), side("shards"), ask, True)
    assert [name for name, _, _ in asked] == ["resident", "shards"] * 4
    assert [cold for _, _, cold in asked] == [False, True] + [False] * 6
    assert {steps for _, steps, _ in asked} == {7}
    assert ours == {"seconds": 1 + 3 + 5 + 7, "peak_mb": -1, "weights": "7"}
    assert theirs == {"seconds": 2 + 4 + 6 + 8, "peak_mb": 0, "weights": "8"}
    asked.clear()
    bench.script.one_round(side("resident"), side("shards"), ask, False)
    assert not any(cold for _, _, cold in asked)


def test_ratios_are_those_of_neighbours(bench):
    pairs = [
        ({"seconds": mine, "peak_mb": 10.0 * mine}, {"seconds": theirs, "peak_mb": theirs})
        for mine, theirs in ((1.0, 2.0), (10.0, 10.0), (4.0, 5.0))
    ]
    found = bench.script.compared(pairs, 20)
    assert found["ratios"] == [0.5, 1.0, 0.8]
    assert found["ratio"] == 0.8
    assert found["resident"] == {"per_s": 5.0, "peak_mb": 100.0}
    assert found["shards"] == {"per_s": 4.0, "peak_mb": 10.0}


@pytest.mark.slow
def test_a_process_that_ends_early_is_an_error(bench, task, tmp_path):
    broken = task | {"shards": None, "optimizer": "none such"}
    with (
        pytest.raises(RuntimeError, match="ended"),
        bench.script.training(broken, tmp_path / "task.json"),
    ):
        pytest.fail("it trains")


def test_what_cannot_be_written_is_refused(bench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.script, "run", lambda *given, **named: pytest.fail("measured"))
    app = Typer()
    app.command()(bench.script.main)
    for arguments, said in ((["--json=nowhere/a.json"], "no folder"), (["--rows=10"], "--rows")):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert said in done.output


@pytest.mark.slow
def test_the_script_runs_as_it_is_called(pipelines, tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, pipelines / "benchmark_shards.py", "--rows=20000", "--dim=8"]
    command += ["--rounds=3", "--steps=8", "--batch-size=512", "--negatives=50"]
    done = subprocess.run(
        [*command, f"--folder={tmp_path}", f"--json={path}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["same_weights"]
    assert (report["steps"], report["rounds"]) == (8, 3)
    for found in report["phases"].values():
        assert len(found["ratios"]) == 3
        assert found["ratio"] > 0
        for side in ("resident", "shards"):
            assert found[side]["per_s"] > 0
            assert found[side]["peak_mb"] > 50
    assert "the same to the bit" in done.stdout
    assert "20,000 rows" in done.stdout
    assert {item.name for item in tmp_path.iterdir()} == {"found.json"}
