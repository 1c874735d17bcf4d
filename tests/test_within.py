"""Negatives of the positive's own group."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.within as module
from recclr.batch_size import try_batch_sizes
from recclr.batches import Batch
from recclr.building import build_model
from recclr.config import parse_config
from recclr.data.log import CategoricalColumn, DenseColumn, EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError
from recclr.fitting import fit_model
from recclr.kernels import BitMask, PairMask, masked_logsumexp, total_contrastive_loss
from recclr.momentum import MomentumQueue
from recclr.objective import Objective
from recclr.settings import (
    LossSettings,
    ModelSettings,
    NegativesSettings,
    QueueSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.stepping import Stepper
from recclr.within import RoomError, SameGroup, item_groups, require_groups

NUM_USERS, NUM_ITEMS, NUM_ROWS = 5, 14, 37
# Group 0 is none, 3 has one item.
GROUP = torch.tensor([1, 1, 2, 0, 2, 1, 2, 2, 3, 0, 1, 2, 1, 2])


def planted():
    draws = torch.Generator().manual_seed(6)
    users = torch.randint(NUM_USERS, (NUM_ROWS,), generator=draws)
    items = torch.cat([torch.arange(NUM_ITEMS), torch.randint(NUM_ITEMS, (23,), generator=draws)])
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS)


LOG = planted()


def model_of(loss):
    data = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    tower, size = TowerSettings(), ModelSettings(embedding_dim=4)
    return build_model(data, user=tower, item=tower, model=size, loss=loss, seed=1).train()


@given(seed=st.integers(0, 300), num_rows=st.integers(0, 9), num_candidates=st.integers(0, 70))
@settings(max_examples=40)
def test_the_mask_is_that_of_a_loop(seed, num_rows, num_candidates):
    draws = torch.Generator().manual_seed(seed)
    positives = torch.randint(NUM_ITEMS, (num_rows,), generator=draws)
    candidates = torch.randint(NUM_ITEMS, (num_candidates,), generator=draws)
    known = torch.rand(num_rows, num_candidates, generator=draws) < 0.2
    found = SameGroup(GROUP).limit(PairMask(*known.nonzero().T), positives, candidates)
    for row, item in enumerate(positives.tolist()):
        for column, other in enumerate(candidates.tolist()):
            elsewhere = int(GROUP[item]) not in (0, int(GROUP[other]))
            hidden = elsewhere or bool(known[row, column])
            assert bool(found.dense(num_candidates)[row, column]) == hidden


def test_many_groups_are_compared_a_few_at_a_time(monkeypatch):
    positives, candidates = torch.arange(NUM_ITEMS), torch.arange(NUM_ITEMS).flip(0)
    nothing = PairMask(positives[:0], positives[:0])
    whole = SameGroup(GROUP).limit(nothing, positives, candidates)
    monkeypatch.setattr(module, "_STRETCH", 1)
    parts = SameGroup(GROUP).limit(nothing, positives, candidates)
    assert torch.equal(whole.words, parts.words)


@given(
    seed=st.integers(0, 300),
    num_rows=st.integers(0, 12),
    num_candidates=st.integers(0, 20),
    has_own=st.booleans(),
    second=st.sampled_from([None, 1.3]),
)
@settings(max_examples=40)
def test_group_by_group_is_the_loss_over_the_bits(seed, num_rows, num_candidates, has_own, second):
    draws = torch.Generator().manual_seed(seed)
    positives = torch.randint(NUM_ITEMS, (num_rows,), generator=draws)
    candidates = torch.randint(NUM_ITEMS, (num_candidates,), generator=draws)
    known = torch.rand(num_rows, num_candidates, generator=draws) < 0.2
    mask = SameGroup(GROUP).limit(PairMask(*known.nonzero().T), positives, candidates)
    shapes = ((num_rows, 3), (num_candidates, 3), (num_rows,), (num_rows,))
    leaves = [torch.randn(shape, generator=draws) for shape in shapes]
    log_weights, row_weights = torch.randn(num_candidates), torch.rand(num_rows)
    found = []
    for each in (mask, BitMask(mask.words)):
        queries, vectors, logits, own = (leaf.clone().requires_grad_(True) for leaf in leaves)
        loss = total_contrastive_loss(
            queries,
            vectors,
            log_weights,
            logits,
            row_weights,
            each,
            own_partition=own if has_own else None,
            second_temperature=second,
        )
        wanted = [queries, vectors, logits, *([own] if has_own else [])]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        nothing = [torch.zeros_like(leaf) for leaf in wanted]
        told = [n if g is None else g for g, n in zip(gradients, nothing, strict=True)]
        found.append([loss.detach(), *told])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=4e-6, rtol=2e-5)
    if not num_candidates:
        return
    queries, vectors = leaves[0].requires_grad_(True), leaves[1]
    for each in (mask, BitMask(mask.words)):
        sums = masked_logsumexp(queries, vectors, log_weights, each)
        finite = sums.where(sums > -torch.inf, 0.0).sum() + 0.0 * queries.sum()
        slopes = torch.autograd.grad(finite, queries)
        found.append([sums.detach(), *slopes])
    for one, other in zip(*found[2:], strict=True):
        torch.testing.assert_close(one, other, atol=4e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("kind", "queued"), [("infonce", False), ("infonce", True), ("full_softmax", False)]
)
def test_a_step_equals_the_loop_over_the_own_group(kind, queued):
    loss = LossSettings(kind=kind, temperature=0.4)
    model, queue = model_of(loss), None
    if queued:
        queue = MomentumQueue(model, QueueSettings(size=9))
        queue.push(LOG.item_idx[20:29].long(), torch.randn(9, 4))
    negatives = NegativesSettings(
        in_batch=True, uniform=6, within="kind", queue=QueueSettings() if queued else None
    )
    objective = Objective(LOG, loss, negatives, seed=2, item_group=GROUP, queue=queue)
    rows = torch.arange(3, 15)
    batch = Batch(LOG.user_idx[rows].long(), LOG.item_idx[rows].long(), None, None, None, None)
    found = objective(model, batch, 0)
    drawn = objective._candidates(batch, 0)
    users, items = (vectors.double() for vectors in model.all_vectors(None))
    vectors, weights = drawn.weighted(items[drawn.item_idx].float())
    everything = drawn.candidate_idx
    if queued:
        everything = torch.cat([everything, drawn.queued.item_idx])
    pairs = list(zip(everything.tolist(), vectors.double(), weights.double().exp(), strict=True))
    known = set(zip(LOG.user_idx.tolist(), LOG.item_idx.tolist(), strict=True))
    losses = []
    for user, item in zip(batch.user_idx.tolist(), batch.item_idx.tolist(), strict=True):
        group, total = int(GROUP[item]), 0.0
        for other, vector, weight in pairs:
            if (user, other) not in known and group in (0, int(GROUP[other])):
                total += float(weight) * math.exp(float(users[user] @ vector) / 0.4)
        positive = float(users[user] @ items[item]) / 0.4
        losses.append(math.log(math.exp(positive) + total) - positive)
    # Rows without a group meet all, and the only item of its group meets none.
    assert {0, 3} <= set(GROUP[batch.item_idx].tolist())
    assert min(losses) == pytest.approx(0.0, abs=1e-12)
    assert float(found.loss.detach()) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


COLUMNS = {
    "kind": CategoricalColumn(GROUP.int(), 4),
    "image": DenseColumn(torch.zeros(NUM_ITEMS, 3)),
}


def test_the_group_is_the_category_of_the_named_feature():
    table = FeatureTable(NUM_ITEMS, COLUMNS)
    assert item_groups(NegativesSettings(), table) is None
    assert torch.equal(item_groups(NegativesSettings(in_batch=True, within="kind"), table), GROUP)
    with pytest.raises(ConfigError, match=r"'image' is not categorical; expected 'kind'"):
        item_groups(NegativesSettings(in_batch=True, within="image"), table)
    with pytest.raises(ConfigError, match=r"'kinds' is none of \[item.features\]"):
        item_groups(NegativesSettings(in_batch=True, within="kinds"), table)
    with pytest.raises(ConfigError, match="a feature of kind categorical, of which there is none"):
        item_groups(NegativesSettings(in_batch=True, within="kind"), FeatureTable(NUM_ITEMS))


def test_a_configuration_that_names_no_category_is_refused_before_any_data_are_read():
    values = {
        "data": {"events": "e.parquet"},
        "item": {"features": {"kind": {"kind": "categorical"}, "year": {"kind": "numeric"}}},
    }
    parse_config(values | {"negatives": {"within": "kind"}})
    for name in ("year", "other"):
        with pytest.raises(ConfigError, match=rf"negatives\.within: .*found '{name}'"):
            parse_config(values | {"negatives": {"within": name}})


def test_groups_that_are_not_there_and_pairs_without_room_are_refused():
    limits = {"num_rows": 1 << 14, "num_candidates": 1 << 17}
    within = NegativesSettings(in_batch=True, within="kind")
    require_groups(within, GROUP, **limits)
    with pytest.raises(RoomError, match=r"32,768 rows and 131,072 candidates takes 536,870,912"):
        require_groups(within, GROUP, **limits | {"num_rows": 1 << 15})
    with pytest.raises(ConfigError, match="give item_group"):
        require_groups(within, None, **limits)


def test_a_training_is_handed_the_groups_and_another_without_them():
    found = []
    for within in (None, "kind"):
        loss = LossSettings(temperature=0.4)
        stepper = Stepper(
            model_of(loss),
            LOG,
            loss=loss,
            negatives=NegativesSettings(in_batch=True, uniform=5, within=within),
            train=TrainSettings(batch_size=8),
            seed=0,
            item_group=GROUP,
        )
        assert (stepper.objective.groups is None) == (within is None)
        found.append(float(stepper(0)[0].loss))
    # Fewer negatives: a smaller sum.
    assert found[1] < found[0]


def test_a_configuration_trains_within_the_category():
    found = []
    for negatives in ({}, {"within": "kind"}):
        values = {
            "data": {"events": "none.parquet"},
            "item": {"features": {"kind": {"kind": "categorical"}}},
            "model": {"embedding_dim": 4},
            "train": {"epochs": 1, "batch_size": 8},
            "negatives": {"uniform": 5} | negatives,
        }
        data = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS, COLUMNS))
        events, config = [], parse_config(values)
        fit_model(config, data, None, device="cpu", on_event=events.append)
        found.append(events[0]["loss"])
        assert len(try_batch_sizes(config, data, device="cpu", seconds=0.0)) == 1
    assert found[1] < found[0]
