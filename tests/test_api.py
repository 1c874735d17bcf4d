"""The verbs in Python: the five lines of DESIGN, and what they refuse."""

import json

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import recclr
from recclr.data.sharding import rows_for_training
from recclr.errors import CheckpointError, ConfigError, DataError, StoreError
from recclr.export import open_store

pytestmark = pytest.mark.usefixtures("no_power_cut")

QUICK = {
    "train": {"epochs": 2.0, "batch_size": 64},
    "negatives": {"uniform": 32},
    "model": {"embedding_dim": 8},
    "evaluate": {"ks": [5, 10], "select": "recall@10"},
}


@pytest.fixture(scope="module")
def paths(small_data):
    return {name: str(small_data / f"{name}.parquet") for name in ("events", "users", "items")}


@pytest.fixture(scope="module")
def parts(paths):
    return recclr.read(**paths).split_by_time(valid=0.1, test=0.1)


@pytest.fixture(scope="module")
def model(parts):
    train, valid, _ = parts
    return recclr.TwoTower.fit(train, valid=valid, config=QUICK, device="cpu", progress=False)


@pytest.mark.slow
def test_the_five_lines(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("events", "users", "items"):
        (tmp_path / f"{name}.parquet").write_bytes((small_data / f"{name}.parquet").read_bytes())
    log = recclr.read("events.parquet", users="users.parquet", items="items.parquet")
    train, valid, test = log.split_by_time(valid=0.1, test=0.1)
    model = recclr.TwoTower.fit(train, valid=valid)
    print(model.evaluate(test, ks=(10, 20)))
    model.export("lancedb://vectors", name="catalogue")
    shown = capsys.readouterr().out
    assert "recall@20" in shown
    assert "cold_items" in shown
    assert len(open_store("lancedb:vectors").items) == 70


def test_columns_of_the_tables_become_features(model):
    assert {"category", "title"} <= set(model.config.item.features)
    assert "country" in model.config.user.features
    assert repr(model) == "TwoTower(60 users, 70 items, 8 dimensions)"


def test_frames_in_memory_and_files_are_the_same_log(paths, parts, model):
    frames = {name: pl.read_parquet(path) for name, path in paths.items()}
    train, valid, _ = recclr.read(**frames).split_by_time(valid=0.1, test=0.1)
    again = recclr.TwoTower.fit(train, valid=valid, config=QUICK, device="cpu", progress=False)
    assert_frame_equal(again.recommend(k=4), model.recommend(k=4))


def test_a_log_on_the_disk_gives_the_same_model(paths, parts, model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("recclr.data.reading.available_bytes", lambda: 5 * 65 * 97)
    monkeypatch.setattr("recclr.data.reading._LEAST_ROWS", 97)
    train, valid, test = recclr.read(**paths).split_by_time(valid=0.1, test=0.1)
    assert train.disk.rows == 97
    said = []
    monkeypatch.setattr(
        "recclr.fitting.rows_for_training",
        lambda *a, **k: rows_for_training(*a, **k | {"say": said.append}),
    )
    found = recclr.TwoTower.fit(train, valid=valid, config=QUICK, device="cpu", progress=False)
    assert "training reads its rows from files" in said[0]
    assert torch.equal(found.ranker.user_vectors, model.ranker.user_vectors)
    assert torch.equal(found.ranker.item_vectors, model.ranker.item_vectors)
    assert found.evaluate(test).metrics == model.evaluate(parts[2]).metrics
    assert not list(tmp_path.iterdir())


def test_evaluate_leaves_out_what_users_had_in_validation(model, parts):
    found = model.evaluate(parts[2], ks=(3, 70), num_bootstrap=20)
    low, high = found.intervals["all"]["recall@3"]
    assert low <= found.metrics["all"]["recall@3"] <= high
    assert found.metrics["all"]["recall@70"] == 1.0
    unaware = recclr.TwoTower(model.config, model.prepared, model.ranker)
    worse = unaware.evaluate(parts[2], ks=(70,), num_bootstrap=0)
    assert worse.metrics["all"]["mrr@70"] < found.metrics["all"]["mrr@70"]
    had = parts[0].concat(parts[1]).events.select("user_id", "item_id")
    truth = parts[2].events.join(had, on=["user_id", "item_id"], how="anti")
    assert found.counts["all"]["users"] == truth["user_id"].n_unique()
    assert model.evaluate(parts[2], num_bootstrap=0).intervals == {}


def test_evaluate_without_a_test_part(model):
    with pytest.raises(ConfigError, match="no test part"):
        model.evaluate(None)


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ({"ks": 10}, "ks must be"),
        ({"ks": ()}, "ks must be"),
        ({"ks": (5, 0)}, "ks must be"),
        ({"num_bootstrap": 1}, "num_bootstrap must be"),
    ],
)
def test_numbers_of_an_evaluation_that_are_refused(model, parts, numbers, word):
    with pytest.raises(ConfigError, match=word):
        model.evaluate(parts[2], **numbers)


