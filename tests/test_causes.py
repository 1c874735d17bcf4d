"""Rules name what was planted, and nothing on healthy models."""

import json

import pytest
import torch

from recclr.causes import causes
from recclr.data.log import EncodedLog
from recclr.monitors import Monitor
from recclr.topk import EmbeddingRanker
from recclr.watching import tell_figures

NUM_USERS, NUM_ITEMS, DIM, K = 300, 700, 16, 10
AT_LOW = {"temperature": 0.02, "temperature_low": 0.02, "temperature_high": 1.0}
AT_HIGH = AT_LOW | {"temperature": 1.0}
BETWEEN = AT_LOW | {"temperature": 0.11}


def draws(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=draws(seed))


def the_log():
    users = torch.arange(NUM_USERS).repeat_interleave(12).int()
    items = (NUM_ITEMS * torch.rand(len(users), generator=draws(1)) ** 2).int()
    return EncodedLog(users, items, NUM_USERS, NUM_ITEMS)


def figures(users, items):
    return Monitor(the_log(), k=K, seed=3)(EmbeddingRanker("model", users, items))


def names(users, items):
    return [cause.name for cause in causes([figures(users, items)], final=True)]


def healthy(seed=0, similarity="cosine"):
    """Tastes in clusters, with popularity's direction in common, as a trained model has them."""
    tastes = normal(20, DIM, seed=seed)
    users = tastes[torch.arange(NUM_USERS + 1) % 20] + 0.7 * normal(NUM_USERS + 1, DIM, seed=seed)
    items = tastes[torch.arange(NUM_ITEMS) % 20] + 0.7 * normal(NUM_ITEMS, DIM, seed=seed + 1)
    users[:, 0] += 2.0
    items[:, 0] += normal(NUM_ITEMS, seed=seed + 2)
    if similarity == "cosine":
        return tuple(x / x.norm(dim=1, keepdim=True) for x in (users, items))
    popular = 0.5 + torch.rand(NUM_ITEMS, 1, generator=draws(seed))
    return users, items * popular


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("seed", range(4))
def test_no_rule_fires_on_a_healthy_model(similarity, seed):
    users, items = healthy(seed, similarity)
    history = [figures(users, items) | BETWEEN] * 5
    assert causes(history) == causes(history, final=True) == []


def test_no_rule_fires_on_vectors_as_they_are_drawn():
    for dim in (2, 8, 64):
        assert names(normal(NUM_USERS + 1, dim), normal(NUM_ITEMS, dim, seed=1)) == []


def test_a_user_tower_that_says_one_thing():
    _, items = healthy()
    same = normal(1, DIM) + 0.01 * normal(NUM_USERS + 1, DIM, seed=1)
    (cause,) = causes([figures(same, items)], final=True)
    assert cause.name == "constant_user_tower"
    assert "nearly the same vector to everybody" in cause.text
    assert "user.history" in cause.advice


def test_an_item_tower_that_says_one_thing():
    users, _ = healthy()
    assert names(users, normal(1, DIM).expand(NUM_ITEMS, -1)) == ["constant_item_tower"]


def test_vectors_along_one_line():
    users, items = healthy()
    line, side = normal(1, DIM, seed=5), normal(NUM_USERS + 1, 1, seed=6).sign()
    assert names(side * line + 0.02 * users, items) == ["one_direction_users"]
    # One direction, and lengths that rank the items: the same list for everybody, or its reverse.
    lengths = 0.2 + torch.rand(NUM_ITEMS, 1, generator=draws(7))
    assert names(users, lengths * line) == ["one_direction_items"]


def test_vectors_in_few_of_many_dimensions():
    users, items = normal(NUM_USERS + 1, 2), normal(NUM_ITEMS, 2, seed=1)
    wide = normal(2, 64, seed=2)
    found = causes([figures(users @ wide, items @ wide)], final=True)
    assert [cause.name for cause in found] == ["low_rank_users", "low_rank_items"]
    assert "only 2.0 of 64 dimensions" in found[0].text
    assert names(users @ wide[:, :6], items @ wide[:, :6]) == []


def test_the_same_popular_items_for_everybody():
    users, items = healthy(similarity="dot")
    users[:, 1], items[:K, 1] = 5.0, 9.0
    (cause,) = causes([figures(users, items)], final=True)
    assert cause.name == "popularity_only"
    assert "10 most recommended items take" in cause.text


