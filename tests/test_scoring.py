"""What a step scores: negatives of single rows against a loop over them, and the softmax family
against all logits at once, in double precision.
"""

import math
from dataclasses import replace

import pytest
import torch

from recclr import scoring
from recclr.kernels import BitMask, PairMask
from recclr.scoring import Scored, hardened_partition, own_partition, scored_loss
from recclr.settings import LossSettings

B, U, C, M, D = 5, 9, 7, 3, 4
# Two further positives of a row, of which some have one and one has none.
MORE = torch.tensor([[6, 2], [1, -1], [0, 7], [-1, -1], [2, -1]])


def scored(*, own=True):
    draws = torch.Generator().manual_seed(3)
    queries = torch.randn(B, D, generator=draws).requires_grad_()
    items = torch.randn(U, D, generator=draws).requires_grad_()
    own_weights = torch.randn(B, M, generator=draws)
    own_weights[1] = -math.inf
    own_weights[2, 1:] = -math.inf
    return Scored(
        queries,
        items,
        torch.tensor(0.7),
        torch.arange(B),
        torch.arange(B),
        torch.tensor([0, 8, 3, 3, 5]),
        items[:C],
        torch.randn(C, generator=draws),
        PairMask(torch.tensor([0, 2, 4]), torch.tensor([0, 3, 5])),
        torch.rand(B, generator=draws),
        torch.randint(U, (B, M), generator=draws) if own else None,
        own_weights if own else None,
    )


def without_graph(case):
    tensors = {name: getattr(case, name).detach() for name in ("queries", "items", "candidates")}
    return replace(case, **tensors)


def loop(case):
    total, case = 0.0, without_graph(case)
    masked = set(zip(case.mask.rows.tolist(), case.mask.columns.tolist(), strict=True))
    for b in range(B):
        positive = float(case.queries[b] @ case.items[case.positive_row[b]]) / 0.7
        found = math.exp(positive)
        for c in range(C):
            if (b, c) not in masked:
                logit = float(case.queries[b] @ case.candidates[c]) / 0.7
                found += math.exp(logit + float(case.log_weights[c]))
        for m in range(M if case.own_row is not None else 0):
            logit = float(case.queries[b] @ case.items[case.own_row[b, m]]) / 0.7
            found += math.exp(logit + float(case.own_log_weights[b, m]))
        total += float(case.row_weights[b]) * (math.log(found) - positive)
    return total


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_is_that_of_a_loop(own):
    case = scored(own=own)
    loss = scored_loss(case, LossSettings())
    assert float(loss.detach()) == pytest.approx(loop(case), rel=1e-5)
    loss.backward()
    assert case.queries.grad.isfinite().all()


def test_a_row_without_negatives_of_its_own_has_no_gradient_from_them():
    case = scored()
    found = own_partition(case, case.queries)
    assert found[1] == -math.inf
    (grad,) = torch.autograd.grad(found[found > -math.inf].sum(), case.queries)
    assert grad[1].abs().sum() == 0
    assert grad.isfinite().all()
    assert own_partition(scored(own=False), case.queries) is None


def dense(case, loss):
    """The same loss from all logits at once, float64, with the gradient of what ``case`` holds."""
    leaves = [x.detach().double().requires_grad_() for x in (case.queries, case.items)]
    queries, items = leaves
    candidates = items[:C]
    hidden = torch.zeros(B, C, dtype=torch.bool)
    hidden[case.mask.rows, case.mask.columns] = True
    scores, weights = queries @ candidates.T, case.log_weights.double().expand(B, C)
    weights = weights.masked_fill(hidden, -math.inf)
    if case.own_row is not None:
        own = torch.einsum("bd,bmd->bm", queries, items[case.own_row])
        scores = torch.cat([scores, own], 1)
        weights = torch.cat([weights, case.own_log_weights.double()], 1)
    logits, omega = scores / float(case.temperature), weights.exp()
    hard = (loss.hardness * logits).exp()
    mean = (omega * hard).sum(1, keepdim=True) / omega.sum(1, keepdim=True)
    total = (omega * hard / mean * logits.exp()).sum(1)
    some = total.isfinite()
    total = torch.where(some, total, 0.0)
    losses = torch.zeros(B, dtype=torch.float64)
    for b in range(B):
        rows = [int(case.positive_row[b])]
        if case.more_row is not None:
            rows += [row for row in case.more_row[b].tolist() if row >= 0]
        for p, row in enumerate(rows):
            score = queries[b] @ items[row]
            positive = score / float(case.temperature)
            if case.positive_log_weights is not None:
                positive = positive + float(case.positive_log_weights[b, p])
            second = 1.0 if loss.decoupled else loss.second_temperature
            if second is None:
                value = (positive.exp() + total[b]).log() - positive
            else:
                value = second * (total[b].log() if some[b] else 0.0) - positive
            if loss.top_k is not None:
                quantile = sorted_quantile(scores[b], omega[b], loss.top_k)
                far = (float(score.detach()) - quantile) / loss.top_k_temperature
                value = value / (1 + math.exp(-far))
            losses[b] += value / len(rows)
    found = (losses * case.row_weights.double()).sum()
    return found.detach(), torch.autograd.grad(found, leaves)


