"""The benchmark of ranks runs the same steps on both sides, and compares neighbours."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def script():
    import benchmark_ranks

    return benchmark_ranks


def test_medians_and_ratios_of_neighbours(script):
    turns = [([1.0, 9.0, 2.0], [4.0, 4.0, 3.0]), ([4.0], [6.0]), ([1.0], [7.0])]
    pairs = [({"seconds": one}, {"seconds": ranks}) for one, ranks in turns]
    found = script.compared(pairs)
    assert found["ratios"] == [2.0, 1.5, 7.0]
    assert (found["one_ms"], found["ranks_ms"], found["ratio"]) == (2000.0, 6000.0, 2.0)


def test_a_failure_shows_what_was_said(script):
    with pytest.raises(RuntimeError, match="KeyError: 'log'"):
        script.one_turn({"threads": 2}, 1)


@pytest.mark.slow
def test_both_sides_are_measured(script, tmp_path):
    app = Typer()
    app.command()(script.main)
    out = tmp_path / "found.json"
    arguments = ["--rows", "900", "--dim", "8", "--negatives", "20", "--batch-size", "64"]
    arguments += ["--steps", "3", "--rounds", "1", "--json", str(out)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    found = json.loads(out.read_text())
    [row] = found["rows"]
    assert row["batch_size"] == 64
    assert row["one_ms"] > 0 < row["ranks_ms"]
    assert row["ratio"] == pytest.approx(row["ranks_ms"] / row["one_ms"])
    assert "2 processes beside one" in ended.output
