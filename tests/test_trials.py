"""One training among many: the rows it gets, the folder it is in, differences over seeds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from recclr.bootstrap import paired_differences
from recclr.config import parse_config, with_changes
from recclr.data.log import EncodedLog
from recclr.errors import CheckpointError, ConfigError
from recclr.evaluate import Evaluation
from recclr.trials import Place, averaged, difference, encoding_of, repeat, share_of, with_seed
from recclr.work_folder import DECLARED, work_folder

CONFIG = parse_config({"data": {"events": "events.parquet"}, "seed": 4})


def log_of(num_rows):
    rows = torch.arange(num_rows, dtype=torch.int32)
    return EncodedLog(rows % 7, rows % 5, 7, 5, timestamp=rows.long() * 10)


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [3, 20, 331])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5])
def test_a_share_is_a_draw_in_order_that_larger_shares_hold(num_rows, share):
    log = log_of(num_rows)
    times = {}
    for part in (share, 0.8):
        found = share_of(log, part, seed=2)
        assert len(found) == max(1, round(part * num_rows))
        assert (found.num_users, found.num_items) == (7, 5)
        times[part] = found.timestamp.tolist()
        assert times[part] == sorted(set(times[part]))
        row = found.timestamp // 10
        assert torch.equal(found.user_idx, log.user_idx[row])
        assert torch.equal(found.item_idx, log.item_idx[row])
    assert set(times[share]) <= set(times[0.8])


def test_all_rows_are_the_log_itself_and_seeds_draw_others():
    log = log_of(331)
    assert share_of(log, 1.0, seed=2) is log
    first, second = (share_of(log, 0.5, seed=seed).timestamp for seed in (2, 3))
    assert not torch.equal(first, second)
    assert torch.equal(first, share_of(log, 0.5, seed=2).timestamp)
    # Half of the rows from each half of the log, as a draw gives them.
    assert 60 < int((first < 1650).sum()) < 105


# --- what may be shared --------------------------------------------------------------------------


def test_the_encoding_follows_from_what_is_read_and_features_not_from_dropout():
    title = {"kind": "text", "buckets": 10}
    config = with_changes(CONFIG, {"item.features": {"title": title}})
    same = (
        {"item.features.title.dropout": 0.3},
        {"item.features.title.subsample": 0.5},
        {"item.features.title.swap": 0.1},
        {"user.dropout": 0.1},
        {"train.epochs": 3.0},
    )
    other = ({"item.features.title.buckets": 11}, {"data.k_core_user": 2}, {"split.valid": 0.2})
    for values in same:
        assert encoding_of(with_changes(config, values)) == encoding_of(config)
    for values in other:
        assert encoding_of(with_changes(config, values)) != encoding_of(config)


def test_repetitions_count_seeds_from_the_own():
    assert with_seed(CONFIG, 0) == CONFIG
    assert with_seed(CONFIG, 2) == with_changes(CONFIG, {"seed": 6})


# --- changes of a configuration ------------------------------------------------------------------


def test_changes_set_and_take_away():
    config = with_changes(CONFIG, {"user.history.length": 7, "loss.second_temperature": 2.0})
    assert config.user.history.length == 7
    assert config.loss.second_temperature == 2.0
    assert with_changes(config, {}, without=["user.history", "loss.second_temperature"]) == CONFIG
    assert with_changes(config, {}, without=["model.init"]) == config
    with pytest.raises(ConfigError, match=r"with loss.tau = 1: loss.tau: unknown key"):
        with_changes(config, {"loss.tau": 1})
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        with_changes(config, {"seed.own": 1})


# --- differences ---------------------------------------------------------------------------------


def evaluation(draws, shift):
    """Two slices with users of their own."""
    per_user = {
        part: {m: torch.tensor(draws.random(size) + shift) for m in ("recall@20", "ndcg@20")}
        for part, size in (("all", 31), ("tail", 11))
    }
    metrics = {p: {m: float(v.mean()) for m, v in found.items()} for p, found in per_user.items()}
    return Evaluation("model", metrics, per_user, {"all": {"users": 31}, "tail": {"users": 11}})


def test_differences_are_paired_by_user_over_the_mean_of_seeds():
    draws = np.random.default_rng(1)
    ours, base = ([evaluation(draws, shift) for _ in range(3)] for shift in (0.3, 0.0))
    mine, theirs = averaged("ours", ours), averaged("base", base)
    assert mine.metrics["tail"]["ndcg@20"] == pytest.approx(
        sum(e.metrics["tail"]["ndcg@20"] for e in ours) / 3
    )
    found = difference(mine, theirs, CONFIG)
    for part in ("all", "tail"):
        for metric in ("recall@20", "ndcg@20"):
            by_user = sum(
                a.per_user[part][metric] - b.per_user[part][metric]
                for a, b in zip(ours, base, strict=True)
            )
            (expected,) = paired_differences(
                (by_user / 3)[:, None], num_resamples=CONFIG.evaluate.num_bootstrap, seed=4
            )
            assert found[part][metric] == pytest.approx(expected)
    without = with_changes(CONFIG, {"evaluate.num_bootstrap": 0})
    assert difference(mine, theirs, without) == {}


# --- results that are there already --------------------------------------------------------------


def test_a_damaged_result_is_an_error_that_says_what_to_do(tmp_path):
    from recclr.run_folder import config_digest

    place = Place(tmp_path / "running", tmp_path, "cpu", lambda: False, lambda event: None)
    path = tmp_path / f"{config_digest(CONFIG)[:16]}.safetensors"
    for content in (b"", b"nothing", b"\x02\0\0\0\0\0\0\0{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged .* remove it"):
            repeat(CONFIG, None, {}, place)


# --- the folder ----------------------------------------------------------------------------------


def begin(out, config=CONFIG, *, resume=False, finish=False, **declared):
    with work_folder(out, config, lambda: declared, finished="done.json", resume=resume) as to_do:
        if finish:
            (out / "done.json").write_text("{}")
        return to_do


def test_work_is_begun_once_and_gone_on_with(tmp_path):
    out = tmp_path / "work"
    assert begin(out, seeds=3)
    assert json.loads((out / DECLARED).read_text())["seeds"] == 3
    with pytest.raises(ConfigError, match="holds unfinished work; add --resume"):
        begin(out, seeds=3)
    assert begin(out, resume=True, seeds=3, finish=True)
    assert not begin(out, resume=True, seeds=3)
    with pytest.raises(ConfigError, match="holds finished work"):
        begin(out, seeds=3)


def test_other_work_is_refused_and_named(tmp_path):
    out = tmp_path / "work"
    begin(out, seeds=3, space={"a": {"low": 1}})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"seeds = 3 there, 4 here\nspace.a.low = 1 there, 2"):
        begin(out, resume=True, seeds=4, space={"a": {"low": 2}})
    other = with_changes(CONFIG, {"train.epochs": 3.0})
    with pytest.raises(ConfigError, match=r"config.train.epochs = .*30.0.* there, .*3.0"):
        begin(out, other, resume=True, seeds=3, space={"a": {"low": 1}})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # How the work is carried out may change.
    free = replace(CONFIG.train, cuda_graph=False)
    same = CONFIG.model_copy(update={"train": free})
    assert begin(out, same, resume=True, seeds=3, space={"a": {"low": 1}})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"is not empty|is a file"):
            begin(out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def refuse():
        raise ConfigError("no")

    with (
        pytest.raises(ConfigError, match="no"),
        work_folder(tmp_path / "new", CONFIG, refuse, finished="x", resume=False),
    ):
        pass
    assert not (tmp_path / "new").exists()
