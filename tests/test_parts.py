"""Parts of a tower against loops over entities; histories never see their future or target."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, kstest
from torch import nn

from recclr.data.log import CategoricalColumn, Csr, EncodedLog, RaggedColumn
from recclr.history import HistoryPart
from recclr.optim import Table, TableOptimizer
from recclr.order import keyed_uniform
from recclr.parts import BagPart, CategoryPart, DensePart, IdPart, StatisticsPart
from recclr.rows import Rows
from recclr.sequences import Shuffle, cropped
from recclr.statistics import DAY_S, TimeIndex, statistics_at

DIM = 3
NUM_USERS, NUM_ITEMS = 4, 6


def table_of(num_rows, seed=0):
    return Table(num_rows, DIM, std=1.0, generator=torch.Generator().manual_seed(seed))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def every(count):
    return torch.ones(count, dtype=torch.bool)


def is_likely(hits, trials, probability):
    low, high = binom.interval(1 - 1e-6, trials, probability)
    return low <= hits <= high


# ids


def test_ids_are_table_rows_shifted_by_the_unknown_one():
    part = IdPart(table_of(6), every(5), dropout=0.0, trains_unknown=False)
    idx = torch.tensor([4, 0, 4, 2])
    for rows in (Rows(idx), Rows(idx, generator=draws())):
        assert torch.equal(part(rows), part.table.weight[idx + 1])


def test_an_unknown_id_that_training_never_shows_is_served_the_mean_of_the_known():
    known = torch.tensor([True, False, True, True, False])
    part = IdPart(table_of(6), known, dropout=0.0, trains_unknown=False)
    found = part(Rows(torch.tensor([0, 1, 4, 5, 77, 3])))
    mean = part.table.weight[[1, 3, 4]].mean(0)
    expected = [part.table.weight[1], mean, mean, mean, mean, part.table.weight[4]]
    torch.testing.assert_close(found, torch.stack(expected))
    shown = part(Rows(torch.tensor([0, 1]), generator=draws()))
    assert torch.equal(shown, part.table.weight[[1, 0]])


def test_id_dropout_shows_the_unknown_row_at_its_rate_and_trains_it():
    part = IdPart(table_of(8), every(7), dropout=0.3, trains_unknown=True)
    idx = torch.arange(7).repeat(500)
    vectors = part(Rows(idx, generator=draws(1)))
    dropped = (vectors == part.table.weight[0]).all(1)
    assert torch.equal(vectors[~dropped], part.table.weight[idx[~dropped] + 1])
    assert is_likely(int(dropped.sum()), len(idx), 0.3)
    vectors[dropped].sum().backward()
    before = part.table.weight.clone()
    TableOptimizer({"ids": part.table}, "sgd").step(0.01)
    expected = before[0] - 0.01 * dropped.sum()
    torch.testing.assert_close(part.table.weight[0], expected)
    # What it learned is what unknown entities are served.
    assert torch.equal(part(Rows(torch.tensor([7, 99]))), part.table.weight[[0, 0]])


def test_nothing_is_dropped_at_inference():
    part = IdPart(table_of(8), every(7), dropout=0.9, trains_unknown=True)
    assert torch.equal(part(Rows(torch.arange(7))), part.table.weight[1:])


def test_as_of_ids_count_from_the_second_after_they_were_first_seen():
    first_seen = torch.tensor([100, 200, 1 << 62])
    part = IdPart(
        table_of(4),
        torch.tensor([True, True, False]),
        dropout=0.0,
        trains_unknown=True,
        first_seen=first_seen,
    )

    def rows_at(at):
        found = part(Rows(torch.tensor([0, 1, 2, 3]), torch.tensor(at)))
        return [int((part.table.weight == vector).all(1).nonzero()) for vector in found]

    assert rows_at(100) == [0, 0, 0, 0]
    assert rows_at(101) == [1, 0, 0, 0]
    assert rows_at(200) == [1, 0, 0, 0]
    assert rows_at(201) == [1, 2, 0, 0]
    each = part(Rows(torch.tensor([1, 1]), torch.tensor([200, 201])))
    assert torch.equal(each, part.table.weight[[0, 2]])


# features


def test_a_missing_unknown_or_dropped_category_is_row_0():
    column = CategoricalColumn(torch.tensor([2, 0, 1, 2], dtype=torch.int32), 3)
    part = CategoryPart(table_of(4), column, dropout=0.25)
    assert torch.equal(
        part(Rows(torch.tensor([0, 1, 2, 3, 4, 99]))), part.table.weight[[2, 0, 1, 2, 0, 0]]
    )
    idx = torch.tensor([0, 2]).repeat(1000)
    found = part(Rows(idx, generator=draws()))
    dropped = (found == part.table.weight[0]).all(1)
    assert torch.equal(found[~dropped], part.table.weight[[2, 1]].repeat(1000, 1)[~dropped])
    assert is_likely(int(dropped.sum()), len(idx), 0.25)


bags = st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=6)


@given(lists=bags, asked=st.lists(st.integers(0, 8), max_size=9))
@settings(max_examples=100, deadline=None)
def test_a_bag_is_the_mean_of_its_categories_as_a_loop_has_it(lists, asked):
    values = torch.tensor([v for bag in lists for v in bag], dtype=torch.int32)
    offsets = torch.tensor([0, *(len(bag) for bag in lists)]).cumsum(0)
    part = BagPart(table_of(6), RaggedColumn(Csr(offsets, values), 5), dropout=0.0)
    found = part(Rows(torch.tensor(asked, dtype=torch.int64)))
    assert found.shape == (len(asked), DIM)
    for vector, entity in zip(found, asked, strict=True):
        bag = lists[entity] if entity < len(lists) else []
        # Repeats count as often as they stand there; nothing at all is the last row.
        expected = part.table.weight[bag].mean(0) if bag else part.table.weight[5]
        torch.testing.assert_close(vector, expected)


def table_gradient(table):
    """Of every row, and which rows were looked up."""
    grads, touched = torch.zeros_like(table.weight), torch.zeros(len(table.weight))
    for lookup in table.lookups:
        if lookup.vectors.grad is None:
            assert not len(lookup.rows)
            continue
        places = torch.arange(len(lookup.rows)) if lookup.places is None else lookup.places
        grads.index_add_(0, lookup.rows, lookup.vectors.grad[places])
        touched[lookup.rows] = 1
    table.lookups.clear()
    return grads, touched


def assert_padded(part, rows, tables):
    """Padded to a fixed shape a part gives the same, and teaches its tables the same."""
    found = {}
    for fixed_shapes in (False, True):
        vectors = part(replace(rows, fixed_shapes=fixed_shapes))
        pull = torch.linspace(-1.0, 2.0, vectors.numel()).view_as(vectors)
        (vectors * pull).sum().backward()
        found[fixed_shapes] = vectors.detach(), [table_gradient(table) for table in tables]
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    for (ours, touched), (theirs, asked) in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        yield touched, asked


@given(lists=bags, asked=st.lists(st.integers(0, 8), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_padded_bags_equal_ragged_ones(lists, asked):
    values = torch.tensor([v for bag in lists for v in bag], dtype=torch.int32)
    offsets = torch.tensor([0, *(len(bag) for bag in lists)]).cumsum(0)
    part = BagPart(table_of(6), RaggedColumn(Csr(offsets, values), 5), dropout=0.0)
    rows = Rows(torch.tensor(asked), generator=draws())
    for touched, expected in assert_padded(part, rows, [part.table]):
        # The row of empty bags is looked up in either form.
        assert torch.equal(touched, expected)


def test_gradients_of_bags_reach_each_category_by_its_share():
    column = RaggedColumn(Csr(torch.tensor([0, 3, 3]), torch.tensor([1, 1, 4]).int()), 5)
    part = BagPart(table_of(6), column, dropout=0.0)
    before = part.table.weight.clone()
    part(Rows(torch.tensor([0, 1, 1]), generator=draws())).sum().backward()
    TableOptimizer({"bag": part.table}, "sgd").step(1.0)
    moved = (before - part.table.weight)[:, 0]
    torch.testing.assert_close(moved, torch.tensor([0, 2 / 3, 0, 0, 1 / 3, 2.0]))


def test_dropped_bags_are_shown_as_empty_ones():
    column = RaggedColumn(Csr(torch.tensor([0, 1]), torch.tensor([3]).int()), 5)
    part = BagPart(table_of(6), column, dropout=0.4)
    found = part(Rows(torch.zeros(2000, dtype=torch.int64), generator=draws()))
    dropped = (found == part.table.weight[5]).all(1)
    assert torch.equal(found[~dropped], part.table.weight[[3]].expand(int((~dropped).sum()), DIM))
    assert is_likely(int(dropped.sum()), 2000, 0.4)


@pytest.mark.parametrize("width", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dense_vectors_pass_the_network_and_absent_ones_are_the_missing_vector(width, dtype):
    values = torch.randn(5, width, generator=draws()).to(dtype)
    part = DensePart(values, DIM, dropout=0.2)
    torch.nn.init.normal_(part.missing)
    idx = torch.tensor([4, 0, 5, 99])
    found = part(Rows(idx))
    torch.testing.assert_close(found[:2], part.network(values[[4, 0]].float()))
    assert torch.equal(found[2:], part.missing.expand(2, DIM))
    shown = part(Rows(torch.ones(2000, dtype=torch.int64), generator=draws()))
    dropped = (shown == part.missing).all(1)
    torch.testing.assert_close(shown[~dropped][0], part.network(values[1].float()))
    assert is_likely(int(dropped.sum()), 2000, 0.2)


def test_statistics_pass_the_network_as_they_stood_at_the_moment_of_each_row():
    index = TimeIndex(torch.tensor([0, 1, 1]), torch.tensor([10, 20, 30]) * DAY_S, 2)
    part = StatisticsPart(index, DIM, windows_d=(5.0, 15.0), age=True, dropout=0.3)
    torch.nn.init.normal_(part.missing)
    idx, at = torch.tensor([1, 0, 2, 1]), torch.tensor([25, 11, 25, 31]) * DAY_S
    values = statistics_at(index, idx, at, windows_d=(5.0, 15.0), age=True)
    torch.testing.assert_close(part(Rows(idx, at)), part.network(values))
    rows = Rows(idx.repeat(500), at.repeat(500), generator=draws())
    dropped = (part(rows) == part.missing).all(1)
    assert is_likely(int(dropped.sum()), 2000, 0.3)


# what training changes of a feature


def kept_of(bag, seed, keep):
    """Which categories of a bag stay, one by one."""
    drawn = [float(keyed_uniform(torch.tensor([seed]), torch.tensor([p]))) for p in range(len(bag))]
    kept = [value for value, chance in zip(bag, drawn, strict=True) if chance < keep]
    return kept or [bag[drawn.index(min(drawn))]] if bag else []


@given(
    lists=bags,
    asked=st.lists(st.integers(0, 8), min_size=1, max_size=9),
    keep=st.floats(0.05, 0.99),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_subsampled_bag_equals_a_loop_ragged_and_padded(lists, asked, keep, seed):
    values = torch.tensor([v for bag in lists for v in bag], dtype=torch.int32)
    offsets = torch.tensor([0, *(len(bag) for bag in lists)]).cumsum(0)
    column = RaggedColumn(Csr(offsets, values), 5)
    part = BagPart(table_of(6), column, dropout=0.0, subsample=keep)
    seeds = Rows(torch.tensor(asked), generator=draws(seed)).seeds()
    expected = []
    for entity, own in zip(asked, seeds.tolist(), strict=True):
        bag = kept_of(lists[entity] if entity < len(lists) else [], own, keep)
        expected.append(part.table.weight[bag].mean(0) if bag else part.table.weight[5])
    for fixed_shapes in (False, True):
        rows = Rows(torch.tensor(asked), generator=draws(seed), fixed_shapes=fixed_shapes)
        torch.testing.assert_close(part(rows), torch.stack(expected))
    plain = BagPart(part.table, column, dropout=0.0)
    rows = Rows(torch.tensor(asked))
    assert torch.equal(part(rows), plain(rows))


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_subsampling_teaches_the_categories_it_keeps_at_their_rate(fixed_shapes):
    column = RaggedColumn(Csr(torch.tensor([0, 2]), torch.tensor([1, 4]).int()), 5)
    part = BagPart(table_of(6), column, dropout=0.0, subsample=0.3)
    idx = torch.zeros(3000, dtype=torch.int64)
    shown = part(Rows(idx, generator=draws(), fixed_shapes=fixed_shapes))
    one, other = part.table.weight[1], part.table.weight[4]
    alone = [torch.isclose(shown, each).all(1) for each in (one, other)]
    both = torch.isclose(shown, (one + other) / 2).all(1)
    assert (alone[0] | alone[1] | both).all()
    assert is_likely(int(both.sum()), 3000, 0.09)
    # Both drew badly at 0.49, and then each stays as often.
    assert is_likely(int(alone[0].sum()), 3000, 0.91 / 2)
    shown.sum().backward()
    grads, _ = table_gradient(part.table)
    expected = alone[0].sum() + both.sum() / 2
    torch.testing.assert_close(grads[1], expected.expand(DIM))
    assert (grads[[0, 2, 3]] == 0).all()


@pytest.mark.parametrize("missing", [False, True])
def test_jitter_is_normal_of_its_deviation_and_spares_what_is_missing(missing):
    values = torch.tensor([[0.0, 1.0]] if missing else [[1.5, 0.0]])
    part = DensePart(values, DIM, dropout=0.0, jitter=0.25)
    part.network = nn.Identity()
    part.missing = nn.Parameter(torch.zeros(2))
    rows = Rows(torch.zeros(2000, dtype=torch.int64))
    assert torch.equal(part(rows), values.expand(2000, 2))
    shown = part(replace(rows, generator=draws(), share=0.8))
    assert torch.equal(shown[:, 1], values[0, 1].expand(2000))
    noise = (shown[:, 0] - values[0, 0]).detach()
    if missing:
        assert (noise == 0).all()
    else:
        assert kstest(noise.numpy() / 0.2, "norm").pvalue > 1e-6


def swapping(kind, **options):
    """A part that gives each of 5 entities a vector of its own."""
    torch.manual_seed(0)
    if kind == "category":
        column = CategoricalColumn(torch.arange(5).int(), 6)
        return CategoryPart(table_of(7), column, dropout=0.0, **options)
    if kind == "bag":
        column = RaggedColumn(Csr(torch.arange(6), torch.arange(5).int()), 5)
        return BagPart(table_of(6), column, dropout=0.0, **options)
    if kind == "dense":
        return DensePart(torch.arange(5.0)[:, None], DIM, dropout=0.0, **options)
    index = TimeIndex(torch.arange(5), torch.arange(1, 6) * DAY_S, 5)
    return StatisticsPart(index, DIM, windows_d=(50.0,), age=True, dropout=0.0, **options)


@pytest.mark.parametrize("kind", ["category", "bag", "dense", "statistics"])
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_swapped_features_are_those_of_the_batch_as_often_as_it_has_them(kind, fixed_shapes):
    part = swapping(kind, swap=0.4)
    # Entity 3 is in no row, 1 in half of them.
    idx = torch.tensor([0, 1, 2, 1, 4, 1]).repeat(600)
    # Each at a moment of its own, which a swapped row has to take along.
    at = (9 + 3 * idx) * DAY_S if kind == "statistics" else None
    rows = Rows(idx, at)
    own = part(rows)
    assert torch.equal(own, swapping(kind)(rows))
    vectors = {entity: own[idx == entity][0] for entity in (0, 1, 2, 4)}
    shown = part(replace(rows, generator=draws(2), fixed_shapes=fixed_shapes))
    entity = torch.full_like(idx, -1)
    for number, vector in vectors.items():
        entity[torch.isclose(shown, vector, atol=1e-5).all(1)] = number
    assert (entity >= 0).all()
    for number, count in ((0, 600), (1, 1800), (2, 600), (4, 600)):
        others = idx != number
        # Of the rows of other entities: swapped, and for a row of this one.
        hits = int((entity[others] == number).sum())
        assert is_likely(hits, int(others.sum()), 0.4 * count / len(idx))


def test_padded_rows_swap_with_those_that_exist_only():
    """Four candidates; places beyond repeat the last one."""
    part = swapping("category", swap=0.9)
    idx = torch.tensor([0, 1, 2, 3] + [3] * 2000)
    padded = Rows(idx, generator=draws(), fixed_shapes=True)
    padded = replace(padded, whole=padded, places=idx)
    seen, count = torch.zeros(4), 800
    for seed in range(count):
        shown = replace(padded, generator=draws(seed)).swapped(0.9).idx
        assert (shown[4:] == shown[3]).all()
        seen += shown[:4].bincount(minlength=4)
    # Of four rows each: its own, if not swapped or for itself.
    for number in range(4):
        assert is_likely(int(seen[number]), 4 * count, 0.25)
    assert part(padded).shape == (len(idx), DIM)


# histories

HALF_LIFE_D = 2.0
events = st.lists(
    st.tuples(
        st.integers(0, 12).map(lambda step: 1_000_000 + step * DAY_S // 2),
        st.integers(0, NUM_USERS - 1),
        st.integers(0, NUM_ITEMS - 1),
    ),
    min_size=1,
    max_size=30,
).map(sorted)


def log_of(rows, *, timed):
    times, users, items = (list(column) for column in zip(*rows, strict=True))
    return EncodedLog(
        torch.tensor(users, dtype=torch.int32),
        torch.tensor(items, dtype=torch.int32),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        timestamp=torch.tensor(times) if timed else None,
    )


def history_of(rows, *, timed, length=50, half_life_d=None, dropout=0.0, **options):
    log = log_of(rows, timed=timed)
    table = table_of(NUM_ITEMS + 1, seed=3)
    items = IdPart(table, every(NUM_ITEMS), dropout=0.0, trains_unknown=False)
    part = HistoryPart(
        [items],
        log.user_items(),
        TimeIndex.of_users(log) if timed else None,
        dim=DIM,
        length=length,
        half_life_d=half_life_d,
        dropout=dropout,
        **options,
    )
    with torch.no_grad():
        part.missing.copy_(torch.tensor([7.0, 8.0, 9.0]))
    return part


def pooled(part, past, at, half_life_d):
    """Slow twin: Σ w·v / sqrt(Σ w²) over (time, item) pairs, in float64."""
    if not past:
        return part.missing.detach()
    vectors = part.item_parts[0].table.weight.double()
    weights = [
        1.0 if half_life_d is None else 0.5 ** ((at - t) / DAY_S / half_life_d) for t, _ in past
    ]
    total = sum(w * vectors[item + 1] for w, (_, item) in zip(weights, past, strict=True))
    return (total / sum(w * w for w in weights) ** 0.5).float()


@given(
    rows=events,
    asked=st.lists(st.tuples(st.integers(0, NUM_USERS + 2), st.integers(-1, 14)), max_size=6),
    length=st.integers(1, 6),
    half_life_d=st.sampled_from([None, HALF_LIFE_D]),
)
@settings(max_examples=150, deadline=None)
def test_timed_histories_equal_a_loop(rows, asked, length, half_life_d):
    part = history_of(rows, timed=True, length=length, half_life_d=half_life_d)
    idx = torch.tensor([user for user, _ in asked], dtype=torch.int64)
    at = 1_000_000 + torch.tensor([step for _, step in asked], dtype=torch.int64) * (DAY_S // 2)
    found = part(Rows(idx, at))
    assert found.shape == (len(asked), DIM)
    for vector, user, moment in zip(found, idx.tolist(), at.tolist(), strict=True):
        past = [(t, item) for t, u, item in rows if u == user and t < moment][-length:]
        expected = pooled(part, past, moment, half_life_d)
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)
    for moment in at[:1]:
        together = part(Rows(idx, moment))
        assert torch.equal(together, part(Rows(idx, moment.expand(len(idx)))))


@given(
    rows=events,
    asked=st.lists(
        st.tuples(st.integers(0, NUM_USERS + 2), st.integers(-1, 14), st.integers(0, 5)),
        min_size=1,
        max_size=6,
    ),
    length=st.integers(1, 6),
    half_life_d=st.sampled_from([None, HALF_LIFE_D]),
    timed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_padded_histories_equal_ragged_ones(rows, asked, length, half_life_d, timed):
    part = history_of(rows, timed=timed, length=length, half_life_d=half_life_d)
    users, steps, targets = (torch.tensor(column) for column in zip(*asked, strict=True))
    at = 1_000_000 + steps * (DAY_S // 2) if timed else None
    wanted = Rows(users, at, targets, draws())
    table = part.item_parts[0].table
    for touched, expected in assert_padded(part, wanted, [table]):
        # Where nobody has a history, the first target, which the item tower looks up as well.
        if not expected.any():
            expected[targets[0] + 1] = 1
        assert torch.equal(touched, expected)


@given(
    rows=events,
    asked=st.lists(
        st.tuples(st.integers(0, NUM_USERS + 2), st.integers(-1, 14), st.integers(0, 5)),
        min_size=1,
        max_size=6,
    ),
    crop=st.sampled_from([0.3, 0.7, 1.0]),
    mask=st.sampled_from([0.0, 0.4]),
    reorder=st.sampled_from([0.0, 0.8]),
    timed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_augmented_histories_equal_a_loop_ragged_and_padded(
    rows, asked, crop, mask, reorder, timed, seed
):
    options = {"crop": crop, "mask": mask, "reorder": reorder}
    half_life_d = HALF_LIFE_D if timed else None
    part = history_of(rows, timed=timed, length=5, half_life_d=half_life_d, **options)
    users, steps, targets = (torch.tensor(column) for column in zip(*asked, strict=True))
    at = 1_000_000 + steps * (DAY_S // 2) if timed else None
    wanted = Rows(users, at, targets, draws(seed), share=0.5)
    augmented = crop < 1 or mask > 0 or reorder > 0
    seeds = wanted.seeds() if augmented else torch.zeros(len(asked), dtype=torch.int64)
    # Rates are halved by the share: what is left of a crop is the mean of its share and all.
    shuffle = Shuffle(0.5 * mask, 0.5 * reorder)
    expected = []
    for place, user in enumerate(users.tolist()):
        moment = 1 << 60 if at is None else int(at[place])
        past = [(t, item) for t, u, item in rows if u == user and t < moment][-5:]
        bounds = torch.tensor([0]), torch.tensor([len(past)])
        start, stop = cropped(*bounds, 0.5 + 0.5 * crop, seeds[place : place + 1])
        past = past[int(start) : int(stop)]
        weights = torch.ones(1, len(past))
        if timed and past:
            ages_d = [(past[-1][0] - t) / DAY_S for t, _ in past]
            weights = torch.tensor([[0.5 ** (age_d / HALF_LIFE_D) for age_d in ages_d]])
        if augmented:
            weights = shuffle.padded(weights, stop - start, seeds[place : place + 1])
        items = torch.tensor([item for _, item in past], dtype=torch.int64)
        if not timed:
            weights = weights * (items != targets[place])
        vectors = part.item_parts[0].table.weight[items + 1]
        squares = weights.square().sum()
        found = (weights @ vectors)[0] / squares.sqrt() if squares > 0 else part.missing
        expected.append(found.detach())
    for fixed_shapes in (False, True):
        found = part(replace(wanted, generator=draws(seed), fixed_shapes=fixed_shapes))
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    quiet = history_of(rows, timed=timed, length=5, half_life_d=half_life_d)
    assert torch.equal(part(Rows(users, at)), quiet(Rows(users, at)))


def test_in_a_padded_history_dropout_hides_an_item_wherever_it_stands():
    log = log_of([(t, t % 2, 4) for t in range(40)], timed=True)
    table = table_of(NUM_ITEMS + 1, seed=3)
    items = IdPart(table, every(NUM_ITEMS), dropout=0.5, trains_unknown=True)
    part = HistoryPart(
        [items],
        log.user_items(),
        TimeIndex.of_users(log),
        dim=DIM,
        length=9,
        half_life_d=None,
        dropout=0.0,
    )
    shown, hidden = items.table.weight[5] * 3, items.table.weight[0] * 3
    seen = set()
    for seed in range(12):
        rows = Rows(torch.tensor([0, 1]), torch.tensor(99), torch.tensor([1, 1]), draws(seed))
        found = part(replace(rows, fixed_shapes=True))
        torch.testing.assert_close(found[0], found[1])
        seen.add(bool(torch.isclose(found[0], hidden).all()))
        assert torch.isclose(found[0], shown).all() or torch.isclose(found[0], hidden).all()
    assert seen == {True, False}


@given(
    rows=events, asked=st.lists(st.integers(0, 29), min_size=1, max_size=5), cap=st.integers(1, 6)
)
@settings(max_examples=100, deadline=None)
def test_histories_without_time_leave_out_every_occurrence_of_the_target(rows, asked, cap):
    part = history_of(rows, timed=False, length=cap)
    targets = [rows[position % len(rows)] for position in asked]
    idx = torch.tensor([user for _, user, _ in targets])
    without = torch.tensor([item for _, _, item in targets])
    found = part(Rows(idx, without=without))
    for vector, (_, user, target) in zip(found, targets, strict=True):
        own = [(t, item) for t, u, item in rows if u == user][-cap:]
        past = [(t, item) for t, item in own if item != target]
        torch.testing.assert_close(vector, pooled(part, past, 0, None), rtol=1e-5, atol=1e-5)


@given(
    rows=events, other=events, position=st.integers(0, 29), half_life_d=st.sampled_from([None, 3.0])
)
@settings(max_examples=150, deadline=None)
def test_neither_the_target_nor_the_future_ever_changes_a_timed_history(
    rows, other, position, half_life_d
):
    at, user, _ = rows[position % len(rows)]
    past = [row for row in rows if row[0] < at]
    changed = sorted([*past, *((max(t, at), u, item) for t, u, item in other)])
    found = [
        history_of(log, timed=True, half_life_d=half_life_d)(
            Rows(torch.tensor([user]), torch.tensor([at]))
        )
        for log in (rows, changed)
    ]
    assert torch.equal(*found)


@given(rows=events, position=st.integers(0, 29), stranger=st.integers(0, NUM_ITEMS - 1))
@settings(max_examples=100, deadline=None)
def test_the_target_never_changes_a_history_without_time(rows, position, stranger):
    _, user, target = rows[position % len(rows)]
    own = [item for _, u, item in rows if u == user]
    if stranger in own:
        stranger = target
    swapped = [(t, u, stranger if (u, i) == (user, target) else i) for t, u, i in rows]
    found = [
        history_of(log, timed=False)(Rows(torch.tensor([user]), without=torch.tensor([item])))
        for log, item in ((rows, target), (swapped, stranger))
    ]
    assert torch.equal(*found)


def test_a_timed_log_asked_without_a_moment_leaves_the_target_out_as_well():
    rows = [(10, 0, 1), (20, 0, 2)]
    part = history_of(rows, timed=True)
    found = part(Rows(torch.tensor([0]), without=torch.tensor([2])))
    torch.testing.assert_close(found[0], part.item_parts[0].table.weight[2])


@pytest.mark.parametrize("half_lives", [0, 50, 5000])
def test_a_long_absence_does_not_make_a_history_fade(half_lives):
    rows = [(0, 1, 4), (DAY_S, 1, 2), (3 * DAY_S, 1, 5)]
    part = history_of(rows, timed=True, half_life_d=HALF_LIFE_D)
    soon = 3 * DAY_S + 1
    later = soon + int(half_lives * HALF_LIFE_D * DAY_S)
    expected = pooled(part, [(t, item) for t, _, item in rows], soon, HALF_LIFE_D)
    torch.testing.assert_close(part(Rows(torch.tensor([1]), torch.tensor(later)))[0], expected)


def test_history_dropout_hides_whole_rows_at_its_rate():
    part = history_of([(0, 2, 3), (1, 2, 1)], timed=True, dropout=0.35)
    idx, at = torch.full((2000,), 2), torch.tensor(9)
    kept = part(Rows(idx[:1], at))[0]
    found = part(Rows(idx, at, generator=draws()))
    hidden = (found == part.missing).all(1)
    assert torch.allclose(found[~hidden], kept)
    assert is_likely(int(hidden.sum()), 2000, 0.35)


def test_item_parts_add_up_and_learn_from_the_history():
    rows = [(0, 0, 1), (1, 0, 4)]
    log = log_of(rows, timed=True)
    column = CategoricalColumn(torch.tensor([0, 1, 2, 1, 2, 0]).int(), 3)
    ids = IdPart(table_of(7), every(NUM_ITEMS), dropout=0.0, trains_unknown=False)
    kinds = CategoryPart(table_of(4, seed=1), column, dropout=0.0)
    part = HistoryPart(
        [ids, kinds],
        log.user_items(),
        TimeIndex.of_users(log),
        dim=DIM,
        length=9,
        half_life_d=None,
        dropout=0.0,
    )
    found = part(Rows(torch.tensor([0]), torch.tensor(9), generator=draws()))
    items = ids.table.weight[[2, 5]] + kinds.table.weight[[1, 2]]
    torch.testing.assert_close(found[0], items.sum(0) / 2**0.5)
    found.sum().backward()
    before = ids.table.weight.clone()
    TableOptimizer({"ids": ids.table, "kinds": kinds.table}, "sgd").step(1.0)
    moved = (before - ids.table.weight)[:, 0]
    torch.testing.assert_close(moved, torch.tensor([0, 0, 1, 0, 0, 1, 0]) / 2**0.5)
