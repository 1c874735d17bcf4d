"""The sampled softmax, corrected, estimates the full softmax, for every mixture of sources.

With Ẑ the weighted sum over candidates, E[Ẑ] is the sum Z over all items that are no known
positives: exactly, which small logs prove by listing every draw. The loss log(e^s + Ẑ) - s is then
off by Jensen's inequality alone. With δ = (Ẑ - Z) / (e^s + Z), its bias is
-E[δ²]/2 + E[δ³]/3 - E[δ⁴]/4 …, whose moments follow from the sources: the first term falls as
1 / candidates. Run with ``-s`` to see the measured biases beside the predicted ones.
"""

import math
from collections import namedtuple
from itertools import combinations, product

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import recclr.scoring as scoring_module
from recclr.batches import Batch, BatchSource
from recclr.data.log import EncodedLog
from recclr.kernels import masked_logsumexp
from recclr.losses import contrastive_loss
from recclr.objective import Objective
from recclr.settings import LossSettings, NegativesSettings, PopularitySettings, TrainSettings
from recclr.towers import TwoTower

NUM_USERS, NUM_ITEMS, DIM, NUM_ROWS = 61, 150, 6, 960
TEMPERATURE, ALPHA, SEED = 0.25, 0.75, 5
# Draws of each other source for a row of the batch: four times as many as in-batch ones.
DRAWS_PER_ROW = 4
SOURCES = [sources for sources in product((True, False), repeat=3) if any(sources)]
NAMES = ("in_batch", "uniform", "popularity")


def name_of(sources):
    return "+".join(name for name, on in zip(NAMES, sources, strict=True) if on)


def vectors_of(num_rows, seed):
    return normalize(torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed)))


class Vectors(nn.Module):
    """The plainest tower: one free vector per entity."""

    def __init__(self, num_rows, seed):
        super().__init__()
        self.weight = nn.Parameter(vectors_of(num_rows, seed))

    def forward(self, rows):
        return self.weight[rows.idx]


def model_of(log):
    return TwoTower(
        Vectors(log.num_users, 1),
        Vectors(log.num_items, 2),
        num_users=log.num_users,
        num_items=log.num_items,
        similarity="cosine",
        loss=LossSettings(temperature=TEMPERATURE),
    )


def objective_of(log, sources, size, **loss):
    in_batch, uniform, popular = sources
    negatives = NegativesSettings(
        in_batch=in_batch,
        uniform=size * DRAWS_PER_ROW if uniform else 0,
        popularity=PopularitySettings(count=size * DRAWS_PER_ROW, alpha=ALPHA) if popular else None,
    )
    return Objective(log, LossSettings(temperature=TEMPERATURE, **loss), negatives, seed=SEED)


@pytest.fixture
def seen(monkeypatch):
    """(positive logits, log Ẑ) of every row, as the objective hands them to the loss."""
    calls = []

    def composed(
        queries,
        candidates,
        log_weights,
        positives,
        row_weights,
        mask,
        *,
        own_partition,
        bfloat16,
        **options,
    ):
        # What ``total_contrastive_loss`` is tested to be, with its parts in the graph.
        assert own_partition is None
        assert not bfloat16
        partition = masked_logsumexp(queries, candidates, log_weights, mask)
        calls.append((positives, partition))
        return (contrastive_loss(positives, partition, **options) * row_weights).sum()

    monkeypatch.setattr(scoring_module, "total_contrastive_loss", composed)
    return calls


# every draw of a tiny log, listed

# (user, item): item 0 is popular, 3 is in the catalogue only, and user 0 took item 1 twice. The
# last two rows lie outside the cell that a batch is drawn from.
TINY = [(0, 0), (1, 0), (2, 0), (0, 1), (0, 1), (3, 2), (1, 2), (2, 1)]
TINY_ITEMS = 4


def draws_of(sources):
    """Draws of each source: two of a single one, so that an item may come twice."""
    return 2 if sum(sources) == 1 else 1


def outcomes(sources, shares):
    """(probability, drawn items) of every possible draw."""
    _, uniform, popular = sources
    slots = [[(1 / TINY_ITEMS, item) for item in range(TINY_ITEMS)]] * uniform
    slots += [[(share, item) for item, share in shares.items()]] * popular
    for picks in product(*slots * draws_of(sources)):
        drawn = torch.tensor([item for _, item in picks], dtype=torch.int64)
        yield math.prod(share for share, _ in picks), drawn


