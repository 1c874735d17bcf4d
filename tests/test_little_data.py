"""How much data there are, by stated criteria, and settings that fit what is there."""

import json
import tomllib

import polars as pl
import pytest

from recclr.checking import read_data
from recclr.config import Config, parse_config, with_changes
from recclr.data.synthetic import generate_log
from recclr.little_data import advise, facts_of


def written(folder, **sizes):
    generate_log(**sizes, seed=5).write(folder)
    return {name: f"{folder}/{name}.parquet" for name in ("events", "users", "items")}


def advice_of(values):
    config = parse_config(values)
    data = read_data(config, inputs={})
    train = data.prepared.tensors.train
    return advise(data.log, train, data.examples, config), data, config


def merged(values, fragment):
    """What a person makes of a configuration and the proposed lines."""
    for key, value in fragment.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merged(values[key], value)
        else:
            values[key] = value
    return values


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    folder = tmp_path_factory.mktemp("little")
    return written(folder, num_users=400, num_items=500, num_events=6_000, num_days=60)


def keys(advice):
    return {line.key: line.value for line in advice.profile}


def test_plenty_asks_for_nothing(tmp_path):
    tables = written(tmp_path, num_users=3_000, num_items=600, num_events=130_000, num_days=60)
    # A log in which everybody takes much, as a shop of few articles has it.
    events = pl.read_parquet(tables["events"])
    assert len(events) > 70_000
    advice, data, config = advice_of({"data": {"events": tables["events"]}})
    facts = facts_of(data.log, data.prepared.tensors.train, data.examples, config)
    assert facts.per_user >= 5 <= facts.per_item
    assert (advice.verdict, advice.reasons, advice.profile) == ("plenty", (), ())
    assert advice.toml() == ""


def test_the_facts_are_those_of_slow_counts(little):
    _, data, config = advice_of({"data": little})
    facts = facts_of(data.log, data.prepared.tensors.train, data.examples, config)
    train, valid = data.split.train.events, data.split.valid.events
    assert facts.rows == train.height
    assert (facts.users, facts.items) == tuple(train[c].n_unique() for c in ("user_id", "item_id"))
    for column, found in (("user_id", facts.per_user), ("item_id", facts.per_item)):
        assert found == train.group_by(column).len()["len"].median()
    had = set(train.select("user_id", "item_id").iter_rows())
    wanted = {pair for pair in valid.select("user_id", "item_id").iter_rows() if pair not in had}
    cold = [item for _, item in wanted if item not in set(train["item_id"])]
    assert facts.judged == len({user for user, _ in wanted})
    assert facts.cold == pytest.approx(len(cold) / len(wanted))
    assert facts.has_features


def test_little_is_said_by_each_criterion_with_settings_that_a_run_takes(little):
    values = {"data": little}
    advice, data, config = advice_of(values)
    assert advice.verdict == "little"
    rows = len(data.prepared.tensors.train)
    assert any("train rows, fewer than 50,000" in reason for reason in advice.reasons)
    found = keys(advice)
    assert found["item.features.category"] == {"kind": "categorical", "dropout": 0.1}
    assert found["item.features.popularity_prior"]["kind"] == "statistics"
    assert found["user.history"] == {"length": 50, "use": "both"}
    assert found["item.id.dropout"] == 0.3
    # Both sides have an id, and then it is so by itself.
    assert "model.init" not in found
    assert found["item.dropout"] > config.item.dropout
    assert 16 <= found.get("model.embedding_dim", 64) <= 64
    assert rows / 128 < found["train.batch_size"] <= rows / 64
    assert all(line.reason for line in advice.profile)
    text = advice.toml()
    for line in advice.profile:
        assert f"# {line.reason}" in text
    again = merged({"data": dict(little)}, tomllib.loads(text))
    settled, data, _ = advice_of(again)
    # What was proposed is there, so that nothing is left to propose; the data are no more.
    assert settled.verdict == "little"
    assert settled.profile == ()
    assert set(data.prepared.tensors.items.columns) >= {"category", "tags"}


