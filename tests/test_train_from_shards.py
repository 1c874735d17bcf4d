"""A training from shards is the training from memory, to the bit, also when it is interrupted."""

import threading
from dataclasses import replace

import pytest
import torch

import recclr.data.grouping as grouping
import recclr.watching as watching
import recclr.windows as windows
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.data.shards import open_shards, write_shards
from recclr.errors import InterruptedTraining
from recclr.evaluate import EvaluationSet
from recclr.settings import (
    FeatureSettings,
    HistorySettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    PopularitySettings,
    TowerSettings,
    TrainSettings,
)
from recclr.statistics import DAY_S
from recclr.stepping import needs_time_cells
from recclr.train import fit

pytestmark = pytest.mark.usefixtures("no_power_cut")

NUM_USERS, NUM_ITEMS, NUM_ROWS, DIM = 11, 17, 131, 6
# 131 rows in batches of 12: eleven steps an epoch, the last one shorter; 28 steps in all.
TRAIN = TrainSettings(batch_size=12, epochs=2.5, dense_lr=0.02, table_lr=0.05, staleness_d=2.0)
NEGATIVES = NegativesSettings(in_batch=True, uniform=5, popularity=PopularitySettings(count=3))

HISTORY = HistorySettings(length=3, half_life_d=4.0, dropout=0.3, use="both")
RECENT = {"recent": FeatureSettings(kind="statistics", windows_d=(9.0,))}
TOWERS = {
    "ids": (TowerSettings(), TowerSettings()),
    "history": (
        TowerSettings(id=IdSettings(dropout=0.2), history=HISTORY),
        TowerSettings(mlp=(5,), dropout=0.2),
    ),
    "cells": (
        TowerSettings(history=HISTORY, features=RECENT),
        TowerSettings(id=IdSettings(as_of=True), features=RECENT),
    ),
}
LOSSES = {
    "infonce": LossSettings(),
    "own_only": LossSettings(mask_known_positives=False),
    "full_softmax": LossSettings(kind="full_softmax", temperature=0.3),
    "family": LossSettings(symmetric=0.4, positives=3, top_k=3, hardness=0.3, log_q="classic"),
}


