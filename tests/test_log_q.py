"""The sampled softmax, corrected, is an estimate of the full softmax, for every mixture of sources.

With Ẑ the weighted sum over candidates, E[Ẑ] is the sum over all items, so the loss log(e^s + Ẑ) is
biased only by Jensen's inequality: about -Var(Ẑ) / 2(e^s + Z)², which falls as 1 / candidates.
Run with ``-s`` to see the measured biases.
"""

from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from recclr.data.log import EncodedLog
from recclr.kernels import masked_logsumexp
from recclr.known_positives import KnownPositives
from recclr.losses import contrastive_loss
from recclr.negatives import CandidateSampler
from recclr.order import generator
from recclr.settings import NegativesSettings, PopularitySettings

NUM_USERS, NUM_ITEMS, DIM, TEMPERATURE = 61, 97, 7, 0.3
SOURCES = [s for s in product((False, True), repeat=3) if any(s)]
NAMES = ("in_batch", "uniform", "popularity")


def planted_log():
    """Skewed popularity; every item has a row, since in-batch draws cannot reach others."""
    draws = torch.Generator().manual_seed(3)
    weight = 1 / torch.arange(1.0, NUM_ITEMS + 1) ** 0.9
    pairs = set()
    for item in range(NUM_ITEMS):
        pairs.add((int(torch.randint(NUM_USERS, (1,), generator=draws)), item))
    while len(pairs) < 900:
        user = int(torch.randint(NUM_USERS, (1,), generator=draws))
        pairs.add((user, int(torch.multinomial(weight, 1, generator=draws))))
    users, items = torch.tensor(sorted(pairs), dtype=torch.int32).T
    return EncodedLog(users.contiguous(), items.contiguous(), NUM_USERS, NUM_ITEMS)


class Experiment:
    """Mean difference of sampled and full softmax over many random batches."""

    def __init__(self, sources, size, strength):
        in_batch, uniform, popular = sources
        self.log = planted_log()
        settings = NegativesSettings(
            in_batch=in_batch,
            uniform=size if uniform else 0,
            popularity=PopularitySettings(count=size, alpha=0.7) if popular else None,
        )
        self.sampler = CandidateSampler(self.log, settings, log_q_strength=strength)
        self.known = KnownPositives(self.log)
        self.size = size
        draws = torch.Generator().manual_seed(5)
        self.users = normalize(torch.randn(NUM_USERS, DIM, generator=draws)).requires_grad_()
        self.items = normalize(torch.randn(NUM_ITEMS, DIM, generator=draws)).requires_grad_()

    def loss(self, candidates, user_idx, item_idx):
        queries = self.users[user_idx] / TEMPERATURE
        rows = self.items[candidates.candidate_idx]
        mask = self.known.mask(user_idx, item_idx, candidates.candidate_idx)
        log_partition = masked_logsumexp(queries, rows, candidates.log_weights, mask)
        return contrastive_loss((queries * self.items[item_idx]).sum(1), log_partition).mean()

    def run(self, num_batches):
        """(bias, its standard error, relative error of the mean gradient)."""
        biases, differences, full_gradient = [], [], 0.0
        for number in range(num_batches):
            draws = generator("cpu", 11, number)
            rows = torch.randperm(len(self.log), generator=draws)[: self.size]
            user_idx, item_idx = self.log.user_idx[rows].long(), self.log.item_idx[rows].long()
            sampled = self.loss(self.sampler.draw(item_idx, draws), user_idx, item_idx)
            full = self.loss(self.sampler.everything(item_idx), user_idx, item_idx)
            biases.append(float((sampled - full).detach()))
            leaves = (self.users, self.items)
            ours, theirs = (
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
                for loss in (sampled, full)
            )
            differences.append(ours - theirs)
            full_gradient = full_gradient + theirs / num_batches
        bias = torch.tensor(biases, dtype=torch.float64)
        difference = torch.stack(differences).double()
        mean = difference.mean(0)
        # The squared norm of a mean of noise is its variance; taken off, what is left is bias.
        noise = (difference.var(0) / num_batches).sum()
        error = (mean.square().sum() - noise).clamp_min(0).sqrt() / full_gradient.norm()
        return (
            float(bias.mean()),
            float(bias.std() / num_batches**0.5),
            float(error),
        )


def mixtures():
    """The three that are used most in the default suite, the others in the slow one."""
    for sources in SOURCES:
        name = "+".join(n for n, on in zip(NAMES, sources, strict=True) if on)
        quick = sources in ((True, False, False), (False, True, False), (True, True, True))
        yield pytest.param(sources, id=name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("sources", list(mixtures()))
def test_correction_approaches_the_full_softmax_as_candidates_grow(sources):
    small, middle, large = (Experiment(sources, size, 1.0).run(250) for size in (12, 48, 192))
    plain = Experiment(sources, 192, 0.0).run(60)
    for size, (bias, error, gradient) in ((12, small), (48, middle), (192, large)):
        print(f"\n{size:4d} draws: bias {bias:+.4f} ± {error:.4f}, gradient off by {gradient:.3f}")
    print(f"\n192 draws, uncorrected: bias {plain[0]:+.4f}, gradient off by {plain[2]:.3f}")
    # Jensen: never above the full softmax.
    for bias, error, _ in (small, middle, large):
        assert bias <= 3 * error
    # Four times the candidates, a quarter of the bias; draws without replacement do better.
    for few, many in ((small, middle), (middle, large)):
        assert abs(many[0]) <= abs(few[0]) / 2.5 + 3 * many[1]
    assert abs(large[0]) < 0.1 * abs(plain[0])
    if sources != (False, True, False):
        # Without correction uniform draws alone are off by a constant factor only.
        assert large[2] < 0.25 * plain[2]
    assert large[2] < small[2]


def test_an_uncorrected_batch_pushes_popular_items_down():
    # Uncorrected in-batch negatives weigh an item by its popularity, so the most popular ones are
    # pushed away harder than under the full softmax, and the correction takes that back.
    pushes = {}
    for strength in (0.0, 1.0):
        trial = Experiment((True, False, False), 64, strength)
        popular = trial.log.item_counts().argsort(descending=True)[:5]
        total = torch.zeros(())
        for number in range(200):
            draws = generator("cpu", 11, number)
            rows = torch.randperm(len(trial.log), generator=draws)[:64]
            user_idx = trial.log.user_idx[rows].long()
            item_idx = trial.log.item_idx[rows].long()
            queries = trial.users[user_idx].detach() / TEMPERATURE
            for kind in ("sampled", "full"):
                candidates = (
                    trial.sampler.draw(item_idx, draws)
                    if kind == "sampled"
                    else trial.sampler.everything(item_idx)
                )
                weights = candidates.log_weights.clone().requires_grad_()
                mask = trial.known.mask(user_idx, item_idx, candidates.candidate_idx)
                items = trial.items.detach()
                partition = masked_logsumexp(
                    queries, items[candidates.candidate_idx], weights, mask
                )
                positive = (queries * items[item_idx]).sum(1)
                contrastive_loss(positive, partition).mean().backward()
                mass = weights.grad[torch.isin(candidates.candidate_idx, popular)].sum()
                total += mass if kind == "sampled" else -mass
        pushes[strength] = float(total / 200)
    assert pushes[0.0] > 0.02
    assert abs(pushes[1.0]) < 0.1 * pushes[0.0]
