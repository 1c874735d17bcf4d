"""Statistics in time against loops over the events strictly before the moment."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.data.log import EncodedLog
from recclr.errors import ConfigError
from recclr.statistics import DAY_S, TimeIndex, statistics_at, statistics_width

NUM_ENTITIES = 4
# Far from 0, so that nothing works only for small timestamps.
EPOCH_S = 1_700_000_000

# Few distinct moments: ties, and questions at exactly the time of an event, are the rule.
moments = st.integers(-3, 9).map(lambda step: EPOCH_S + step * DAY_S // 2)
logs = st.lists(st.tuples(st.integers(0, NUM_ENTITIES - 1), moments), max_size=25)
questions = st.lists(st.tuples(st.integers(0, NUM_ENTITIES + 2), moments), min_size=1, max_size=7)


def index_of(events, num_entities=NUM_ENTITIES):
    entity_idx = torch.tensor([entity for entity, _ in events], dtype=torch.int32)
    timestamp = torch.tensor([time for _, time in events], dtype=torch.int64)
    return TimeIndex(entity_idx, timestamp, num_entities)


def asked(pairs):
    return torch.tensor([entity for entity, _ in pairs]), torch.tensor([at for _, at in pairs])


def times_before(events, entity, at, window_s=math.inf):
    return [time for one, time in events if one == entity and at - window_s <= time < at]


@given(events=logs, pairs=questions, window_s=st.sampled_from([1, DAY_S // 2, DAY_S, 9 * DAY_S]))
@settings(max_examples=150, deadline=None)
def test_counts_and_last_seen_equal_a_loop(events, pairs, window_s):
    index = index_of(events)
    pairs = [(entity % NUM_ENTITIES, at) for entity, at in pairs]
    idx, at = asked(pairs)
    ever, inside, totals = (
        index.counts(idx, at),
        index.counts(idx, at, window_s),
        index.totals(at, window_s),
    )
    last = index.last_seen(idx, at)
    for row, (entity, moment) in enumerate(pairs):
        before = times_before(events, entity, moment)
        assert ever[row] == len(before)
        assert inside[row] == len(times_before(events, entity, moment, window_s))
        assert totals[row] == sum(
            len(times_before(events, one, moment, window_s)) for one in range(NUM_ENTITIES)
        )
        assert last[row] == max(before) if before else last[row] < -(1 << 60)
    for entity, first in enumerate(index.first_seen.tolist()):
        own = [time for one, time in events if one == entity]
        assert first == min(own) if own else first > 1 << 60


@given(events=logs)
@settings(max_examples=50, deadline=None)
def test_rank_walks_the_log_by_entity_and_time(events):
    index = index_of(events)
    by_entity = [divmod(key, index.span) for key in index.keys.tolist()]
    by_entity = [(entity, index.origin + second) for entity, second in by_entity]
    assert by_entity == sorted(events)
    assert index.all_times.tolist() == sorted(time for _, time in events)
    for entity in range(NUM_ENTITIES):
        start = index.rank(torch.tensor([entity]), torch.tensor(EPOCH_S - 99 * DAY_S))
        assert start == sum(one < entity for one, _ in events)


def statistics_of(events, entity, at, windows_d):
    """Slow twin of one row of ``statistics_at``."""
    row = []
    for days in windows_d:
        window_s = round(days * DAY_S)
        of_all = sum(len(times_before(events, e, at, window_s)) for e in range(NUM_ENTITIES))
        own = len(times_before(events, entity, at, window_s))
        row.append(math.log1p(own * NUM_ENTITIES / max(of_all, 1)))
    before = times_before(events, entity, at)
    if not before:
        return [*row, 0.0, 0.0, 1.0]
    ages_d = [(at - min(before)) / DAY_S, (at - max(before)) / DAY_S]
    return [*row, *map(math.log1p, ages_d), 0.0]


@given(events=logs, pairs=questions)
@settings(max_examples=150, deadline=None)
def test_statistics_equal_a_loop_for_known_and_unknown_entities(events, pairs):
    windows_d = (0.5, 2.0, 40.0)
    idx, at = asked(pairs)
    found = statistics_at(index_of(events), idx, at, windows_d=windows_d, age=True)
    assert found.dtype == torch.float32
    assert found.shape == (len(pairs), statistics_width(windows_d, True))
    expected = [statistics_of(events, entity, moment, windows_d) for entity, moment in pairs]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@given(events=logs, pairs=questions)
@settings(max_examples=50, deadline=None)
def test_one_moment_for_all_is_that_moment_for_each(events, pairs):
    index, at = index_of(events), pairs[0][1]
    idx = torch.tensor([entity for entity, _ in pairs])
    together = statistics_at(index, idx, torch.tensor(at), windows_d=(3.0,), age=True)
    each = statistics_at(index, idx, torch.full_like(idx, at), windows_d=(3.0,), age=True)
    assert torch.equal(together, each)


@given(events=logs, canary=logs, pairs=questions)
@settings(max_examples=150, deadline=None)
def test_no_event_at_or_after_the_moment_ever_matters(events, canary, pairs):
    at = pairs[0][1]
    past = [event for event in events if event[1] < at]
    future = [(entity, max(time, at)) for entity, time in [*events, *canary]]
    idx = torch.arange(NUM_ENTITIES + 2)
    found = [
        statistics_at(index_of(log), idx, torch.tensor(at), windows_d=(1.0, 9.0), age=True)
        for log in (past, past + future)
    ]
    assert torch.equal(*found)


def test_a_busier_season_is_no_rise():
    quiet = [(entity, EPOCH_S) for entity in range(NUM_ENTITIES)]
    at = torch.tensor(EPOCH_S + 1)
    found = [
        statistics_at(index_of(log), torch.arange(NUM_ENTITIES), at, windows_d=(1.0,), age=False)
        for log in (quiet, quiet * 7)
    ]
    assert torch.equal(*found)
    assert torch.allclose(found[0], torch.tensor(2.0).log())


def test_one_second_decides_between_seen_and_never_seen():
    index = index_of([(2, EPOCH_S)])
    flags = [
        statistics_at(index, torch.tensor([2]), torch.tensor(EPOCH_S + s), windows_d=(), age=True)
        for s in (0, 1)
    ]
    assert [flag[0, 2].item() for flag in flags] == [1.0, 0.0]


def test_users_and_items_of_a_log_have_their_own_index():
    log = EncodedLog(
        torch.tensor([0, 2, 2], dtype=torch.int32),
        torch.tensor([4, 1, 4], dtype=torch.int32),
        num_users=3,
        num_items=6,
        timestamp=torch.tensor([10, 20, 30]),
    )
    late = torch.tensor(99)
    users, items = TimeIndex.of_users(log), TimeIndex.of_items(log)
    assert users.counts(torch.arange(3), late).tolist() == [1, 0, 2]
    assert items.counts(torch.arange(6), late).tolist() == [0, 1, 0, 0, 2, 0]


def test_a_log_without_time_or_with_endless_time_is_refused():
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ConfigError, match="need timestamps"):
        TimeIndex.of_items(EncodedLog(one, one, num_users=1, num_items=1))
    with pytest.raises(ConfigError, match="too long"):
        TimeIndex(torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1 << 40]), 1 << 30)