def log(*, timed):
    """Users who come back to some items, so that pairs repeat; entities without any row."""
    draws = torch.Generator().manual_seed(0)
    return EncodedLog(
        torch.randint(NUM_USERS - 1, (NUM_ROWS,), generator=draws).int(),
        torch.randint(NUM_ITEMS - 2, (NUM_ROWS,), generator=draws).int(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        # Two rows of each moment.
        timestamp=torch.arange(NUM_ROWS) // 2 * DAY_S if timed else None,
        weight=1 + torch.rand(NUM_ROWS, generator=draws),
    )


def model_of(towers, rows, loss):
    prepared = Prepared(rows, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    user, item = TOWERS[towers]
    settings = ModelSettings(embedding_dim=DIM)
    return build_model(prepared, user=user, item=item, model=settings, loss=loss, seed=2)


def train(rows, *, towers, loss="infonce", settings=TRAIN, **options):
    """Weights after a training, and what it logged, times left out."""
    model, events = model_of(towers, rows, LOSSES[loss]), []
    fit(
        model,
        rows,
        loss=LOSSES[loss],
        negatives=NEGATIVES,
        train=settings,
        seed=4,
        on_event=events.append,
        **options,
    )
    clocks = {"seconds", "positives_per_s"}
    told = [{k: v for k, v in event.items() if k not in clocks} for event in events]
    return {name: value.detach().clone() for name, value in model.weights().items()}, told


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """The log from files, with many windows and many passes."""
    monkeypatch.setattr(windows, "_LEAST_ROWS", 30)
    monkeypatch.setattr(grouping, "_ROWS", 25)
    # Every step is told of, however long it took.
    monkeypatch.setattr(watching, "_LOG_EVERY_S", 0.0)

    def make(*, timed=True):
        write_shards(tmp_path / "shards", log(timed=timed).stretches(50))
        return open_shards(tmp_path / "shards")

    return make


CASES = [
    ("ids", "infonce", False),
    ("ids", "own_only", True),
    ("ids", "full_softmax", True),
    ("history", "infonce", False),
    ("history", "infonce", True),
    ("cells", "infonce", True),
    ("cells", "full_softmax", True),
    ("cells", "family", True),
    ("history", "family", False),
]


@pytest.mark.parametrize(("towers", "loss", "timed"), CASES)
def test_weights_and_losses_are_those_of_rows_in_memory(mapped, towers, loss, timed):
    before = threading.active_count()
    rows = mapped(timed=timed)
    weights, told = train(rows, towers=towers, loss=loss)
    assert threading.active_count() == before
    expected, expected_told = train(log(timed=timed), towers=towers, loss=loss)
    assert same(weights, expected)
    assert told == expected_told
    assert told
    # The comparison sees something: the model has moved, and rows matter.
    fresh = {n: v.detach() for n, v in model_of(towers, rows, LOSSES[loss]).weights().items()}
    assert not same(weights, fresh)
    other = replace(log(timed=timed), item_idx=log(timed=timed).item_idx.flip(0))
    assert not same(weights, train(other, towers=towers, loss=loss)[0])


def test_the_cases_have_batches_of_both_kinds():
    rows = log(timed=True)
    kinds = {name: needs_time_cells(model_of(name, rows, LossSettings())) for name in TOWERS}
    assert kinds == {"ids": False, "history": False, "cells": True}


@pytest.mark.parametrize("towers", ["history", "cells"])
def test_accumulated_batches_are_the_same(mapped, towers):
    settings = replace(TRAIN, accumulate=3)
    weights, told = train(mapped(), towers=towers, settings=settings)
    expected, expected_told = train(log(timed=True), towers=towers, settings=settings)
    assert same(weights, expected)
    assert told == expected_told
    assert not same(weights, train(log(timed=True), towers=towers)[0])


@pytest.mark.parametrize("towers", ["history", "cells"])
@pytest.mark.parametrize(
    ("first", "then"), [("mapped", "mapped"), ("mapped", "memory"), ("memory", "mapped")]
)
def test_a_training_goes_on_wherever_its_rows_are(mapped, tmp_path, towers, first, then):
    places = {"mapped": mapped(), "memory": log(timed=True)}
    # In the middle of a window, of an epoch and between checkpoints.
    checkpoints = tmp_path / "checkpoints"
    train(places[first], towers=towers, checkpoints=checkpoints, num_steps=16)
    weights, _ = train(places[then], towers=towers, checkpoints=checkpoints, resume=True)
    assert same(weights, train(places["memory"], towers=towers)[0])


def test_all_that_the_softmax_family_draws_goes_on_too(mapped, tmp_path):
    options = {"towers": "cells", "loss": "family"}
    train(mapped(), checkpoints=tmp_path / "checkpoints", num_steps=16, **options)
    rows = log(timed=True)
    weights, _ = train(rows, checkpoints=tmp_path / "checkpoints", resume=True, **options)
    assert same(weights, train(rows, **options)[0])


@pytest.mark.parametrize("towers", ["ids", "cells"])
def test_a_training_that_is_stopped_leaves_no_thread(mapped, tmp_path, towers):
    rows, before, asked = mapped(), threading.active_count(), []

    def stop():
        asked.append(threading.active_count())
        return len(asked) == 5

    with pytest.raises(InterruptedTraining):
        train(rows, towers=towers, checkpoints=tmp_path / "checkpoints", stop=stop)
    assert asked == [before + 1] * 5
    assert threading.active_count() == before


def test_an_error_of_the_reading_thread_ends_the_training(mapped, monkeypatch):
    rows, before = mapped(), threading.active_count()
    real, calls = windows.permuted, []

    def fails(positions, *keys):
        calls.append(threading.current_thread())
        if len(calls) == 4:
            raise MemoryError("in the thread")
        return real(positions, *keys)

    monkeypatch.setattr(windows, "permuted", fails)
    with pytest.raises(MemoryError, match="in the thread"):
        train(rows, towers="ids")
    assert threading.main_thread() not in calls
    assert threading.active_count() == before


@pytest.mark.parametrize("keep_seen", [False, True])
def test_held_out_rows_are_judged_alike(mapped, keep_seen):
    """What users had, and how often, comes from the groups of the files."""
    held_out = EncodedLog(
        torch.tensor([0, 3, 3, 10, 14, 2]).int(),
        torch.tensor([1, 16, 4, -1, 5, 15]).int(),
        NUM_USERS,
        NUM_ITEMS,
    )
    found = []
    for rows in (mapped(), log(timed=True)):
        tables = FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS)
        prepared = Prepared(rows, *tables, held_out=held_out)
        also = log(timed=True).rows(slice(90, 131))
        found.append(
            [
                EvaluationSet.from_prepared(prepared, keep_seen=keep_seen),
                EvaluationSet.from_prepared(prepared, keep_seen=keep_seen, also_seen=also),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours.num_dropped, ours.num_repeats) == (theirs.num_dropped, theirs.num_repeats)
        for name in ("user_idx", "item_counts", "user_counts"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for one, other in ((ours.relevant, theirs.relevant), (ours.seen, theirs.seen)):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one.offsets, other.offsets)
            assert one is None or torch.equal(one.values, other.values)
    # Rows between train and test count as had.
    assert keep_seen or len(found[0][1].seen.values) > len(found[0][0].seen.values)


def test_the_best_of_evaluations_is_the_same(mapped):
    def judged(model):
        users, items = model.all_vectors(NUM_ROWS * DAY_S)
        return {"recall@20": float((users[:-1] @ items.T).abs().sum())}

    options = {"towers": "cells", "evaluate": judged}
    weights, told = train(mapped(), **options)
    expected, expected_told = train(log(timed=True), **options)
    assert same(weights, expected)
    assert told == expected_told
    assert sum(event["kind"] == "evaluation" for event in told) == 3
