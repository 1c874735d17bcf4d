"""Configuration: what is written is read back equal, and every mistake is named with its key."""

import math
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.config import Config, apply_override, dump_toml, load_config, parse_config
from recclr.errors import ConfigError
from recclr.settings import METRIC_NAMES, ColumnSettings, LossKind
from recclr.settings.baselines import BASELINE_NAMES

RECIPES = sorted((Path(__file__).parents[1] / "pipelines" / "recipes").glob("*.toml"))
MINIMAL = {"data": {"events": "events.parquet"}}


def problems(values):
    with pytest.raises(ConfigError) as caught:
        parse_config(values, source="run.toml")
    return str(caught.value).splitlines()


def problem(**sections):
    (line,) = problems(MINIMAL | sections)
    assert line.startswith("run.toml: ")
    return line.removeprefix("run.toml: ")


# --- what is written is read back equal -----------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def between(low, high):
    return st.floats(low, high, allow_nan=False)


def section(**values):
    return st.fixed_dictionaries({}, optional=values)


FEATURE = section(
    column=NAME,
    dropout=between(0, 0.95),
    buckets=st.integers(2, 1 << 26),
    min_count=st.integers(1, 1 << 31),
    transform=st.sampled_from(["standardize", "quantile"]),
    windows_d=st.lists(between(0.001, 1e9), max_size=3),
    age=st.just(True),
    shared=NAME,
).flatmap(
    lambda given: st.sampled_from(
        ["categorical", "multi_hot", "numeric", "vector", "statistics"]
        + ["text"] * ("buckets" in given)
    ).map(lambda kind: given | {"kind": kind})
)
TOWER = {
    "id": section(enabled=st.booleans(), dropout=between(0, 0.95), as_of=st.booleans()),
    "features": st.dictionaries(NAME, FEATURE, max_size=3),
    "mlp": st.lists(st.integers(1, 65_536), max_size=3),
    "dropout": between(0, 0.95),
}
HISTORY = section(
    length=st.integers(1, 100_000),
    half_life_d=between(1e-6, 1e6),
    use=st.sampled_from(["ids", "features", "both"]),
)
VIEWS = section(
    weight=between(1e-6, 1e3),
    temperature=between(1e-4, 1e4),
    batch_size=st.integers(2, 1 << 24),
    distribution=st.sampled_from(["uniform", "batch", "popularity"]),
    dropout=between(0, 0.95),
    projection=st.integers(0, 65_536),
)
CONFIGS = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {"events": TEXT},
            optional={
                "users": TEXT,
                "columns": section(user=NAME, item=NAME, timestamp=NAME, weight=NAME),
                "id_type": st.sampled_from(["auto", "string"]),
                "where": st.dictionaries(TEXT, TEXT, max_size=3),
                "max_bad_share": between(0, 1),
                "k_core_user": st.integers(0, 1 << 31),
                "decay_half_life_d": between(1e-6, 1e6),
                "resident": st.just("auto") | st.booleans(),
            },
        )
    },
    optional={
        "seed": st.integers(0, (1 << 62) - 1),
        "split": section(
            by=st.sampled_from(["auto", "time", "random"]),
            valid=between(0.01, 0.4),
            test=between(0, 0.5),
        ),
        "user": section(history=HISTORY, **TOWER),
        "item": section(**TOWER),
        "loss": section(
            temperature=between(1e-4, 1e4) | st.sampled_from(["auto", "learned"]),
            second_temperature=between(0.01, 100),
            mask_known_positives=st.booleans(),
        ),
        "negatives": st.fixed_dictionaries(
            # Streaming counts are about positives that become negatives.
            {"in_batch": st.just(True)},
            optional={
                "uniform": st.integers(0, 1 << 24),
                "popularity": st.fixed_dictionaries({"count": st.integers(1, 1 << 24)}),
                "queue": section(
                    size=st.integers(0, 1 << 24), momentum=between(0, 0.9999), warmup=between(0, 1)
                ),
                "available": st.booleans(),
                "counts": st.sampled_from(["static", "streaming"]),
            },
        ),
        "self_supervision": st.fixed_dictionaries({"item": VIEWS}, optional={"user": VIEWS}),
        "train": section(
            batch_size=st.integers(1, 1 << 24),
            epochs=between(0.001, 1e6) | st.integers(1, 1_000_000),
            clip_norm=between(1e-9, 1e9),
            table_optimizer=st.sampled_from(["adam", "rowwise_adam", "rowwise_adagrad", "sgd"]),
            sharded_tables=st.just("none"),
            time_cells=st.just(True),
            refit=st.booleans(),
            cuda_graph=st.booleans() | st.just("auto"),
            compile=st.booleans() | st.just("auto"),
        ),
        "evaluate": st.tuples(
            st.lists(st.integers(1, 100_000), min_size=1, max_size=4), st.sampled_from(METRIC_NAMES)
        ).map(lambda drawn: {"ks": drawn[0], "select": f"{drawn[1]}@{drawn[0][-1]}"}),
        "baselines": section(names=st.lists(st.sampled_from(BASELINE_NAMES), max_size=3)),
        "export": st.lists(TEXT, max_size=3),
    },
)


