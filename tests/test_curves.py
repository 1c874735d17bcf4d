"""A learning curve: nested samples, one validation set, folders that go on where they stopped."""

import json
import re

import pytest

from recclr.checking import read_data
from recclr.config import load_config
from recclr.curves import learning_curve
from recclr.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_power_cut")
QUICK = (
    "train.epochs=1",
    'baselines.names=["popularity", "item_knn"]',
    "evaluate.num_bootstrap=20",
)
SET = [part for text in QUICK for part in ("--set", text)]


@pytest.fixture(scope="module")
def begun(recclr, small_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("curves") / "curve"
    arguments = ("curve", "--config", small_config, "--out", out, "--device", "cpu", *SET)
    done = recclr(*arguments, "--shares", "0.5,0.1")
    assert done.code == 0, done.err
    return out, arguments, done


def curve_of(out):
    return json.loads((out / "curve.json").read_text())


def test_every_share_is_a_run_judged_on_the_same_rows(begun, small_config):
    out, _, _ = begun
    curve = curve_of(out)
    assert [point["share"] for point in curve["shares"]] == [0.1, 0.5]
    for point in curve["shares"]:
        folder = out / point["run"]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert "test" not in metrics
        assert set(metrics["valid"]) == set(point["rankers"])
        for name, found in point["rankers"].items():
            assert found["value"] == metrics["valid"][name]["all"]["recall@10"]
            low, high = metrics["intervals"]["valid"][name]["all"]["recall@10"]
            assert (found["low"], found["high"]) == (low, high)
        config = load_config(folder / "config.toml")
        assert config.split.train_share == point["share"]
        assert not config.train.refit
        counts = json.loads((folder / "data.json").read_text())["split"]["counts"]
        assert point["rows"] == counts["train"]["rows"]
    small, large = curve["shares"]
    assert small["rows"] < large["rows"]
    assert small["users"] == large["users"]
    assert small["rows_share"] >= 0.1
    assert {"model", "popularity", "item_knn"} == set(small["rankers"])
    assert "one at least" in curve["sampling"]


def test_validation_and_what_is_had_are_those_of_the_whole(small_config):
    whole, part = (
        read_data(load_config(small_config, [f"split.train_share={share}"]), inputs={})
        for share in (1, 0.1)
    )
    assert len(part.prepared.items) == len(whole.prepared.items)
    ids = {}
    for name, data in (("whole", whole), ("part", part)):
        items = data.prepared.items.ids.to_list()
        users = data.prepared.users.ids.to_list()
        named = {}
        for row, user in enumerate(data.examples.user_idx.tolist()):
            key = users[user] if user < len(users) else None
            for what in ("relevant", "seen"):
                csr = getattr(data.examples, what)
                found = {items[i] for i in csr.row(row).tolist() if i >= 0}
                named.setdefault((what, key), set()).update(found)
        ids[name] = named
    assert ids["whole"] == ids["part"]
    assert whole.examples.num_repeats == part.examples.num_repeats
    assert part.examples.item_counts.sum() < 0.5 * whole.examples.item_counts.sum()


def test_shares_are_added_and_finished_ones_left_alone(recclr, begun):
    out, arguments, first = begun
    refused = recclr(*arguments, "--shares", "1")
    assert refused.code == 2
    assert "add --resume to go on with it" in refused.err
    before = {p: p.stat().st_mtime_ns for p in out.glob("share-*/**/*") if p.is_file()}
    done = recclr(*arguments, "--shares", "0.5,1", "--resume", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == curve_of(out)
    assert [point["share"] for point in found["shares"]] == [0.1, 0.5, 1]
    assert found["shares"][-1]["rows_share"] == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before
    page = (out / "curve.html").read_text()
    (chart,) = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert chart.count("<polyline") == 3
    # An interval for every ranker and share.
    assert chart.count("<path") == 9
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(", page)
    for name, value in found["shares"][-1]["rankers"].items():
        assert name in page
        assert f"{value['value']:.4f}" in page
    assert "page: " in first.err
    assert "│ model" in first.out


def test_a_share_that_was_begun_goes_on(small_config, tmp_path):
    config = load_config(small_config, ["train.epochs=1", "baselines.names=[]"])
    events = []

    class Stop(Exception):
        pass

    def until_judged(event):
        events.append(event)
        if event.get("kind") == "evaluation":
            raise Stop

    with pytest.raises(Stop):
        learning_curve(config, tmp_path / "c", [0.3], device="cpu", on_event=until_judged)
    assert not (tmp_path / "c" / "curve.json").exists()
    found = learning_curve(config, tmp_path / "c", [0.3], resume=True, device="cpu")
    whole = learning_curve(config, tmp_path / "d", [0.3], device="cpu")
    assert found == whole
    assert events[0] == {"kind": "share", "share": 0.3}


def test_another_configuration_other_folders_and_other_files_are_refused(
    recclr, begun, small_config, small_run, tmp_path
):
    out, arguments, _ = begun
    before = sorted(out.rglob("*"))
    done = recclr(*arguments, "--shares", "0.1", "--resume", "--set", "model.embedding_dim=4")
    assert done.code == 2
    assert "model.embedding_dim = 8 there, 4 here" in done.err
    done = recclr("curve", "--config", small_config, "--out", small_run, "--resume")
    assert "is the folder of a run" in done.err
    (tmp_path / "notes.txt").touch()
    done = recclr("curve", "--config", small_config, "--out", tmp_path)
    assert "holds no curve" in done.err
    data = out / "share-0.1" / "data.json"
    kept = data.read_text()
    data.write_text(kept.replace('"bytes": ', '"bytes": 9'))
    done = recclr(*arguments, "--shares", "0.1", "--resume")
    data.write_text(kept)
    assert "input files have changed" in done.err
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    ("shares", "override", "words"),
    [
        ("0.5,2", "seed=1", "above 0 and at most 1"),
        ("0", "seed=1", "above 0 and at most 1"),
        ("half", "seed=1", "expected shares such as"),
        ("0.5", "split.train_share=0.2", "a curve sets it"),
        ("0.5", "split.valid=0", "set split.valid"),
    ],
)
def test_what_makes_no_curve_is_refused(recclr, small_config, tmp_path, shares, override, words):
    done = recclr(
        *("curve", "--config", small_config, "--out", tmp_path / "c", "--shares", shares),
        *("--set", override, "--set", "train.refit=false"),
    )
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "c").exists()


def test_a_curve_without_baselines_or_intervals(small_config, tmp_path):
    config = load_config(
        small_config, ["train.epochs=1", "baselines.names=[]", "evaluate.num_bootstrap=0"]
    )
    with pytest.raises(ConfigError, match="nothing"):
        learning_curve(config, tmp_path / "c", [])
    curve = learning_curve(config, tmp_path / "c", [1, 1], device="cpu")
    (point,) = curve["shares"]
    assert set(point["rankers"]) == {"model"}
    assert set(point["rankers"]["model"]) == {"value"}
    assert "<circle" in (tmp_path / "c" / "curve.html").read_text()


def test_a_share_is_evaluated_again_as_it_was_judged(recclr, begun, small_config, tmp_path):
    folder = begun[0] / "share-0.5"
    again = recclr("evaluate", folder, "--split", "valid", "--ks", "5,10", "--json")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert json.loads(again.out)["metrics"] == metrics["valid"]["model"]
    out = tmp_path / "refitted"
    done = recclr(
        *("train", "--config", small_config, "--out", out, "--device", "cpu"),
        *("--set", "split.train_share=0.3", "--set", "train.epochs=1"),
        *("--set", "baselines.names=[]"),
    )
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    again = json.loads(recclr("evaluate", out, "--json").out)
    assert again["metrics"] == metrics["test"]["model"]
    # What is ranked, and left out as had, is that of all rows.
    assert metrics["counts"]["test"]["all"]["candidates"] == 70
    whole = recclr(
        *("train", "--config", small_config, "--out", tmp_path / "whole", "--device", "cpu"),
        *("--set", "train.epochs=1", "--set", "baselines.names=[]"),
    )
    assert whole.code == 0, whole.err
    counts = json.loads((tmp_path / "whole" / "metrics.json").read_text())["counts"]
    assert counts["test"]["all"] == metrics["counts"]["test"]["all"]