def tiny_objective(log, sources, strength):
    in_batch, uniform, popular = sources
    negatives = NegativesSettings(
        in_batch=in_batch,
        uniform=draws_of(sources) if uniform else 0,
        popularity=PopularitySettings(count=draws_of(sources), alpha=ALPHA) if popular else None,
    )
    loss = LossSettings(temperature=TEMPERATURE, log_q_strength=strength)
    return Objective(log, loss, negatives, seed=SEED)


def expected_partition(sources, num_rows, seen, monkeypatch, *, cell, strength=1.0):
    """E[Ẑ | the row is in the batch] of each of the first ``num_rows`` rows, [num_rows]."""
    users, items = torch.tensor(TINY if cell else TINY[:num_rows], dtype=torch.int32).T
    log = EncodedLog(users.contiguous(), items.contiguous(), 4, TINY_ITEMS)
    counts = log.item_counts().tolist()
    powers = {item: count**ALPHA for item, count in enumerate(counts) if count}
    shares = {item: power / sum(powers.values()) for item, power in powers.items()}
    objective, model = tiny_objective(log, sources, strength), model_of(log)
    pool = log.item_idx[:num_rows] if cell else None
    total = torch.zeros(num_rows, dtype=torch.float64)
    for probability, drawn in outcomes(sources, shares):
        monkeypatch.setattr(objective.sampler, "_draws", lambda *args, drawn=drawn: drawn)
        for rows in map(list, combinations(range(num_rows), 3)):
            user_idx, item_idx = log.user_idx[rows].long(), log.item_idx[rows].long()
            seen.clear()
            objective(model, Batch(user_idx, item_idx, None, None, None, pool), 0)
            # Each row is in as many batches as there are pairs of others.
            share = probability / math.comb(num_rows - 1, 2)
            total[rows] += share * seen[0][1].detach().double().exp()
    return total, log


def full_partition(log, num_rows, reachable):
    users, items = vectors_of(log.num_users, 1), vectors_of(log.num_items, 2)
    known = set(zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True))
    return [
        sum(
            math.exp(float(users[user] @ items[item]) / TEMPERATURE)
            for item in reachable
            if (user, item) not in known
        )
        for user in log.user_idx[:num_rows].tolist()
    ]


@pytest.mark.parametrize("cell", [False, True], ids=["whole_log", "time_cell"])
@pytest.mark.parametrize("sources", SOURCES, ids=name_of)
def test_the_expected_sum_is_exactly_that_of_the_full_softmax(sources, cell, seen, monkeypatch):
    found, log = expected_partition(sources, 6, seen, monkeypatch, cell=cell)
    # What no source reaches cannot be estimated: the cold item needs uniform draws.
    reachable = range(TINY_ITEMS if sources[1] else TINY_ITEMS - 1)
    expected = full_partition(log, 6, reachable)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0
    )


def test_without_correction_the_expected_sum_is_another(seen, monkeypatch):
    found, log = expected_partition(
        (True, False, False), 6, seen, monkeypatch, cell=False, strength=0.0
    )
    expected = torch.tensor(full_partition(log, 6, range(3)), dtype=torch.float64)
    assert ((found / expected - 1).abs() > 0.05).all()


# what Jensen's inequality leaves, measured and predicted


def planted_log():
    """Rows of popularity times taste, so that the model fits its positives.

    Every item has a row, since in-batch draws cannot reach others.
    """
    draws = torch.Generator().manual_seed(3)
    scores = vectors_of(NUM_USERS, 1) @ vectors_of(NUM_ITEMS, 2).T
    weight = (scores / TEMPERATURE).exp() / torch.arange(1.0, NUM_ITEMS + 1) ** 0.9
    pairs = {(int(scores[:, item].argmax()), item) for item in range(NUM_ITEMS)}
    while len(pairs) < NUM_ROWS:
        user = int(torch.randint(NUM_USERS, (), generator=draws))
        pairs.add((user, int(torch.multinomial(weight[user], 1, generator=draws))))
    users, items = torch.tensor(sorted(pairs), dtype=torch.int32).T
    return EncodedLog(users.contiguous(), items.contiguous(), NUM_USERS, NUM_ITEMS)


LOG = planted_log()

# loss: sampled minus full. linear: the part of it that is proportional to δ, whose mean is 0.
# gradient, linear_gradient: likewise, by user and item vectors.
Measured = namedtuple("Measured", ["loss", "linear", "gradient", "linear_gradient", "full"])


