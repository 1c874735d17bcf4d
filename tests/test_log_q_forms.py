"""Both forms of logQ against what their papers write, and against the full softmax.

Run with ``-s`` to see how far the loss and its gradient are off, over an epoch of batches.
"""

import math
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from recclr.batches import Batch, BatchSource
from recclr.data.log import EncodedLog
from recclr.objective import Objective
from recclr.settings import LossSettings, NegativesSettings, PopularitySettings, TrainSettings
from recclr.towers import TwoTower

TEMPERATURE, SEED = 0.1, 6


class Vectors(nn.Module):
    def __init__(self, vectors):
        super().__init__()
        self.weight = nn.Parameter(vectors)

    def forward(self, rows):
        return self.weight[rows.idx]


def vectors_of(num_rows, seed, dim=6):
    return normalize(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)))


def model_of(log):
    return TwoTower(
        Vectors(vectors_of(log.num_users, 1)),
        Vectors(vectors_of(log.num_items, 2)),
        num_users=log.num_users,
        num_items=log.num_items,
        similarity="cosine",
        loss=LossSettings(temperature=TEMPERATURE),
    )


def leaves_of(model):
    return model.user_tower.weight, model.item_tower.weight


# what the papers write

# Items 0 to 5 came once, the others 2, 3, … times; a batch holds each item at most once.
COUNTS = [1] * 6 + [2, 3, 5, 9]
BATCH_ITEMS = torch.tensor([0, 6, 3, 9, 1, 7])


def small_log():
    items = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    users = torch.arange(len(items)) % 7
    return EncodedLog(users.int(), items.int(), 7, len(COUNTS))


def small_step(log, *, weight=None, **options):
    model = model_of(log)
    users = torch.tensor([5, 0, 3, 3, 2, 6])
    batch = Batch(users, BATCH_ITEMS, weight, None, None, None)
    loss = LossSettings(temperature=TEMPERATURE, mask_known_positives=False, **options)
    found = Objective(log, loss, NegativesSettings(in_batch=True, uniform=0), seed=SEED)(
        model, batch, 0
    ).loss
    unit = [normalize(leaf.double(), dim=1) for leaf in leaves_of(model)]
    scores = unit[0][users] @ unit[1][BATCH_ITEMS].T / TEMPERATURE
    return model, found, scores