@pytest.mark.parametrize(("spread", "named"), [(1.0, False), (3.0, True)])
def test_lengths_that_run_apart(spread, named):
    users, items = healthy(similarity="dot")
    lengths = torch.exp(spread * normal(NUM_ITEMS, 1, seed=8))
    found = causes([figures(users, lengths * items)], final=True)
    assert ("item_norms_apart" in [cause.name for cause in found]) is named
    if named:
        (text,) = [cause.text for cause in found if cause.name == "item_norms_apart"]
        assert "times the first" in text
    # Half of the items without any length at all.
    items[::2][: NUM_ITEMS // 2] = 0.0
    items[1::8] = 0.0
    assert "item_norms_apart" in names(users, items)


def test_concentrated_demand_is_no_fault_of_the_model():
    users, items = healthy(similarity="dot")
    users[:, 1], items[:K, 1] = 5.0, 9.0
    # Everybody takes the first few items.
    wanted = torch.arange(NUM_USERS), torch.arange(NUM_USERS) % 8
    monitor = Monitor(the_log(), k=K, seed=3, held_out=wanted)
    found = monitor(EmbeddingRanker("model", users, items))
    assert found["top_percent_share"] > 0.9
    assert causes([found], final=True) == []


@pytest.mark.parametrize(("figures", "which"), [(AT_LOW, "lower"), (AT_HIGH, "upper")])
def test_a_temperature_that_stays_at_its_bound(figures, which):
    assert causes([figures, figures]) == causes([BETWEEN, figures, figures]) == []
    assert causes([figures, BETWEEN, figures]) == causes([figures, figures, BETWEEN]) == []
    (cause,) = causes([BETWEEN, figures, figures, figures])
    assert cause.name == f"temperature_at_{which}_bound"
    assert "raise loss.max_temperature" in cause.advice or "lower loss.min_t" in cause.advice
    assert [c.name for c in causes([figures], final=True)] == [cause.name]


def test_a_temperature_that_is_given_saturates_nothing():
    assert causes([{"temperature": 0.02}] * 4, final=True) == []
    pinned = {"temperature": 0.1, "temperature_low": 0.1, "temperature_high": 0.1}
    assert causes([pinned] * 4, final=True) == []


# As trained on real logs, each with a good part of its final recall; the first learns to recommend
# what is new, which many take. Figures of collapse are near, so these hold the thresholds in place.
MOVIETWEETINGS = {"user_variance": 0.245, "item_variance": 0.115, "user_rank": 26.8} | {
    **{"item_rank": 18.3, "user_first_share": 0.806, "item_first_share": 0.897},
    **{"top_percent_share": 0.999, "overlap": 0.734, "demand_share": 0.493, "top_items": 127},
}
ONLINE_RETAIL = {"user_variance": 0.077, "item_variance": 0.14, "user_rank": 12.0} | {
    **{"item_rank": 13.1, "user_first_share": 0.925, "item_first_share": 0.863},
    **{"top_percent_share": 0.859, "overlap": 0.463, "demand_share": 0.126, "top_items": 41},
}


@pytest.mark.parametrize("found", [MOVIETWEETINGS, ONLINE_RETAIL])
def test_no_rule_fires_on_models_of_real_logs(found):
    lengths = {f"item_norm_{name}": 1.0 for name in ("q1", "median", "q3")}
    limits = {"user_rank_limit": 64.0, "item_rank_limit": 64.0}
    assert causes([found | limits | lengths], final=True) == []


def test_missing_figures_keep_rules_silent():
    assert causes([]) == causes([{}]) == causes([{}], final=True) == []
    _, items = healthy()
    sick = figures(normal(1, DIM).expand(NUM_USERS + 1, -1), items)
    assert [cause.name for cause in causes([sick], final=True)] == ["constant_user_tower"]
    for name in ("overlap", "user_variance"):
        found = causes([{k: v for k, v in sick.items() if k != name}], final=True)
        assert "constant_user_tower" not in [cause.name for cause in found]


def test_a_cause_is_told_when_no_evaluation_before_named_it():
    _, items = healthy()
    sick, fine = figures(normal(1, DIM).expand(NUM_USERS + 1, -1), items), figures(*healthy())
    events, evaluations = [], []
    course = [fine, sick, sick, sick, sick, fine, sick, sick, sick | AT_LOW]
    for step, found in enumerate(course):
        evaluations.append({"step": step, "epoch": step / 4, "metrics": {}})
        tell_figures(found, evaluations, events.append)
        # As a resumed training has them.
        evaluations = json.loads(json.dumps(evaluations, allow_nan=False))
    named = ["constant_user_tower"]
    assert [e["causes"] for e in evaluations] == [*[[]] * 3, named, named, *[[]] * 3, named]
    assert [e["monitors"] for e in evaluations][:2] == [fine, sick]
    told = [(e["kind"], e["step"]) for e in events if e["kind"] != "warning"]
    assert told == [("monitor", step) for step in range(9)]
    (warning,) = (e for e in events if e["kind"] == "warning")
    assert (warning["step"], warning["epoch"]) == (3, 0.75)
    assert warning["cause"] == "constant_user_tower"
    assert warning["text"]
    assert warning["advice"]
