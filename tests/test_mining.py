"""Mining against a loop over every user and item, its counts, and what it never takes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recclr import mining
from recclr.data.log import EncodedLog
from recclr.distributed import Ranks
from recclr.errors import DivergedError
from recclr.mining import Miner
from recclr.mining_report import GUARDS, Spread, Tally
from recclr.settings import MinedSettings

NUM_USERS, NUM_ITEMS, DIM = 7, 19, 3
CPU = torch.device("cpu")
OPEN = {"skip": 0, "margin": -1e6, "share": 0.0}


def log_of(seed=0, rows=40):
    draws = torch.Generator().manual_seed(seed)
    # The last user has nothing, and popularity differs.
    users = torch.randint(NUM_USERS - 1, (rows,), generator=draws)
    items = (torch.rand(rows, generator=draws) ** 2 * NUM_ITEMS).long()
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS)


def vectors_of(seed=0):
    draws = torch.Generator().manual_seed(seed + 100)
    # Whole numbers: scores are exact, and many are equal.
    users = torch.randint(-3, 4, (NUM_USERS + 1, DIM), generator=draws).float()
    return users, torch.randint(-3, 4, (NUM_ITEMS, DIM), generator=draws).float()


def known_of(log):
    pairs = zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True)
    found = [set() for _ in range(log.num_users)]
    for user, item in pairs:
        found[user].add(item)
    return found


def slow(log, users, items, settings, user, positive):
    """What is kept for one score of a positive, best first, and what each guard refused."""
    scores = (users[user] @ items.T).tolist()
    known, counts = known_of(log)[user], log.item_counts().tolist()
    order = sorted(set(range(NUM_ITEMS)) - known, key=lambda item: (-scores[item], item))
    by_count = sorted(range(NUM_ITEMS), key=lambda item: (-counts[item], item))
    popular = set(by_count[: int(settings.drop_popular * NUM_ITEMS)])
    kept, refused = [], dict.fromkeys(GUARDS, 0)
    for rank, item in enumerate(order[: settings.depth]):
        score = scores[item]
        over = settings.max_train_rows and counts[item] > settings.max_train_rows
        if rank < settings.skip:
            refused["skip"] += 1
        elif item in popular or over:
            refused["popular"] += 1
        elif positive - score < settings.margin:
            refused["margin"] += 1
        elif settings.relative_margin and (
            positive - score < settings.relative_margin * abs(positive)
        ):
            refused["relative_margin"] += 1
        elif settings.share and positive > 0 and score >= settings.share * positive:
            refused["share"] += 1
        else:
            kept.append(item)
    return kept, refused


def positive_of(log, users, items, user, kind):
    found = [float(users[user] @ items[item]) for item in known_of(log)[user]]
    return min(found) if kind == "lowest" else sum(found) / len(found)


GUARDED = st.builds(
    MinedSettings,
    count=st.just(2),
    depth=st.integers(9, 30),
    skip=st.integers(0, 6),
    drop_popular=st.sampled_from([0.0, 0.2, 0.7]),
    max_train_rows=st.sampled_from([0, 1, 4]),
    margin=st.sampled_from([-4.0, 0.0, 1.5]),
    relative_margin=st.sampled_from([0.0, 0.3]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    choice=st.sampled_from(["top", "uniform", "score"]),
    pool=st.integers(2, 40),
    positive=st.sampled_from(["mean", "lowest"]),
)


@given(GUARDED, st.integers(0, 200))
@settings(max_examples=40)
def test_a_table_holds_what_a_loop_keeps_and_its_counts_add_up(options, seed):
    log, (users, items) = log_of(seed), vectors_of(seed)
    table, report = Miner(log, options).table(users, items, options, temperature=1.0, keys=(seed,))
    assert table.dtype == torch.int32
    assert table.shape == (NUM_USERS, options.width)
    known, skipped, gaps = known_of(log), dict.fromkeys(GUARDS, 0), []
    lengths = []
    for user in range(NUM_USERS):
        mined = [item for item in table[user].tolist() if item >= 0]
        # Nothing after the last.
        assert table[user].tolist() == mined + [-1] * (options.width - len(mined))
        assert not set(mined) & known[user]
        if not known[user]:
            assert mined == []
            continue
        positive = positive_of(log, users, items, user, options.positive)
        # A sum in another order could fall on the other side of a guard.
        edges = [positive - options.margin, options.share * positive]
        edges.append(positive - options.relative_margin * abs(positive))
        scores = (users[user] @ items.T).tolist()
        assume(not any(1e-9 < abs(s - e) < 1e-4 for s in scores for e in edges))
        assume(options.positive == "lowest" or positive == float(torch.tensor(positive)))
        kept, refused = slow(log, users, items, options, user, positive)
        lengths.append(len(kept))
        for name, count in refused.items():
            skipped[name] += count
        assert len(mined) == min(len(kept), options.width)
        # In order of rank, whatever chose them.
        assert [item for item in kept if item in set(mined)] == mined
        if options.choice == "top":
            assert mined == kept[: options.width]
        gaps += [positive - scores[item] for item in mined]
    assert report.skipped == skipped
    assert report.kept == sum(lengths)
    assert report.candidates == report.kept + sum(skipped.values())
    assert report.queries == len(lengths)
    assert report.mined == int((table >= 0).sum()) == len(gaps)
    assert report.short == sum(length < options.count for length in lengths)
    assert report.empty == sum(length == 0 for length in lengths)
    if gaps:
        found = report.scores["difference"]
        assert found["mean"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
        assert found["min"] == pytest.approx(min(gaps), rel=1 / 128, abs=1e-6)
        assert found["max"] == pytest.approx(max(gaps), rel=1 / 128, abs=1e-6)
    else:
        assert report.scores == {}


@given(GUARDED, st.integers(0, 200))
@settings(max_examples=20)
def test_triplets_are_those_of_a_loop_over_pairs(options, seed):
    log, (users, items) = log_of(seed), vectors_of(seed)
    miner, tally = Miner(log, options), Tally(options.count, CPU)
    miner.height = 3  # several blocks of users
    blocks = list(miner.triplets(users, items, temperature=1.0, keys=(seed,), tally=tally))
    assert len(blocks) >= 2
    found = {}
    for block in blocks:
        for row, (user, positive) in enumerate(
            zip(block.user_idx.tolist(), block.positive_idx.tolist(), strict=True)
        ):
            assert float(users[user] @ items[positive]) == float(block.positive_scores[row])
            here = block.item_idx[row] >= 0
            assert here.tolist() == (block.ranks[row] > 0).tolist()
            assert (block.scores[row][~here] == -math.inf).all()
            found[user, positive] = [each[row][here].tolist() for each in (block.item_idx,)] + [
                block.scores[row][here].tolist(),
                block.ranks[row][here].tolist(),
            ]
    known = known_of(log)
    # Every pair once, in order.
    assert list(found) == [(u, i) for u in range(NUM_USERS) for i in sorted(known[u])]
    for (user, positive), (mined, scores, ranks) in found.items():
        scored = (users[user] @ items.T).tolist()
        kept, _ = slow(log, users, items, options, user, scored[positive])
        assert len(mined) == min(len(kept), options.count)
        assert [item for item in kept if item in set(mined)] == mined
        if options.choice == "top":
            assert mined == kept[: options.count]
        assert scores == [scored[item] for item in mined]
        order = sorted(set(range(NUM_ITEMS)) - known[user], key=lambda i: (-scored[i], i))
        assert [order[rank - 1] for rank in ranks] == mined
    report = tally.report()
    assert report.queries == len(found)
    assert report.mined == sum(len(each[0]) for each in found.values())
    assert report.candidates == report.kept + sum(report.skipped.values())


def test_triplets_are_the_same_in_blocks_of_any_size(monkeypatch):
    log, (users, items) = log_of(), vectors_of()
    options = MinedSettings(count=2, depth=12, choice="uniform", **OPEN)

    def whole():
        blocks = Miner(log, options).triplets(
            users, items, temperature=1.0, keys=(1,), tally=Tally(2, CPU)
        )
        return [torch.cat(each) for each in zip(*(vars(b).values() for b in blocks), strict=True)]

    expected = whole()
    assert len(expected[0]) > 20
    monkeypatch.setattr(mining, "_ELEMENTS", 2 * DIM)
    for mine, other in zip(whole(), expected, strict=True):
        assert torch.equal(mine, other)


def mined_of(options, seed=0, *, keys=(0,), miner=None, temperature=1.0):
    log, (users, items) = log_of(seed), vectors_of(seed)
    miner = miner or Miner(log, options)
    return miner.table(users, items, options, temperature=temperature, keys=keys)[0]


@pytest.mark.parametrize("choice", ["uniform", "score"])
def test_what_is_chosen_follows_from_the_keys(choice):
    options = MinedSettings(count=2, pool=3, depth=15, choice=choice, **OPEN)
    first, again, *others = (mined_of(options, keys=(5, n)) for n in (1, 1, 2, 3, 4))
    assert torch.equal(first, again)
    assert any(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("choice", ["uniform", "score"])
def test_choices_have_the_frequencies_that_the_setting_says(choice):
    options = MinedSettings(count=1, pool=1, depth=6, skip=1, choice=choice, share=0.0, margin=-9e5)
    temperature, trials = 4.0, 3000
    users, items = vectors_of()
    # As many users of one taste, each with a draw of their own.
    users = users[:1].expand(trials, -1)
    log = EncodedLog(torch.arange(trials).int(), torch.zeros(trials).int(), trials, NUM_ITEMS)
    table, _ = Miner(log, options).table(users, items, options, temperature=temperature, keys=(1,))
    counts = torch.bincount(table[:, 0], minlength=NUM_ITEMS)
    kept, _ = slow(log, users, items, options, 0, 0.0)
    assert len(kept) == 5
    weights = torch.ones(5).double()
    if choice == "score":
        weights = ((users[0] @ items[kept].T).double() / temperature).exp()
    shares = weights / weights.sum()
    spread = 4.5 * (trials * shares * (1 - shares)).sqrt()
    assert ((counts[kept] - trials * shares).abs() <= spread).all()
    assert int(counts[kept].sum()) == trials


def test_a_positive_that_scores_nothing_has_no_share():
    """Of a positive at -2, a share of 0.95 would let items at -1.95 pass: above it."""
    users, items = torch.tensor([[1.0], [1.0]]), torch.tensor([[-2.0], [-1.95], [-2.5], [-9.0]])
    log = EncodedLog(torch.tensor([0]).int(), torch.tensor([0]).int(), 1, 4)
    for options, expected in (
        ({}, [2, 3]),
        ({"margin": 0.6}, [3]),
        ({"margin": -0.1}, [1, 2, 3]),
        ({"relative_margin": 0.3}, [3]),
        ({"share": 0.1}, [2, 3]),
    ):
        chosen = MinedSettings(count=1, depth=9, skip=0, **options)
        table, _ = Miner(log, chosen).table(users, items, chosen, temperature=1.0, keys=(0,))
        assert [item for item in table[0].tolist() if item >= 0] == expected, options


class Part(Ranks):
    """One of several ranks, without the others."""

    def gather(self, x, counts, name):
        assert len(x) == counts[self.rank]
        self.counts_seen = counts
        return x

    def sum_(self, x, name):
        return x


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_mine_their_parts_of_the_same_table(size):
    options = MinedSettings(count=2, pool=4, depth=15, **OPEN)
    log, (users, items) = log_of(), vectors_of()
    miner = Miner(log, options)
    miner.height = 2
    whole, report = miner.table(users, items, options, temperature=1.0, keys=(3,))
    parts, mined = [], 0
    for rank in range(size):
        ranks = Part(rank, size)
        part, of_part = miner.table(users, items, options, temperature=1.0, keys=(3,), ranks=ranks)
        assert sum(ranks.counts_seen) == NUM_USERS
        parts.append(part)
        mined += of_part.mined
    assert torch.equal(torch.cat(parts), whole)
    assert mined == report.mined


def test_held_out_positives_among_the_mined_are_counted_beside_chance():
    log, (users, items) = log_of(), vectors_of()
    options = MinedSettings(count=2, pool=5, depth=NUM_ITEMS, choice="top", **OPEN)
    known = known_of(log)
    table, report = Miner(log, options).table(users, items, options, temperature=1.0, keys=(0,))
    assert report.held_out_hits is None
    assert report.to_json()["false_negatives"] is None
    # Of user 0 two mined items and one other, one known item, an unknown item and a new user.
    other = next(i for i in range(NUM_ITEMS) if i not in known[0] | set(table[0].tolist()))
    held = [table[0, 0], table[0, 3], other, min(known[0]), -1]
    held_out = EncodedLog(
        torch.tensor([0, 0, 0, 0, 0, NUM_USERS + 2]).int(),
        torch.tensor([*held, int(table[1, 0])]).int(),
        NUM_USERS,
        NUM_ITEMS,
    )
    again, report = Miner(log, options, held_out).table(
        users, items, options, temperature=1.0, keys=(0,)
    )
    assert torch.equal(again, table)
    assert report.held_out_hits == 2
    assert report.held_out_chance == pytest.approx(5 * 3 / (NUM_ITEMS - len(known[0])), rel=1e-6)
    told = report.to_json()["false_negatives"]
    assert told["share"] == 2 / report.mined
    assert "are positives in validation" in str(report)
    empty = Miner(log, options, replace(held_out, item_idx=torch.full((6,), -1).int()))
    _, report = empty.table(users, items, options, temperature=1.0, keys=(0,))
    assert (report.held_out_hits, report.held_out_chance) == (0, 0.0)


def test_scores_that_are_no_numbers_are_refused():
    users, items = vectors_of()
    options = MinedSettings(count=1, depth=5, skip=0)
    items[3, 1] = math.nan
    with pytest.raises(DivergedError, match="NaN"):
        Miner(log_of(), options).table(users, items, options, temperature=1.0, keys=(0,))


def test_a_user_who_has_everything_gets_nothing():
    log = EncodedLog(torch.zeros(NUM_ITEMS).int(), torch.arange(NUM_ITEMS).int(), 2, NUM_ITEMS)
    options = MinedSettings(count=2, pool=3, depth=9, **OPEN)
    users, items = vectors_of()
    table, report = Miner(log, options).table(users, items, options, temperature=1.0, keys=(0,))
    assert (table == -1).all()
    assert (report.queries, report.candidates, report.empty, report.mined) == (1, 0, 1, 0)
    assert "1 queries have fewer than were wanted, 1 of them none" in str(report)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.integers(1, 59))
@settings(max_examples=30)
def test_a_spread_knows_the_quantiles_to_three_digits(values, cut):
    spread, half = Spread(CPU), Spread(CPU)
    tensor = torch.tensor(values, dtype=torch.float32)
    # In parts, on two ranks.
    spread.add(tensor[:cut])
    half.add(tensor[cut:])
    spread.counts += half.counts
    spread.total += half.total
    found, ordered = spread.summary(), sorted(tensor.tolist())
    assert found["mean"] == pytest.approx(sum(ordered) / len(ordered), rel=1e-5, abs=1e-6)
    for name, level in (("min", 0), ("25%", 0.25), ("median", 0.5), ("95%", 0.95), ("max", 1)):
        exact = ordered[min(int(level * len(ordered)), len(ordered) - 1)]
        assert found[name] == pytest.approx(exact, rel=1 / 128, abs=1e-6)
    assert Spread(CPU).summary() == {}


def test_a_report_says_what_each_guard_refused():
    log, (users, items) = log_of(), vectors_of()
    options = MinedSettings(count=2, depth=NUM_ITEMS, skip=2, drop_popular=0.2, max_train_rows=9)
    _, report = Miner(log, options).table(users, items, options, temperature=1.0, keys=(0,))
    text = str(report)
    share = report.skipped["skip"] / report.candidates
    assert report.skipped["skip"] == 2 * report.queries
    assert f"skipped {report.skipped['skip']:,} ({share:.1%}): among the best ranks" in text
    assert f"{report.skipped['popular']:,} " in text
    assert "relative_margin" not in text
    for name in ("mean", "min", "median", "max"):
        assert f"{report.scores['positive'][name]:.4f}" in text
    told = report.to_json()
    assert told["skipped"] == report.skipped
    assert "held_out_hits" not in told