@settings(deadline=None, max_examples=150)
@given(values=CONFIGS)
def test_what_is_dumped_is_loaded_equal(tmp_path_factory, values):
    config = parse_config(values)
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(dump_toml(config), "utf-8", newline="")
    assert load_config(path) == config
    # A whole dump: nothing in it depends on defaults that a later version may change.
    written = tomllib.loads(dump_toml(config))
    assert set(written) == {n for n in Config.model_fields if getattr(config, n) is not None}
    names = {f.name for f in fields(config.model) if getattr(config.model, f.name) is not None}
    assert names == set(written["model"])


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_every_kind_of_loss_is_dumped_and_loaded_equal(kind):
    config = parse_config({"data": {"events": "e"}, "loss": {"kind": kind}})
    assert parse_config(tomllib.loads(dump_toml(config))) == config
    assert config.loss.kind == kind


def test_a_log_without_time_is_written_down_as_such():
    config = parse_config({"data": {"events": "e", "columns": {"timestamp": None}}})
    assert parse_config(tomllib.loads(dump_toml(config))) == config
    assert parse_config({"data": {"events": "e", "columns": {"timestamp": ""}}}) == config
    assert config.data.columns == ColumnSettings(timestamp=None)


AUGMENT = """
[data]
events = "e"
[item.features]
genres = { kind = "multi_hot", subsample = 0.7, swap = 0.1 }
price = { kind = "numeric", jitter = 0.2 }
[item.augment]
groups = [["genres", "price"], ["id"]]
dropout = [0.2, 0.1]
dimension_mask = 0.1
end = 0.5
[user.history]
half_life_d = 3
crop = 0.8
mask = 0.1
reorder = 0.5
[user.augment]
mode = "complementary"
dropout = 0.1
"""


def test_augmentation_is_read_and_written():
    config = parse_config(tomllib.loads(AUGMENT))
    assert config.item.augment.groups == (("genres", "price"), ("id",))
    assert config.item.augment.dropout == (0.2, 0.1)
    assert config.user.augment.dropout == 0.1
    assert parse_config(tomllib.loads(dump_toml(config))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("item.augment.dimension=0.1", "augment.dimension: unknown key; did you mean"),
        ("item.augment.dropout=high", "item.augment.dropout: expected"),
        ("item.augment.dropout=0.99", "item.augment: dropout must be between 0.0 and 0.95"),
        ("item.augment.groups=[['colour']]", "item: .*names 'colour', which the tower lacks"),
    ],
)
def test_augmentation_that_cannot_be_is_refused_by_its_key(override, words):
    values = tomllib.loads(AUGMENT)
    apply_override(values, override)
    if "colour" in override:
        apply_override(values, "item.augment.dropout=0.1")
    with pytest.raises(ConfigError, match=words):
        parse_config(values)