def sorted_quantile(scores, weights, top_k):
    """The smallest score such that no more than K items are above it, by trying all of them."""
    alive = [
        (s, w) for s, w in zip(scores.tolist(), weights.tolist(), strict=True) if math.isfinite(w)
    ]
    alive = [(s, w) for s, w in alive if w > 0]
    if math.fsum(w for _, w in alive) <= top_k:
        return -math.inf
    enough = [t for t, _ in alive if math.fsum(w for s, w in alive if s > t) <= top_k]
    return min(enough)


FAMILY = {
    "infonce": {},
    "decoupled": {"decoupled": True},
    "bsl": {"second_temperature": 1.3},
    "hard": {"hardness": 0.8},
    "hard_decoupled": {"hardness": 0.3, "decoupled": True},
    "top_k": {"top_k": 2, "top_k_temperature": 0.4},
    "top_k_hard": {"top_k": 1, "top_k_temperature": 2.5, "hardness": 1.5},
}


@pytest.mark.parametrize("more", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("classic", [False, True], ids=["corrected", "classic"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradients_are_those_of_all_logits_at_once(name, own, classic, more):
    case, loss = scored(own=own), LossSettings(**FAMILY[name])
    if more:
        case = replace(case, more_row=MORE)
    if classic:
        draws = torch.Generator().manual_seed(9)
        width = 1 + MORE.shape[1] if more else 1
        case = replace(case, positive_log_weights=torch.randn(B, width, generator=draws))
    expected, slow = dense(case, loss)
    found = scored_loss(case, loss)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)
    fast = torch.autograd.grad(found, (case.queries, case.items))
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "infonce"])
def test_every_key_changes_the_loss_and_its_gradient(name):
    found = {}
    for key in ("infonce", name):
        case = scored()
        loss = scored_loss(case, LossSettings(**FAMILY[key]))
        loss.backward()
        found[key] = float(loss.detach()), case.queries.grad
    assert abs(found[name][0] - found["infonce"][0]) > 1e-3
    assert (found[name][1] - found["infonce"][1]).abs().max() > 1e-3


def test_hardness_0_is_infonce_by_either_way(monkeypatch):
    case = scored()
    queries = case.queries / case.temperature
    partition = hardened_partition(case, queries, 0.0)
    logits = (queries * case.items[case.positive_row]).sum(1)
    by_parts = ((torch.logaddexp(logits, partition) - logits) * case.row_weights).sum()
    torch.testing.assert_close(scored_loss(case, LossSettings(hardness=0.0)), by_parts)
    # So near to 0 that nothing is weighted, but by the other way.
    torch.testing.assert_close(scored_loss(case, LossSettings(hardness=1e-6)), by_parts)
    monkeypatch.setattr(scoring, "total_contrastive_loss", None)
    scored_loss(case, LossSettings(hardness=1e-6))
    with pytest.raises(TypeError):
        scored_loss(case, LossSettings())


@pytest.mark.parametrize("hardness", [0.0, 0.7])
def test_equal_logits_are_all_as_hard_as_each_other(hardness):
    case = scored()
    case = replace(case, candidates=torch.ones(C, D), items=torch.ones(U, D))
    found = hardened_partition(case, torch.ones(B, D), hardness)
    plain = hardened_partition(case, torch.ones(B, D), 0.0)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("loss", FAMILY.values(), ids=FAMILY)
def test_rows_without_negatives_give_numbers(loss):
    """Their loss is 0, or they pull their positive; never NaN."""
    every = torch.arange(C).repeat(2)
    mask = PairMask(torch.tensor([0, 3]).repeat_interleave(C), every)
    case = replace(scored(own=False), mask=mask)
    for more in (None, MORE):
        found = scored_loss(replace(case, more_row=more), LossSettings(**loss))
        gradients = torch.autograd.grad(found, (case.queries, case.items), retain_graph=True)
        assert found.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        pulled = "second_temperature" in loss or "decoupled" in loss
        assert (float(gradients[0][0].abs().sum()) > 0) == pulled


@pytest.mark.parametrize("loss", FAMILY.values(), ids=FAMILY)
def test_a_mask_of_bits_gives_the_same(loss):
    case, settings = scored(), LossSettings(**loss)
    hidden = torch.zeros(B, C, dtype=torch.bool)
    hidden[case.mask.rows, case.mask.columns] = True
    bits = replace(case, mask=BitMask.from_dense(hidden))
    torch.testing.assert_close(scored_loss(bits, settings), scored_loss(case, settings))


def test_one_positive_more_or_less_is_the_mean_of_both():
    """A row with two positives costs what two rows of half the weight cost."""
    case = scored(own=False)
    both = replace(case, more_row=torch.full((B, 1), -1))
    both.more_row[1] = 4
    which = torch.tensor([0, 1, 1, 2, 3, 4])
    rows = case.positive_row[which]
    rows[2] = 4
    weights = case.row_weights[which] / torch.tensor([1, 2, 2, 1, 1, 1])
    mask = PairMask(torch.tensor([0, 3, 5]), torch.tensor([0, 3, 5]))
    apart = replace(
        case, queries=case.queries[which], positive_row=rows, row_weights=weights, mask=mask
    )
    torch.testing.assert_close(
        scored_loss(both, LossSettings()), scored_loss(apart, LossSettings())
    )
