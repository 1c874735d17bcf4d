"""The commands beyond a whole run: what goes to which stream, and what is said beside it."""

import json
import os
import shutil

import polars as pl
import pytest

from recclr.cli import app
from recclr.config import load_config, with_changes
from recclr.console import RunProgress, print_frame, print_results, working
from recclr.errors import InterruptedTraining
from recclr.kernels import native

pytestmark = pytest.mark.usefixtures("no_power_cut")


@pytest.fixture
def run_copy(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "run")
    return tmp_path / "run"


# --- usage ----------------------------------------------------------------------------------------


def test_version_and_help_are_results(recclr):
    from recclr import __version__

    assert recclr("--version").out == f"recclr {__version__}\n"
    shown = recclr("--help")
    assert shown.code == 0
    for command in app.registered_commands:
        name = command.callback.__name__.replace("_", "-")
        assert name in shown.out
        own = recclr(name, "--help")
        assert own.code == 0
        assert own.out
    assert recclr().code == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nonsense",), "nonsense"),
        (("train",), "--config"),
        (("train", "--config", "a", "--out", "b", "--rsume"), "--rsume"),
        (("recommend",), "RUN"),
        (("recommend", "r", "-k", "0"), "1"),
        (("recommend", "r", "-k", "many"), "-k"),
        (("export", "r"), "--to"),
        (("check", "a", "b"), "b"),
    ],
)
def test_wrong_usage_is_told_on_stderr(recclr, arguments, word):
    done = recclr(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert word in done.err
    assert "Traceback" not in done.err


# --- streams and formats --------------------------------------------------------------------------


def test_train_prints_its_metrics_as_json_and_the_rest_elsewhere(recclr, small_config, tmp_path):
    done = recclr(
        *("train", "--config", small_config, "--out", tmp_path / "run", "--json"),
        *("--set", "train.epochs=1", "--set", "train.refit=false", "--set", "baselines.names=[]"),
    )
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    for word in ("read", "selection", "test", "report", "recall@10", "note: "):
        assert word in done.err
    assert not any(line.endswith(" ") for line in done.err.splitlines())


def test_results_are_sorted_with_intervals(recclr, small_config, small_run):
    done = recclr("train", "--config", small_config, "--out", small_run, "--resume")
    test = json.loads((small_run / "metrics.json").read_text())["test"]
    expected = sorted(test, key=lambda name: -test[name]["all"]["recall@10"])
    rows = [line.split("│")[1].strip() for line in done.out.splitlines() if line.startswith("│")]
    assert rows == expected
    assert f"{test['model']['all']['recall@10']:.4f}  [" in done.out
    assert "report.html" in done.err


@pytest.mark.parametrize(
    ("ending", "read"),
    [("parquet", pl.read_parquet), ("csv", pl.read_csv), ("jsonl", pl.read_ndjson)],
)
def test_results_are_the_same_in_every_format(recclr, small_run, tmp_path, ending, read):
    out = tmp_path / f"best.{ending}"
    done = recclr("recommend", small_run, "--users", "u02,u01", "-k", "3", "--out", out)
    assert (done.code, done.out) == (0, "")
    shown = json.loads(
        recclr("recommend", small_run, "--users", "u02,u01", "-k", "3", "--json").out
    )
    assert [row["user_id"] for row in shown] == ["u02"] * 3 + ["u01"] * 3
    assert read(out).drop("score").to_dicts() == [
        {name: row[name] for name in ("user_id", "item_id", "rank")} for row in shown
    ]
    assert read(out)["score"].to_list() == pytest.approx([row["score"] for row in shown], rel=1e-6)


def test_ids_come_from_tables_and_candidates_can_be_limited(recclr, small_run, tmp_path):
    pl.DataFrame({"user_id": ["u03", "u01", "u03"]}).write_parquet(tmp_path / "users.parquet")
    (tmp_path / "items.csv").write_text("item_id\nsku-01\nsku-02\nsku-03\n")
    done = recclr(
        *("recommend", small_run, "--users-from", tmp_path / "users.parquet", "--keep-seen"),
        *("--items-from", tmp_path / "items.csv", "-k", "3", "--json"),
    )
    rows = json.loads(done.out)
    assert [row["user_id"] for row in rows] == ["u03"] * 3 + ["u01"] * 3
    for user in ("u03", "u01"):
        found = {row["item_id"] for row in rows if row["user_id"] == user}
        assert found == {"sku-01", "sku-02", "sku-03"}


def test_a_long_result_is_shown_in_part_and_says_so(recclr, small_run):
    done = recclr("similar", small_run, "-k", "2")
    assert sum(line.startswith("│") for line in done.out.splitlines()) == 20
    assert "120 more rows; write them all with --out FILE" in done.err


def test_k_above_the_catalogue_is_said(recclr, small_run):
    for command, choices in (
        (("recommend", small_run, "--users", "u01", "-k", "71"), 70),
        (("similar", small_run, "--items", "sku-01", "-k", "70"), 69),
    ):
        done = recclr(*command, "--json")
        assert done.code == 0
        assert f"there are {choices} items to choose from" in done.err
        within = recclr(*command[:-1], choices, "--json")
        assert within.err == ""
        assert json.loads(within.out) == json.loads(done.out)


def test_a_name_that_cannot_be_written_is_told_before_the_work(recclr, tmp_path):
    # The run is not even looked at.
    for command in ("recommend", "similar"):
        done = recclr(command, tmp_path / "absent", "--out", tmp_path / "x.xlsx")
        assert (done.code, "x.xlsx" in done.err) == (2, True)
    done = recclr("export", tmp_path / "absent", "--to", "lance:store")
    assert (done.code, "did you mean lancedb:store?" in done.err) == (2, True)


# --- evaluate, report, export ---------------------------------------------------------------------


def test_evaluate_refuses_inputs_that_are_not_those_of_the_run(
    recclr, small_data, small_config, tmp_path
):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_data, data)
    config = tmp_path / "run.toml"
    config.write_text(small_config.read_text().replace(str(small_data), str(data)))
    quick = ("--set", "train.epochs=1", "--set", "baselines.names=[]")
    assert recclr("train", "--config", config, "--out", run, *quick).code == 0
    pl.read_parquet(data / "events.parquet").head(400).write_parquet(data / "events.parquet")
    done = recclr("evaluate", run)
    assert done.code == 2
    assert f"input files have changed since {run}" in done.err
    assert str(data / "events.parquet") in done.err
    other = recclr("evaluate", run, "--events", small_data / "events.parquet", "--json")
    assert other.code == 0, other.err
    resumed = recclr("train", "--config", config, "--out", run, *quick, "--resume")
    assert resumed.code == 0  # finished: nothing is read any more