@pytest.mark.parametrize(
    "text", ["\x7f", "\x00\x1f", 'a"b\\c', "\u2028\ufeffé😀", "a.b [c]\n\t", "'" * 3, "${HOME}"]
)
def test_any_text_is_written_so_that_toml_reads_it_back(text):
    config = parse_config(
        {
            "data": {"events": text, "where": {text: text}},
            "item": {"features": {text: {"kind": "numeric", "column": text}}},
        }
    )
    assert parse_config(tomllib.loads(dump_toml(config))) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_survive_a_dump(path, tmp_path):
    config = load_config(path)
    (tmp_path / "copy.toml").write_text(dump_toml(config), "utf-8")
    assert load_config(tmp_path / "copy.toml") == config


def test_there_are_recipes():
    assert len(RECIPES) >= 3


def test_the_recipe_of_the_design_means_what_it_says():
    config = parse_config(
        tomllib.loads(
            """
            seed = 7
            [data]
            events = "${RECCLR_DATA}/interactions.parquet"
            where = { rating = ">= 7" }
            [item.features]
            genres = { kind = "multi_hot", dropout = 0.2 }
            title  = { kind = "text", buckets = 20000 }
            recent = { kind = "statistics", windows_d = [3, 10, 30], age = true }
            [user]
            id = { dropout = 0.3 }
            history = { length = 50, half_life_d = 30 }
            [loss]
            temperature = "learned"
            [negatives]
            popularity = { count = 256, alpha = 0.75 }
            [train]
            epochs = 40
            """
        )
    )
    assert config.seed == 7
    assert config.item.features["recent"].windows_d == (3.0, 10.0, 30.0)
    assert config.item.features["title"].buckets == 20_000
    assert config.user.id.dropout == 0.3
    assert config.user.history is not None
    assert config.user.history.half_life_d == 30.0
    assert config.negatives.popularity is not None
    assert config.negatives.popularity.count == 256
    assert isinstance(config.train.epochs, float)
    assert config.loss.temperature == "learned"


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("train.epochs = 2.5", ("train", "epochs"), 2.5),
        ("train.refit=true", ("train", "refit"), True),
        ("data.resident=false", ("data", "resident"), False),
        ("data.resident=auto", ("data", "resident"), "auto"),
        ("data.events=a/b c.parquet", ("data", "events"), "a/b c.parquet"),
        ('data.events="7"', ("data", "events"), "7"),
        ("data.events=", ("data", "events"), ""),
        ("data.where.rating=>= 7", ("data", "where", "rating"), ">= 7"),
        ("evaluate.ks=[3, 7]", ("evaluate", "ks"), [3, 7]),
        ('user.history={length = 5, use = "both"}', ("user", "history"), {"length": 5}),
        ("split.by=x=y", ("split", "by"), "x=y"),
    ],
)
def test_an_override_sets_one_key(override, path, value):
    values = {"data": {"events": "before", "users": "kept"}}
    apply_override(values, override)
    found = values
    for key in path:
        found = found[key]
    if isinstance(value, dict):
        assert found.items() >= value.items()
    else:
        assert (found, type(found)) == (value, type(value))
    assert values["data"]["users"] == "kept"


@pytest.mark.parametrize("override", ["seed", "=3", "train.=3", ".seed=3", "train..epochs=3"])
def test_an_override_that_is_none(override):
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        apply_override({}, override)


def test_an_override_through_a_value():
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        apply_override({"seed": 3}, "seed.more=4")


