"""One tower on both sides: symmetric scores, masks, users as means, and the whole command."""

import json

import pytest
import torch

from recclr.co_interactions import co_interactions
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.load import load_run, ranker_of
from recclr.objective import Objective
from recclr.rows import Rows
from recclr.settings import (
    LossSettings,
    ModelSettings,
    NegativesSettings,
    PairSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.siamese import build_siamese
from recclr.train import fit

NUM_USERS, NUM_ITEMS = 9, 14


def prepared_of(seed=2, num_rows=60):
    draws = torch.Generator().manual_seed(seed)
    log = EncodedLog(
        torch.randint(NUM_USERS - 1, (num_rows,), generator=draws).int(),
        torch.randint(NUM_ITEMS, (num_rows,), generator=draws).int(),
        NUM_USERS,
        NUM_ITEMS,
    )
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))


def model_of(prepared, similarity="cosine", **tower):
    return build_siamese(
        prepared,
        item=TowerSettings(**tower),
        model=ModelSettings(
            embedding_dim=5, similarity=similarity, pairs=PairSettings(query_length=4)
        ),
        loss=LossSettings(),
        seed=1,
    )


def test_swapped_inputs_give_equal_scores():
    prepared = prepared_of()
    model = model_of(prepared, mlp=(7,)).eval()
    rows = Rows(torch.arange(NUM_ITEMS))
    scores = model.embed_users(rows) @ model.embed_items(rows).T
    torch.testing.assert_close(scores, scores.T)
    assert model.user_tower is model.item_tower
    assert not [name for name in model.weights() if name.startswith("item_tower")]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_user_is_the_mean_of_the_last_items(similarity):
    prepared = prepared_of()
    model = model_of(prepared, similarity)
    users, items = model.all_vectors(None)
    assert users.shape == (NUM_USERS + 1, 5)
    log = prepared.train
    for user in range(NUM_USERS - 1):
        last = log.item_idx[log.user_idx == user][-4:].long()
        expected = items[last].mean(0)
        if similarity == "cosine":
            expected = expected / expected.norm()
        torch.testing.assert_close(users[user], expected)
    # The last user has no row, and is served as one that nobody knows.
    average = items[log.item_idx.long()].mean(0)
    if similarity == "cosine":
        average = average / average.norm()
    torch.testing.assert_close(users[-1], average)
    torch.testing.assert_close(users[-2], average)


def test_a_query_is_never_its_own_negative():
    pairs = co_interactions(prepared_of().train, PairSettings(window=1))
    objective = Objective(pairs, LossSettings(), NegativesSettings(), seed=3)
    query = torch.arange(NUM_ITEMS)
    mask = objective.known_positives.mask(query, query, query)
    hidden = set(zip(mask.rows.tolist(), mask.columns.tolist(), strict=True))
    assert all((item, item) in hidden for item in range(NUM_ITEMS))


def test_planted_companions_are_found():
    """Items 2k and 2k + 1 are always had one after the other, by everybody, in any order."""
    draws = torch.Generator().manual_seed(4)
    histories = []
    for _ in range(40):
        for pair in torch.randperm(7, generator=draws).tolist():
            first = int(torch.randint(2, (1,), generator=draws))
            histories += [2 * pair + first, 2 * pair + 1 - first]
    users = torch.arange(40).repeat_interleave(14)
    log = EncodedLog(users.int(), torch.tensor(histories).int(), 40, 14)
    prepared = Prepared(log, FeatureTable(40), FeatureTable(14))
    model = build_siamese(
        prepared,
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=16),
        loss=LossSettings(mask_known_positives=False),
        seed=1,
    )
    fit(
        model,
        co_interactions(log, PairSettings(window=1)),
        loss=LossSettings(mask_known_positives=False, temperature=0.2),
        negatives=NegativesSettings(uniform=14, in_batch=False),
        train=TrainSettings(batch_size=128, epochs=60, table_lr=0.02),
    )
    _, items = model.all_vectors(None)
    scores = items @ items.T
    scores.fill_diagonal_(-2)
    assert scores.argmax(1).tolist() == [item ^ 1 for item in range(14)]


@pytest.mark.slow
def test_a_whole_run_serves_users_by_their_items(recclr, small_config, tmp_path):
    config = tmp_path / "items.toml"
    text = small_config.read_text()
    start, stop = text.index("[user]"), text.index("[model]")
    config.write_text(text[:start] + text[stop:])
    out = tmp_path / "run"
    done = recclr(
        *("train", "--config", config, "--out", out, "--device", "cpu"),
        *("--set", "model.mode=item_item", "--set", "model.pairs.window=3"),
        *("--set", "model.init=spectral"),
    )
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    judged = recclr("evaluate", out, "--json")
    found = json.loads(judged.out)["metrics"]["all"]["recall@10"]
    assert found == pytest.approx(metrics["test"]["model"]["all"]["recall@10"])
    _, prepared, model = load_run(out)
    ranker = ranker_of(model, prepared.tensors.cutoff)
    assert ranker.user_vectors.shape[0] == len(prepared.users) + 1
    assert recclr("similar", out, "-k", "2", "--out", tmp_path / "s.parquet").code == 0
    assert recclr("check", "--config", out / "config.toml", "--batch-sizes").code == 0


def test_a_tower_of_users_is_refused(recclr, small_config, tmp_path):
    done = recclr(
        *("train", "--config", small_config, "--out", tmp_path / "run"),
        *("--set", "model.mode=item_item"),
    )
    assert done.code == 2
    assert 'user: model.mode = "item_item" has one tower' in done.err
