"""The benchmark measures what it says; rows that cannot be measured say why."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

SECTIONS = {"ids", "features", "evaluation", "tables", "growth", "peers"}
FIELDS = {
    "measured_s",
    "floor_s",
    "ratio",
    "per_s",
    "unit",
    "peak_memory_mb",
    "repeats",
    "bound",
    "cores",
}
RATE, COPY = 1e9, 1e8


@pytest.fixture(scope="module")
def bench():
    """The script, and the modules it is made of."""
    import benchmark
    from bench import data, floors, grid, machine, memory, runner, timing, training

    modules = (data, floors, grid, machine, memory, runner, timing, training)
    names = {module.__name__.rpartition(".")[2]: module for module in modules}
    return SimpleNamespace(script=benchmark, **names)


@pytest.fixture
def settings(bench):
    return bench.grid.Settings("cpu", 0.02, gemm_size=64)


@pytest.fixture
def log(bench):
    return bench.data.LogSpec(num_users=70, num_items=50, num_rows=900)


def here(row):
    """What the child does, without a process of its own: quicker, and its memory is ours."""
    import importlib

    try:
        return importlib.import_module(row.module).measure(row.task)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"


def run(bench, settings, sections, **given):
    given = {"most_rows": 0, "rounds": 2, "measure": here, "tell": lambda text: None} | given
    return bench.script.run("smoke", settings, sections=sections, **given)


def sane(row) -> None:
    assert row.keys() >= FIELDS
    assert row["measured_s"] > 0
    low, high = row["quartiles_s"]
    assert low <= row["measured_s"] <= high
    assert row["per_s"] == pytest.approx(row["amount"] / row["measured_s"])
    assert row["ratio"] == pytest.approx(row["floor_s"] / row["measured_s"])
    assert row["peak_memory_mb"] > 1


def test_the_smallest_preset_fills_every_field(bench, settings):
    report = run(bench, settings, SECTIONS - {"peers", "tables"})
    assert [row["section"] for row in report["rows"]] == ["ids", "features", "evaluation"]
    for row in report["rows"]:
        sane(row)
    assert report["threads"] == torch.get_num_threads()
    assert "generated: 70 users" in report["log"]
    low, high = report["gemm_gflops_range"]
    assert low <= report["gemm_gflops"] <= high
    json.dumps(report)


def test_a_training_floor_by_hand(bench, settings, log):
    row = bench.grid.training_row("ids", log, settings, dim=8, batch_size=64, negatives=None)
    (entry,) = bench.runner.run_rows([row], here, say=lambda text: None)
    # The full softmax: 64 rows against all 50 items. 64 vectors of users, 50 of items.
    assert entry["num_candidates"] == 50
    assert entry["num_vectors"] == 64 + 50
    assert 50 < entry["num_touched"] < 64 + 50
    flop, moved = 6 * 64 * 50 * 8, (64 + 50) * 8 * 8 + entry["num_touched"] * (4 + 24) * 8
    bench.runner.add_floors([entry], bench.floors.Rates(RATE, COPY))
    assert (entry["floor_s"], entry["bound"]) == (pytest.approx(moved / COPY), "rows")
    bench.runner.add_floors([entry], bench.floors.Rates(RATE, 100 * COPY))
    assert (entry["floor_s"], entry["bound"]) == (pytest.approx(flop / RATE), "gemm")
    sane(entry)


def test_an_item_drawn_twice_is_scored_and_counted_once(bench, settings, log):
    row = bench.grid.training_row("ids", log, settings, dim=8, batch_size=64, negatives=400)
    assert 40 < here(row)["num_candidates"] <= 50
    in_batch = bench.grid.training_row(
        "ids", log, settings, dim=8, batch_size=64, negatives=63, in_batch=True
    )
    assert here(in_batch)["num_candidates"] < 50


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam", "rowwise_adagrad", "sgd"])
def test_traffic_of_rows(bench, optimizer):
    work = bench.floors.training_work(
        batch_size=1, num_candidates=1, dim=8, num_touched=3, num_vectors=5, optimizer=optimizer
    )
    # Read, then weight in and out, then each float of the optimiser's state in and out.
    state = {"adam": 2 * 8, "rowwise_adam": 8 + 1, "rowwise_adagrad": 1, "sgd": 0}[optimizer]
    assert work.row_bytes == 5 * 2 * 4 * 8 + 3 * 4 * (8 + 2 * 8 + 2 * state)


def test_a_ranking_floor_by_hand(bench, settings, log):
    row = bench.grid.evaluation_row("evaluation", log, settings, dim=8, k=5, num_queries=30)
    (entry,) = bench.runner.run_rows([row], here, say=lambda text: None)
    bench.runner.add_floors([entry], bench.floors.Rates(RATE, COPY))
    assert entry["floor_s"] == pytest.approx(2 * 30 * 50 * 8 / RATE)
    assert (entry["amount"], entry["unit"]) == (30, "users/s")
    sane(entry)


@pytest.mark.parametrize("features", [False, True])
def test_a_step_really_trains(bench, settings, log, features):
    # One that left out the update would look fast.
    row = bench.grid.training_row(
        "ids", log, settings, dim=8, batch_size=64, negatives=32, features=features
    )
    model, step = bench.training.make_step(row.task, bench.data.make_log(log))
    names = {name.split(".")[0] for name in model.weights()}
    assert {"user_tower", "item_tower"} <= names
    before = {name: value.clone() for name, value in model.weights().items()}
    step(0)
    moved = {
        name for name, value in model.weights().items() if not torch.equal(value, before[name])
    }
    assert any(name.startswith("user_tower") for name in moved)
    # The id of users, and of items; two features of items, which the history shares with them.
    assert len(model.tables()) == (3 if features else 2)
    assert {name for name in moved if name.endswith("table.weight")} == {
        f"{name}.weight" for name in model.tables()
    }


@pytest.mark.parametrize(
    ("takes_s", "warm_ups", "measured"), [(0.01, 10, 100), (0.4, 1, 3), (3.0, 1, 2), (7.0, 1, 1)]
)
def test_warm_up_is_no_measurement(bench, monkeypatch, takes_s, warm_ups, measured):
    now, calls = [0.0], []

    def work(number):
        calls.append(number)
        now[0] += takes_s

    monkeypatch.setattr(bench.timing.time, "perf_counter", lambda: round(now[0], 6))
    monkeypatch.setattr(bench.timing.time, "process_time", lambda: round(2 * now[0], 6))
    times = bench.timing.repeated(work, 1.0)
    assert times["seconds"] == pytest.approx([takes_s] * measured)
    assert times["cores"] == pytest.approx(2.0)
    assert calls == list(range(warm_ups + measured))


def test_peers_are_measured_beside_recclr(bench, settings):
    report = run(bench, settings, {"peers"})
    rows = {row["what"].split(",")[0]: row for row in report["rows"] if "skipped" not in row}
    own, peer = rows["recclr"], rows["PyTorch dataloader"]
    assert own["rounds"] == peer["rounds"] == 2
    assert peer["recclr_times"] == pytest.approx(own["per_s"] / peer["per_s"])
    assert peer["floor_s"] / peer["amount"] == pytest.approx(own["floor_s"] / own["amount"])
    assert peer["ratio"] == pytest.approx(peer["floor_s"] / peer["measured_s"])
    absent = {row["what"].split()[0]: row["skipped"] for row in report["rows"] if "skipped" in row}
    assert "is not installed" in absent["LibRecommender"]


@pytest.mark.parametrize("in_batch", [False, True])
def test_plain_torch_trains_on_the_log(bench, in_batch, tmp_path):
    from peers import plain_torch

    torch.manual_seed(0)
    model = plain_torch.TwoTower(7, 5, 4, sparse=True)
    users, items = torch.tensor([3, 6]), torch.tensor([4, 0])
    logits, labels = model(users, items, None if in_batch else 9)
    assert logits.shape == (2, 2 if in_batch else 1 + 9)
    cosine = torch.nn.functional.cosine_similarity(model.users(users), model.items(items)) / 0.08
    torch.testing.assert_close(logits.gather(1, labels[:, None]).squeeze(1), cosine)


def test_batches_of_plain_torch_go_once_over_the_log(bench):
    from peers import plain_torch

    users, items = torch.arange(12), torch.arange(12) + 100
    for batches in (plain_torch.from_loader, plain_torch.from_slices):
        stream = batches(users, items, 4)
        epoch = [next(stream) for _ in range(3)]
        assert sorted(torch.cat([pair[0] for pair in epoch]).tolist()) == list(range(12))
        assert all((pair[1] - pair[0] == 100).all() for pair in epoch)


def test_a_row_of_its_own_process(bench, settings, log):
    row = bench.grid.evaluation_row("evaluation", log, settings, dim=8, k=5)
    result = bench.runner.in_child(row, limit_s=120)
    assert not isinstance(result, str), result
    assert result["amount"] == 70
    assert result["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("change", "limit_s", "reason"),
    [
        ({"library": "no_such_library"}, 60, "no_such_library is not installed"),
        ({"module": "bench.nothing"}, 60, "No module named 'bench.nothing'"),
        ({"module": "time", "task": {}}, 60, "has no attribute 'measure'"),
        ({}, 0.01, "took more than 0.01 s"),
    ],
)
def test_a_row_that_fails_says_why(bench, settings, log, change, limit_s, reason):
    row = bench.grid.evaluation_row("evaluation", log, settings, dim=8, k=5)
    found = bench.runner.in_child(replace(row, **change), limit_s=limit_s)
    assert isinstance(found, str)
    assert reason in found


def test_an_interpreter_that_is_not_there(bench, settings, log, tmp_path):
    row = bench.grid.evaluation_row("evaluation", log, settings, dim=8, k=5)
    found = bench.runner.in_child(row, limit_s=9, interpreters=[str(tmp_path / "python")])
    assert found == f"{tmp_path / 'python'}: No such file or directory"


def test_the_next_interpreter_may_have_the_library(bench, settings, log, tmp_path):
    """The second one stands for an environment with a library that ours lacks."""
    (tmp_path / "a_peer.py").write_text(
        "def measure(task):\n    return {'seconds': [1.0, 3.0, 2.0], 'amount': task['k']}\n"
    )
    second = tmp_path / "python"
    second.write_text(
        f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path}" exec "{sys.executable}" "$@"\n'
    )
    second.chmod(0o755)
    row = bench.grid.evaluation_row("evaluation", log, settings, dim=8, k=5)
    row = replace(row, module="a_peer", library="a_peer")
    result = bench.runner.in_child(row, limit_s=60, interpreters=[sys.executable, str(second)])
    assert result == {"seconds": [1.0, 3.0, 2.0], "amount": 5}


def test_what_does_not_fit_is_not_tried(bench, settings, log, monkeypatch):
    row = bench.grid.training_row("growth", log, settings, dim=8, batch_size=64, negatives=32)
    monkeypatch.setattr(bench.runner, "available_bytes", lambda: 1 << 30)
    (entry,) = bench.runner.run_rows([row], lambda row: pytest.fail("tried"), say=lambda text: None)
    assert "needs about 0.5 GiB, 1.0 GiB of memory are free" in entry["skipped"]


def test_rows_take_turns_and_a_failed_one_is_not_tried_again(bench, settings, log):
    turns = []

    def measure(row):
        turns.append(row.what)
        if row.what == "b":
            return "broken"
        turn = len(turns)
        return {"seconds": [turn], "cores": 1, "amount": 6, "unit": "x/s", "peak_memory_mb": turn}

    row = bench.grid.evaluation_row("evaluation", log, settings, dim=8, k=5)
    rows = [replace(row, what=name) for name in ("a", "b", "c")]
    a, b, c = bench.runner.run_rows(rows, measure, rounds=3, say=lambda text: None)
    assert "".join(turns) == "abcacac"
    assert (a["measured_s"], a["per_s"], a["peak_memory_mb"]) == (4, 1.5, 6)
    assert (c["measured_s"], c["repeats"]) == (5, 3)
    assert b["skipped"] == "broken"


def test_the_peak_is_that_of_the_row(bench):
    """In a process of its own, as rows are: one that has freed much keeps what it asks for next."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system cannot forget a peak")
    code = (
        "import torch; from bench import memory; "
        "large = torch.ones(60 << 20, dtype=torch.uint8); high = memory.peak_mb(); del large; "
        "memory.reset_peak(); print(high - memory.peak_mb())"
    )
    folder = Path(bench.memory.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 40


def test_presets(bench, settings, log):
    standard = bench.grid.own_rows("standard", log, settings, most_rows=10_000_000)
    full = bench.grid.own_rows("full", log, settings, most_rows=100_000_000)
    shapes = {
        (row.section, *(row.task[key] for key in ("dim", "batch_size", "negatives")))
        for row in full
        if row.section in ("ids", "features")
    }
    assert len(shapes) == 2 * 3 * 4 * 3
    grown = [row.task["log"] for row in full if row.section == "growth"]
    assert max(log["num_rows"] for log in grown) == 100_000_000
    assert max(log["num_items"] for log in grown) == 10_000_000
    assert max(row.task["log"]["num_rows"] for row in standard) == 10_000_000
    for rows in (standard, full):
        names = [(row.section, row.what) for row in rows]
        assert len(set(names)) == len(names)
    wanted = {f"{name}" for name, *_ in shapes} | {"evaluation", "growth"}
    assert {row.section for row in standard} == wanted


def test_a_log_is_generated_where_there_are_no_data(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("RECCLR_DATA", str(tmp_path))
    spec = bench.data.gowalla()
    assert spec.path is None
    log = bench.data.make_log(spec)
    assert (len(log), log.num_users, log.num_items) == tuple(
        asdict(spec)[name] for name in ("num_rows", "num_users", "num_items")
    )
    assert int(log.user_idx.max()) < log.num_users
    assert int(log.item_idx.max()) < log.num_items
    counts = log.item_counts().sort(descending=True).values
    assert counts[:4098].sum() > 0.2 * counts.sum()


@pytest.fixture
def command(bench):
    # Frames would cut messages into pieces.
    app = Typer(rich_markup_mode=None)
    app.command()(bench.script.main)
    return partial(CliRunner().invoke, app)


def test_the_command_writes_and_prints_its_rows(bench, command, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.script, "in_child", lambda row, **given: here(row))
    path = tmp_path / "rows.json"
    done = command(["--preset=smoke", "--seconds=0.02", "--peers", "--rounds=1", f"--json={path}"])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert (report["preset"], report["device"]) == ("smoke", bench.machine.device_name("cpu"))
    # Broken over lines where the column is narrow.
    names = [line.split("│")[1] for line in done.output.splitlines() if line.startswith("│")]
    shown = " ".join(" ".join(names).split())
    for row in report["rows"]:
        assert row["what"] in shown
        assert row.get("skipped", "") in shown
    assert f"{report['threads']} threads" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only=speed"], "evaluation"),
        (["--json=nowhere/rows.json"], "there is no folder nowhere"),
        (["--device=abacus"], "--device abacus"),
        (["--peer-python=nowhere/python"], "nowhere/python"),
        (["--rounds=0"], "--rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, command, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.script, "run", lambda *given, **named: pytest.fail("measured"))
    done = command(arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_asking_for_peers_adds_them_to_the_sections(bench, command, monkeypatch):
    asked = []
    monkeypatch.setattr(
        bench.script, "run", lambda *given, sections, **named: asked.append(sections)
    )
    monkeypatch.setattr(bench.script, "show", lambda *given: None)
    for arguments in ([], ["--peers"], ["--only=tables", "--peers"], ["--only=peers"]):
        assert command(arguments).exit_code == 0
    assert asked == [SECTIONS - {"peers"}, SECTIONS, {"tables", "peers"}, {"peers"}]


@pytest.mark.slow
def test_the_script_runs_as_it_is_called(pipelines, tmp_path):
    """Real child processes; their memory is theirs alone."""
    path = tmp_path / "rows.json"
    command = [sys.executable, pipelines / "benchmark.py", "--preset=smoke", "--only=ids"]
    done = subprocess.run(
        [*command, "--seconds=0.01", f"--json={path}"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    sane(row)
    assert row["what"] in done.stdout


def test_other_trainers_are_not_compared_across_devices(command):
    done = command(["--peers", "--device=cuda"])
    assert done.exit_code == 2
    assert "CPU" in done.output
