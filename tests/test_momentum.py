"""The queue of earlier positives: what is in it, who made it, and what it counts for."""

import math
from collections import deque
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recclr.momentum as module
from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import CategoricalColumn, DenseColumn, EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError
from recclr.known_positives import KnownPositives
from recclr.momentum import MomentumQueue, averaged_copy, mask_repeats, move_average, spread
from recclr.negatives import CandidateSampler, Queued
from recclr.objective import Objective
from recclr.optim import Table
from recclr.order import generator
from recclr.rows import Rows
from recclr.settings import (
    FeatureSettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    QueueSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.statistics import DAY_S
from recclr.stepping import Stepper
from recclr.train import fit

NUM_USERS, NUM_ITEMS, NUM_ROWS, DIM = 7, 13, 41, 5
LOSS = LossSettings(temperature=0.4)


def prepared():
    draws = torch.Generator().manual_seed(1)
    log = EncodedLog(
        torch.randint(NUM_USERS, (NUM_ROWS,), generator=draws).int(),
        torch.randint(NUM_ITEMS, (NUM_ROWS,), generator=draws).int(),
        NUM_USERS,
        NUM_ITEMS,
        timestamp=torch.arange(NUM_ROWS) * DAY_S,
    )
    columns = {
        "kind": CategoricalColumn(torch.randint(4, (NUM_ITEMS,), generator=draws).int(), 4),
        "image": DenseColumn(torch.randn(NUM_ITEMS, 3, generator=draws)),
    }
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS, columns))


DATA = prepared()
RICH = TowerSettings(
    id=IdSettings(dropout=0.2),
    features={
        "kind": FeatureSettings(kind="categorical", dropout=0.3),
        "image": FeatureSettings(kind="vector"),
    },
    mlp=(6,),
    dropout=0.2,
)
TIMED = TowerSettings(
    id=IdSettings(as_of=True), features={"recent": FeatureSettings(kind="statistics")}
)


def model_of(item=RICH, loss=LOSS, similarity="cosine"):
    settings = ModelSettings(embedding_dim=DIM, similarity=similarity)
    user = TowerSettings()
    return build_model(DATA, user=user, item=item, model=settings, loss=loss, seed=1).train()


def queue_of(model, size=6, momentum=0.9, **options):
    return MomentumQueue(model, QueueSettings(size=size, momentum=momentum), **options)


def batch_of(rows, **options):
    rows = torch.as_tensor(rows)
    fields = {"weight": None, "user_at": None, "item_at": None, "pool": None, **options}
    return Batch(DATA.train.user_idx[rows].long(), DATA.train.item_idx[rows].long(), **fields)


def stepper_of(model, queue, *, loss=LOSS, emit=None, uniform=4, **train):
    settings = TrainSettings(**{"batch_size": 9, "epochs": 2, "table_lr": 0.1} | train)
    return Stepper(
        model,
        DATA.train,
        loss=loss,
        negatives=NegativesSettings(in_batch=True, uniform=uniform, queue=queue),
        train=settings,
        seed=4,
        **({} if emit is None else {"emit": emit}),
    )


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.weights().items()}


# the average


@pytest.mark.parametrize("momentum", [0.3, 0.99])
def test_the_average_is_that_of_a_loop_over_all_weights_of_the_item_tower(momentum):
    model = model_of()
    stepper = stepper_of(model, QueueSettings(size=6, momentum=momentum), dense_lr=0.05)
    queue = stepper.objective.queue
    slow = {name: p.detach().double() for name, p in model.item_tower.named_parameters()}
    start = {name: p.clone() for name, p in slow.items()}
    for step in range(4):
        stepper(step)
        for name, p in model.item_tower.named_parameters():
            slow[name] = momentum * slow[name] + (1 - momentum) * p.detach().double()
    assert queue.weights.keys() == slow.keys()
    for name, p in slow.items():
        torch.testing.assert_close(queue.weights[name].double(), p, atol=1e-6, rtol=0)
    moved = [name for name, p in slow.items() if (p - start[name]).abs().max() > 1e-3]
    assert len(moved) >= len(slow) - 1


