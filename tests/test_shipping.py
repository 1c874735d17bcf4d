import hashlib
import json
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
import torch
from torch.nn.functional import normalize

import recclr
from recclr.config import dump_toml, parse_config
from recclr.data.interactions import Log
from recclr.data.prepare import prepare
from recclr.errors import ConfigError, ShapeError, StoreError
from recclr.export import open_store
from recclr.settings import DataSettings, TowerSettings
from recclr.shipping import ship
from recclr.topk import EmbeddingRanker

CONFIG = parse_config({"data": {"events": "events.parquet"}})


@pytest.fixture(scope="module")
def prepared():
    pairs = [("al", "fig"), ("bo", "nut"), ("al", "oat"), ("cy", "fig")]
    events = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")
    events = events.with_columns(timestamp=pl.Series([100, 200, 300, 400]))
    log = Log(events, None, None, DataSettings(events="<memory>"))
    return prepare(log, None, user=TowerSettings(), item=TowerSettings())


def ranker(seed=0, num_users=4, num_items=3):
    generator = torch.Generator().manual_seed(seed)
    users = normalize(torch.randn(num_users, 5, generator=generator))
    items = normalize(torch.randn(num_items, 5, generator=generator))
    return EmbeddingRanker("model", users, items)


def listed(run):
    return json.loads((run / "exports.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", ["parquet", "lancedb"])
def test_the_store_holds_the_model_under_raw_ids(prepared, tmp_path, kind):
    model = ranker()
    report = ship(prepared, model, f"{kind}:vectors", run=tmp_path, config=CONFIG, name="mine")
    store = open_store(f"{kind}:{tmp_path / 'vectors'}", "mine")
    assert report.target == f"{kind}:{tmp_path / 'vectors'}"
    assert store.items.ids.to_list() == ["fig", "nut", "oat"]
    assert torch.equal(store.read_vectors("item"), model.item_vectors)
    assert torch.equal(store.user_vectors(["cy", "al", "bo"]), model.user_vectors[[2, 0, 1]])
    assert torch.equal(store.user_vectors(["dan"]), model.user_vectors[3:])


def test_the_manifest_says_where_the_model_comes_from(prepared, tmp_path):
    ship(prepared, ranker(), f"parquet:{tmp_path / 'p'}", run=None, config=CONFIG)
    manifest = open_store(f"parquet:{tmp_path / 'p'}").manifest
    facts = manifest.facts
    assert facts.train_cutoff == prepared.tensors.cutoff == 401
    assert facts.recclr == recclr.__version__
    assert facts.config_sha256 == hashlib.sha256(dump_toml(CONFIG).encode()).hexdigest()
    age = datetime.now(UTC) - datetime.fromisoformat(facts.created)
    assert timedelta(seconds=-1) < age < timedelta(minutes=5)
    assert manifest.similarity == CONFIG.model.similarity == "cosine"


def test_the_similarity_is_that_of_the_configuration(prepared, tmp_path):
    config = parse_config({"data": {"events": "e"}, "model": {"similarity": "dot"}})
    long = EmbeddingRanker("model", 3 * ranker().user_vectors, ranker().item_vectors)
    ship(prepared, long, f"parquet:{tmp_path / 'p'}", run=None, config=config)
    assert open_store(f"parquet:{tmp_path / 'p'}").manifest.similarity == "dot"


def test_the_run_lists_its_exports(prepared, tmp_path):
    report = ship(prepared, ranker(), "parquet:p", run=tmp_path, config=CONFIG)
    (entry,) = listed(tmp_path)
    assert entry["target"] == "parquet:p"
    assert (entry["name"], entry["version"]) == ("catalogue", report.version)
    assert (entry["num_items"], entry["num_users"], entry["embedding_dim"]) == (3, 3, 5)
    assert entry["bytes"] == report.bytes
    assert entry["unchanged"] is False
    assert entry["verification"]["num_queries"] == 4
    assert datetime.fromisoformat(entry["created"]).utcoffset() == timedelta(0)


def test_a_repeated_export_replaces_its_entry_and_others_are_added(prepared, tmp_path):
    def again(seed=0, target="parquet:p", name="catalogue"):
        ship(prepared, ranker(seed), target, run=tmp_path, config=CONFIG, name=name)
        keys = ("target", "name", "version", "unchanged")
        return [tuple(entry[key] for key in keys) for entry in listed(tmp_path)]

    ((_, _, first, _),) = again()
    assert again() == [("parquet:p", "catalogue", first, True)]
    second = again(seed=1)[1][2]
    assert second != first
    again(target="parquet:q", name="other")
    # The first version once more: its entry moves to the end.
    assert again() == [
        ("parquet:p", "catalogue", second, False),
        ("parquet:q", "other", first, False),
        ("parquet:p", "catalogue", first, False),
    ]


def test_an_absolute_place_is_listed_as_it_is(prepared, tmp_path):
    run = tmp_path / "run"
    target = f"parquet:{tmp_path / 'elsewhere'}"
    ship(prepared, ranker(), target, run=run, config=CONFIG)
    assert [entry["target"] for entry in listed(run)] == [target]
    assert (tmp_path / "elsewhere" / "CURRENT").is_file()


def test_without_a_run_the_place_is_taken_from_the_working_folder(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ship(prepared, ranker(), "parquet://here", run=None, config=CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1]", "\x00"])
def test_a_damaged_list_is_refused_before_anything_is_exported(prepared, tmp_path, text):
    (tmp_path / "exports.json").write_text(text)
    with pytest.raises(StoreError, match=r"exports\.json .*remove it and export again"):
        ship(prepared, ranker(), "parquet:p", run=tmp_path, config=CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["exports.json"]
    (tmp_path / "exports.json").unlink()
    ship(prepared, ranker(), "parquet:p", run=tmp_path, config=CONFIG)
    assert len(listed(tmp_path)) == 1


def test_entries_of_an_older_kind_are_kept(prepared, tmp_path):
    (tmp_path / "exports.json").write_text('[{"note": "é"}]')
    ship(prepared, ranker(), "parquet:p", run=tmp_path, config=CONFIG)
    assert listed(tmp_path)[0] == {"note": "é"}


def test_a_failed_export_is_not_listed(prepared, tmp_path):
    (tmp_path / "p").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is a file"):
        ship(prepared, ranker(), "parquet:p", run=tmp_path, config=CONFIG)
    assert not (tmp_path / "exports.json").exists()


@pytest.mark.parametrize(("num_users", "num_items"), [(3, 3), (5, 3), (4, 2)])
def test_a_ranker_of_other_data_is_refused(prepared, tmp_path, num_users, num_items):
    model = ranker(num_users=num_users, num_items=num_items)
    with pytest.raises(ShapeError, match=rf"\(4, 3\) user and item .*\({num_users}, {num_items}\)"):
        ship(prepared, model, "parquet:p", run=tmp_path, config=CONFIG)
    assert list(tmp_path.iterdir()) == []
