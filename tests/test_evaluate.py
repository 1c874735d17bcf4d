"""Exact evaluation against a brute-force loop, on rankings that are planted."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.evaluate as evaluate_module
from recclr.data.log import Csr, EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError, DivergedError
from recclr.evaluate import Evaluation, EvaluationSet, evaluate
from recclr.intervals import intervals, resampled
from recclr.settings.judging import SLICES
from recclr.topk import top_k_of_scores

NUM_USERS, NUM_ITEMS = 6, 9
KS = (1, 3, 7)


class Planted:
    """Ranks by a fixed table of scores; the last row serves users beyond it."""

    name = "planted"

    def __init__(self, scores):
        self.scores = torch.as_tensor(scores).float()

    def top_k(self, user_idx, k, *, seen=None, items=None):
        rows = user_idx.clamp(max=len(self.scores) - 1)
        return top_k_of_scores(self.scores[rows], k, seen=seen, items=items)


def log_of(pairs, num_users=NUM_USERS, num_items=NUM_ITEMS):
    users, items = zip(*pairs, strict=True) if pairs else ((), ())
    return EncodedLog(
        torch.tensor(users, dtype=torch.int32),
        torch.tensor(items, dtype=torch.int32),
        num_users,
        num_items,
    )


def prepared_of(train, held_out, num_users=NUM_USERS, num_items=NUM_ITEMS):
    return Prepared(
        train=log_of(train, num_users, num_items),
        users=FeatureTable(num_users),
        items=FeatureTable(num_items),
        held_out=log_of(held_out, num_users, num_items),
    )


def bands_slowly(train, num_items):
    """Item slices from their definition: walk down the list until 20 % and 80 % are spent."""
    counts = [sum(item == i for _, item in train) for i in range(num_items)]
    bands = {name: set() for name in ("warm_items", "cold_items", "head", "torso", "tail")}
    spent = 0
    for item in sorted(range(num_items), key=lambda i: (-counts[i], i)):
        bands["warm_items" if counts[item] else "cold_items"].add(item)
        if counts[item]:
            share = spent / len(train)
            bands["head" if share < 0.2 else "torso" if share < 0.8 else "tail"].add(item)
        spent += counts[item]
    return bands


def slowly(scores, train, held_out, num_items, *, also=(), keep_seen=False):
    """{slice: {metric: mean}} and {slice: users}, one user and one slice at a time."""
    bands = bands_slowly(train, num_items)
    # Items outside the corpus (-1) cannot be told apart, so none is a repeat of another.
    history = {u: {i for v, i in [*train, *also] if u == v and i >= 0} for u, _ in held_out}
    trained = {user for user, _ in train}
    relevant = {}
    for user, item in held_out:
        if keep_seen or item not in history[user]:
            relevant.setdefault(user, []).append(item)
    found = {name: [] for name in SLICES}
    for user, items in sorted(relevant.items()):
        inside, outside = {i for i in items if i >= 0}, sum(i < 0 for i in items)
        hidden = set() if keep_seen else history[user]
        row = scores[min(user, len(scores) - 1)]
        ranked = sorted(set(range(num_items)) - hidden, key=lambda i: (-row[i], i))
        found["all"].append(judged_slowly(ranked, inside, outside))
        status = "warm_users" if user in trained else "cold_users"
        found[status].append(judged_slowly(ranked, inside, outside))
        for band, members in bands.items():
            if inside & members:
                found[band].append(judged_slowly(ranked, inside & members, 0))
        cold = bands["cold_items"]
        if inside & cold:
            among = [item for item in ranked if item in cold]
            found["cold_items_among_cold"].append(judged_slowly(among, inside & cold, 0))
    means = {
        name: {metric: sum(r[metric] for r in rows) / len(rows) for metric in rows[0]}
        for name, rows in found.items()
        if rows
    }
    return means, {name: len(rows) for name, rows in found.items() if rows}


def judged_slowly(ranked, inside, outside):
    size = len(inside) + outside
    result = {}
    for k in KS:
        ranks = [rank for rank, item in enumerate(ranked[:k], 1) if item in inside]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, size) + 1))
        result[f"recall@{k}"] = len(ranks) / size
        result[f"ndcg@{k}"] = sum(1 / math.log2(rank + 1) for rank in ranks) / ideal
        result[f"mrr@{k}"] = 1 / ranks[0] if ranks else 0.0
    return result


def pair_lists(max_user, least_item):
    pairs = st.tuples(st.integers(0, max_user), st.integers(least_item, NUM_ITEMS - 1))
    return st.lists(pairs, min_size=1, max_size=40)


def require_equal(found, expected):
    means, users = expected
    assert {name: counts["users"] for name, counts in found.counts.items()} == users
    assert set(found.metrics) == set(means)
    for name, metrics in means.items():
        for metric, value in metrics.items():
            assert found.metrics[name][metric] == pytest.approx(value, abs=1e-12), (name, metric)


@given(
    train=pair_lists(NUM_USERS - 2, 0),
    held_out=pair_lists(NUM_USERS + 2, -1),
    also=pair_lists(NUM_USERS - 1, -1),
    levels=st.integers(1, 20),
    seed=st.integers(0, 1000),
    keep_seen=st.booleans(),
    with_also=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_every_slice_equals_a_brute_force_loop(
    train, held_out, also, levels, seed, keep_seen, with_also
):
    # Distinct inside the corpus; each row outside of it is a relevant item of its own.
    held_out = list(dict.fromkeys(p for p in held_out if p[1] >= 0)) + [
        p for p in held_out if p[1] < 0
    ]
    draws = torch.Generator().manual_seed(seed)
    # Few levels: ties everywhere, settled by item index.
    scores = torch.randint(0, levels, (NUM_USERS + 1, NUM_ITEMS), generator=draws)
    expected = slowly(
        scores.tolist(),
        train,
        held_out,
        NUM_ITEMS,
        also=also if with_also else (),
        keep_seen=keep_seen,
    )
    prepared = prepared_of(train, held_out)
    options = {"keep_seen": keep_seen, "also_seen": log_of(also) if with_also else None}
    if not expected[0]:
        with pytest.raises(ConfigError, match="nothing is left to find"):
            EvaluationSet.from_prepared(prepared, **options)
        return
    examples = EvaluationSet.from_prepared(prepared, **options)
    require_equal(evaluate(Planted(scores), examples, ks=KS), expected)
    for name in SLICES:
        if name in expected[0]:
            examples.require_slice(name)
        else:
            with pytest.raises(ConfigError, match="nobody of validation is in that slice"):
                examples.require_slice(name)


def test_users_left_without_relevant_items_are_dropped_and_counted():
    train = [(0, 1), (1, 2), (2, 3)]
    # User 0 only repeats, user 1 repeats once and finds something, user 2 is new all over.
    held_out = [(0, 1), (0, 1), (1, 2), (1, 5), (2, 4)]
    prepared = prepared_of(train, held_out)
    examples = EvaluationSet.from_prepared(prepared)
    assert examples.user_idx.tolist() == [1, 2]
    assert [examples.relevant.row(row).tolist() for row in (0, 1)] == [[5], [4]]
    assert (examples.num_dropped, examples.num_repeats) == (1, 2)
    found = evaluate(Planted(torch.zeros(1, NUM_ITEMS)), examples, ks=(2,))
    assert found.counts["all"] == {
        "users": 2,
        "relevant": 2,
        "candidates": NUM_ITEMS,
        "dropped_users": 1,
        "repeated_rows": 2,
    }
    kept = EvaluationSet.from_prepared(prepared, keep_seen=True)
    assert kept.user_idx.tolist() == [0, 1, 2]
    assert (kept.num_dropped, kept.num_repeats, kept.seen) == (0, 0, None)


def test_a_held_out_pair_counts_once_however_often_it_was_repeated():
    examples = EvaluationSet.from_prepared(prepared_of([(0, 0)], [(1, 4), (1, 4), (1, 7)]))
    assert examples.relevant.row(0).tolist() == [4, 7]


def test_items_outside_the_corpus_are_relevant_and_never_hit():
    everything = torch.zeros(1, NUM_ITEMS)
    examples = EvaluationSet.from_prepared(prepared_of([(0, 0)], [(1, 4), (1, -1), (2, -1)]))
    found = evaluate(Planted(everything), examples, ks=(NUM_ITEMS, 30))
    assert found.per_user["all"]["recall@9"].tolist() == [0.5, 0.0]
    # Even where the ranking is padded with -1.
    assert found.per_user["all"]["recall@30"].tolist() == [0.5, 0.0]
    assert found.counts["cold_items"]["users"] == 1


def test_the_users_own_items_are_left_out_unless_kept():
    train, held_out = [(0, 0), (0, 1)], [(0, 2)]
    scores = [[9.0, 8, 7, 0, 0, 0, 0, 0, 0]]
    prepared = prepared_of(train, held_out)
    by_default = evaluate(Planted(scores), EvaluationSet.from_prepared(prepared), ks=(1,))
    assert by_default.metrics["all"]["recall@1"] == 1.0
    kept = EvaluationSet.from_prepared(prepared, keep_seen=True)
    assert evaluate(Planted(scores), kept, ks=(1,)).metrics["all"]["recall@1"] == 0.0


def test_validation_items_are_left_out_at_test_and_change_no_slice():
    train, valid = [(0, 0), (1, 1)], [(0, 5), (1, -1), (NUM_USERS + 3, 2)]
    prepared = prepared_of(train, [(0, 5), (0, 2), (1, 3)])
    also = log_of(valid)
    examples = EvaluationSet.from_prepared(prepared, also_seen=also)
    assert [examples.relevant.row(row).tolist() for row in (0, 1)] == [[2], [3]]
    assert sorted(examples.seen.row(0).tolist()) == [0, 5]
    assert (examples.num_repeats, examples.num_dropped) == (1, 0)
    # Item 5 is still cold: statistics are those of train.
    assert examples.item_counts.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_cold_items_had_in_validation_are_not_ranked_among_the_cold():
    prepared = prepared_of([(0, 0)], [(0, 4)])
    # Everything but item 0 is cold; the user took 2 and 3 in validation, which rank first.
    scores = [[0.0, 1, 9, 8, 7, 1, 1, 1, 1]]
    also = log_of([(0, 2), (0, 3), (0, 3)])
    examples = EvaluationSet.from_prepared(prepared, also_seen=also)
    found = evaluate(Planted(scores), examples, ks=(1, 6, 7))
    assert found.metrics["cold_items_among_cold"]["recall@1"] == 1.0
    counts = found.counts["cold_items_among_cold"]
    assert counts["candidates"] == 8
    assert [counts[f"chance_recall@{k}"] for k in (1, 6, 7)] == pytest.approx([1 / 6, 1, 1])


def test_chance_is_the_mean_recall_of_random_rankings():
    train = [(0, 0), (1, 1)]
    held_out = [(0, 4), (0, 6), (0, 1), (1, 5), (2, 0)]
    prepared = prepared_of(train, held_out)
    examples = EvaluationSet.from_prepared(prepared, also_seen=log_of([(0, 3), (1, 2), (1, 7)]))
    draws = torch.Generator().manual_seed(4)
    recalls = []
    for _ in range(400):
        ranker = Planted(torch.rand(NUM_USERS, NUM_ITEMS, generator=draws))
        found = evaluate(ranker, examples, ks=(3,), slices=("cold_items_among_cold",))
        recalls.append(found.metrics["cold_items_among_cold"]["recall@3"])
    recalls = torch.tensor(recalls)
    chance = found.counts["cold_items_among_cold"]["chance_recall@3"]
    assert chance == pytest.approx((3 / 6 + 3 / 5) / 2)
    assert abs(float(recalls.mean()) - chance) < 4 * float(recalls.std()) / 20


def test_ties_stand_in_order_of_item_index():
    examples = EvaluationSet.from_prepared(prepared_of([(0, 0)], [(1, 3), (2, 8)]))
    found = evaluate(Planted(torch.ones(1, NUM_ITEMS)), examples, ks=(3, 4))
    assert found.per_user["all"]["recall@3"].tolist() == [0.0, 0.0]
    assert found.per_user["all"]["recall@4"].tolist() == [1.0, 0.0]


def test_head_torso_and_tail_are_cut_at_20_and_80_percent_of_interactions():
    counts = [1, 0, 3, 2, 2, 1, 1]
    train = [(user, item) for item, count in enumerate(counts) for user in range(count)]
    examples = EvaluationSet.from_prepared(prepared_of(train, [(4, 0)], num_items=7))
    found = {name: mask.nonzero().squeeze(1).tolist() for name, mask in examples.bands().items()}
    # Down the list 2, 3, 4, 0, 5, 6 with 3, 2, 2, 1, 1, 1 of 10: item 2 crosses the 20 % border
    # and is above it, item 5 begins at 80 %.
    assert found == {
        "warm_items": [0, 2, 3, 4, 5, 6],
        "cold_items": [1],
        "head": [2],
        "torso": [0, 3, 4],
        "tail": [5, 6],
    }


def random_case():
    draws = torch.Generator().manual_seed(11)
    train = torch.stack(
        [
            torch.randint(0, 30, (200,), generator=draws),
            torch.randint(0, 40, (200,), generator=draws),
        ]
    )
    held = torch.stack(
        [torch.randint(0, 37, (90,), generator=draws), torch.randint(0, 50, (90,), generator=draws)]
    )
    prepared = prepared_of(train.T.tolist(), held.T.tolist(), num_users=35, num_items=50)
    return prepared, Planted(torch.randint(0, 9, (36, 50), generator=draws))


@pytest.mark.parametrize("chunk", [1, 7, 29])
def test_chunks_of_queries_do_not_change_anything(chunk, monkeypatch):
    prepared, ranker = random_case()
    examples = EvaluationSet.from_prepared(prepared)
    whole = evaluate(ranker, examples, ks=(2, 5))
    assert set(whole.metrics) == set(SLICES)
    calls = []
    monkeypatch.setattr(evaluate_module, "_CHUNK", chunk)
    parts = evaluate(ranker, examples, ks=(2, 5), progress=lambda *call: calls.append(call))
    assert parts.metrics == whole.metrics
    assert parts.counts == whole.counts
    queries = len(examples.user_idx)
    assert calls == [(min(end, queries), queries) for end in range(chunk, queries + chunk, chunk)]


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("length", [1, 3, 17])
def test_stretches_of_the_log_do_not_change_what_is_judged(length, also, monkeypatch):
    draws = torch.Generator().manual_seed(4)

    def some(count, least=0):
        users = torch.randint(NUM_USERS + 3 * (least < 0), (count,), generator=draws).tolist()
        items = torch.randint(least, NUM_ITEMS, (count,), generator=draws).tolist()
        return list(zip(users, items, strict=True))

    prepared = prepared_of(some(40), some(30, least=-1))
    later = log_of(some(9)) if also else None
    whole = EvaluationSet.from_prepared(prepared, also_seen=later)
    assert whole.num_repeats
    assert whole.num_dropped or len(whole.user_idx) > 5
    monkeypatch.setattr("recclr.data.log._STRETCH", length)
    monkeypatch.setattr("recclr.data.grouping._ROWS", length)
    found = EvaluationSet.from_prepared(prepared, also_seen=later)
    for name in ("user_idx", "item_counts", "user_counts"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    for name in ("relevant", "seen"):
        ours, theirs = getattr(found, name), getattr(whole, name)
        assert torch.equal(ours.offsets, theirs.offsets)
        assert torch.equal(ours.values, theirs.values)
    assert (found.num_dropped, found.num_repeats) == (whole.num_dropped, whole.num_repeats)


def test_only_the_slices_asked_for_are_judged():
    prepared, ranker = random_case()
    examples = EvaluationSet.from_prepared(prepared)
    whole = evaluate(ranker, examples, ks=(5,))
    some = evaluate(ranker, examples, ks=(5,), slices=("tail", "cold_users"))
    assert some.metrics == {name: whole.metrics[name] for name in ("cold_users", "tail")}


def test_a_longer_ranking_leaves_the_shorter_cut_offs_alone():
    prepared, ranker = random_case()
    examples = EvaluationSet.from_prepared(prepared)
    short, long = (evaluate(ranker, examples, ks=ks).metrics for ks in ((3,), (3, 20, 99)))
    for name, metrics in short.items():
        assert metrics == {metric: long[name][metric] for metric in metrics}
    assert long["all"]["recall@99"] == 1.0


class Broken:
    name = "broken"

    def top_k(self, user_idx, k, *, seen=None, items=None):
        found = Planted(torch.zeros(1, NUM_ITEMS)).top_k(user_idx, k, seen=seen, items=items)
        scores = torch.where(user_idx[:, None] == 2, torch.nan, found.scores)
        return replace(found, scores=scores)


@pytest.mark.parametrize(
    "ranker", [Broken(), Planted([[0.0] * 8 + [math.nan]])], ids=["own", "by_scores"]
)
def test_nan_scores_are_refused(ranker):
    examples = EvaluationSet.from_prepared(prepared_of([(0, 0)], [(1, 3), (2, 8)]))
    with pytest.raises(DivergedError, match="NaN"):
        evaluate(ranker, examples, ks=(3,))


@pytest.mark.parametrize(
    ("held_out", "words"), [([], "no held-out rows"), ([(0, 0)], "keep_seen = true")]
)
def test_nothing_to_judge_is_refused_with_a_reason(held_out, words):
    with pytest.raises(ConfigError, match=words):
        EvaluationSet.from_prepared(prepared_of([(0, 0)], held_out))
    without = replace(prepared_of([(0, 0)], [(0, 1)]), held_out=None)
    with pytest.raises(ConfigError, match="no held-out rows"):
        EvaluationSet.from_prepared(without)


def test_users_without_any_row_before_are_judged_alone():
    # User 4 has no train row, users 7 and 9 no index at all; others are not looked at.
    prepared = prepared_of([(0, 0), (1, 0), (2, 1)], [(4, 2), (9, 1), (9, -1)])
    examples = EvaluationSet.from_prepared(prepared)
    assert examples.user_idx.tolist() == [4, 9]
    assert examples.relevant.lengths().tolist() == [1, 2]
    assert examples.seen.lengths().tolist() == [0, 0]
    assert examples.user_counts.tolist() == [0, 0]
    assert examples.num_repeats == examples.num_dropped == 0
    later = replace(prepared.held_out, user_idx=torch.tensor([4, 7, 9]).int())
    examples = EvaluationSet.from_prepared(prepared, also_seen=later)
    # Of users beyond train nothing is known, whatever the rows between say.
    assert examples.seen.lengths().tolist() == [0]
    assert (examples.user_idx.tolist(), examples.num_dropped) == ([9], 1)


def test_held_out_rows_change_no_statistic():
    train = [(0, 0), (1, 0), (2, 1)]
    plain = EvaluationSet.from_prepared(prepared_of(train, [(0, 2), (4, 3)]))
    # The canary: an item and a user that are everywhere, but in held-out rows only.
    canary = [(user, 7) for user in range(4)] * 50 + [(4, item) for item in range(NUM_ITEMS)]
    crowded = EvaluationSet.from_prepared(prepared_of(train, [(0, 2), *canary]))
    assert crowded.item_counts.tolist() == plain.item_counts.tolist() == [2, 1] + [0] * 7
    assert crowded.user_counts.tolist() == [1, 1, 1, 0, 0]
    for name, mask in plain.bands().items():
        assert torch.equal(mask, crowded.bands()[name])


def test_intervals_do_not_depend_on_the_company():
    prepared, ranker = random_case()
    examples = EvaluationSet.from_prepared(prepared)
    alone = evaluate(ranker, examples, ks=(5,), num_bootstrap=30, seed=3)
    constant = evaluate(Planted(torch.ones(1, 50)), examples, ks=(5,))
    both = [constant, replace(alone, intervals={})]
    means = resampled([e.per_user for e in both], 30, seed=3)
    first, second = (
        replace(e, intervals=intervals(own)) for e, own in zip(both, means, strict=True)
    )
    assert set(alone.intervals) == set(alone.metrics)
    for name, shown in alone.intervals.items():
        for metric, bounds in shown.items():
            assert second.intervals[name][metric] == pytest.approx(bounds, abs=1e-12)
            low, high = first.intervals[name][metric]
            assert low <= constant.metrics[name][metric] <= high
    assert alone.metrics == second.metrics
    assert resampled([], 30) == []


def test_shown_as_a_table_and_as_json():
    examples = EvaluationSet.from_prepared(prepared_of([(0, 0)], [(1, 3), (2, 8)]))
    found = evaluate(Planted([[0.0, 0, 0, 5, 0, 0, 0, 0, 0]]), examples, ks=(1,))
    lines = str(found).splitlines()
    assert lines[0].split() == ["users", "recall@1", "ndcg@1"]
    assert lines[1].split() == ["all", "2", "0.5000", "0.5000"]
    assert found.to_json()["metrics"]["all"]["recall@1"] == 0.5
    assert set(found.to_json()) == {"metrics", "intervals", "counts"}
    assert str(Evaluation("empty", {}, {}, {})).split() == ["users"]


def test_relevant_items_of_a_slice_are_cut_down_to_it():
    examples = EvaluationSet.from_prepared(
        prepared_of([(0, 0), (1, 1)], [(0, 1), (0, 5), (2, 6), (2, -1), (3, 0)])
    )
    queries, relevant = examples.restricted(examples.bands()["cold_items"])
    assert queries.tolist() == [0, 1]
    assert [relevant.row(row).tolist() for row in range(2)] == [[5], [6]]
    nothing = examples.restricted(torch.zeros(NUM_ITEMS, dtype=torch.bool))
    assert (len(nothing[0]), nothing[1].num_rows) == (0, 0)
    assert isinstance(nothing[1], Csr)
