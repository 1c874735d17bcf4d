"""The benchmark as a whole, on a generated log that takes no time."""

import importlib
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

# Libraries that a machine may lack; here they always do.
ABSENT = {"torchrec", "torch_rechub", "libreco", "recbole"}
ALWAYS = {"section", "what", "measured_s", "quartiles_s", "repeats", "rounds", "amount", "unit"}
ALWAYS |= {"per_s", "floor_s", "ratio", "peak_memory_mb"}
OWN = {"flop", "row_bytes", "bound", "gemm", "copy", "device", "threads"}


@pytest.fixture(scope="module")
def benchmark():
    return importlib.import_module("benchmark")


def in_process(row):
    if row.library in ABSENT:
        return f"{row.library} is not installed"
    return importlib.import_module(row.module).measure(row.task)


@pytest.fixture(scope="module")
def report(benchmark):
    from bench import grid

    return benchmark.run(
        "smoke",
        grid.Settings("cpu", 0.01, gemm_size=64),
        sections=set(grid.SECTIONS),
        most_rows=0,
        rounds=2,
        measure=in_process,
        tell=lambda text: None,
    )


def measured(report):
    return [row for row in report["rows"] if "skipped" not in row]


def test_every_section_of_the_smallest_preset_is_measured(report):
    sections = {row["section"] for row in measured(report)}
    assert sections == {"ids", "features", "evaluation", "tables", "peers"}
    assert report["threads"] >= 1
    assert report["gemm_gflops"] > 0
    assert report["log"] == "generated: 70 users, 50 items, 900 rows"


def test_every_row_has_every_field(report):
    for row in measured(report):
        fields = ALWAYS if "version" in row else ALWAYS | OWN
        assert fields <= set(row), fields - set(row)
        assert row["measured_s"] > 0
        assert row["repeats"] >= 3
        assert row["quartiles_s"][0] <= row["measured_s"] <= row["quartiles_s"][1]
        assert row["per_s"] == pytest.approx(row["amount"] / row["measured_s"])
        assert row["ratio"] == pytest.approx(row["floor_s"] / row["measured_s"])
        assert row["peak_memory_mb"] > 10
    assert json.loads(json.dumps(report)) == report


def test_the_floor_of_a_row_by_hand(report):
    (row,) = [row for row in report["rows"] if row["section"] == "ids"]
    # Batches of 64 from 900 rows; 32 draws from 50 items give at most 32 distinct candidates.
    assert row["amount"] == 64
    assert 2 <= row["num_candidates"] <= 32
    gemm_s = 6 * 64 * row["num_candidates"] * 8 / (report["gemm_gflops"] * 1e9)
    row_bytes = row["num_vectors"] * 8 * 8 + row["num_touched"] * (4 * 8 + 24 * 8 + 8)
    rows_s = row_bytes / (report["copy_gb_s"] * 1e9)
    assert row["floor_s"] == pytest.approx(max(gemm_s, rows_s))
    assert row["bound"] == ("gemm" if gemm_s >= rows_s else "rows")
    (row,) = [row for row in report["rows"] if row["section"] == "evaluation"]
    assert row["floor_s"] == pytest.approx(2 * 70 * 50 * 8 / (report["gemm_gflops"] * 1e9))


def test_peers_stand_beside_recclr(report):
    rows = {row["what"]: row for row in measured(report)}
    peers = [row for row in rows.values() if row["against"] is not None]
    assert {row["section"] for row in peers} == {"tables", "peers"}
    for row in peers:
        twin = rows[row["against"]]
        assert row["recclr_times"] == pytest.approx(twin["per_s"] / row["per_s"])
        assert row["floor_s"] / row["amount"] == pytest.approx(twin["floor_s"] / twin["amount"])
        assert row["rounds"] == twin["rounds"] == 2


def test_absent_peers_are_reported(benchmark, report):
    reasons = {row["skipped"] for row in report["rows"] if "skipped" in row}
    assert reasons == {f"{name} is not installed" for name in ABSENT - {"recbole"}}
    out = io.StringIO()
    benchmark.show(report, Console(file=out, width=150))
    printed = out.getvalue()
    for reason in reasons:
        assert f"not measured: {reason}" in printed
    for row in report["rows"]:
        assert row["what"] in printed


def test_the_command_measures_in_child_processes_and_writes_json(pipelines, tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, pipelines / "benchmark.py", "--preset", "smoke", "--only", "ids"]
    command += ["--seconds", "0.01", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert row["section"] == "ids"
    assert row["per_s"] > 0
    assert "positives/s" in done.stdout
    assert "threads" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "choose of ids"),
        (["--json", "nowhere/rows.json"], "there is no folder nowhere"),
        (["--device", "abacus"], "--device abacus"),
        (["--peer-python", "nowhere/python"], "does not exist"),
        (["--rounds", "0"], "'--rounds'"),
    ],
)
def test_what_cannot_be_measured_is_refused(benchmark, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    # Colours and frames would cut the message into pieces.
    app = Typer(rich_markup_mode=None)
    app.command()(benchmark.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.output