def test_the_last_override_wins_and_is_checked_like_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seed = 1\n[data]\nevents = "e.parquet"\n')
    assert load_config(path, ["seed=2", "seed=5"]).seed == 5
    with pytest.raises(ConfigError, match=r"run\.toml: sed: unknown key; did you mean 'seed'\?"):
        load_config(path, ["sed=2"])


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "key", "meant"),
    [
        ({"sede": 3}, "sede", "seed"),
        ({"trian": {"epochs": 3}}, "trian", "train"),
        ({"train": {"batchsize": 3}}, "train.batchsize", "batch_size"),
        ({"user": {"histroy": {}}}, "user.histroy", "history"),
        ({"user": {"history": {"lenght": 3}}}, "user.history.lenght", "length"),
        ({"user": {"id": {"drop_out": 0.1}}}, "user.id.drop_out", "dropout"),
        (
            {"negatives": {"popularity": {"count": 3, "alfa": 1.0}}},
            "negatives.popularity.alfa",
            "alpha",
        ),
        (
            {"item": {"features": {"kind": {"kind": "vector", "colunm": "c"}}}},
            "item.features.kind.colunm",
            "column",
        ),
    ],
)
def test_an_unknown_key_gets_the_closest_name(sections, key, meant):
    assert problem(**sections) == f"{key}: unknown key; did you mean {meant!r}?"


def test_an_unknown_key_unlike_any_other_gets_the_list():
    line = problem(user={"id": {"zzzzzz": 1}})
    assert line == "user.id.zzzzzz: unknown key; known here: as_of, dropout, enabled, propagation"