def test_the_report_can_be_written_again(recclr, run_copy):
    page = (run_copy / "report.html").read_bytes()
    (run_copy / "report.html").unlink()
    done = recclr("report", run_copy)
    assert done.out == f"{run_copy / 'report.html'}\n"
    # The title is the path, which is another here.
    assert len((run_copy / "report.html").read_bytes()) == pytest.approx(len(page), rel=0.01)


def test_export_reports_in_json_and_does_nothing_twice(recclr, small_run, tmp_path):
    arguments = ("export", small_run, "--to", f"parquet:{tmp_path / 'store'}", "--json")
    first, second = (json.loads(recclr(*arguments).out) for _ in range(2))
    assert (first["num_items"], first["unchanged"]) == (70, False)
    assert second["unchanged"]
    assert second["version"] == first["version"]


def test_a_resume_of_a_finished_run_with_another_configuration(recclr, small_config, small_run):
    done = recclr(
        *("train", "--config", small_config, "--out", small_run, "--resume"),
        *("--set", "evaluate.ks=[3]", "--set", "evaluate.select=recall@3"),
    )
    assert done.code == 2
    assert "evaluate.ks = [5, 10] there, [3] here" in done.err


# --- check ----------------------------------------------------------------------------------------


def test_check_takes_tables_or_a_configuration(recclr, small_data, small_config):
    tables = [small_data / f"{name}.parquet" for name in ("events", "users", "items")]
    done = recclr("check", tables[0], "--users", tables[1], "--items", tables[2], "--json")
    plain = json.loads(done.out)
    configured = json.loads(recclr("check", "--config", small_config, "--json").out)
    assert plain["split"] == configured["split"]
    assert plain["steps"] == configured["steps"]
    assert set(plain) == {"log", "steps", "quarantined", "notes", "split", "encoded", "amount"}
    changed = recclr("check", tables[0], "--set", "split.test=0", "--json")
    assert "test" not in json.loads(changed.out)["split"]["counts"]
    shown = recclr("check", tables[0])
    assert "deduplicate" in shown.out
    assert "split by time" in shown.out
    assert "note: " in shown.err
    for wrong in (
        ("check", tables[0], "--config", small_config),
        ("check", "--config", small_config, "--users", tables[1]),
    ):
        assert recclr(*wrong).code == 2