def measure(sources, size, seen, *, num_steps, strength=1.0):
    """Differences of every step, [num_steps] and [num_steps, P], from the real objective.

    ``num_steps`` batches of ``size`` rows are whole epochs, so each row counts equally.
    """
    assert num_steps * size % NUM_ROWS == 0
    assert NUM_ROWS % size == 0
    model = model_of(LOG)
    leaves = (model.user_tower.weight, model.item_tower.weight)
    sampled = objective_of(LOG, sources, size, log_q_strength=strength)
    full = objective_of(LOG, sources, size, kind="full_softmax")
    batches = BatchSource(LOG, TrainSettings(batch_size=size), seed=SEED, time_cells=False)
    steps = []
    for step in range(num_steps):
        seen.clear()
        batch = batches.batch(step)
        ours, exact = sampled(model, batch, step).loss, full(model, batch, step).loss
        (_, ours_partition), (positive, partition) = seen
        whole = torch.logaddexp(positive, partition)
        linear = ((ours_partition - whole).exp() - (partition - whole).exp()).mean()
        values = (ours - exact, linear, exact)
        gradients = [flat_gradient(value, leaves) for value in values]
        steps.append((values[0].detach(), linear.detach(), *gradients))
    return Measured(*(torch.stack(column).double() for column in zip(*steps, strict=True)))