class Buffered(nn.Module):
    """A tower with every kind of weight."""

    def __init__(self):
        super().__init__()
        self.vectors = nn.Parameter(torch.ones(NUM_ITEMS, DIM))
        self.register_buffer("mean", torch.full((DIM,), 2.0))
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("constant", torch.full((4,), 5.0), persistent=False)


def test_saved_buffers_are_averaged_integers_copied_and_constants_shared():
    tower = Buffered()
    made = averaged_copy(tower)
    assert made.constant is tower.constant
    for name in ("vectors", "mean", "seen"):
        assert getattr(made, name).data_ptr() != getattr(tower, name).data_ptr()
    assert not made.training
    assert not made.vectors.requires_grad
    with torch.no_grad():
        tower.vectors.fill_(9.0)
        tower.mean.fill_(6.0)
        tower.seen.fill_(8)
    move_average(module.saved_weights(made), module.saved_weights(tower), 0.75)
    assert (made.vectors == 3.0).all()
    assert (made.mean == 3.0).all()
    assert int(made.seen) == 8


# who is in the queue


@given(sizes=st.lists(st.integers(1, 9), max_size=7), places=st.integers(1, 8))
@settings(max_examples=30)
def test_first_in_is_first_out(sizes, places):
    queue, told = queue_of(PLAIN, places), deque(maxlen=places)
    draws = torch.Generator().manual_seed(len(sizes))
    for size in sizes:
        items = torch.randint(NUM_ITEMS, (size,), generator=draws)
        vectors = torch.randn(size, DIM, generator=draws)
        queue.push(items, vectors)
        told.extend(zip(items.tolist(), vectors.tolist(), strict=True))
    found = queue.queued(0)
    if not told:
        assert found is None
        return
    order = range(int(queue.pushed) - len(told), int(queue.pushed))
    slots = [number % places for number in order]
    assert len(found.item_idx) == len(found.vectors) == found.num_rows == len(told)
    assert found.item_idx[slots].tolist() == [item for item, _ in told]
    assert found.vectors[slots].tolist() == [vector for _, vector in told]
    assert found.counts is None


PLAIN = model_of(TowerSettings())


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("item", [RICH, TIMED], ids=["rich", "timed"])
def test_with_momentum_0_it_holds_the_vectors_of_the_tower_after_each_step(item, chunk_size):
    model = model_of(item)
    settings = QueueSettings(size=21, momentum=0.0, warmup=0.0)
    stepper = stepper_of(model, settings, chunk_size=chunk_size)
    queue, told = stepper.objective.queue, []
    assert not any(name.startswith("queue/tower") for name in stepper.objective.state)
    for step in range(4):
        stepper(step)
        (batch,) = stepper.source.step(step).values()
        vectors = model.eval().embed_items(Rows(batch.item_idx, batch.item_at)).detach()
        model.train()
        told += zip(batch.item_idx.tolist(), vectors, strict=True)
    last = told[-21:]
    slots = torch.arange(len(told) - 21, len(told)) % 21
    found = queue.queued(99)
    assert found.item_idx[slots].tolist() == [item for item, _ in last]
    expected = torch.stack([vector for _, vector in last])
    torch.testing.assert_close(found.vectors[slots], expected, atol=1e-6, rtol=0)


def test_it_fills_before_it_is_anybodys_negative():
    said = []
    # Five steps in an epoch of 41 rows, ten in all: the queue serves from the fourth on.
    stepper = stepper_of(model_of(), QueueSettings(size=20, warmup=0.3), emit=said.append)
    queue = stepper.objective.queue
    assert queue.starts == 3
    for step in range(5):
        assert queue.num_filled == min(9 * step, 20)
        found = queue.queued(step)
        assert (found is None) == (step < 3)
        stats, _ = stepper(step)
        fresh = stepper.objective._candidates(stepper.source.batch(step), step).candidate_idx
        assert stats.num_candidates == len(fresh) + (0 if found is None else found.num_rows)
    # Once in an epoch, as often as there may be an evaluation.
    (event,) = said
    assert (event["kind"], event["step"], event["filled"]) == ("queue", 5, 20)
    assert -1 <= event["cosine"] <= 1