def test_what_is_configured_is_not_proposed_again(little):
    values = {
        "data": little,
        "item": {"features": {"category": {"kind": "categorical"}}, "id": {"dropout": 0.5}},
        "user": {"id": {"enabled": False}, "history": {"length": 7}, "dropout": 0.2},
        "model": {"embedding_dim": 8, "init": "spectral"},
        "train": {"batch_size": 32, "patience": 1},
    }
    found = keys(advice_of(values)[0])
    assert not {key for key in found if key.startswith("item.features")} - {
        "item.features.popularity_prior"
    }
    assert found["user.history.use"] == "both"
    for key in ("item.id.dropout", "user.id.enabled", "user.dropout", "model.init"):
        assert key not in found
    assert not {"model.embedding_dim", "train.batch_size", "train.patience"} & set(found)


@pytest.mark.parametrize("init", ["auto", "random"])
def test_a_spectral_start_is_proposed_where_it_is_not_made_by_itself(little, init):
    only_items = {"id": {"enabled": False}, "history": {"length": 7}}
    found = keys(advice_of({"data": little, "user": only_items, "model": {"init": init}})[0])
    assert found["model.init"] == "spectral"
    found = keys(advice_of({"data": little, "model": {"init": init}})[0])
    assert ("model.init" in found) == (init == "random")


def test_without_features_or_time_neither_is_proposed(little, tmp_path):
    events = tmp_path / "events.parquet"
    pl.read_parquet(little["events"]).select("user_id", "item_id").write_parquet(events)
    found = keys(advice_of({"data": {"events": str(events)}})[0])
    assert not {key for key in found if "features" in key}
    assert "item.id.dropout" not in found
    assert found["user.history"] == {"length": 50}


@pytest.mark.parametrize(
    ("section", "left_out"),
    [
        ({"model": {"mode": "item_item"}}, "user."),
        ({"train": {"time_cells": False}}, "item.features.popularity_prior"),
    ],
)
def test_a_profile_fits_what_is_configured(little, section, left_out):
    every = keys(advice_of({"data": little})[0])
    advice, _, config = advice_of({"data": little} | section)
    found = keys(advice)
    gone = {key for key in every if key.startswith(left_out)}
    assert gone
    assert every.keys() - found.keys() == gone
    with_changes(config, found)


def test_what_rests_on_a_feature_goes_with_it(little):
    """Without a table of items the moment is all that tells items apart."""
    values = {"data": {"events": little["events"]}}
    assert advice_of(values)[0].profile
    found = keys(advice_of(values | {"train": {"time_cells": False}})[0])
    every = keys(advice_of(values)[0])
    assert "item.features.popularity_prior" in every
    gone = {"item.features.popularity_prior", "item.id.dropout", "self_supervision.item"}
    assert every.keys() - found.keys() == gone
    assert every["user.history"]["use"] == "both"
    assert "use" not in found["user.history"]


def test_too_little_says_that_baselines_suffice(small_data):
    tables = {name: f"{small_data}/{name}.parquet" for name in ("events", "items")}
    advice, _, _ = advice_of({"data": tables})
    assert advice.verdict == "too_little"
    assert "baselines suffice" in advice.sentence
    assert any("users to judge by, fewer than 100" in reason for reason in advice.reasons)
    assert any("train rows, fewer than 1,000" in reason for reason in advice.reasons)


def test_rows_that_share_nothing_are_too_little(tmp_path):
    frame = pl.DataFrame({"user_id": range(3000), "item_id": range(3000)})
    frame.write_parquet(tmp_path / "events.parquet")
    values = {"data": {"events": str(tmp_path / "events.parquet")}, "split": {"valid": 0}}
    values["split"]["test"] = 0
    advice, _, _ = advice_of(values)
    assert advice.verdict == "too_little"
    assert any("nothing joins one row to another" in reason for reason in advice.reasons)


def test_the_command_says_it_in_text_and_in_json(recclr, small_data):
    arguments = ("check", small_data / "events.parquet", "--items", small_data / "items.parquet")
    found = json.loads(recclr(*arguments, "--json").out)["amount"]
    assert found["verdict"] == "too_little"
    assert tomllib.loads(found["toml"])["user"]["history"]["use"] == "both"
    shown = recclr(*arguments)
    assert shown.code == 0
    assert found["toml"] in shown.out
    for text in (found["sentence"], *found["reasons"]):
        assert text in shown.err
    assert {line["key"].partition(".")[0] for line in found["profile"]} <= set(Config.model_fields)
