"""What a step scores: negatives of single rows against a loop over them."""

import math
from dataclasses import replace

import pytest
import torch

from recclr.kernels import PairMask
from recclr.scoring import Scored, own_partition, scored_loss
from recclr.settings import LossSettings

B, U, C, M, D = 5, 9, 7, 3, 4


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