def test_check_writes_a_configuration_that_runs_with_what_it_proposes(recclr, small_data, tmp_path):
    tables = [small_data / f"{name}.parquet" for name in ("events", "users", "items")]
    given = ("check", tables[0], "--users", tables[1], "--items", tables[2], "--set", "seed=5")
    path = tmp_path / "mine.toml"
    said = recclr(*given, "--write-config", path)
    assert said.code == 0
    assert f"configuration: {path}" in said.err
    proposed = json.loads(recclr(*given, "--json").out)["amount"]["profile"]
    assert proposed
    lines = path.read_text("utf-8").splitlines()
    for line in proposed:
        assert f"# {line['key']}: {line['reason']}" in lines
    written = load_config(path)
    assert written.seed == 5
    for line in proposed:
        changed = with_changes(written, {line["key"]: line["value"]})
        assert changed == written, line
    # What it says holds of itself: nothing more is proposed.
    again = json.loads(recclr("check", "--config", path, "--json").out)["amount"]
    assert again["profile"] == []
    before = path.read_bytes()
    refused = recclr(*given, "--write-config", path)
    assert refused.code == 2
    assert "exists already" in refused.err
    assert path.read_bytes() == before
    nowhere = recclr(*given, "--write-config", tmp_path / "no" / "mine.toml")
    assert nowhere.code == 2
    assert "there is no folder" in nowhere.err


def test_check_says_where_training_is_slower_than_it_could_be(recclr, small_config):
    def slow():
        done = recclr("check", "--config", small_config, "--json")
        return [note for note in json.loads(done.out)["notes"] if "as long as it could" in note]

    assert len(slow()) == (native.why_not() is not None)
    with native.turned_off():
        assert slow()[0].endswith("two to three times as long as it could: turned off")


def test_check_says_what_accumulation_loses(recclr, small_config):
    values = ("--set", "train.accumulate=3", "--set", "negatives.in_batch=true")
    done = recclr("check", "--config", small_config, *values, "--json")
    lost = [note for note in json.loads(done.out)["notes"] if "train.accumulate = 3" in note]
    assert len(lost) == 1
    assert "train.chunk_size" in lost[0]


def test_settings_that_nothing_reads_are_said(recclr, small_config, tmp_path):
    idle = ("--set", "train.final_lr=0.5", "--set", "train.decay=none")
    said = 'train.final_lr = 0.5 does nothing here: train.decay is "none"'
    assert (
        said in json.loads(recclr("check", "--config", small_config, *idle, "--json").out)["notes"]
    )
    once = ("--set", "train.epochs=1", "--set", "baselines.names=[]")
    done = recclr("train", "--config", small_config, "--out", tmp_path / "run", *idle, *once)
    assert done.code == 0
    assert said in done.err
    assert said in json.loads((tmp_path / "run" / "data.json").read_text())["notes"]


def test_check_tells_bad_rows_by_reason(recclr, small_data, tmp_path):
    events = pl.read_parquet(small_data / "events.parquet")
    gap = pl.when(pl.int_range(pl.len()) < 2).then(None).otherwise(pl.col("user_id"))
    events.with_columns(user_id=gap).write_parquet(tmp_path / "e.parquet")
    refused = recclr("check", tmp_path / "e.parquet")
    assert refused.code == 3
    drop = ("--set", "data.bad_rows=drop", "--set", "data.max_bad_share=0.5")
    done = recclr("check", tmp_path / "e.parquet", *drop)
    assert done.code == 0
    assert "bad rows: 2 " in done.err