def test_the_names_of_the_package_are_those_that_it_promises():
    assert dir(recclr) == sorted(recclr.__all__)


def test_recommend_and_similar_take_any_sequence(model, parts):
    best = model.recommend(["u07", "nobody"], k=3)
    assert best["user_id"].to_list() == ["u07"] * 3 + ["nobody"] * 3
    assert best["rank"].to_list() == [1, 2, 3] * 2
    had = set(parts[0].events.filter(pl.col("user_id") == "u07")["item_id"])
    assert not had & set(best["item_id"].head(3))
    assert_frame_equal(model.recommend(pl.Series(["u07", "nobody"]), k=3), best)
    among = model.recommend(("u07",), items=["sku-05", "sku-06"], keep_seen=True)
    assert set(among["item_id"]) == {"sku-05", "sku-06"}
    assert model.similar(["sku-05"], k=4).height == 4
    assert model.recommend([], k=3).height == 0
    with pytest.raises(ConfigError, match="single value 'u07'"):
        model.recommend("u07")
    with pytest.raises(ConfigError, match="k must be whole and at least 1"):
        model.recommend(["u07"], k=0)
    with pytest.raises(ConfigError, match="k must be whole and at least 1"):
        model.recommend(["u07"], k=2.5)
    with pytest.raises(DataError, match="'sku-9999'"):
        model.similar(["sku-9999"])


def test_export_is_verified_and_can_be_opened(model, tmp_path):
    report = model.export(f"parquet:{tmp_path / 'store'}", name="mine")
    assert report.num_items == 70
    store = open_store(f"parquet:{tmp_path / 'store'}", "mine")
    assert len(store.items) == 70
    with pytest.raises(ConfigError, match="no kind of store"):
        model.export("redis:x")
    (tmp_path / "file").write_text("x")
    with pytest.raises((ConfigError, StoreError), match="file"):
        model.export(f"parquet:{tmp_path / 'file' / 'store'}")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data": {"events": "x"}}, "config has data"),
        ({"split": {}, "export": []}, "config has export, split"),
        ({"blend": {"seeds": 2}}, "config has blend"),
        ({"trian": {}}, "did you mean 'train'"),
        ({"train": {"epochs": "two"}}, "config: train.epochs"),
        ({"item": {"features": {"absent": {"kind": "numeric"}}}}, "absent"),
    ],
)
def test_settings_that_are_refused(parts, config, words):
    with pytest.raises((ConfigError, DataError), match=words):
        recclr.TwoTower.fit(parts[0], config=QUICK | config, device="cpu", progress=False)


def test_a_configuration_is_no_path(parts):
    with pytest.raises(ConfigError, match="config must be sections"):
        recclr.TwoTower.fit(parts[0], config="run.toml", progress=False)


