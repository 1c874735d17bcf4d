"""Mining in a training: when it happens, what it changes, and that a resumed run is the same."""

from dataclasses import replace

import pytest
import torch

from recclr.building import build_model
from recclr.checkpoint import find_checkpoint, load_checkpoint
from recclr.data.log import Csr, EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError, InterruptedTraining
from recclr.load import ranker_of
from recclr.mining import Refresher
from recclr.settings import (
    ExplicitSettings,
    LossSettings,
    MinedSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.stepping import Stepper
from recclr.train import fit

pytestmark = pytest.mark.usefixtures("no_power_cut")

NUM_USERS, NUM_ITEMS = 9, 17
MINED = MinedSettings(
    count=2, pool=3, depth=9, skip=1, margin=-9.0, share=0.0, warmup_epochs=0.5, refresh_epochs=0.75
)
EXPLICIT = ExplicitSettings(events=("shown",), count=1)
# 40 rows in batches of 10: four steps an epoch, nine steps in all; mined before 2, 5 and 8.
TRAIN = TrainSettings(batch_size=10, epochs=2.25, table_lr=0.05, checkpoint_every=0.25)
DRAWS = torch.Generator().manual_seed(0)
LOG = EncodedLog(
    torch.randint(NUM_USERS, (40,), generator=DRAWS).int(),
    torch.randint(NUM_ITEMS, (40,), generator=DRAWS).int(),
    num_users=NUM_USERS,
    num_items=NUM_ITEMS,
)
SHOWN = Csr.from_pairs(torch.tensor([0, 0, 3]), torch.tensor([4, 5, 6]), NUM_USERS)


def model_of(seed=0, **model):
    return build_model(
        Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS)),
        user=TowerSettings(),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=4, **model),
        loss=LossSettings(),
        seed=seed,
    )


def run(model, *, mined=MINED, explicit=EXPLICIT, refresh=True, loss=None, **options):
    negatives = NegativesSettings(in_batch=True, uniform=4, mined=mined, explicit=explicit)
    miner = Refresher(LOG, mined, seed=3, cutoff=None) if refresh and mined else None
    return fit(
        model,
        LOG,
        loss=loss or LossSettings(),
        negatives=negatives,
        train=TRAIN,
        seed=3,
        refresh_negatives=miner,
        explicit=SHOWN,
        **options,
    )


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.weights().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_mining_happens_after_the_warm_up_and_then_every_so_often():
    events = []
    run(model_of(), on_event=events.append)
    mined = [event for event in events if event["kind"] == "mining"]
    assert [event["step"] for event in mined] == [2, 5, 8]
    assert [event["epoch"] for event in mined] == [0.5, 1.25, 2.0]
    for event in mined:
        assert event["queries"] == len(set(LOG.user_idx.tolist()))
        assert event["candidates"] == event["kept"] + sum(event["skipped"].values())
        assert event["mined"] > 0


def test_each_source_changes_the_training_and_nothing_else_does():
    found = {}
    for name, options in {
        "both": {},
        "again": {},
        "mined": {"explicit": None},
        "explicit": {"mined": None},
        "neither": {"mined": None, "explicit": None},
        "later": {"mined": replace(MINED, warmup_epochs=99.0), "explicit": None},
        "more": {"mined": replace(MINED, count=3), "explicit": None},
        "lighter": {"mined": None, "explicit": replace(EXPLICIT, weight=0.1)},
    }.items():
        model = model_of()
        run(model, **options)
        found[name] = weights_of(model)
    assert same(found["both"], found["again"])
    different = ["both", "mined", "explicit", "neither", "more", "lighter"]
    for number, name in enumerate(different):
        for other in different[:number]:
            assert not same(found[name], found[other]), (name, other)
    # Nothing is mined in the warm-up.
    for name, value in found["later"].items():
        torch.testing.assert_close(value, found["neither"][name])


@pytest.mark.parametrize("at", [1, 2, 4, 5, 7])
def test_resumed_before_and_after_a_mining_it_is_the_uninterrupted_run(tmp_path, at):
    whole = model_of()
    run(whole, checkpoints=tmp_path / "whole")
    asked = iter(range(1, 99))
    with pytest.raises(InterruptedTraining):
        run(model_of(), checkpoints=tmp_path / "cut", stop=lambda: next(asked) == at)
    table = find_checkpoint(tmp_path / "cut").tensors["objective/mined"]
    assert table.shape == (NUM_USERS, 3)
    assert bool((table >= 0).any()) == (at > 2)
    again = model_of(seed=1)
    run(again, checkpoints=tmp_path / "cut", resume=True)
    assert same(weights_of(again), weights_of(whole))
    last = (load_checkpoint(tmp_path / name / "step-9").tensors for name in ("whole", "cut"))
    assert same(*last)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_a_bias_of_served_scores_makes_nothing_hard(similarity):
    found = []
    for bias in (0.0, 40.0):
        model = model_of(similarity=similarity, popularity_bias=bias)
        miner = Refresher(LOG, MINED, seed=3, cutoff=None)
        table, report = miner(model, 5)
        found.append((table, {k: v for k, v in report.items() if k != "seconds"}))
        ranked = ranker_of(model, None).top_k(torch.arange(NUM_USERS), 1).item_idx
        assert (len(ranked.unique()) == 1) is (bias > 0)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_what_was_mined_is_nothing_that_a_user_has():
    checked = []
    miner = Refresher(LOG, MINED, seed=3, cutoff=None)

    def mine(model, step):
        table, report = miner(model, step)
        known = set(zip(LOG.user_idx.tolist(), LOG.item_idx.tolist(), strict=True))
        rows, _ = (table >= 0).nonzero(as_tuple=True)
        pairs = set(zip(rows.tolist(), table[table >= 0].tolist(), strict=True))
        assert pairs
        assert not pairs & known
        checked.append(step)
        return table, report

    fit(
        model_of(),
        LOG,
        loss=LossSettings(),
        negatives=NegativesSettings(in_batch=True, uniform=4, mined=MINED),
        train=TRAIN,
        refresh_negatives=mine,
    )
    assert checked == [2, 5, 8]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="give refresh_negatives"):
        run(model_of(), refresh=False)
    with pytest.raises(ConfigError, match="scores every item"):
        run(model_of(), loss=LossSettings(kind="full_softmax"))
    with pytest.raises(ConfigError, match=r"negatives\.explicit needs"):
        Stepper(
            model_of(),
            LOG,
            loss=LossSettings(),
            negatives=NegativesSettings(in_batch=True, explicit=EXPLICIT),
            train=TRAIN,
            seed=1,
        )
