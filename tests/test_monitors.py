"""Figures of vectors against slow loops, and the samples they are of."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recclr.monitors as monitors
from recclr.data.log import Csr, EncodedLog
from recclr.errors import ShapeError
from recclr.monitors import (
    Monitor,
    alignment,
    concentration,
    correlation,
    effective_rank,
    first_share,
    most_taken,
    quartiles,
    singular_values,
    uniformity,
    variance,
)
from recclr.similarity import as_candidates, as_queries, with_bias
from recclr.topk import EmbeddingRanker

NUM_USERS, NUM_ITEMS, DIM = 23, 31, 7


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(num, dim=DIM, seed=0):
    lengths = 0.1 + 3 * torch.rand(num, 1, generator=draws(seed + 100))
    return torch.randn(num, dim, generator=draws(seed)) * lengths


def unit(row):
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row] if length else list(row)


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def log_of(seed=1, num_rows=190):
    """Users 20 on and items 29 on have no row."""
    users = torch.randint(20, (num_rows,), generator=draws(seed)).int()
    items = (29 * torch.rand(num_rows, generator=draws(seed + 1)) ** 2).int()
    return EncodedLog(users, items, NUM_USERS, NUM_ITEMS)


# figures against their definitions


def test_alignment_is_the_mean_over_pairs():
    users, items = vectors(19, seed=1), vectors(19, seed=2)
    users[3] = 0
    pairs = zip(users.tolist(), items.tolist(), strict=True)
    slow = [squared_distance(unit(u), unit(v)) for u, v in pairs]
    assert alignment(users, items) == pytest.approx(sum(slow) / 19, rel=1e-6)
    assert alignment(users, 5 * users) == pytest.approx(0, abs=1e-12)
    assert alignment(items, -2 * items) == pytest.approx(4)


def test_uniformity_is_over_all_pairs_of_different_vectors():
    found = vectors(17)
    found[5] = 0
    rows = [unit(row) for row in found.tolist()]
    near = [math.exp(-2 * squared_distance(a, b)) for a, b in itertools.combinations(rows, 2)]
    assert uniformity(found) == pytest.approx(math.log(sum(near) / len(near)), rel=1e-5)
    assert uniformity(found[:1].expand(9, -1)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.stack([found[0], -found[0]])) == pytest.approx(-8, rel=1e-5)
    with pytest.raises(ShapeError, match="at least 2 vectors, found 1"):
        uniformity(found[:1])


def test_variance_is_the_mean_distance_from_the_mean():
    found = vectors(13)
    rows = [unit(row) for row in found.tolist()]
    mean = [sum(column) / 13 for column in zip(*rows, strict=True)]
    slow = sum(squared_distance(row, mean) for row in rows) / 13
    assert variance(found) == pytest.approx(slow, rel=1e-5)
    assert variance(found[:1].expand(9, -1)) == pytest.approx(0, abs=1e-6)
    assert variance(torch.cat([found, -found])) == pytest.approx(1)


@pytest.mark.parametrize(("num", "dim"), [(29, 5), (4, 9), (1, 3), (200, 64)])
def test_singular_values_and_effective_rank_are_those_of_the_whole_matrix(num, dim, monkeypatch):
    monkeypatch.setattr(monitors, "_CHUNK", 6)
    found = vectors(num, dim)
    whole = torch.linalg.svdvals(found.double())
    values = singular_values(found)
    assert len(values) == min(num, dim)
    torch.testing.assert_close(values, whole, rtol=1e-6, atol=1e-6)
    shares = [float(value / whole.sum()) for value in whole]
    entropy = -sum(share * math.log(share) for share in shares)
    assert effective_rank(values) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert first_share(values) == pytest.approx(float(whole[0] ** 2 / whole.square().sum()))


@given(rank=st.integers(1, DIM), num=st.integers(DIM, 40), seed=st.integers(0, 99))
def test_the_effective_rank_of_equal_directions_is_their_number(rank, num, seed):
    basis = torch.linalg.qr(torch.randn(num, DIM, generator=draws(seed)).double()).Q[:, :rank]
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=draws(seed + 1)).double()).Q
    values = singular_values(basis @ turn[:rank])
    assert effective_rank(values) == pytest.approx(rank, rel=1e-4)
    assert first_share(values) == pytest.approx(1 / rank, rel=1e-6)


def test_no_vector_has_a_rank_where_all_are_zero():
    values = singular_values(torch.zeros(9, 4))
    assert (effective_rank(values), first_share(values)) == (0.0, 0.0)


def test_quartiles_are_those_of_torch():
    for num in (1, 2, 5, 12):
        found = vectors(num, 1).squeeze(1)
        whole = torch.quantile(found.double(), torch.tensor([0.25, 0.5, 0.75]).double())
        assert quartiles(found) == pytest.approx(whole.tolist(), rel=1e-6)


def test_correlation_is_pearsons_and_none_of_what_does_not_vary():
    a = vectors(21, 1, seed=3).squeeze(1)
    b = a + vectors(21, 1, seed=4).squeeze(1)
    x, y = a.tolist(), b.tolist()
    mean_x, mean_y = sum(x) / 21, sum(y) / 21
    over = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    under = math.sqrt(sum((p - mean_x) ** 2 for p in x) * sum((q - mean_y) ** 2 for q in y))
    assert correlation(a, b) == pytest.approx(over / under, rel=1e-6)
    # The lengths of unit vectors differ by rounding, which must not be taken for a figure.
    assert correlation(a, 1 + 1e-6 * b) is None
    assert correlation(a[:1], b[:1]) is None


@pytest.mark.parametrize("num_items", [3, 40, 950])
def test_concentration_counts_slots_and_what_lists_share(num_items):
    k = 5
    picks = [torch.randperm(num_items, generator=draws(row))[:k].tolist() for row in range(11)]
    picks = [row + [-1] * (k - len(row)) for row in picks]
    picks[4][1:] = [-1] * (k - 1)
    found = concentration(torch.tensor(picks), num_items)
    filled = [[item for item in row if item >= 0] for row in picks]
    counts = Counter(item for row in filled for item in row)
    slots, most = sum(counts.values()), most_taken(num_items, k)
    assert most == min(num_items, {3: 3, 40: 5, 950: 10}[num_items])
    assert found["top_item_share"] == max(counts.values()) / slots
    expected = sum(count for _, count in counts.most_common(most)) / slots
    assert found["top_percent_share"] == pytest.approx(expected)
    assert (found["distinct_items"], found["top_items"]) == (len(counts), most)
    shared = [len({*a} & {*b}) for a, b in itertools.combinations(filled, 2)]
    assert found["overlap"] == pytest.approx(sum(shared) / len(shared) / (slots / 11))


def test_the_same_list_for_everybody_overlaps_wholly():
    found = concentration(torch.tensor([[7, 2, 5]]).expand(6, -1), 10)
    assert found["overlap"] == pytest.approx(1)
    assert (found["top_item_share"], found["top_percent_share"]) == (1 / 3, 1.0)
    assert "overlap" not in concentration(torch.tensor([[1, 2]]), 10)


# the monitor


def served(users, items, **arguments):
    return EmbeddingRanker("model", users, items, **arguments)


def monitor_of(log, **arguments):
    return Monitor(log, **{"k": 4, "seed": 5, **arguments})


def test_figures_are_of_users_and_items_with_train_rows():
    log = log_of()
    users, items = vectors(NUM_USERS + 1, seed=7), vectors(NUM_ITEMS, seed=8)
    found = monitor_of(log)(served(users, items))
    warm_users = [u for u in range(NUM_USERS) if u in log.user_idx.tolist()]
    warm_items = [i for i in range(NUM_ITEMS) if i in log.item_idx.tolist()]
    assert len(warm_items) <= NUM_ITEMS - 2
    for side, own in (("user", users[warm_users]), ("item", items[warm_items])):
        assert found[f"{side}_uniformity"] == pytest.approx(uniformity(own))
        assert found[f"{side}_variance"] == pytest.approx(variance(own))
        values = torch.linalg.svdvals(own.double())
        assert found[f"{side}_rank"] == pytest.approx(effective_rank(values))
        assert found[f"{side}_rank_limit"] == DIM
        assert found[f"{side}_first_share"] == pytest.approx(first_share(values))
        lengths = torch.linalg.vector_norm(own, dim=1)
        names = (f"{side}_norm_{name}" for name in ("q1", "median", "q3"))
        assert [found[name] for name in names] == pytest.approx(quartiles(lengths))
    counts = torch.bincount(log.item_idx, minlength=NUM_ITEMS)[warm_items].double()
    lengths = torch.linalg.vector_norm(items[warm_items], dim=1)
    assert found["norm_popularity"] == pytest.approx(correlation(lengths, counts.log()))
    pairs = alignment(users[log.user_idx.long()], items[log.item_idx.long()])
    assert found["alignment_train"] == pytest.approx(pairs)
    assert "alignment" not in found
    # What nobody trained may be anything.
    users[20:], items[29:] = 1e6, -1e6
    again = monitor_of(log, seen=None)(served(users, items))
    same = [name for name in found if name.endswith(("variance", "rank", "uniformity"))]
    assert [again[name] for name in same] == [found[name] for name in same]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_rankings_are_those_of_the_judged_without_what_they_have():
    log, k = log_of(), 4
    users, items = vectors(NUM_USERS + 1, seed=7), vectors(NUM_ITEMS, seed=8)
    judged = torch.tensor([1, 4, 9, 21, NUM_USERS + 5])
    had = [[0, 3], [], [30], [1, 2, 3, 4], [5]]
    rows = torch.tensor([r for r, own in enumerate(had) for _ in own])
    seen = Csr.from_pairs(rows, torch.tensor([i for own in had for i in own]), len(had))
    relevant = torch.tensor([6, 6, 6, 8, 9]), torch.tensor([2, 2, 2, 7, 11])
    held_out = relevant[0], relevant[1]
    found = monitor_of(log, users=judged, seen=seen, held_out=held_out)(served(users, items))
    lists = []
    for user, own in zip(judged.tolist(), had, strict=True):
        scores = items @ users[min(user, NUM_USERS)]
        order = sorted(range(NUM_ITEMS), key=lambda i: (-float(scores[i]), i))
        lists.append([i for i in order if i not in own][:k])
    expected = concentration(torch.tensor(lists), NUM_ITEMS)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["num_queries"] == 5
    # The most taken of held-out items: as many as one user is shown.
    assert found["demand_share"] == 1.0
    pairs = alignment(users[held_out[0]], items[held_out[1]])
    assert found["alignment"] == pytest.approx(pairs)
    train = monitor_of(log)(served(users, items))
    counts = torch.bincount(log.item_idx).sort(descending=True).values
    assert train["demand_share"] == pytest.approx(float(counts[:k].sum() / len(log)))


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("biased", [False, True])
def test_what_a_score_needs_beside_the_vectors_is_in_no_figure_of_them(similarity, biased):
    log = log_of()
    held_out = log.user_idx.long(), log.item_idx.long()
    users, items = vectors(NUM_USERS + 1, seed=7), vectors(NUM_ITEMS, seed=8)
    # Pairs in one direction, which lifted vectors hide: they are nearly orthogonal.
    items[held_out[1]] = 0.5 * users[held_out[0]].mean(0)
    users[held_out[0]] = users[held_out[0]].mean(0)
    lifted = as_queries(users, similarity), as_candidates(items, similarity)
    if biased:
        lifted = with_bias(*lifted, 9 * torch.rand(NUM_ITEMS, generator=draws(9)))
    beside = lifted[0].shape[1] - DIM
    monitor = monitor_of(log, held_out=held_out)
    plain = monitor(served(users, items))
    found = monitor(served(*lifted, similarity=similarity, num_beside=beside))
    rankings = ("top_", "distinct_items", "overlap")
    of_vectors = {name: plain[name] for name in plain if not name.startswith(rankings)}
    assert plain["alignment"] == pytest.approx(0, abs=1e-6)
    assert {name: found[name] for name in of_vectors} == pytest.approx(of_vectors)
    # But users are shown what is served.
    expected = concentration(served(*lifted).top_k(monitor.queries, 4).item_idx, NUM_ITEMS)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_samples_are_bounded_without_repeats_and_of_the_seed(monkeypatch):
    for name, size in (("_VECTORS", 6), ("_PAIRS", 30), ("_QUERIES", 8), ("_ROWS", 9)):
        monkeypatch.setattr(monitors, name, size)
    log = log_of()
    users, items = vectors(NUM_USERS + 1, seed=7), vectors(NUM_ITEMS, seed=8)
    held_out = log.user_idx.long(), log.item_idx.long()
    first, again = (monitor_of(log, held_out=held_out) for _ in range(2))
    other = monitor_of(log, held_out=held_out, seed=6)
    assert len(first.queries) == len(set(first.queries.tolist())) == 8
    assert {name: len(pair[0]) for name, pair in first.pairs.items()} == {
        "alignment": 30,
        "alignment_train": 30,
    }
    known = set(zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True))
    for user_idx, item_idx in first.pairs.values():
        assert set(zip(user_idx.tolist(), item_idx.tolist(), strict=True)) <= known
    found = first(served(users, items))
    assert found == again(served(users, items))
    assert found != other(served(users, items))
    # Estimates from samples: of the same figures as from all.
    monkeypatch.undo()
    assert found.keys() == monitor_of(log, held_out=held_out)(served(users, items)).keys()


def test_a_sample_reaches_all_of_what_it_is_of():
    many = monitor_of(log_of())._sample(100_000, 500, 9)
    assert len(many.unique()) == 500
    assert torch.equal(many, many.sort().values)
    # A fifth of them below a fifth of the range, within five standard deviations.
    assert abs(int((many < 20_000).sum()) - 100) < 45
    assert int(many.max()) > 98_000


def test_what_is_not_finite_or_not_there_is_left_out():
    users, items = vectors(NUM_USERS + 1, seed=7), vectors(NUM_ITEMS, seed=8)
    users[2, 1] = torch.inf
    found = monitor_of(log_of())(served(users, items))
    assert "user_rank" not in found
    assert found["item_rank"] > 1
    one = EncodedLog(torch.tensor([0]).int(), torch.tensor([0]).int(), 1, 1)
    single = monitor_of(one)(served(users[:2], items[:1]))
    assert single["item_rank"] == pytest.approx(1)
    assert "item_uniformity" not in single
    assert "norm_popularity" not in single
