"""A run that was killed and resumed is the run that was never killed, to the byte."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

CHECKPOINTS = (
    *("--set", "train.checkpoint_every=0.4", "--set", "train.evaluate_every=0.7"),
    *("--set", 'export=["parquet:store"]'),
)
PRELOADED = [
    *("torch._dynamo", "pandas", "recclr.baselines.neighbours", "recclr.cli", "recclr.report"),
    *("recclr.run", "recclr.shipping"),
]
# A process of its own that does all a shell would: environment, arguments, both streams.
PROGRAM = """
import os, sys
os.environ.update({environment!r})
os.fsync = lambda descriptor: None  # it guards against a power cut, which nobody tests here
for stream in (sys.stdout, sys.stderr):
    os.dup2(os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
sys.argv = ["recclr", *{arguments!r}]
from recclr.cli import main
main()
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts ``recclr train`` in a process that does not have to import PyTorch again."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    logs = tmp_path_factory.mktemp("logs")

    def begin(config, out, *extra, fault=None):
        log = logs / f"{len(list(logs.iterdir()))}.txt"
        log.touch()
        environment = {"CUDA_VISIBLE_DEVICES": "", "RECCLR_FAULT": fault or ""}
        arguments = ["train", "--config", config, "--out", out, *CHECKPOINTS, *extra]
        program = PROGRAM.format(
            environment=environment, log=str(log), arguments=list(map(str, arguments))
        )
        process = server.Process(target=exec, args=(program, {}))
        process.start()
        return process, log

    return begin


@dataclass(frozen=True)
class Done:
    returncode: int
    stderr: str


@pytest.fixture(scope="module")
def run(start):
    def whole(config, out, *extra, fault=None):
        process, log = start(config, out, *extra, fault=fault)
        process.join()
        return Done(process.exitcode, log.read_text())

    return whole


def without_times(value):
    """JSON without what a clock wrote."""
    if isinstance(value, dict):
        clocks = {"seconds", "time", "created", "positives_per_s"}
        return {k: without_times(v) for k, v in value.items() if k not in clocks}
    if isinstance(value, list):
        return [without_times(v) for v in value]
    return value


def outcome(out):
    """Everything that must not depend on interruptions."""
    last = (out / "checkpoints" / "LAST").read_text().strip()
    weights = (out / "checkpoints" / last / "tensors.safetensors").read_bytes()
    version = (out / "store" / "CURRENT").read_text().strip()
    exported = {
        name: (out / "store" / version / name).read_bytes()
        for name in ("items.parquet", "users.parquet")
    }
    texts = [
        without_times(json.loads((out / name).read_text()))
        for name in ("metrics.json", "data.json", "selection/selection.json", "refit.json")
    ]
    folders = {str(p.relative_to(out)) for p in out.rglob("*")}
    return last, weights, version, exported, texts, folders


@pytest.fixture(scope="module")
def whole(run, small_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(small_config, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def uninterrupted(whole):
    return outcome(whole)


FAULTS = [
    *(f"train.step:{n}:kill" for n in (1, 5, 13, 17, 21)),
    *(f"checkpoint.{point}:{n}:kill" for point in ("tensors", "manifest") for n in (1, 4)),
    *(f"checkpoint.{point}:{n}:kill" for point in ("renamed", "best") for n in (2, 3)),
    *(f"checkpoint.last:{n}:kill" for n in (3, 8, 10)),
    *(f"files.write:{n}:kill" for n in (1, 2, 3, 4, 5, 8, 13, 21, 34)),
    *(f"files.rename:{n}:kill" for n in (1, 2, 5, 11, 30)),
    *("files.folder:1:kill", "files.folder:3:kill"),
    *("export.items:1:kill", "export.users:1:kill", "export.point:1:kill"),
]
QUICK = {"checkpoint.renamed:3:kill", "checkpoint.last:8:kill", "export.point:1:kill"}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS]
)
def test_killed_runs_end_in_the_same_bytes(run, small_config, tmp_path, uninterrupted, fault):
    out = tmp_path / "run"
    killed = run(small_config, out, fault=fault)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(small_config, out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(out) == uninterrupted


@pytest.mark.parametrize(
    ("first", "then", "point"),
    [
        ("false", "true", "train.step:13"),
        pytest.param("false", "false", "train.step:17", marks=pytest.mark.slow),
        pytest.param("true", "false", "train.step:5", marks=pytest.mark.slow),
        pytest.param("false", "false", "shards.columns:1", marks=pytest.mark.slow),
        pytest.param("false", "true", "shards.columns:2", marks=pytest.mark.slow),
    ],
)
def test_rows_may_be_in_files_or_in_memory_before_and_after(
    run, small_config, tmp_path, uninterrupted, first, then, point
):
    out = tmp_path / "run"
    killed = run(small_config, out, "--set", f"data.resident={first}", fault=f"{point}:kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path.name for path in out.glob(".*shards*")]
    assert len(left) == (first == "false"), left
    resumed = run(small_config, out, "--resume", "--set", f"data.resident={then}")
    assert resumed.returncode == 0, resumed.stderr
    assert ("reads its rows from files" in resumed.stderr) == (then == "false")
    assert outcome(out) == uninterrupted


@pytest.mark.slow
def test_every_write_of_a_run_is_a_place_to_be_killed_at(
    run, small_config, tmp_path, uninterrupted
):
    """Killed at the first write, at the second, and so on, always resumed: each gets further."""
    out = tmp_path / "run"
    for number in range(1, 100):
        killed = run(small_config, out, "--resume", fault=f"files.rename:{number}:kill")
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert number > 5
    assert outcome(out) == uninterrupted


@pytest.mark.slow
def test_killed_again_and_again(run, small_config, tmp_path, uninterrupted):
    out = tmp_path / "run"
    codes = [
        run(small_config, out, "--resume", fault="train.step:9:kill").returncode for _ in range(6)
    ]
    assert codes[0] == -signal.SIGKILL
    assert codes[-1] == 0
    assert set(codes) == {-signal.SIGKILL, 0}
    assert outcome(out) == uninterrupted


def test_a_report_that_was_never_written_is_written_by_resume(
    run, whole, small_config, tmp_path, uninterrupted
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "report.html").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run(small_config, out, "--resume").returncode == 0
    assert outcome(out) == uninterrupted
    assert {p for p in before if p.stat().st_mtime_ns != before[p]} == set()


def test_killed_from_outside_at_any_time(start, run, small_config, tmp_path, uninterrupted):
    out = tmp_path / "run"
    process, log = start(small_config, out)
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        assert process.is_alive(), log.read_text()
        process.join(0.002)
    process.join(random.random() * 0.2)
    process.kill()
    process.join()
    # The machine may have been so fast that nothing was left to kill.
    assert process.exitcode in (-signal.SIGKILL, 0)
    resumed = run(small_config, out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(out) == uninterrupted


@pytest.mark.slow
def test_the_command_itself_is_killed_and_resumed(small_config, tmp_path, uninterrupted):
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "recclr", "train", "--config", str(small_config)]
    arguments += ["--out", str(out), *CHECKPOINTS]
    # As many threads as the other run has: sums depend on their number in the last digit.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("selection/checkpoints/step-*")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed = subprocess.run(
        [*arguments, "--resume"], env=environment, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(out) == uninterrupted


def test_a_polite_signal_ends_with_a_checkpoint_and_code_75(
    run, small_config, tmp_path, uninterrupted
):
    out = tmp_path / "run"
    stopped = run(small_config, out, fault="train.step:8:term")
    assert stopped.returncode == 75, stopped.stderr
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    refused = run(small_config, out)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    other = run(small_config, out, "--resume", "--set", "seed=4")
    assert other.returncode == 2
    assert "seed = 3" in other.stderr
    resumed = run(small_config, out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(out) == uninterrupted


# The 13th write is one of the selection's last, so the signal is noticed between two stages.
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["files.write:1:term", "files.write:3:int", "export.point:1:int"])
def test_a_polite_signal_between_two_stages(run, small_config, tmp_path, uninterrupted, fault):
    out = tmp_path / "run"
    stopped = run(small_config, out, fault=fault)
    # Where only the report is left to write, it is written.
    assert stopped.returncode == (0 if fault.startswith("export") else 75), stopped.stderr
    assert "Traceback" not in stopped.stderr
    resumed = run(small_config, out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(out) == uninterrupted