def test_check_refuses_a_test_that_nobody_can_be_judged_on(recclr, tmp_path):
    # Everybody buys the same again: the later parts repeat the rows of train.
    rows = [(f"u{n % 5}", f"i{n % 5}", 1_600_000_000 + n * 3600) for n in range(200)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.write_parquet(tmp_path / "e.parquet")
    repeats = ("--set", "data.deduplicate=none", "--set", "split.valid=0")
    done = recclr("check", tmp_path / "e.parquet", *repeats)
    assert done.code == 2
    assert "evaluate.keep_seen = true" in done.err
    kept = recclr("check", tmp_path / "e.parquet", *repeats, "--set", "evaluate.keep_seen=true")
    assert kept.code == 0


# --- the screen -----------------------------------------------------------------------------------

EVENTS = [
    {"kind": "stage", "name": "selection [x]"},
    {"kind": "note", "text": "k is [large]"},
    {"kind": "step", "step": 3, "num_steps": 9, "loss": 1.5, "temperature": 0.1}
    | {"positives_per_s": 1234.5},
    {"kind": "judging", "name": "model", "done": 8192, "total": 107_000},
    {"kind": "evaluation", "epoch": 2.0, "metrics": {"recall@20": 0.25}},
    {"kind": "mining", "epoch": 2.0, "mined": 1500, "queries": 400, "candidates": 40_000}
    | {"skipped": {"skip": 4000, "share": 6000}, "false_negatives": {"share": 0.0125}},
    {"kind": "judging", "name": "als"},
    {"kind": "judging", "name": "als", "done": 16_384, "total": 107_000},
    {"kind": "baseline", "name": "als", "value": 0.125},
    {"kind": "graph", "captured": True, "reason": None},
    {"kind": "graph", "captured": False, "reason": "a [part] pools lists"},
    {"kind": "compile", "compiled": False, "reason": "no compiler"},
    # Again by the refit.
    {"kind": "graph", "captured": False, "reason": "a [part] pools lists"},
    {"kind": "of another version"},
]


def test_where_there_is_no_terminal_lines_are_written(capsys):
    with RunProgress() as progress:
        for event in EVENTS:
            progress(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "selection [x]",
        "  note: k is [large]",
        "  epoch 2.0  recall@20 0.2500",
        "  epoch 2.0  mined 1,500 negatives for 400 users, 25% refused, 1.25% known to be false",
        "  als",
        "  note: steps are not captured as a CUDA graph: a [part] pools lists",
        "  note: dense layers are not compiled: no compiler",
    ]


def test_at_a_terminal_long_work_shows_how_far_it_is(monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    progress = RunProgress()
    assert not progress.bar.disable
    shown = []
    for event in EVENTS:
        progress(event)
        shown += [task.description for task in progress.bar.tasks]
    assert any("loss 1.5000" in text and "1,234 positives/s" in text for text in shown)
    assert "judging model: 8,192 of 107,000 users" in shown
    assert "judging als: 16,384 of 107,000 users" in shown
    progress({"kind": "stage", "name": "next"})
    assert progress.bar.tasks == []


def test_work_that_counts_fills_a_bar_at_a_terminal_and_is_silent_elsewhere(capsys, monkeypatch):
    with working("judging") as progress:
        progress(3, 7)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with working("judging [it]") as progress:
        progress(3, 7)
    err = capsys.readouterr().err
    assert "judging [it]" in err
    assert "3/7" in err


def test_quiet_is_quiet(capsys):
    with RunProgress(quiet=True) as progress:
        for event in EVENTS:
            progress(event)
    assert capsys.readouterr() == ("", "")


def test_nothing_held_out_is_nothing_to_print(capsys):
    print_results({"counts": {}}, "20")
    assert capsys.readouterr().out == ""


def test_ids_are_never_taken_for_markup(capsys):
    print_frame(pl.DataFrame({"user_id": ["[red]a[/red]"], "score": [0.25]}))
    assert "[red]a[/red]" in capsys.readouterr().out


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["read", "baselines", "test"])
def test_a_signal_between_stages_ends_before_the_next_and_resumes(
    small_config, small_run, tmp_path, stage
):
    import signal

    from recclr.config import load_config
    from recclr.run import train_run

    config, out = load_config(small_config), tmp_path / "run"
    seen = []

    def ask(event):
        seen.append(event)
        if event == {"kind": "stage", "name": stage}:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedTraining, match="--resume"):
        train_run(config, out, device="cpu", on_event=ask)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (out / "metrics.json").exists()
    assert [event["name"] for event in seen if event["kind"] == "stage"][-1] == stage
    train_run(config, out, device="cpu", resume=True)
    expected = (small_run / "metrics.json").read_bytes()
    assert (out / "metrics.json").read_bytes() == expected


def test_a_run_does_not_go_on_with_other_inputs(
    recclr, small_data, small_config, tmp_path, monkeypatch
):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_data, data)
    config = tmp_path / "run.toml"
    config.write_text(small_config.read_text().replace(str(small_data), str(data)))
    monkeypatch.setattr("recclr.files._reached", {})
    monkeypatch.setenv("RECCLR_FAULT", "train.step:5:term")
    assert recclr("train", "--config", config, "--out", out).code == 75
    monkeypatch.delenv("RECCLR_FAULT")
    events = (data / "events.parquet").read_bytes()
    pl.read_parquet(data / "events.parquet").head(400).write_parquet(data / "events.parquet")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    refused = recclr("train", "--config", config, "--out", out, "--resume")
    assert refused.code == 2
    assert f"events: {data / 'events.parquet'}" in refused.err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (data / "events.parquet").write_bytes(events)
    assert recclr("train", "--config", config, "--out", out, "--resume").code == 0
