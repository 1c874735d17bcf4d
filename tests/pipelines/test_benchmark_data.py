"""The benchmark of reading tells every step of the same log, and leaves nothing behind."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("no_power_cut")


@pytest.fixture(scope="module")
def script():
    import benchmark_data

    return benchmark_data


@pytest.fixture
def bench(script):
    app = Typer()
    app.command()(script.main)
    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments])


def test_each_step_is_timed_and_the_log_is_gone_afterwards(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = tmp_path / "found.json"
    done = bench("--rows", 20_000, "--dim", 4, "--json", out)
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    found = json.loads(out.read_text())
    names = [step["name"] for step in found["steps"]]
    assert names[:5] == [
        "read",
        "split by time",
        "split by random",
        "split by leave_last",
        "encode",
    ]
    assert found["rows"] == 20_000
    assert all(step["seconds"] > 0 for step in found["steps"])
    assert all(step["peak_bytes"] is None or step["peak_bytes"] >= 0 for step in found["steps"])
    assert all(name in done.output for name in ("read", "encode", "bytes a row"))


def test_a_result_without_a_place_is_refused_first(bench, tmp_path):
    done = bench("--rows", 20_000, "--json", tmp_path / "nowhere" / "found.json")
    assert done.exit_code == 2
    assert "there is no folder" in done.output
