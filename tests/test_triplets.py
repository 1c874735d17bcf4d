"""``recclr mine``, and a run with negatives of both kinds, from files to files."""

import json

import polars as pl
import pytest
import torch

from recclr.load import load_run
from recclr.settings import MiningSettings
from recclr.triplets import mine_run

READERS = {
    "parquet": pl.read_parquet,
    "csv": pl.read_csv,
    "jsonl": pl.read_ndjson,
}
QUICK = ("--count", "3", "--depth", "40", "--skip", "2", "--choice", "top")


@pytest.mark.parametrize("ending", READERS)
def test_triplets_are_ranked_by_the_model_and_no_train_pairs(recclr, small_run, tmp_path, ending):
    out = tmp_path / f"triplets.{ending}"
    done = recclr("mine", small_run, "--out", out, *QUICK, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    report, rows = json.loads(done.out), READERS[ending](out)
    assert rows.columns == [
        *("user_id", "positive_id", "negative_id"),
        *("positive_score", "negative_score", "rank"),
    ]
    assert rows.height == report["mined"] > 100
    assert report["candidates"] == report["kept"] + sum(report["skipped"].values())
    # Refitted on validation, which then says nothing.
    assert report["false_negatives"] is None
    _, prepared, model = load_run(small_run)
    train = prepared.tensors.train
    users, items = (vectors.detach() for vectors in model.all_vectors(prepared.tensors.cutoff))
    known = set(zip(train.user_idx.tolist(), train.item_idx.tolist(), strict=True))
    assert report["queries"] == len(known)
    pairs = {}
    for user_id, positive_id, negative_id, positive, negative, rank in rows.iter_rows():
        user = prepared.users.ids.to_list().index(user_id)
        item, other = (prepared.items.ids.to_list().index(i) for i in (positive_id, negative_id))
        assert (user, item) in known
        assert (user, other) not in known
        scores = users[user] @ items.T
        assert positive == pytest.approx(float(scores[item]), abs=1e-5)
        assert negative == pytest.approx(float(scores[other]), abs=1e-5)
        assert rank > 2
        assert negative <= positive + 1e-6
        pairs.setdefault((user, item), []).append(rank)
    assert all(ranks == sorted(set(ranks)) and len(ranks) <= 3 for ranks in pairs.values())
    assert max(map(len, pairs.values())) == 3


def test_negatives_are_mined_by_the_scores_of_training(recclr, small_config, tmp_path):
    run, out = tmp_path / "run", tmp_path / "t.parquet"
    sets = ("model.popularity_bias=2.0", "train.epochs=1", "baselines.names=[]")
    options = [word for option in sets for word in ("--set", option)]
    done = recclr("train", "--config", small_config, "--out", run, "--device", "cpu", *options)
    assert done.code == 0, done.err
    assert recclr("mine", run, "--out", out, *QUICK, "--device", "cpu").code == 0
    _, prepared, model = load_run(run)
    with torch.no_grad():
        users, items = model.all_embeddings(prepared.tensors.cutoff)
        served = model.all_vectors(prepared.tensors.cutoff)
    rows = pl.read_parquet(out)
    user = torch.from_numpy(prepared.users.encode(rows["user_id"])).long()
    for column in ("positive", "negative"):
        item = torch.from_numpy(prepared.items.encode(rows[f"{column}_id"])).long()
        found = torch.from_numpy(rows[f"{column}_score"].to_numpy().copy())
        assert torch.allclose(found, (users[user] * items[item]).sum(1), atol=1e-5)
        assert not torch.allclose(found, (served[0][user] * served[1][item]).sum(1), atol=0.1)


def test_the_report_is_shown_and_wrong_use_is_refused(recclr, small_run, tmp_path):
    out = tmp_path / "t.parquet"
    done = recclr("mine", small_run, "--out", out, *QUICK)
    assert done.code == 0
    assert "too near the positive (share)" in done.out
    assert "among the best ranks that are left out" in done.out
    refused = recclr("mine", small_run, "--out", tmp_path / "t.xlsx")
    assert refused.code == 2
    assert "ends in .parquet" in refused.err
    refused = recclr("mine", small_run, "--out", out, "--depth", "5")
    assert refused.code == 2
    assert "depth - skip must leave" in refused.err
    refused = recclr("mine", small_run, "--out", out, "--choice", "best")
    assert refused.code == 2
    assert "choice must be uniform, score or top" in refused.err


def test_a_choice_follows_from_the_seed(small_run, tmp_path):
    settings = MiningSettings(count=2, depth=40, skip=0)

    def rows(seed):
        path = tmp_path / "t.parquet"
        mine_run(small_run, path, settings, seed=seed, device="cpu")
        return pl.read_parquet(path)

    assert rows(1).equals(rows(1))
    assert not rows(1).equals(rows(2))


def test_a_run_mines_and_knows_what_was_refused(recclr, small_data, small_config, tmp_path):
    events = pl.read_parquet(small_data / "events.parquet")
    kind = pl.when(pl.int_range(pl.len()) % 5 == 0).then(pl.lit("hide")).otherwise(pl.lit("buy"))
    events.with_columns(kind=kind).write_parquet(tmp_path / "events.parquet")
    options = [
        *(f'data.events="{tmp_path / "events.parquet"}"', 'data.columns.event="kind"'),
        *("data.event_weights={ buy = 1.0 }", 'negatives.explicit={ events = ["hide"] }'),
        "negatives.mined={ count = 2, depth = 30, skip = 3, warmup_epochs = 1.0 }",
        *("baselines.names=[]", "train.epochs=3"),
    ]
    sets = [word for option in options for word in ("--set", option)]
    out = tmp_path / "run"
    done = recclr("train", "--config", small_config, "--out", out, "--device", "cpu", *sets)
    assert done.code == 0, done.err
    assert "negatives for" in done.err
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    mined = {event["stage"]: event for event in events if event["kind"] == "mining"}
    # Validation is known in selection; after it nothing is, and test is never looked at.
    assert mined["selection"]["false_negatives"] is not None
    assert mined["refit"]["false_negatives"] is None
    _, prepared, _ = load_run(out)
    assert prepared.counts["explicit_pairs"] > 20
    lists, train = prepared.tensors.explicit, prepared.tensors.train
    known = set(zip(train.user_idx.tolist(), train.item_idx.tolist(), strict=True))
    assert not known & set(zip(lists.row_numbers().tolist(), lists.values.tolist(), strict=True))
    assert torch.equal(lists.lengths().sum(), torch.tensor(prepared.counts["explicit_pairs"]))
