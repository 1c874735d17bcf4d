"""Further positives: what is drawn, and a step with several against a loop over them."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import Csr, EncodedLog, FeatureTable, Prepared
from recclr.more_positives import MorePositives, with_items
from recclr.negatives import Candidates
from recclr.objective import Objective
from recclr.settings import (
    HistorySettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
)

NUM_USERS, NUM_ITEMS = 6, 11


def lists_of(lengths, seed):
    draws = torch.Generator().manual_seed(seed)
    items = [torch.randperm(50, generator=draws)[:length].sort().values for length in lengths]
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Csr.from_pairs(rows, torch.cat(items), len(lengths))


def rows_of(lists, seed, num_rows):
    draws = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(lists.values), (num_rows,), generator=draws)
    return Batch(lists.row_numbers()[picked], lists.values[picked].long(), *[None] * 4)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    seed=st.integers(0, 500),
    num_more=st.integers(1, 9),
)
def test_they_are_other_items_of_the_user_each_once(lengths, seed, num_more):
    lists = lists_of(lengths, seed)
    batch = rows_of(lists, seed, 23)
    more = MorePositives(lists, num_more)
    found = more.draw(batch, torch.Generator().manual_seed(seed))
    assert found.shape == (23, 1 + num_more)
    for user, item, row in zip(
        batch.user_idx.tolist(), batch.item_idx.tolist(), found.tolist(), strict=True
    ):
        others = set(lists.row(user).tolist()) - {item}
        drawn = [each for each in row[1:] if each >= 0]
        assert row[0] == item
        assert len(drawn) == len(set(drawn)) == min(num_more, len(others))
        assert set(drawn) <= others
    again = more.draw(batch, torch.Generator().manual_seed(seed))
    assert torch.equal(found, again)


@pytest.mark.parametrize("place", [0, 2, 5])
def test_all_sets_are_equally_likely(place):
    lists, num_rows = lists_of([3, 6], 1), 20_000
    item = lists.row(1)[place].long().expand(num_rows)
    batch = Batch(torch.ones(num_rows, dtype=torch.int64), item, *[None] * 4)
    found = MorePositives(lists, 2).draw(batch, torch.Generator().manual_seed(7))
    counts = Counter(tuple(sorted(row)) for row in found[:, 1:].tolist())
    others = sorted(set(lists.row(1).tolist()) - {int(item[0])})
    assert set(counts) == set(combinations(others, 2))
    expected = num_rows / len(counts)
    chi_square = math.fsum((n - expected) ** 2 / expected for n in counts.values())
    # Nine degrees of freedom: above 33.7 once in 10,000 seeds, and this one is given.
    assert chi_square < 33.7


def candidates_of(*, rows):
    return Candidates(
        torch.tensor([2, 5, 7, 8]), torch.tensor([3, 0]), rows, torch.tensor([0.1, 0.2, 0.3, 0.4])
    )


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 3, 0, 2])], ids=["all", "some"])
@pytest.mark.parametrize("more", [[[1, 5], [9, -1]], [[5, -1], [8, 2]], [[-1, -1], [-1, -1]]])
def test_items_to_encode_are_added_and_nothing_else_changes(rows, more):
    before, more = candidates_of(rows=rows), torch.tensor(more)
    after, places = with_items(before, more)
    assert after.candidate_idx.tolist() == before.candidate_idx.tolist()
    assert after.log_weights is before.log_weights
    assert after.item_idx[after.positive_row].tolist() == [8, 2]
    assert after.item_idx.tolist() == sorted({2, 5, 7, 8, *more[more >= 0].tolist()})
    found = torch.where(places < 0, -1, after.item_idx[places.clamp(min=0)])
    assert torch.equal(found, more)


def log_of(*, timestamps):
    draws = torch.Generator().manual_seed(2)
    users = torch.cat([torch.arange(11) % 6, torch.randint(5, (19,), generator=draws)])
    items = torch.cat([torch.arange(11), torch.randint(NUM_ITEMS, (19,), generator=draws)])
    times = torch.arange(30) * 86_400 if timestamps else None
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS, timestamp=times)


def model_of(log, loss, *, history=None):
    prepared = Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    tower = TowerSettings(history=history)
    settings = ModelSettings(embedding_dim=5)
    return build_model(
        prepared, user=tower, item=TowerSettings(), model=settings, loss=loss, seed=1
    ).train()


def batch_of(log, *, weight=None):
    rows = torch.arange(4, 17)
    at = None if log.timestamp is None else log.timestamp[rows]
    return Batch(log.user_idx[rows].long(), log.item_idx[rows].long(), weight, at, None, None)


@pytest.mark.parametrize("kind", ["infonce", "full_softmax"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_a_step_is_the_mean_over_each_rows_positives(kind, in_batch):
    log = log_of(timestamps=False)
    loss = LossSettings(kind=kind, temperature=0.4, positives=4)
    negatives = NegativesSettings(in_batch=in_batch, uniform=5)
    weight = torch.linspace(0.5, 2.0, 13)
    model, batch = model_of(log, loss), batch_of(log, weight=weight)
    objective = Objective(log, loss, negatives, seed=3)
    found = objective(model, batch, 6)
    drawn = []
    original = objective.more_positives.draw
    objective.more_positives.draw = lambda *args: drawn.append(original(*args)) or drawn[0]
    assert float(objective(model, batch, 6).loss.detach()) == float(found.loss.detach())
    plain = objective._candidates(batch, 6)
    known = set(zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True))
    users, items = (vectors.double() for vectors in model.all_vectors(None))
    total, lengths = 0.0, set()
    for b, user in enumerate(batch.user_idx.tolist()):
        negative = math.fsum(
            weight * math.exp(float(users[user] @ items[candidate]) / 0.4)
            for candidate, weight in zip(
                plain.candidate_idx.tolist(), plain.log_weights.exp().tolist(), strict=True
            )
            if (user, candidate) not in known
        )
        positives = [item for item in drawn[0][b].tolist() if item >= 0]
        assert all((user, item) in known for item in positives)
        lengths.add(len(positives))
        logits = [float(users[user] @ items[item]) / 0.4 for item in positives]
        row = [math.log(math.exp(logit) + negative) - logit for logit in logits]
        total += float(weight[b]) * math.fsum(row) / len(row)
    assert len(lengths) > 1
    expected = total / float(weight.sum())
    assert float(found.loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert found.num_candidates == len(plain.log_weights)


def test_they_follow_from_seed_and_step():
    log = log_of(timestamps=False)
    loss = LossSettings(kind="full_softmax", temperature=0.4, positives=2)
    model, batch = model_of(log, loss), batch_of(log)

    def at(step, seed=3):
        objective = Objective(log, loss, NegativesSettings(), seed=seed)
        return float(objective(model, batch, step).loss.detach())

    assert at(4) == at(4)
    assert at(4) != at(5)
    assert at(4) != at(4, seed=2)


def test_the_classic_form_corrects_each_of_them():
    log = log_of(timestamps=False)
    classic = LossSettings(temperature=0.4, positives=3, log_q="classic", log_q_strength=0.7)
    batch = batch_of(log)
    objective = Objective(log, classic, NegativesSettings(in_batch=True, uniform=4), seed=3)
    positives = objective.more_positives.draw(batch, torch.Generator().manual_seed(1))
    found = objective._positive_log_weights(positives, batch)
    counts = torch.bincount(log.item_idx, minlength=NUM_ITEMS)
    expected = 4 / NUM_ITEMS + (13 - 1) / (30 - 1) * counts
    alive = positives >= 0
    torch.testing.assert_close(found[alive], -0.7 * expected.log()[positives[alive]])


@pytest.mark.parametrize("timestamps", [False, True])
def test_no_positive_is_in_the_history_it_is_told_from(timestamps):
    """A user of two items, both of them positives, has no history left to tell either from."""
    users, items = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 4])
    times = torch.arange(5) * 86_400 if timestamps else None
    log = EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS, timestamp=times)
    found = {}
    for positives in (1, 2):
        loss = LossSettings(kind="full_softmax", temperature=0.4, positives=positives)
        history = HistorySettings(length=5)
        model = model_of(log, loss, history=history)
        rows = torch.tensor([1])
        at = None if times is None else times[rows]
        batch = Batch(users[rows], items[rows], None, at, None, None)
        seen = []
        model.user_tower.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        Objective(log, loss, NegativesSettings(), seed=3)(model, batch, 0)
        missing = model.user_tower.parts[1].missing
        bare = model.user_tower.parts[0].table.weight[1] + missing + model.user_tower.bias
        found[positives] = bool(torch.allclose(seen[0][0], bare))
    assert found == {1: False, 2: True}