def test_batches_that_are_accumulated_fill_it_in_their_order():
    stepper = stepper_of(model_of(), QueueSettings(size=20, warmup=0.5), accumulate=2)
    # Three steps an epoch, six in all: half of them is the first batch of the second epoch.
    assert stepper.objective.queue.starts == 5
    stepper(0)
    batches = stepper.source.step(0).values()
    told = torch.cat([batch.item_idx for batch in batches])
    assert stepper.objective.queue.queued(5).item_idx.tolist() == told.tolist()


@pytest.mark.parametrize("queue", [QueueSettings(size=0), QueueSettings(size=6, warmup=1.0)])
def test_a_queue_that_serves_nobody_changes_no_bit(queue):
    found = []
    for each in (None, queue):
        stepper = stepper_of(model_of(), each)
        for step in range(6):
            stepper(step)
        found.append(weights_of(stepper.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_staleness_is_the_mean_cosine_with_the_vectors_of_today(similarity):
    model = model_of(TowerSettings(), similarity=similarity)
    queue = queue_of(model, 6, 0.9)
    assert queue.staleness(model) is None
    rows = [3, 8, 11, 20]
    queue.advance(model, [batch_of(rows)])
    assert queue.staleness(model) == pytest.approx(1.0, abs=1e-6)
    table = model.item_tower.parts[0].table
    with torch.no_grad():
        table.weight.neg_()
        own = DATA.train.item_idx[rows[0]].long() + 1
        table.weight[own] = table.weight[own].neg()
    same = (DATA.train.item_idx[rows] == DATA.train.item_idx[rows[0]]).float()
    assert queue.staleness(model) == pytest.approx(float((2 * same - 1).mean()), abs=1e-6)


# what it counts for


def draw_of(log, sampler, rows, drawn, queued, monkeypatch):
    monkeypatch.setattr(sampler, "_draws", lambda *args: drawn)
    positives = log.item_idx[list(rows)].long()
    return sampler.draw(positives, generator("cpu", 0), queued=queued)


@pytest.mark.parametrize("uniform", [0, 1])
def test_with_todays_vectors_every_item_is_expected_to_weigh_one(uniform, monkeypatch):
    """Over all batches, draws and queues: so the weighted sum is that of the full softmax."""
    items = torch.tensor([0, 0, 0, 1, 1, 2])
    log = EncodedLog(torch.arange(6).int(), items.int(), 6, 4)
    sampler = CandidateSampler(log, NegativesSettings(in_batch=True, uniform=uniform))
    size = 1 if uniform else 2
    total = torch.zeros(6, 4, dtype=torch.float64)
    contents = list(product(range(6), repeat=size))
    draws = [torch.tensor([item] * uniform, dtype=torch.int64) for item in range(4**uniform)]
    for rows, content, drawn in product(combinations(range(6), 3), contents, draws):
        queued = Queued(items[list(content)], torch.zeros(size, 2), size)
        found = draw_of(log, sampler, rows, drawn, queued, monkeypatch)
        weights = torch.zeros(4, dtype=torch.float64)
        weights.index_add_(0, found.candidate_idx, found.log_weights.double().exp())
        weights.index_add_(0, queued.item_idx, found.queued.log_weights.double().exp())
        total[list(rows)] += weights
    total /= math.comb(5, 2) * len(contents) * len(draws)
    # A row's own item is masked, and the cold one is reached by uniform draws only.
    reached = torch.ones(6, 4, dtype=torch.bool)
    reached[torch.arange(6), items] = False
    reached[:, 3] = uniform > 0
    torch.testing.assert_close(
        total[reached], torch.ones(int(reached.sum())).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("own_only", [False, True])
@pytest.mark.parametrize("in_batch", [False, True])
def test_a_step_with_a_queue_equals_the_loop(in_batch, own_only, strength):
    loss = LossSettings(temperature=0.4, mask_known_positives=not own_only, log_q_strength=strength)
    model = model_of(TowerSettings())
    queue = queue_of(model, 12)
    negatives = NegativesSettings(in_batch=in_batch, uniform=5)
    objective = Objective(DATA.train, loss, negatives, seed=3, queue=queue)
    queue.push(*[torch.cat([each] * 2) for each in older()])
    batch = batch_of(range(4, 11))
    found = objective(model, batch, 6)
    users, items = (each.double() for each in model.all_vectors(None))
    fresh = objective._candidates(batch, 6)
    counts = torch.bincount(DATA.train.item_idx, minlength=NUM_ITEMS).double()
    pairs = [
        (int(c), items[c], w)
        for c, w in zip(fresh.candidate_idx, fresh.log_weights.exp(), strict=True)
    ]
    drawn = torch.randint(NUM_ITEMS, (5,), generator=objective._draws(6, 11))
    merged = torch.cat([drawn, batch.item_idx]) if in_batch else drawn
    expected = 5 / NUM_ITEMS + 12 / NUM_ROWS * counts + in_batch * 6 / (NUM_ROWS - 1) * counts
    for item, _, weight in pairs:
        told = float((merged == item).sum()) / float(expected[item]) ** strength
        assert float(weight) == pytest.approx(told, rel=1e-5)
    held = zip(queue.item_idx.tolist(), queue.vectors.double(), strict=True)
    pairs += [(c, v, float(expected[c]) ** -strength) for c, v in held]
    known = set(zip(DATA.train.user_idx.tolist(), DATA.train.item_idx.tolist(), strict=True))
    losses, num_masked = [], 0
    for user, item in zip(batch.user_idx.tolist(), batch.item_idx.tolist(), strict=True):
        masked = {(user, item)} if own_only else known
        hidden = [(user, c) in masked for c, _, _ in pairs]
        num_masked += sum(hidden)
        total = sum(
            float(w) * math.exp(float(users[user] @ v) / 0.4)
            for (_, v, w), hide in zip(pairs, hidden, strict=True)
            if not hide
        )
        positive = float(users[user] @ items[item]) / 0.4
        losses.append(math.log(math.exp(positive) + total) - positive)
    assert float(found.loss.detach()) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert (found.num_candidates, found.num_masked) == (len(pairs), num_masked)
    found.loss.backward()
    assert queue.vectors.grad is None


def older():
    """Six positives of rows before, and vectors that are not today's."""
    vectors = torch.randn(6, DIM, generator=torch.Generator().manual_seed(8))
    return DATA.train.item_idx[:6].long(), torch.nn.functional.normalize(vectors)


@given(seed=st.integers(0, 400), num_candidates=st.integers(0, 15), own_only=st.booleans())
@settings(max_examples=30)
def test_candidates_that_repeat_are_masked_each_time(seed, num_candidates, own_only):
    draws = torch.Generator().manual_seed(seed)
    candidates = torch.randint(NUM_ITEMS, (num_candidates,), generator=draws)
    batch = batch_of(torch.randperm(NUM_ROWS, generator=draws)[:8])
    known = KnownPositives(DATA.train, only_own=own_only)
    found = mask_repeats(known, batch.user_idx, batch.item_idx, candidates)
    pairs = set(zip(DATA.train.user_idx.tolist(), DATA.train.item_idx.tolist(), strict=True))
    told = [
        (row, column)
        for row, (user, own) in enumerate(
            zip(batch.user_idx.tolist(), batch.item_idx.tolist(), strict=True)
        )
        for column, item in enumerate(candidates.tolist())
        if (item == own if own_only else (user, item) in pairs)
    ]
    assert sorted(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == told
    assert found.rows.tolist() == sorted(found.rows.tolist())


# time cells


@given(num_rows=st.integers(1, 7), around=st.integers(1, 45))
@settings(max_examples=30)
def test_the_rows_around_a_cell_stand_for_its_expected_counts(num_rows, around):
    pool = torch.arange(around) + 100
    items, counts = spread(pool, num_rows)
    assert items.shape == counts.shape == (num_rows, 5)
    assert float(counts.sum()) == pytest.approx(num_rows, rel=1e-5)
    came = items[counts > 0]
    assert len(torch.unique(came)) == len(came) == min(around, 5 * num_rows)
    # With five cells each row has one of each, so that cutting a batch cuts no stretch of time.
    if around == 5 * num_rows:
        assert torch.equal(items, pool.view(5, num_rows).T)


def test_expected_counts_follow_those_who_are_in_the_queue():
    queue = queue_of(model_of(TIMED), 7, time_cells=True)
    draws = torch.Generator().manual_seed(3)
    pushed = deque(maxlen=7)
    for num_rows in (3, 3, 2, 3):
        pool = torch.randint(NUM_ITEMS, (5 * num_rows,), generator=draws)
        items = torch.randint(NUM_ITEMS, (num_rows,), generator=draws)
        queue.push(items, torch.zeros(num_rows, DIM), pool.int())
        pushed.extend(pool.view(5, num_rows).T.tolist())
        told = torch.zeros(NUM_ITEMS)
        for around in pushed:
            for item in around:
                told[item] += 1 / 5
        assert float(told.sum()) == pytest.approx(len(pushed), rel=1e-5)
        found = queue.queued(0)
        # Nothing in the queue is expected less than a row around a cell counts.
        told[found.item_idx] = told[found.item_idx].clamp(min=1 / 5)
        torch.testing.assert_close(found.counts, told)


def test_nothing_in_the_queue_is_unexpected_where_the_rows_around_it_have_left():
    queue = queue_of(model_of(TIMED), 2, time_cells=True)
    # A cell at the start of the log: of nine rows around it, those of item 4 are dealt to the
    # first of its three rows, which is not in the queue any more.
    pool = torch.tensor([4, 1, 2, 4, 1, 2, 4, 1, 2])
    queue.push(torch.tensor([1, 2, 4]), torch.zeros(3, DIM), pool)
    found = queue.queued(0)
    assert found.item_idx.tolist() == [4, 2]
    assert found.counts[[1, 2, 4]].tolist() == pytest.approx([1.0, 1.0, 0.2])


def test_a_time_cell_and_a_queue_are_one_mixture():
    log, counts = DATA.train, torch.rand(NUM_ITEMS) + 0.1
    sampler = CandidateSampler(log, NegativesSettings(in_batch=True, uniform=0))
    queued = Queued(torch.tensor([4, 4]), torch.zeros(2, DIM), 2, counts)
    positives, pool = torch.tensor([2, 7, 7]), torch.tensor([2, 7, 7, 4, 1])
    found = sampler.draw(
        positives, generator("cpu", 0), in_batch_counts=(pool, len(pool)), queued=queued
    )
    of_cell = 2 / 4 * torch.bincount(pool, minlength=NUM_ITEMS)
    expected = (of_cell + counts).log()
    told = torch.tensor([1.0, 2.0]).log() - expected[[2, 7]]
    torch.testing.assert_close(found.log_weights, told)
    torch.testing.assert_close(found.queued.log_weights, -expected[[4, 4]])


# what stands against it, and what comes back


def test_sharded_tables_are_refused(monkeypatch):
    monkeypatch.setattr(module, "ShardedTable", Table)
    with pytest.raises(ConfigError, match=r"parts\.0\.table of the item tower is sharded"):
        stepper_of(model_of(), QueueSettings(size=6))


def test_a_full_softmax_has_no_use_for_it():
    with pytest.raises(ConfigError, match=r"negatives\.queue is about sampled negatives"):
        stepper_of(model_of(), QueueSettings(size=6), loss=LossSettings(kind="full_softmax"))


@pytest.mark.parametrize("item", [RICH, TIMED], ids=["rich", "timed"])
def test_a_resumed_training_ends_in_the_same_bits(tmp_path, item):
    def train(folder, **options):
        model = model_of(item)
        fit(
            model,
            DATA.train,
            loss=LOSS,
            negatives=NegativesSettings(
                in_batch=True,
                uniform=3,
                counts="streaming" if item is RICH else "static",
                queue=QueueSettings(size=11),
            ),
            train=TrainSettings(batch_size=9, epochs=2, checkpoint_every=0.4),
            seed=4,
            checkpoints=tmp_path / folder,
            **options,
        )
        return weights_of(model)

    whole = train("whole")
    half = train("parts", num_steps=5)
    found = train("parts", resume=True)
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not any("queue" in name for name in whole)


def test_chunks_change_nothing_but_roundings():
    found = []
    for chunk_size in (None, 4):
        stepper = stepper_of(model_of(), QueueSettings(size=20, warmup=0.0), chunk_size=chunk_size)
        for step in range(4):
            stepper(step)
        found.append(weights_of(stepper.model) | dict(stepper.objective.state))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-5, rtol=2e-5)
