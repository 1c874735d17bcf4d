"""A run that learns from another one: whose vectors it gets, what is refused, what is served."""

import json
import shutil
from dataclasses import replace

import polars as pl
import pytest
import torch

import recclr as package
from recclr.config import load_config, with_changes
from recclr.data.prepared import PreparedLog
from recclr.errors import ConfigError
from recclr.load import load_ranker, stage_ranker
from recclr.other_runs import require_runs, require_same_rows, with_teacher
from recclr.run_folder import fingerprints


def taught_by(run, *changes):
    values = {
        "distillation.run": str(run),
        "distillation.weight": "0.7",
        "seed": 9,
        **dict(changes),
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def student(recclr, small_config, small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "student"
    arguments = ("train", "--config", small_config, "--out", out, "--device", "cpu")
    done = recclr(*arguments, *taught_by(small_run))
    assert done.code == 0, done.err
    return out, arguments


def test_a_student_is_a_run_like_any_other(recclr, student, small_run):
    out, arguments = student
    config, prepared, ranker = load_ranker(out)
    assert config.distillation.run == str(small_run)
    assert ranker.item_vectors.shape[1] == config.model.embedding_dim
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    told = [line for line in logged if "distillation" in line]
    assert {line["stage"] for line in told} == {"selection", "refit"}
    assert min(line["distillation"] for line in told) >= 0
    # Nothing of the teacher is kept with the data.
    assert prepared.tensors.teacher is None
    before = (out / "metrics.json").read_bytes()
    assert recclr(*arguments, *taught_by(small_run), "--resume").code == 0
    assert (out / "metrics.json").read_bytes() == before
    assert recclr("evaluate", out, "--json").code == 0


@pytest.mark.parametrize("of_selection", [True, False])
def test_the_teacher_of_a_stage_has_seen_no_more_than_the_stage(
    small_config, small_run, of_selection
):
    config = with_changes(load_config(small_config), {"distillation.run": str(small_run)})
    folder = small_run / "selection" if of_selection else small_run
    other = PreparedLog.load(folder)
    ranker = stage_ranker(config, other, folder)
    # The same ids in another order, one that the teacher does not know, and one fewer.
    order = torch.randperm(len(other.items), generator=torch.Generator().manual_seed(1))[1:]
    known = other.items.ids.gather(order.tolist())
    stranger = pl.Series([known.max() + 1 if known.dtype.is_integer() else "nobody's"])
    ids = known.append(stranger.cast(known.dtype))
    own = replace(other, items=type(other.items).of(ids))
    users, items = with_teacher(own, config, of_selection=of_selection).tensors.teacher
    assert torch.equal(users, ranker.user_vectors)
    assert torch.equal(items[:-1], ranker.item_vectors[order])
    assert not items[-1].any()
    plain = with_changes(config, {}, without=["distillation"])
    assert with_teacher(own, plain, of_selection=True) is own


def test_another_split_is_refused(recclr, small_config, small_run, tmp_path):
    out = tmp_path / "run"
    arguments = ("train", "--config", small_config, "--out", out, "--device", "cpu")
    done = recclr(*arguments, *taught_by(small_run), "--set", "split.valid=0.2")
    assert done.code == 2
    assert "distillation.run" in done.err
    assert "split.valid" in done.err
    assert "may have learned from rows that this run is judged on" in done.err
    done = recclr(*arguments, *taught_by(small_run), "--set", "data.k_core_user=2")
    assert done.code == 2
    assert "data.k_core_user" in done.err
    done = recclr(*arguments, "--set", f'blend.runs=["{small_run}"]', "--set", "split.seed=5")
    assert done.code == 2
    assert "blend.runs" in done.err
    assert not out.exists()


def test_other_files_are_refused_wherever_the_same_ones_lie(small_config, small_run, tmp_path):
    config = with_changes(load_config(small_config), {"distillation.run": str(small_run)})
    copy = tmp_path / "elsewhere.parquet"
    shutil.copy(config.data.events, copy)
    moved = with_changes(config, {"data.events": str(copy)})
    require_runs(moved)
    require_same_rows(moved, fingerprints(moved))
    pl.read_parquet(copy)[1:].write_parquet(copy)
    with pytest.raises(ConfigError, match=r"distillation\.run: .* was made from other files of ev"):
        require_same_rows(moved, fingerprints(moved))


def test_a_teacher_that_lost_its_selection_has_seen_validation(
    recclr, small_config, small_run, tmp_path
):
    teacher = tmp_path / "teacher"
    shutil.copytree(small_run, teacher)
    shutil.rmtree(teacher / "selection")
    out = tmp_path / "run"
    for named in (taught_by(teacher), ["--set", f'blend.runs=["{teacher}"]']):
        done = recclr("train", "--config", small_config, "--out", out, "--device", "cpu", *named)
        assert done.code == 2
        assert "has lost its folder 'selection'" in done.err
    assert not out.exists()


def test_a_curve_is_not_taught_by_all_rows(recclr, small_config, small_run, tmp_path):
    arguments = ("curve", "--config", small_config, "--out", tmp_path / "curve")
    done = recclr(*arguments, "--shares", "0.5,1", *taught_by(small_run))
    assert done.code == 2
    assert "distillation.run: a curve shows what rows are worth" in done.err


def test_a_finished_run_outlives_its_teacher(recclr, student, tmp_path):
    out, arguments = student
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    config = load_config(copy / "config.toml")
    gone = tmp_path / "gone"
    text = (copy / "config.toml").read_text().replace(config.distillation.run, str(gone))
    (copy / "config.toml").write_text(text)
    done = recclr(*arguments[:4], copy, *arguments[5:], *taught_by(gone), "--resume")
    assert done.code == 0, done.err


def test_a_run_that_has_not_ended_is_refused(recclr, small_config, tmp_path):
    out = tmp_path / "run"
    done = recclr(
        *("train", "--config", small_config, "--out", out, "--device", "cpu"),
        *taught_by(tmp_path / "nowhere"),
    )
    assert done.code == 2
    assert "nowhere holds no finished run" in done.err


def test_a_teacher_that_changed_stops_a_resumed_run(recclr, student, small_run, tmp_path):
    teacher, copy = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(small_run, teacher)
    arguments = ("train", "--config", student[1][2], "--out", copy, "--device", "cpu")
    assert recclr(*arguments, *taught_by(teacher)).code == 0
    (copy / "metrics.json").unlink()
    metrics = json.loads((teacher / "metrics.json").read_text())
    (teacher / "metrics.json").write_text(json.dumps(metrics, indent=7))
    done = recclr(*arguments, *taught_by(teacher), "--resume")
    assert done.code == 2
    assert "distillation.run" in done.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss.kind": "ccl"}, "set loss.kind ="),
        ({"model.mode": "item_item"}, "leave it out"),
    ],
)
def test_what_has_nothing_to_learn_from_a_teacher_says_so(small_config, changes, said):
    with pytest.raises(ConfigError, match="distillation") as refused:
        with_changes(load_config(small_config), {"distillation.run": "x", **changes})
    assert said in str(refused.value)


def test_the_same_in_python(small_config, small_run):
    log = package.read(load_config(small_config).data.events)
    train, valid, _ = log.split_by_time(valid=0.1, test=0.1)
    model = package.TwoTower.fit(
        train,
        valid=valid,
        config={
            "model": {"embedding_dim": 4},
            "train": {"epochs": 1.0},
            "distillation": {"run": str(small_run)},
        },
        progress=False,
    )
    assert model.prepared.tensors.teacher is not None
    assert len(model.recommend(k=2)) > 0
