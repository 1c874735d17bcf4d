"""Pre-training on a catalogue alone, and starting from it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from recclr.api import TwoTower, read
from recclr.building import build_model
from recclr.config import load_config, parse_config
from recclr.data.features import fit_encoders
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.errors import CheckpointError, ConfigError, InterruptedTraining
from recclr.order import permuted
from recclr.pretrain import (
    CatalogueSource,
    CatalogueStepper,
    catalogue_model,
    judge_views,
    pretrain_items,
    read_catalogue,
)
from recclr.rows import Rows
from recclr.run_folder import fingerprints, require_same_inputs
from recclr.settings import TowerSettings
from recclr.starting import start_from_catalogue

NUM_ITEMS, DIM = 90, 6
FEATURES = {
    "kind": {"kind": "categorical"},
    "tags": {"kind": "multi_hot", "shared": "words"},
    "more": {"kind": "multi_hot", "column": "tags", "shared": "words", "dropout": 0.1},
    "code": {"kind": "categorical", "column": "kind", "buckets": 5},
    "title": {"kind": "text", "buckets": 50},
    "year": {"kind": "numeric"},
    "rank": {"kind": "numeric", "column": "year", "transform": "quantile"},
    "image": {"kind": "vector"},
}


def table(seed=0, num_items=NUM_ITEMS, kinds="abcdef"):
    """Items that differ in what they hold; some hold nothing."""
    draws = np.random.default_rng(seed)
    rows = range(num_items)
    return pl.DataFrame(
        {
            "item_id": list(rows),
            "kind": [None if row % 11 == 0 else str(draws.choice(list(kinds))) for row in rows],
            "tags": [[kinds[i] for i in range(len(kinds)) if draws.random() < 0.3] for _ in rows],
            "title": [f"{row % 13} of {row // 13}" for row in rows],
            "year": [None if row % 9 == 0 else float(draws.normal(1990, 20)) for row in rows],
            "image": [None if row % 7 == 0 else draws.normal(size=4).tolist() for row in rows],
        },
        schema_overrides={"tags": pl.List(pl.String), "image": pl.List(pl.Float32)},
    )


def config_of(folder, *, items=None, features=FEATURES, **sections):
    path = folder / "items.parquet"
    (table() if items is None else items).write_parquet(path)
    values = {
        "seed": 2,
        "data": {"events": str(folder / "missing.parquet"), "items": str(path)},
        "item": {"features": features},
        "model": {"embedding_dim": DIM},
        "self_supervision": {"item": {"batch_size": 40, "projection": 5}},
        "train": {"epochs": 30, "dense_lr": 0.02, "table_lr": 0.05},
    }
    return parse_config(values | sections)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a finished pre-training, its configuration and its report."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = config_of(folder)
    return config, folder / "out", pretrain_items(config, folder / "out", device="cpu")


def tower_of(folder_or_frame, config, **changes):
    """A fresh model as a training on some items would make it, and the encoder of these."""
    frame = folder_or_frame
    item = replace(config.item, **changes)
    nobody = pl.Series("user_id", [], dtype=pl.Int64)
    _, encoder = fit_encoders(None, frame, TowerSettings(), item, nobody, frame["item_id"])
    features = encoder.encode(frame, np.arange(frame.height))
    log = EncodedLog(torch.arange(3).int(), torch.arange(3).int(), 3, frame.height)
    prepared = Prepared(log, FeatureTable(3), features)
    model = build_model(
        prepared,
        user=TowerSettings(),
        item=item,
        model=config.model,
        loss=config.loss,
        seed=9,
    )
    return model.eval(), encoder


def pretrained_vectors(config, out):
    """Of the tower as it came out of the last checkpoint."""
    model = catalogue_model(config, read_catalogue(config).features)
    last = out / "checkpoints" / (out / "checkpoints" / "LAST").read_text().strip()
    tensors = load_file(last / "tensors.safetensors")
    for name, value in model.weights().items():
        value.data.copy_(tensors[f"model/{name}"])
    return model.eval().item_tower(Rows(torch.arange(NUM_ITEMS))).detach()


# pre-training


def test_views_are_found_again_better_than_before_and_far_better_than_by_chance(made):
    _, out, report = made
    before, after, chance = report["untrained"], report["trained"], report["chance"]
    assert chance == {"recall@1": 1 / NUM_ITEMS, "recall@10": 10 / NUM_ITEMS}
    assert after["loss"] < before["loss"]
    assert after["recall@1"] > before["recall@1"]
    assert after["recall@1"] > 10 * chance["recall@1"]
    assert after["alignment"] < before["alignment"]
    # 90 items in steps of 30, 30 times.
    assert (report["items"], report["queries"], report["steps"]) == (90, 90, 90)
    assert json.loads((out / "pretraining.json").read_text()) == report


def test_the_folder_holds_weights_by_feature_and_no_head(made):
    _, out, _ = made
    manifest = json.loads((out / "manifest.json").read_text())
    tensors = load_file(out / "weights.safetensors")
    assert {name: list(value.shape) for name, value in tensors.items()} == manifest["tensors"]
    parts = {name.partition("/")[0] for name in tensors}
    assert parts == {"bias", *(f"features.{name}" for name in FEATURES)}
    assert torch.equal(tensors["features.tags/table.weight"], tensors["features.more/table.weight"])
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (events[0]["kind"], events[0]["num_candidates"]) == ("step", 59)
    # The temperature of the views, not that of a loss on interactions.
    assert events[0]["temperature"] == pytest.approx(0.1)
    assert not (out / ".lock").exists()


def step_by_step(config):
    catalogue = read_catalogue(config)
    model = catalogue_model(config, catalogue.features)
    stepper = CatalogueStepper(config, model, "cpu")
    return [float(stepper(step)[0].loss) for step in range(stepper.num_steps)]


def test_distances_are_learned_from_a_catalogue_too(tmp_path):
    model = {"embedding_dim": DIM, "similarity": "euclidean"}
    losses = step_by_step(config_of(tmp_path, model=model, train={"epochs": 4}))
    assert all(0 < loss < 100 for loss in losses)


def test_rates_follow_the_schedule_of_the_pre_training(tmp_path):
    def losses(**augment):
        features = {"title": FEATURES["title"] | {"dropout": 0.3}, "year": FEATURES["year"]}
        item = {"features": features, "augment": augment}
        return step_by_step(config_of(tmp_path, item=item, train={"epochs": 4}))

    assert losses(start=1.0, end=0.0) != losses(start=1.0, end=1.0)


def test_groups_of_a_training_are_those_of_its_features(tmp_path):
    def losses(features=FEATURES, **augment):
        item = {"id": {"as_of": True}, "features": features, "augment": augment}
        return step_by_step(config_of(tmp_path, item=item, train={"epochs": 3}))

    with_id = losses(groups=[["id", "title"], ["kind"]], dropout=[0.5, 0.2])
    assert with_id == losses(groups=[["title"], ["kind"]], dropout=[0.5, 0.2])
    assert with_id != losses(groups=[["title"], ["kind"]], dropout=[0.1, 0.2])
    assert losses(groups=[["id"], ["kind"]], dropout=[0.5, 0.2]) == losses(
        groups=[["kind"]], dropout=[0.2]
    )
    assert losses(groups=[["id"]], dropout=0.5) == losses()
    halves = losses(mode="complementary", groups=[["id", "year"]])
    assert halves == losses(mode="complementary", groups=[["year"]]) != losses()


def test_halves_of_one_feature_are_refused(tmp_path):
    """A training has the id as the other half; a catalogue has none."""
    item = {"features": {"year": FEATURES["year"]}, "augment": {"mode": "complementary"}}
    config = config_of(tmp_path, item=item)
    with pytest.raises(ConfigError, match=r"hides features only.*needs two parts"):
        pretrain_items(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_epoch_shows_every_item_once_in_steps_of_equal_size():
    source = CatalogueSource(90, 40, seed=3, device="cpu")
    assert source.steps_per_epoch == 3
    epochs = [[source.step(3 * epoch + step) for step in range(3)] for epoch in range(2)]
    for steps in epochs:
        assert [len(idx) for idx in steps] == [30, 30, 30]
        assert sorted(torch.cat(steps).tolist()) == list(range(90))
    assert epochs[0][0].tolist() != epochs[1][0].tolist()
    assert CatalogueSource(3, 40, seed=3, device="cpu").steps_per_epoch == 1


def test_the_report_is_what_loops_over_items_give(made):
    config, _, _ = made
    model = catalogue_model(config, read_catalogue(config).features)
    stepper = CatalogueStepper(config, model, "cpu")
    found = judge_views(stepper, 4)
    idx, views = torch.arange(NUM_ITEMS), stepper.objective.views
    order = permuted(idx, NUM_ITEMS, 4, 52)
    with torch.no_grad():
        first = model.eval().embed_items(views.rows(order, None, -1, 0)).double()
        second = model.embed_items(views.rows(idx, None, -1, 1)).double()
    hits, gaps, spread = [0, 0], [], []
    for row, item in enumerate(order.tolist()):
        scores = second @ first[row]
        ahead = int((scores > scores[item] + 1e-7).sum())
        ahead += sum(abs(float(scores[k] - scores[item])) <= 1e-7 for k in range(item))
        hits[0] += ahead < 1
        hits[1] += ahead < 10
        gaps.append(float((first[row] - second[item]).square().sum()))
        for other in range(NUM_ITEMS):
            if other != row:
                spread.append(float((first[row] - first[other]).square().sum()))
    assert found["recall@1"] == pytest.approx(hits[0] / NUM_ITEMS, abs=0.03)
    assert found["recall@10"] == pytest.approx(hits[1] / NUM_ITEMS, abs=0.03)
    assert found["alignment"] == pytest.approx(np.mean(gaps), rel=1e-4)
    uniformity = np.log(np.mean(np.exp(-2 * np.array(spread))))
    assert found["uniformity"] == pytest.approx(uniformity, abs=1e-4)


@pytest.mark.slow
def test_one_that_is_stopped_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    _, out, report = made
    copy = config_of(tmp_path)
    monkeypatch.setenv("RECCLR_FAULT", "train.step:41:term")
    with pytest.raises(InterruptedTraining, match="after step 42 of 90"):
        pretrain_items(copy, tmp_path / "out", device="cpu")
    monkeypatch.delenv("RECCLR_FAULT")
    with pytest.raises(ConfigError, match="add --resume"):
        pretrain_items(copy, tmp_path / "out", device="cpu")
    again = pretrain_items(copy, tmp_path / "out", device="cpu", resume=True)
    for name in ("weights.safetensors", "encoders.json"):
        assert (out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert again | {"seconds": 0} == report | {"seconds": 0}
    # A finished one is left as it is, and told again.
    assert pretrain_items(copy, tmp_path / "out", device="cpu", resume=True) == again
    with pytest.raises(ConfigError, match="holds a finished run"):
        pretrain_items(copy, tmp_path / "out", device="cpu")


def test_what_is_refused(tmp_path):
    config = config_of(tmp_path, features={})
    with pytest.raises(ConfigError, match=r"learns from item\.features"):
        pretrain_items(config, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"name it in data\.items"):
        pretrain_items(
            config.model_copy(update={"data": replace(config.data, items=None)}), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_the_command(recclr, tmp_path, made):
    config_of(tmp_path)
    features = "\n".join(
        f"{name} = {{ kind = '{of['kind']}' }}" for name, of in list(FEATURES.items())[:1]
    )
    path = tmp_path / "c.toml"
    path.write_text(
        f"[data]\nevents = 'none.parquet'\nitems = '{tmp_path}/items.parquet'\n"
        f"[item.features]\n{features}\n[model]\nembedding_dim = 4\n[train]\nepochs = 2\n"
    )
    out = tmp_path / "out"
    done = recclr("pretrain-items", "--config", path, "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    assert "recall@10" in done.out
    assert f'init_from = "{out}"' in done.err
    again = recclr("pretrain-items", "--config", path, "--out", out, "--resume", "--json")
    assert json.loads(again.out) == json.loads((out / "pretraining.json").read_text())
    lacking = recclr(
        "pretrain-items",
        "--config",
        path,
        "--out",
        tmp_path / "other",
        "--set",
        "data.items=nowhere.parquet",
    )
    assert lacking.code == 3
    assert "Traceback" not in lacking.err


# starting from it


def test_the_same_items_start_as_they_were_left(made):
    config, out, _ = made
    model, encoder = tower_of(table(), config)
    assert start_from_catalogue(model, encoder, out) == []
    # An id is a part more; as it is unknown here, nothing but its mean comes in.
    tower = model.item_tower
    tower.parts[0].table.weight.data.zero_()
    found = tower(Rows(torch.arange(NUM_ITEMS)))
    torch.testing.assert_close(found, pretrained_vectors(config, out), atol=1e-5, rtol=1e-5)


def test_other_items_start_by_category_and_by_what_their_numbers_mean(made):
    """A part of the catalogue has other categories first, other means and other deviations."""
    config, out, _ = made
    features = {n: f for n, f in config.item.features.items() if n != "rank"}
    some = table().filter(pl.col("item_id") % 3 != 1, pl.col("kind") != "c")
    model, encoder = tower_of(some, config, features=features)
    whole = read_catalogue(config).encoder
    own, theirs = encoder.columns["kind"].space, whole.columns["kind"].space
    assert own.categories.ids.to_list() != theirs.categories.ids.to_list()[: len(own.categories)]
    notes = start_from_catalogue(model, encoder, out)
    assert notes == [f"{out} knows a feature 'rank', which is not used"]
    # As the whole tower without the ranks, and with tags that both know.
    model.item_tower.parts[0].table.weight.data.zero_()
    full, full_encoder = tower_of(table(), config, features=features)
    start_from_catalogue(full, full_encoder, out)
    full.item_tower.parts[0].table.weight.data.zero_()
    found = model.item_tower(Rows(torch.arange(some.height)))
    expected = full.item_tower(Rows(torch.tensor(some["item_id"].to_list())))
    # Vectors are stored as float16 of another scale.
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_categories_that_the_catalogue_did_not_know_start_afresh(made):
    config, out, _ = made
    features = {"kind": config.item.features["kind"]}
    other = table(5, 40, kinds="defxyz")
    model, encoder = tower_of(other, config, features=features)
    fresh, _ = tower_of(other, config, features=features)
    (note, *_) = start_from_catalogue(model, encoder, out)
    assert note.startswith("item.features.kind: 3 of 6 categories start from")
    names = encoder.columns["kind"].space.categories.ids.to_list()
    theirs = read_catalogue(config).encoder.columns["kind"].space.categories.ids.to_list()
    trained = load_file(out / "weights.safetensors")["features.kind/table.weight"]
    found = model.item_tower.parts[1].table.weight
    before = fresh.item_tower.parts[1].table.weight
    for row, name in enumerate(names, start=1):
        known = name in theirs
        expected = trained[theirs.index(name) + 1] if known else before[row]
        assert torch.equal(found[row], expected), name
    assert torch.equal(found[0], trained[0])
    assert torch.equal(found[-1], trained[-1])


@pytest.mark.parametrize(
    ("feature", "change", "words"),
    [
        ("title", {"buckets": 60}, "text with 50 buckets.*text with 60 buckets"),
        ("kind", {"buckets": 7}, "with a vocabulary.*with 7 buckets"),
        ("code", {"buckets": None}, "with 5 buckets.*with a vocabulary"),
        ("kind", {"kind": "multi_hot"}, "pre-trained as CategoryEncoder"),
        ("year", {"transform": "quantile"}, "StandardNumberEncoder.*QuantileNumberEncoder"),
    ],
)
def test_a_feature_of_another_kind_is_refused(made, feature, change, words):
    config, out, _ = made
    features = {feature: replace(config.item.features[feature], **change)}
    model, encoder = tower_of(table(), config, features=features)
    with pytest.raises(ConfigError, match=f"(?s)item.features.{feature} was .*{words}"):
        start_from_catalogue(model, encoder, out)


def test_a_tower_of_another_shape_is_refused(made):
    config, out, _ = made
    wide = config.model_copy(update={"model": replace(config.model, embedding_dim=7)})
    model, encoder = tower_of(table(), wide)
    with pytest.raises(ConfigError, match="has embedding_dim 6, the item tower with features 7"):
        start_from_catalogue(model, encoder, out)
    narrow = table().with_columns(pl.col("image").list.head(3))
    model, encoder = tower_of(narrow, config)
    with pytest.raises(ConfigError, match=r"feature 'image': network.*\(6, 5\)|\(32, 5\)"):
        start_from_catalogue(model, encoder, out)
    only = {"other": replace(config.item.features["kind"], column="kind")}
    model, encoder = tower_of(table(), config, features=only)
    with pytest.raises(ConfigError, match=r"item.features has \['other'\]; none starts"):
        start_from_catalogue(model, encoder, out)


def test_blocks_start_where_they_were_left_or_are_refused(tmp_path):
    features = {"kind": FEATURES["kind"], "year": FEATURES["year"]}
    item = {"features": features, "mlp": [3], "id": {"dropout": 0.5}}
    train = {"epochs": 2, "dense_lr": 0.1}
    config = config_of(tmp_path, item=item, train=train)
    pretrain_items(config, tmp_path / "out", device="cpu")
    model, encoder = tower_of(table(), config)
    start_from_catalogue(model, encoder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "weights.safetensors")
    assert tensors["blocks.0.fall.weight"].abs().max() > 0
    assert torch.equal(model.item_tower.blocks[0].fall.weight, tensors["blocks.0.fall.weight"])
    for mlp in ((), (4,)):
        model, encoder = tower_of(table(), config, mlp=mlp)
        with pytest.raises(ConfigError, match=r"above the features: blocks\.0.*item\.mlp"):
            start_from_catalogue(model, encoder, tmp_path / "out")


@pytest.mark.parametrize("name", ["weights.safetensors", "encoders.json", "manifest.json"])
def test_damage_is_noticed(made, tmp_path, name):
    config, out, _ = made
    folder = tmp_path / "copy"
    shutil.copytree(out, folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 0x81
    (folder / name).write_bytes(data)
    model, encoder = tower_of(table(), config)
    with pytest.raises(CheckpointError):
        start_from_catalogue(model, encoder, folder)


# in a run


def test_a_notebook_starts_from_it_as_well(made):
    _, out, _ = made
    rows = pl.DataFrame({"user_id": [u for u in range(6) for _ in range(3)]}).with_columns(
        item_id=pl.int_range(18) % 7
    )
    log = read(rows, items=table())
    sections = {
        "item": {"features": {name: FEATURES[name] for name in ("kind", "year")}},
        "model": {"embedding_dim": DIM, "init_from": str(out)},
        "train": {"epochs": 1, "table_lr": 0.0, "dense_lr": 0.0, "weight_decay": 0.0},
    }
    plain = sections | {"model": {"embedding_dim": DIM}}
    vectors = [
        TwoTower.fit(log, config=each, device="cpu", progress=False).ranker.item_vectors
        for each in (sections, sections, plain)
    ]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.isclose(vectors[0], vectors[2], atol=0.01).all(1).any()


def test_a_run_starts_from_it_says_so_and_knows_the_weights(
    recclr, small_data, small_config, tmp_path, no_power_cut
):
    settings = ("--set", "train.epochs=1", "--set", "train.refit=false", "--device", "cpu")
    weights = tmp_path / "weights"
    done = recclr("pretrain-items", "--config", small_config, "--out", weights, *settings)
    assert done.code == 0, done.err
    start = ("--set", f"model.init_from={weights}", "--set", "train.table_lr=0.0")
    still = ("--set", "train.dense_lr=0.0", *start)
    out = tmp_path / "run"
    done = recclr("train", "--config", small_config, "--out", out, *settings, *still)
    assert done.code == 0, done.err
    last = out / "checkpoints" / (out / "checkpoints" / "LAST").read_text().strip()
    found = load_file(last / "tensors.safetensors")
    trained = load_file(weights / "weights.safetensors")["features.category/table.weight"]
    here = {tuple(row.tolist()) for row in found["model/item_tower.parts.1.table.weight"]}
    there = {tuple(row.tolist()) for row in trained}
    assert len(here) > 3
    assert here <= there
    inputs = json.loads((out / "data.json").read_text())["inputs"]
    assert f"model.init_from: {weights}" in inputs

    # Weights that changed are no ground to resume on; who judges needs none.
    config = load_config(out / "config.toml")
    (weights / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.init_from"):
        require_same_inputs(out, fingerprints(config, start=True))
    shutil.rmtree(weights)
    judged = recclr("evaluate", out)
    assert judged.code == 0, judged.err
    lacking = recclr("train", "--config", small_config, "--out", tmp_path / "no", *settings, *start)
    assert lacking.code == 2
    assert "holds no manifest.json; expected a folder that" in lacking.err
