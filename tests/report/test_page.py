"""The page of a run folder, whole or with parts missing."""

import itertools
import json
import re

import pytest

from recclr.errors import CheckpointError, ConfigError
from recclr.report import write_report
from recclr.report.page import REPORT

FILES = ("metrics.json", "data.json", "log.jsonl", "environment.json")


def page(run) -> str:
    return write_report(run).read_text("utf-8")


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_a_whole_run_has_every_section_in_order(run):
    html = page(run)
    assert headings(html) == [
        "Against the baselines, on test",
        "Where it is good, and where not",
        "Differences, paired by user",
        "Training",
        "Settings of the baselines",
        "Data",
        "Definitions",
        "Configuration",
        "Machine",
    ]
    assert "Not in the run folder" not in html
    assert "<h1>runs/nightly</h1>" in html


def test_the_facts_of_every_file_are_on_the_page(run):
    html = page(run)
    for fact in (
        "0.3100",  # metrics.json
        "shrink = 10.0 (not chosen: no validation)",
        "1,500",
        "7,001",  # data.json
        "null item",
        "3 ids differ only in case",
        "2025-01-01 00:00:00 UTC",
        "45,678 bytes",
        "Temperature by epoch",  # log.jsonl
        "4,000",
        "20.00%",
        "1.23%",
        "torch 2.13",  # environment.json
        "seed = 3",  # config.toml
    ):
        assert fact in html, fact


def test_what_validation_chose_is_said_where_there_was_one(run):
    assert "settings of the baselines were not chosen: no validation" in page(run)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"valid": metrics["test"]}
    metrics["counts"]["valid"] = metrics["counts"]["test"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    html = page(run)
    assert "shrink = 10.0 (validation 0.2345)" in html
    assert "settings of the baselines were chosen on validation" in html


def test_the_page_needs_nothing_but_itself(run):
    html = page(run)
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(", html)
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "gone", [c for size in range(1, 5) for c in itertools.combinations(FILES, size)], ids="+".join
)
def test_missing_files_are_said_and_the_rest_is_shown(run, gone):
    for name in gone:
        (run / name).unlink()
    html = page(run)
    assert f"Not in the run folder: {', '.join(gone)}." in html
    sections = {
        "metrics.json": "Against the baselines, on test",
        "data.json": "Data",
        "log.jsonl": "Training",
        "environment.json": "Machine",
    }
    for name, heading in sections.items():
        # Steps selected are written in metrics.json, and stand in the section on training.
        shown = name not in gone or (name == "log.jsonl" and "metrics.json" not in gone)
        assert (heading in headings(html)) == shown, name
    assert "Configuration" in headings(html)


def test_a_run_without_metrics_is_called_unfinished(run):
    (run / "metrics.json").unlink()
    assert "not finished" in page(run)


def test_a_folder_without_configuration_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.toml"):
        write_report(tmp_path)
    assert not (tmp_path / REPORT).exists()


@pytest.mark.parametrize("name", ["metrics.json", "data.json", "environment.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text('{"test": ')
    with pytest.raises(CheckpointError, match=re.escape(name)):
        write_report(run)


def test_a_cut_off_line_and_repeated_steps_of_a_resumed_run(run):
    path = run / "log.jsonl"
    before = page(run)
    lines = path.read_text().splitlines(keepends=True)
    stale = json.dumps(json.loads(lines[1]) | {"loss": 99.0}) + "\n"
    path.write_text("".join([stale, *lines]) + '{"kind": "step", "st')
    assert page(run) == before


def test_the_selected_point_is_the_best_of_validation(run):
    path = run / "log.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [event for event in events if event["kind"] == "evaluation"]
    for event, value in zip(evaluations, (0.4, 0.3), strict=True):
        event["metrics"]["recall@20"] = value
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    (chart,) = re.findall(r"<svg[^>]*recall@20 on validation.*?</svg>", page(run), flags=re.S)
    (line,) = re.findall(r'polyline points="(\S+) ', chart)
    (dot,) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert ",".join(dot) == line


def test_a_loss_that_is_not_finite_leaves_the_page_readable(run):
    path = run / "log.jsonl"
    path.write_text(path.read_text().replace("7.5", "NaN"))
    html = page(run)
    assert "Training loss by epoch" in html
    assert "nan" not in html.lower()


def test_names_from_outside_are_escaped(run, metrics):
    evil = "<script>alert(1)</script>"
    metrics["test"][evil] = metrics["test"]["popularity"]
    metrics["skipped_baselines"] = {evil: evil}
    metrics["baselines"] = {evil: {"settings": {evil: evil}, "score": 0.5}}
    metrics["definitions"] = {evil: evil}
    (run / "metrics.json").write_text(json.dumps(metrics))
    data = json.loads((run / "data.json").read_text())
    data |= {"log": evil, "quarantined": {evil: 3}, "notes": [evil]}
    data["steps"][0]["name"] = evil
    data["split"]["counts"] = {evil: {"rows": 5}}
    data["inputs"] = {evil: {"bytes": 5, "tail_sha256": evil}}
    (run / "data.json").write_text(json.dumps(data))
    (run / "environment.json").write_text(json.dumps({evil: {evil: evil}, "gpu": evil}))
    (run / "config.toml").write_text(
        (run / "config.toml").read_text().replace("events.parquet", evil)
    )
    html = page(run.rename(run.with_name("<script>")))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 15


def test_writing_again_gives_the_same_bytes(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