def test_the_given_configuration_is_not_changed(parts):
    config = QUICK | {"item": {"id": {"dropout": 0.5}}}
    before = json.dumps(config)
    fitted = recclr.TwoTower.fit(parts[0], config=config, device="cpu", progress=False)
    assert json.dumps(config) == before
    assert fitted.config.item.id.dropout == 0.5
    assert "category" in fitted.config.item.features
    assert fitted.valid is None


def test_a_refit_is_that_of_a_run(recclr_run_like, parts):
    model, metrics = recclr_run_like
    assert model.valid is None
    assert int(model.prepared.items.counts.sum()) == len(parts[0]) + len(parts[1])
    found = model.evaluate(parts[2], ks=(5, 10), num_bootstrap=0)
    assert found.metrics == metrics["test"]["model"]


@pytest.fixture
def recclr_run_like(small_config, small_run, parts):
    """The configuration of the small run in Python, and what the run itself found."""
    import tomllib

    values = tomllib.loads(small_config.read_text("utf-8"))
    for section in ("data", "baselines"):
        del values[section]
    values["user"]["features"] = {}
    model = recclr.TwoTower.fit(
        parts[0], valid=parts[1], config=values, device="cpu", progress=False
    )
    return model, json.loads((small_run / "metrics.json").read_text())


def test_accumulation_that_loses_negatives_warns(parts):
    config = QUICK | {"train": {"accumulate": 2, "batch_size": 64, "epochs": 1}}
    config |= {"negatives": {"in_batch": True}}
    with pytest.warns(UserWarning, match=r"train\.chunk_size = 64"):
        recclr.TwoTower.fit(parts[0], config=config, device="cpu", progress=False)


def test_a_refit_needs_validation(parts):
    config = QUICK | {"train": {"refit": True}}
    with pytest.raises(ConfigError, match="give valid="):
        recclr.TwoTower.fit(parts[0], config=config, device="cpu", progress=False)


# --- load -----------------------------------------------------------------------------------------


def test_load_is_the_model_of_the_run(small_run, parts):
    model = recclr.TwoTower.load(small_run)
    metrics = json.loads((small_run / "metrics.json").read_text())
    found = model.evaluate(parts[2], ks=(5, 10), num_bootstrap=0)
    assert found.metrics == metrics["test"]["model"]


def test_load_of_what_is_no_run(tmp_path, small_run):
    with pytest.raises(ConfigError, match="no run folder"):
        recclr.TwoTower.load(tmp_path)
    (tmp_path / "config.toml").write_bytes((small_run / "config.toml").read_bytes())
    with pytest.raises(CheckpointError, match="prepared"):
        recclr.TwoTower.load(tmp_path)


def test_names_of_the_package():
    assert recclr.read is recclr.data.reading.read
    with pytest.raises(AttributeError, match="'TwoTowers'"):
        recclr.TwoTowers  # noqa: B018


def test_what_users_refused_comes_with_a_log_in_memory(paths):
    events = pl.read_parquet(paths["events"])
    kind = pl.when(pl.int_range(pl.len()) % 4 == 0).then(pl.lit("hide")).otherwise(pl.lit("buy"))
    settings = {"columns": {"event": "kind"}, "event_weights": {"buy": 1.0}}
    frame = events.with_columns(kind=kind)
    log = recclr.read(frame, explicit=["hide"], **settings)
    explicit = QUICK | {"negatives": {"uniform": 32, "explicit": {"events": ["hide"]}}}
    found = [
        recclr.TwoTower.fit(log, config=config, device="cpu", progress=False)
        for config in (QUICK, explicit)
    ]
    assert found[1].prepared.counts["explicit_pairs"] > 50
    assert not found[0].ranker.item_vectors.equal(found[1].ranker.item_vectors)
    without = recclr.read(frame, **settings)
    with pytest.raises(ConfigError, match=r"recclr\.read\(\.\.\., explicit="):
        recclr.TwoTower.fit(without, config=explicit, device="cpu", progress=False)