def flat_gradient(value, leaves):
    gradients = torch.autograd.grad(value, leaves, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def moments(shares_RC, terms_RC):
    """Variance and third central moment of one draw, for each row."""
    centred = terms_RC - (shares_RC * terms_RC).sum(1, keepdim=True)
    return (shares_RC * centred**2).sum(1), (shares_RC * centred**3).sum(1)


def predicted(sources, size):
    """First two orders of the bias (1 / size and 1 / size²), and the gradients of both.

    Uniform and popularity draws are independent, so central moments of up to third order add up.
    The batch is drawn without replacement from the other rows: finite population factors.
    """
    in_batch, uniform, popular = sources
    model = model_of(LOG)
    leaves = (model.user_tower.weight, model.item_tower.weight)
    users, items = (normalize(leaf.double()) for leaf in leaves)
    user_idx, item_idx, rows = LOG.user_idx.long(), LOG.item_idx.long(), torch.arange(NUM_ROWS)
    masses = (users[user_idx] @ items.T / TEMPERATURE).exp()
    known = torch.zeros(NUM_USERS, NUM_ITEMS, dtype=torch.bool)
    known[user_idx, item_idx] = True
    negatives = masses.masked_fill(known[user_idx], 0.0)
    whole = masses[rows, item_idx] + negatives.sum(1)
    counts = LOG.item_counts().double()
    others = counts.repeat(NUM_ROWS, 1)
    others[rows, item_idx] -= 1
    flat = torch.full((NUM_ITEMS,), 1 / NUM_ITEMS, dtype=torch.float64)
    powers = counts**ALPHA / (counts**ALPHA).sum()
    population, drawn, draws = NUM_ROWS - 1, size - 1, size * DRAWS_PER_ROW
    expected = draws * (uniform * flat + popular * powers) + in_batch * drawn / population * counts
    terms = negatives / expected / whole[:, None]
    variance = third = torch.zeros(NUM_ROWS, dtype=torch.float64)
    for shares in [flat] * uniform + [powers] * popular:
        second_of, third_of = moments(shares, terms)
        variance, third = variance + draws * second_of, third + draws * third_of
    if in_batch:
        second_of, third_of = moments(others / population, terms)
        left = (population - drawn) / (population - 1)
        variance = variance + drawn * left * second_of
        third = third + drawn * left * (population - 2 * drawn) / (population - 2) * third_of
    # Of the fourth moment, 3·variance² is of order 1 / size².
    orders = (-variance / 2).mean(), (third / 3 - 3 * variance**2 / 4).mean()
    gradients = [flat_gradient(order, leaves).double() for order in orders]
    return [float(order.detach()) for order in orders], gradients


def mean_and_error(values):
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def length_of_noise(vectors):
    """Root mean square length of the error of the mean of the rows."""
    return float((vectors.var(0) / len(vectors)).sum().sqrt())


def check_unbiased(measured):
    mean, error = mean_and_error(measured.linear)
    assert abs(mean) <= 4 * error
    # The length of noise in many dimensions is near its root mean square; twice that is far off.
    assert float(measured.linear_gradient.mean(0).norm()) <= 2 * length_of_noise(
        measured.linear_gradient
    )


def check_against_theory(measured, theory):
    """Loss and gradient bias are those predicted; what is left is noise and the next order."""
    (first, second), (first_gradient, second_gradient) = theory
    # The linear part is zero in the mean and most of the noise.
    mean, error = mean_and_error(measured.loss - measured.linear)
    assert abs(mean - first - second) <= 4 * error + abs(second)
    curved = measured.gradient - measured.linear_gradient
    off = curved.mean(0) - first_gradient - second_gradient
    slack = float(second_gradient.norm())
    assert float(off.norm()) <= 2 * length_of_noise(curved) + slack
    # Along the predicted direction there is less noise than in all together.
    along, error = mean_and_error(curved @ normalize(first_gradient, dim=0))
    expected = first_gradient + second_gradient
    told = float(expected @ normalize(first_gradient, dim=0))
    assert abs(along - told) <= 4 * error + slack


def check_shrinks(few, many, theories, sizes):
    """From the smaller to the larger size the bias falls by the predicted factor."""
    (first_few, second_few), (first_many, second_many) = (theory[0] for theory in theories)
    factor = first_few / first_many
    growth = sizes[1] / sizes[0]
    # A batch is drawn without replacement from NUM_ROWS - 1 others, which does better yet.
    finite = (NUM_ROWS - sizes[0]) / (NUM_ROWS - sizes[1])
    assert growth * (1 - 1e-9) <= factor <= growth * finite * sizes[0] / (sizes[0] - 1)
    mean_few, error_few = mean_and_error(few.loss - few.linear)
    mean_many, error_many = mean_and_error(many.loss - many.linear)
    noise = 4 * math.hypot(error_few, factor * error_many)
    slack = 2 * (abs(second_few) + factor * abs(second_many))
    assert abs(mean_few - factor * mean_many) <= noise + slack
    # Even at the edge of its error the larger sample is the better one.
    assert abs(mean_many) + 4 * error_many < abs(mean_few)


def check_far_below(corrected, plain):
    """Ten times below the uncorrected bias, errors counted against us, in loss and gradient.

    Both see the same draws, so their difference is less noisy than either.
    """
    bias, error = mean_and_error(corrected.loss - corrected.linear)
    at_most = abs(bias) + 4 * error
    gap, gap_error = mean_and_error(plain.loss - corrected.loss)
    assert 10 * at_most < abs(gap) - 4 * gap_error - at_most
    # Gradients along the direction in which the uncorrected one is off.
    gaps = plain.gradient - corrected.gradient
    direction = gaps.mean(0) / gaps.mean(0).norm()
    bias, error = mean_and_error((corrected.gradient - corrected.linear_gradient) @ direction)
    at_most = abs(bias) + 4 * error
    gap, gap_error = mean_and_error(gaps @ direction)
    assert 10 * at_most < gap - 4 * gap_error - at_most


def show(label, measured, theory=None):
    loss, error = mean_and_error(measured.loss)
    curved, curved_error = mean_and_error(measured.loss - measured.linear)
    full = measured.full.mean(0).norm()
    gradient = float((measured.gradient - measured.linear_gradient).mean(0).norm() / full)
    line = f"{label:>34}: loss {loss:+.4f} ± {error:.4f}"
    if theory is None:
        gradient = float(measured.gradient.mean(0).norm() / full)
        print(f"{line}{'gradient':>48} off by {gradient:6.2%}")
        return
    (first, second), gradients = theory
    told = float(sum(gradients).norm() / full)
    print(
        f"{line}, less its linear part {curved:+.5f} ± {curved_error:.5f} "
        f"(theory {first + second:+.5f}), gradient off by {gradient:6.2%} ({told:6.2%})"
    )


def check_mixture(sources, sizes, seen, *, num_steps):
    theories = [predicted(sources, size) for size in sizes]
    trials = [measure(sources, size, seen, num_steps=num_steps) for size in sizes]
    plain = measure(sources, sizes[-1], seen, num_steps=num_steps, strength=0.0)
    print()
    for size, measured, theory in zip(sizes, trials, theories, strict=True):
        show(f"{name_of(sources)} x {size}", measured, theory)
    show("uncorrected", plain)
    for measured, theory in zip(trials, theories, strict=True):
        check_unbiased(measured)
        check_against_theory(measured, theory)
    for at in range(len(sizes) - 1):
        check_shrinks(*trials[at : at + 2], theories[at : at + 2], sizes[at : at + 2])
    check_far_below(trials[-1], plain)


@pytest.mark.parametrize("sources", SOURCES, ids=name_of)
def test_bias_is_the_predicted_one_and_far_below_the_uncorrected(sources, seen):
    check_mixture(sources, (30, 240), seen, num_steps=32)


@pytest.mark.slow
@pytest.mark.parametrize("sources", SOURCES, ids=name_of)
def test_bias_falls_as_predicted_over_more_sizes(sources, seen):
    check_mixture(sources, (30, 80, 240), seen, num_steps=192)