def test_the_corrected_gradient_is_that_of_khrylchenko_and_others():
    """loss = sg(1 - p)·(log of the mean of exp(s_j) / q'_j - s_pos), q'_j = q_j / (1 - q_pos).

    Written so, an item that came once more than it is expected to would be counted by the size of
    the sample of the others; rows whose item came once have no such difference.
    """
    log, rows = small_log(), (0, 2, 4)
    weight = torch.zeros(len(BATCH_ITEMS))
    weight[list(rows)] = torch.tensor([0.5, 1.0, 2.0])
    model, ours, scores = small_step(log, weight=weight)
    q = torch.tensor(COUNTS, dtype=torch.float64) / len(log)
    q = q[BATCH_ITEMS]
    theirs = 0.0
    for b in rows:
        negatives = [j for j in range(len(BATCH_ITEMS)) if j != b]
        q_prime = q[negatives] / (1 - q[b])
        terms = scores[b, negatives] - q_prime.log()
        mean = terms.exp().mean()
        p = scores[b, b].exp() / (scores[b, b].exp() + mean)
        theirs += weight[b] / weight.sum() * (1 - p).detach() * (mean.log() - scores[b, b])
    found = torch.autograd.grad(ours, leaves_of(model), retain_graph=True)
    expected = torch.autograd.grad(theirs, leaves_of(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # The values are not the same: theirs is none of a likelihood.
    assert abs(float(ours.detach()) - float(theirs.detach())) > 0.1


def test_the_classic_form_is_that_of_yi_and_others():
    """Mean of -log(exp(s_ii - log p_i) / Σ_j exp(s_ij - log p_j)) over a batch."""
    log = small_log()
    model, ours, scores = small_step(log, log_q="classic")
    p = (torch.tensor(COUNTS, dtype=torch.float64) / len(log))[BATCH_ITEMS]
    theirs = -(scores - p.log()).log_softmax(1).diagonal().mean()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    found = torch.autograd.grad(ours, leaves_of(model), retain_graph=True)
    expected = torch.autograd.grad(theirs, leaves_of(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_without_correction_it_is_nt_xent():
    """A loop over the batch, as SimCLR writes it, with the other side for the second view."""
    log = small_log()
    _, ours, scores = small_step(log, log_q_strength=0.0)
    scores, total = scores.tolist(), 0.0
    for i, row in enumerate(scores):
        total -= math.log(math.exp(row[i]) / math.fsum(math.exp(each) for each in row))
    assert float(ours.detach()) == pytest.approx(total / len(scores), abs=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("uniform", [0, 8])
@pytest.mark.parametrize("popularity", [None, PopularitySettings(count=5, alpha=0.5)])
@pytest.mark.parametrize("pool", [None, 9], ids=["log", "cell"])
def test_the_classic_form_moves_positives_by_what_moves_candidates(
    pool, popularity, uniform, strength
):
    """Every mixture: a positive is corrected as if it had been drawn once."""
    log = small_log()
    rows = torch.randperm(len(log), generator=torch.Generator().manual_seed(1))[:6]
    seen = None if pool is None else torch.cat([log.item_idx[rows], log.item_idx[:pool]])
    batch = Batch(log.user_idx[rows].long(), log.item_idx[rows].long(), None, None, None, seen)
    loss = LossSettings(log_q="classic", log_q_strength=strength)
    negatives = NegativesSettings(in_batch=True, uniform=uniform, popularity=popularity)
    objective = Objective(log, loss, negatives, seed=SEED)
    found = objective._positive_log_weights(batch.item_idx, batch).squeeze(1)
    candidates = objective._candidates(batch, 0)
    unmoved = Objective(log, LossSettings(log_q_strength=0.0), negatives, seed=SEED)
    draws = unmoved._candidates(batch, 0).log_weights
    moved = (candidates.log_weights - draws)[candidates.positive_row]
    torch.testing.assert_close(found, moved)


# over a catalogue of 1,000 items

NUM_USERS, NUM_ITEMS, NUM_ROWS, BATCH_SIZE = 300, 1000, 8000, 200
# So many draws that what Jensen's inequality leaves (``test_log_q``) is less than the noise. With
# uniform ones alone the classic form moves all logits alike, and is no correction.
SOURCES = {
    "mixed": NegativesSettings(
        in_batch=True, uniform=2048, popularity=PopularitySettings(count=1024)
    ),
    "uniform": NegativesSettings(in_batch=False, uniform=16_384),
}
FORMS = {
    "corrected": {},
    "classic": {"log_q": "classic"},
    "uncorrected": {"log_q_strength": 0.0},
}
# Of each batch: losses [steps], gradients by user and item vectors [steps, P].
Steps = namedtuple("Steps", ["losses", "gradients"])


@pytest.fixture(scope="module")
def log():
    """Rows by popularity times taste, so that the model fits its positives; each item has some."""
    draws = torch.Generator().manual_seed(3)
    scores = vectors_of(NUM_USERS, 1) @ vectors_of(NUM_ITEMS, 2).T
    weight = (scores / TEMPERATURE).exp() / torch.arange(1.0, NUM_ITEMS + 1) ** 0.9
    picked = torch.multinomial(weight.flatten(), NUM_ROWS - NUM_ITEMS, generator=draws)
    users = torch.cat([picked // NUM_ITEMS, scores.argmax(0)])
    items = torch.cat([picked % NUM_ITEMS, torch.arange(NUM_ITEMS)])
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS)


def steps_of(log, negatives, **options):
    """Loss and gradient of each batch of one epoch, at the same weights."""
    model = model_of(log)
    loss = LossSettings(temperature=TEMPERATURE, **options)
    objective = Objective(log, loss, negatives, seed=SEED)
    train = TrainSettings(batch_size=BATCH_SIZE)
    source = BatchSource(log, train, seed=SEED, time_cells=False)
    losses, gradients = [], []
    for number in range(NUM_ROWS // BATCH_SIZE):
        value = objective(model, source.batch(number), number).loss
        slopes = torch.autograd.grad(value, leaves_of(model))
        losses.append(value.detach())
        gradients.append(torch.cat([slope.flatten() for slope in slopes]))
    return Steps(torch.stack(losses).double(), torch.stack(gradients).double())


@pytest.fixture(scope="module")
def full(log):
    return steps_of(log, SOURCES["mixed"], kind="full_softmax")


def mean_and_error(values):
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@pytest.mark.parametrize("sources", SOURCES)
def test_only_the_corrected_form_is_within_its_error_of_the_full_softmax(log, full, sources):
    off = {}
    for form, options in FORMS.items():
        found = steps_of(log, SOURCES[sources], **options)
        off[form] = Steps(found.losses - full.losses, found.gradients - full.gradients)
    corrected, length = off.pop("corrected"), float(full.gradients.mean(0).norm())
    bias, error = mean_and_error(corrected.losses)
    noise = float((corrected.gradients.var(0) / len(corrected.gradients)).sum().sqrt())
    whole = float(corrected.gradients.mean(0).norm())
    print(
        f"\n{sources}: corrected: loss off by {bias:+.4f} ± {error:.4f}, gradient by "
        f"{whole / length:.1%} in all directions (noise {noise / length:.1%})"
    )
    assert abs(bias) <= 4 * error
    # The length of noise in many dimensions is near its root mean square.
    assert whole <= 1.5 * noise
    for form, found in off.items():
        # Both see the same draws, so the direction between them is less noisy than either.
        direction = normalize((found.gradients - corrected.gradients).mean(0), dim=0)
        along, along_error = mean_and_error(corrected.gradients @ direction)
        wrong, wrong_error = mean_and_error(found.gradients @ direction)
        loss, loss_error = mean_and_error(found.losses)
        print(
            f"  {form}: loss off by {loss:+.4f} ± {loss_error:.4f}, gradient by "
            f"{wrong / length:.2%} ± {wrong_error / length:.2%} where the corrected one is by "
            f"{along / length:+.2%} ± {along_error / length:.2%}"
        )
        assert abs(loss) >= 8 * max(error, loss_error)
        assert abs(along) <= 4 * along_error
        assert wrong >= 8 * wrong_error
