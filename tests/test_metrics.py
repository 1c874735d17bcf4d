"""Ranking metrics against slow loops, and against ir-measures where the definitions agree."""

import math

import ir_measures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, P, R, Success, nDCG

from recclr.errors import ShapeError
from recclr.metrics import DEFINITIONS, Hits, PerUser, ranking_metrics
from recclr.settings import METRIC_NAMES

KS = (1, 3, 4, 10)


def slowly(ranked, relevant, k):
    """Each metric of one user from its definition in words."""
    top = ranked[:k]
    hit_ranks = [rank for rank, item in enumerate(top, 1) if item in relevant]
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))
    precision_at_hits = [sum(r <= rank for r in hit_ranks) / rank for rank in hit_ranks]
    return {
        "recall": len(hit_ranks) / len(relevant),
        "capped_recall": len(hit_ranks) / min(k, len(relevant)),
        "hit_rate": float(bool(hit_ranks)),
        "ndcg": sum(1 / math.log2(rank + 1) for rank in hit_ranks) / ideal,
        "mrr": 1 / hit_ranks[0] if hit_ranks else 0.0,
        "map": sum(precision_at_hits) / min(k, len(relevant)),
        "precision": len(hit_ranks) / k,
    }


@st.composite
def rankings(draw):
    """Rankings of distinct items, and for each the relevant items, ranked or not."""
    num_items = draw(st.integers(max(KS), 14))
    items = st.permutations(range(num_items))
    relevant = st.sets(st.integers(0, num_items + 2), min_size=1, max_size=num_items + 3)
    return draw(st.lists(st.tuples(items, relevant), min_size=1, max_size=5))


def as_hits(cases):
    width = min(len(ranked) for ranked, _ in cases)
    hits = [[item in relevant for item in ranked[:width]] for ranked, relevant in cases]
    return torch.tensor(hits), torch.tensor([len(relevant) for _, relevant in cases])


@given(rankings())
@settings(deadline=None)
def test_every_metric_equals_its_definition(cases):
    found = ranking_metrics(*as_hits(cases), KS)
    assert set(found) == {f"{name}@{k}" for name in METRIC_NAMES for k in KS}
    for row, (ranked, relevant) in enumerate(cases):
        for k in KS:
            for name, value in slowly(ranked, relevant, k).items():
                assert float(found[f"{name}@{k}"][row]) == pytest.approx(value, abs=1e-12)


@given(rankings())
@settings(deadline=None, max_examples=40)
def test_equals_ir_measures(cases):
    found = ranking_metrics(*as_hits(cases), KS)
    qrels = [
        ir_measures.Qrel(str(row), str(item), 1)
        for row, (_, relevant) in enumerate(cases)
        for item in relevant
    ]
    run = [
        ir_measures.ScoredDoc(str(row), str(item), -float(place))
        for row, (ranked, _) in enumerate(cases)
        for place, item in enumerate(ranked)
    ]
    theirs = {"recall": R, "ndcg": nDCG, "mrr": RR, "map": AP, "precision": P, "hit_rate": Success}
    names = {measure @ k: (name, k) for name, measure in theirs.items() for k in KS}
    judged = list(ir_measures.iter_calc(list(names), qrels, run))
    assert len(judged) == len(names) * len(cases)
    for metric in judged:
        name, k = names[metric.measure]
        row = int(metric.query_id)
        ours = float(found[f"{name}@{k}"][row])
        if name == "map":
            # AP@k divides by all relevant items, ours by those that fit into k places.
            num_relevant = len(cases[row][1])
            ours *= min(k, num_relevant) / num_relevant
        assert ours == pytest.approx(metric.value, abs=1e-6), (name, k)


@given(rankings())
@settings(deadline=None, max_examples=40)
def test_every_metric_lies_between_0_and_1_and_is_1_for_the_ideal_ranking(cases):
    hits, num_relevant = as_hits(cases)
    for values in ranking_metrics(hits, num_relevant, KS).values():
        assert bool(((values >= 0) & (values <= 1 + 1e-12)).all())
    ideal = torch.arange(max(KS)) < num_relevant[:, None]
    found = ranking_metrics(ideal, num_relevant, KS)
    for k in KS:
        for name in ("capped_recall", "hit_rate", "ndcg", "mrr", "map"):
            assert found[f"{name}@{k}"].tolist() == pytest.approx([1.0] * len(hits))


def test_hits_beyond_the_cut_off_do_not_count():
    hits = torch.tensor([[False, False, True, True]])
    found = ranking_metrics(hits, torch.tensor([2]), (2, 4))
    assert all(float(found[f"{name}@2"]) == 0 for name in METRIC_NAMES)
    assert all(float(found[f"{name}@4"]) > 0 for name in METRIC_NAMES)


def test_no_query_gives_empty_metrics():
    found = ranking_metrics(torch.empty((0, 5), dtype=torch.bool), torch.empty(0).long(), (2, 5))
    assert {name: values.tolist() for name, values in found.items()} == {
        f"{name}@{k}": [] for name in METRIC_NAMES for k in (2, 5)
    }
    assert all(values.dtype == torch.float64 for values in found.values())


def test_wrong_shapes_and_users_without_relevant_items_are_refused():
    hits = torch.zeros((2, 3), dtype=torch.bool)
    with pytest.raises(ShapeError, match="at least 4"):
        ranking_metrics(hits, torch.ones(2), (2, 4))
    with pytest.raises(ShapeError, match="2 relevant counts"):
        ranking_metrics(hits, torch.ones(3), (2,))
    with pytest.raises(ShapeError, match="drop and count"):
        ranking_metrics(hits, torch.tensor([1, 0]), (2,))


@given(rankings(), st.sampled_from([1, 2, 5]))
@settings(deadline=None, max_examples=40)
def test_figures_of_users_are_the_same_whenever_and_however_they_are_reckoned(cases, together):
    hits, relevant = as_hits(cases)
    expected = ranking_metrics(hits, relevant, KS)
    none = Hits.of(hits[:0], relevant[:0], KS)
    figures = PerUser({"all": Hits.of(hits, relevant, KS), "none": none})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recclr.metrics._ROWS", together)
        found = dict(figures)
    assert list(found) == list(figures) == ["all", "none"]
    assert len(figures) == 2
    assert found["all"].keys() == found["none"].keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found["all"][name], values)
        assert found["none"][name].shape == (0,)
    assert len(figures._hits["all"].rows) == int(hits.any(1).sum())


def test_every_metric_is_defined_in_words():
    assert {f"{name}@k" for name in METRIC_NAMES} <= set(DEFINITIONS)
    assert "min(k, relevant)" in DEFINITIONS["ndcg@k"]
    assert "min(k, relevant)" in DEFINITIONS["map@k"]
    assert "dropped and counted" in DEFINITIONS["mean"].replace("\n", " ")
    assert "item index" in DEFINITIONS["ranking"]