def sections_of(hint):
    """Dataclasses below a type, through unions and dicts."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
        for part in get_type_hints(hint).values():
            yield from sections_of(part)
    for part in get_args(hint):
        yield from sections_of(part)


def test_no_section_takes_unknown_keys_or_casts_silently():
    every = {s for hint in get_type_hints(Config).values() for s in sections_of(hint)}
    assert len(every) >= 13
    for settings_class in every:
        assert settings_class.__pydantic_config__ == {"extra": "forbid", "strict": True}
        assert settings_class.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"seed": "3"}, "seed: expected a valid integer, found '3'"),
        ({"seed": True}, "seed: expected a valid integer, found True"),
        ({"train": 5}, "train: expected an object, found 5"),
        ({"train": {"batch_size": 1.5}}, "train.batch_size: expected a valid integer, found 1.5"),
        ({"train": {"refit": 1}}, "train.refit: expected a valid boolean, found 1"),
        (
            {"loss": {"temperature": "cold"}},
            "loss.temperature: expected a valid number or 'auto' or 'learned', found 'cold'",
        ),
        (
            {"data": {"events": "e", "resident": "yes"}},
            "data.resident: expected a valid boolean or 'auto', found 'yes'",
        ),
        ({"evaluate": {"ks": 5}}, "evaluate.ks: expected a valid array, found 5"),
        ({"evaluate": {"ks": [5, "x"]}}, "evaluate.ks: expected a valid integer, found 'x'"),
        ({"negatives": {"popularity": {}}}, "negatives.popularity.count: this key is required"),
        (
            {"split": {"by": "tiem"}},
            "split.by: expected 'auto', 'time', 'given', 'leave_last', 'random' or 'items', "
            "found 'tiem'",
        ),
    ],
)
def test_a_wrong_type_is_named_with_what_was_found(sections, line):
    assert problem(**sections) == line


def test_required_keys():
    assert problems({}) == ["run.toml: data: this key is required"]
    assert problems({"data": {}}) == ["run.toml: data.events: this key is required"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"seed": -1}, ("seed", "-1")),
        ({"seed": 1 << 62}, ("seed", str(1 << 62))),
        ({"train": {"batch_size": 0}}, ("train", "batch_size must be between 1 and", "found 0")),
        ({"train": {"epochs": math.inf}}, ("train", "epochs", "inf")),
        ({"train": {"epochs": math.nan}}, ("train", "epochs", "nan")),
        ({"loss": {"min_temperature": 2.0}}, ("loss", "min_temperature is above")),
        ({"data": {"events": "e", "event_weights": {"view": 0.0}}}, ("event_weights.view",)),
        ({"split": {"valid": 0.6, "test": 0.5}}, ("split", "leave rows for train", "0.6 + 0.5")),
        ({"evaluate": {"select": "recall@7"}}, ("evaluate", "recall@7", "[5, 10, 20, 50]")),
        ({"evaluate": {"select": "recall@020"}}, ("evaluate", "recall@020")),
        ({"evaluate": {"select": "auc@20"}}, ("evaluate", "choose one of recall")),
        ({"evaluate": {"num_bootstrap": 1}}, ("num_bootstrap",)),
        ({"baselines": {"names": ["poplarity"]}}, ("baselines", "poplarity", "popularity, ")),
        ({"item": {"features": {"t": {"kind": "text"}}}}, ("item.features.t", "buckets = 20000")),
    ],
)
def test_a_value_out_of_range_says_the_range(sections, words):
    line = problem(**sections)
    for word in words:
        assert word in line


def test_several_problems_are_told_at_once_one_per_line():
    found = problems(
        {
            "sede": 3,
            "data": {"events": 5},
            "train": {"batch_size": "many", "epoch": 3},
            "item": {"features": {"g": {"kind": "list"}, "t": {"kind": "text"}}},
        }
    )
    keys = {line.removeprefix("run.toml: ").partition(": ")[0] for line in found}
    assert keys == {
        "sede",
        "data.events",
        "train.batch_size",
        "train.epoch",
        "item.features.g.kind",
        "item.features.t",
    }
    assert len(found) == len(keys)


STATISTICS = {"features": {"recent": {"kind": "statistics"}}}
SPLIT_BY_ROWS = {"sharded_tables": "all", "table_optimizer": "sgd"}
TIMELESS = {"data": {"events": "e", "columns": {"timestamp": ""}}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"item": STATISTICS} | TIMELESS, "item.features.recent: needs timestamps"),
        ({"user": {"id": {"as_of": True}}} | TIMELESS, "user.id.as_of: needs timestamps"),
        ({"item": {"history": {}}}, "item.history: only users have a history"),
        ({"item": STATISTICS, "train": {"time_cells": False}}, "item.features.recent needs time"),
        ({"data": {"events": "e", "event_weights": {"buy": 2.0}}}, "data.columns.event"),
        ({"split": {"by": "leave_last", "valid": 1.0, "test": 0.5}}, "whole numbers; found 1 and"),
        ({"split": {"by": "given"}}, "needs split.test_events"),
        ({"split": {"test_events": "t"}}, "split.test_events: is read with split.by = 'given'"),
        ({"split": {"by": "time", "valid_events": "v"}}, "split.valid_events: is read with"),
        ({"split": {"valid": 0.0}, "train": {"refit": True}}, "train.refit: there is no"),
        ({"negatives": {"in_batch": False, "uniform": 0}}, "no source of negatives"),
        ({"self_supervision": {}}, "self_supervision names no tower: set item = {}"),
        (
            {"blend": {"spectral": 4}, "model": {"popularity_bias": 0.5}},
            "blend: lays vectors side by side, and model.popularity_bias has coordinates",
        ),
        (
            {"blend": {"spectral": 4}, "model": {"similarity": "euclidean"}},
            'blend: lays vectors side by side, and model.similarity = "euclidean" has',
        ),
        (
            {"model": {"mode": "item_item"}, "item": {"id": {"propagation": {}}}},
            'item.id.propagation: model.mode = "item_item" has one tower',
        ),
        *(
            ({"model": {"mode": "item_item"}, **section}, f'{key}: model.mode = "item_item"')
            for key, section in (
                ("user", {"user": {"dropout": 0.1}}),
                ("negatives.mined", {"negatives": {"mined": {}}}),
                ("loss.positives", {"loss": {"positives": 2}}),
                ("self_supervision.user", {"self_supervision": {"user": {}}}),
            )
        ),
        (
            {
                "model": {"init": "spectral"},
                "user": {"id": {"enabled": False}, "history": {"use": "features"}},
                "item": {"id": {"enabled": False}, "features": {"a": {"kind": "numeric"}}},
            },
            'model.init = "spectral" starts tables of ids, and both are switched off',
        ),
        ({"model": {"init_from": "w"}}, "model.init_from: starts item.features, and there are"),
        (
            {"negatives": {"mined": {}}, "loss": {"kind": "full_softmax"}},
            "negatives.mined: loss.kind = 'full_softmax' scores every item",
        ),
        *(
            (
                {"negatives": {"in_batch": True, **source}, "loss": {"kind": "full_softmax"}},
                f"negatives.{name} is about sampled negatives, but loss.kind = 'full_softmax' has",
            )
            for name, source in (("queue", {"queue": {}}), ("counts", {"counts": "streaming"}))
        ),
        ({"negatives": {"explicit": {"events": ["hide"]}}}, "name the event types that are"),
        (
            {
                "negatives": {"explicit": {"events": ["buy", "hide"]}},
                "data": {"events": "e", "event_weights": {"buy": 2.0}, "columns": {"event": "k"}},
            },
            "'buy' has a weight in data.event_weights, which makes it a positive",
        ),
        ({"loss": {"kind": "margin", "temperature": 0.2}}, "does nothing with kind = 'margin'"),
        (
            {"loss": {"kind": "ccl"}, "model": {"similarity": "dot"}},
            "loss.kind = 'ccl' needs model.similarity = 'cosine', found 'dot'",
        ),
        (
            {"loss": {"kind": "alignment_uniformity"}, "negatives": {"uniform": 3}},
            "loss.kind = 'alignment_uniformity' has no negatives",
        ),
        ({"negatives": {"in_batch": False, "counts": "streaming"}}, "set in_batch or queue"),
        ({"negatives": {"available": True}} | TIMELESS, "negatives.available: needs timestamps"),
        (
            {"negatives": {"available": True}, "train": {"time_cells": False}},
            "train.time_cells: negatives.available needs time cells",
        ),
        (
            {"train": SPLIT_BY_ROWS, "model": {"embedding_dim": 6}},
            "train.sharded_tables: needs a model.embedding_dim that is a multiple of 4, found 6",
        ),
    ],
)
def test_settings_that_contradict_each_other(sections, words):
    assert words in problem(**sections)


def test_settings_that_only_look_like_a_contradiction():
    parse_config(MINIMAL | {"user": STATISTICS, "train": {"time_cells": False}})
    parse_config(MINIMAL | {"split": {"by": "leave_last", "valid": 1, "test": 2}})
    parse_config(
        MINIMAL
        | {
            "split": {"by": "given", "test_events": "t", "valid_events": "v", "valid": 0.0},
            "train": {"refit": True},
        }
    )


def test_files_that_cannot_be_read(tmp_path):
    for path, words in (
        (tmp_path / "absent.toml", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
        assert "expected a TOML file" in str(caught.value)
    path = tmp_path / "run.toml"
    path.write_bytes(b'[data]\nevents = "\xff"\n')
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(path)
    path.write_text("seed = 1\nseed = 2\n")
    with pytest.raises(ConfigError, match=r"run\.toml is no valid TOML: .*line 2"):
        load_config(path)


def test_dates_in_toml_are_text():
    values = tomllib.loads('[data]\nevents = "e"\nwhere = { day = 2024-05-01 }')
    assert parse_config(values).data.where == {"day": "2024-05-01"}


def test_a_configuration_cannot_be_changed():
    config = parse_config(MINIMAL)
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3
    assert replace(config.model, embedding_dim=8).embedding_dim == 8
    assert config.model.embedding_dim == 64
