"""What follows training, shared by processes: the same answers as by one."""

import json

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from safetensors.torch import load_file


@pytest.mark.parametrize(("size", "num_users"), [(2, 41), (3, 41), (3, 5), (2, 8)])
def test_mined_triplets_are_those_of_one_process(spread, work, tmp_path, size, num_users):
    alone, many = tmp_path / "alone", tmp_path / "many"
    alone.mkdir()
    work.alone("mines", alone, num_users=num_users)
    ended = spread("mines", size, many, num_users=num_users)
    assert ended.codes == [0] * size, ended.texts
    expected = load_file(alone / "mined-0.safetensors")
    assert len(expected["user_idx"]) > num_users

    def report_of(path):
        report = json.loads(path.read_text())
        assert report.pop("seconds") >= 0
        scores = report.pop("scores")
        return report, scores

    report, scores = report_of(alone / "mined-0.json")
    for rank in range(size):
        found = load_file(many / f"mined-{rank}.safetensors")
        assert {name: x.tolist() for name, x in found.items()} == {
            name: x.tolist() for name, x in expected.items()
        }
        told = report_of(many / f"mined-{rank}.json")
        assert told[0] == report
        # Means are sums of doubles, in another order.
        assert {kind: pytest.approx(values) for kind, values in scores.items()} == told[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("recommend", "--k", "7"),
        ("recommend", "--k", "3", "--keep-seen"),
        ("similar", "--k", "4"),
        ("mine", "--count", "3", "--depth", "40", "--choice", "score", "--device", "cpu"),
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_tables_of_two_processes_are_those_of_one(recclr, torchrun, small_run, tmp_path, command):
    name, *options = command
    done = recclr(name, small_run, "--out", tmp_path / "one.parquet", *options)
    assert done.code == 0, done.err
    two = torchrun(name, small_run, "--out", tmp_path / "two.parquet", *options)
    assert two.returncode == 0, two.stderr
    expected = pl.read_parquet(tmp_path / "one.parquet")
    assert expected.height > 100
    assert_frame_equal(pl.read_parquet(tmp_path / "two.parquet"), expected, abs_tol=1e-5)
    # One of two reports.
    assert two.stdout.count("queries") == done.out.count("queries")


@pytest.mark.slow
def test_an_export_by_two_processes_is_that_of_one(recclr, torchrun, small_run, tmp_path):
    done = recclr("export", small_run, "--to", f"parquet:{tmp_path / 'one'}", "--json")
    assert done.code == 0, done.err
    two = torchrun("export", small_run, "--to", f"parquet:{tmp_path / 'two'}", "--json")
    assert two.returncode == 0, two.stderr
    expected, found = json.loads(done.out), json.loads(two.stdout)
    # A version is named by the bytes of both sides' vectors.
    assert found["version"] == expected["version"]
    assert found["num_items"] == expected["num_items"] > 0
    assert found["num_users"] == expected["num_users"] > 0


OTHER_MODEL = """
if rank == 1:
    import recclr.load as load
    weights = load.saved_weights
    load.saved_weights = lambda model: {name: x + 1e-3 for name, x in weights(model).items()}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "fault", "words"),
    [
        (("recommend", "--k", "3"), OTHER_MODEL, "do not agree on the model"),
        (("mine",), OTHER_MODEL, "do not agree on the model"),
        (
            ("recommend", "--users", "user-1,user-2"),
            "if rank == 1: sys.argv[sys.argv.index('--users') + 1] = 'user-1'",
            "do not agree on the ids that are asked for",
        ),
    ],
    ids=["recommend", "mine", "ids"],
)
def test_parts_of_two_answers_are_refused(torchrun, small_run, tmp_path, command, fault, words):
    name, *options = command
    out = tmp_path / "found.parquet"
    done = torchrun(name, small_run, "--out", out, *options, fault=fault)
    assert done.stderr.count(words) == 1, done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("recommend", "--out", "found.txt"), ".parquet, .csv"),
        (("mine", "--out", "found.parquet", "--count", "0"), "recclr mine: count"),
        (("evaluate", "--ks", "10,0"), "--ks '10,0': expected"),
    ],
    ids=["recommend", "mine", "evaluate"],
)
def test_a_mistake_is_told_once(torchrun, small_run, command, words):
    name, *options = command
    done = torchrun(name, small_run, *options)
    assert done.stderr.count("error: ") == done.stderr.count(words) == 1, done.stderr
    assert "exitcode  : 2" in done.stderr
