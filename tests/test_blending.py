"""Models side by side: the score of the whole is the sum of the weighted scores of its parts."""

import pytest
import torch

from recclr.blending import (
    Vectors,
    choose_weights,
    compressed,
    laid_side_by_side,
    of_equal_spread,
)
from recclr.errors import ShapeError

U, V = 23, 31


def part(dim, seed, *, length=1.0):
    draws = torch.Generator().manual_seed(seed)
    users = torch.randn(U, dim, generator=draws) * length
    return Vectors(users, torch.randn(V, dim, generator=draws) + 0.5)


def scores(vectors):
    return vectors.users @ vectors.items.T


def test_the_spread_is_that_of_the_scores_over_the_catalogue():
    found = of_equal_spread(part(5, 1, length=7.0))
    torch.testing.assert_close(found.users.norm(dim=1), torch.ones(U))
    assert float(scores(found).std(1, unbiased=False).mean()) == pytest.approx(1.0, rel=1e-4)


def test_of_many_users_a_sample_is_measured():
    draws = torch.Generator().manual_seed(3)
    users = torch.randn(5000, 6, generator=draws)
    found = of_equal_spread(Vectors(users, part(6, 1).items))
    spread = float(scores(found).std(1, unbiased=False).mean())
    assert spread == pytest.approx(1.0, abs=0.03)
    assert spread != pytest.approx(1.0, abs=1e-7)


def test_rankings_of_a_part_stay_as_they_are():
    before, after = scores(part(5, 2)), scores(of_equal_spread(part(5, 2)))
    assert torch.equal(before.argsort(1), after.argsort(1))


def test_a_user_of_zeros_and_equal_scores_stay_numbers():
    users = torch.cat([torch.zeros(1, 4), torch.ones(2, 4)])
    found = of_equal_spread(Vectors(users, torch.ones(5, 4)))
    assert found.users[0].abs().sum() == 0
    assert found.items.isfinite().all()
    nobody = of_equal_spread(Vectors(torch.zeros(3, 4), torch.ones(5, 4)))
    assert nobody.items.isfinite().all()


def test_scores_add_with_their_weights():
    parts, weights = [part(3, 1), part(7, 2), part(4, 3)], [1.0, 0.3, 2.0]
    found = laid_side_by_side(parts, weights)
    expected = sum(w * scores(p) for p, w in zip(parts, weights, strict=True))
    torch.testing.assert_close(scores(found), expected)
    assert found.users.shape == (U, 14)


def test_a_part_of_weight_zero_takes_no_room():
    found = laid_side_by_side([part(3, 1), part(7, 2)], [1.0, 0.0])
    assert found.items.shape == (V, 3)
    torch.testing.assert_close(scores(found), scores(part(3, 1)))
    nothing = laid_side_by_side([part(3, 1)], [0.0])
    assert scores(nothing).abs().sum() == 0


@pytest.mark.parametrize(
    ("parts", "weights"),
    [
        ([part(3, 1), Vectors(torch.ones(U + 1, 3), torch.ones(V, 3))], [1.0, 1.0]),
        ([part(3, 1)], [1.0, 1.0]),
        ([], []),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts, weights):
    with pytest.raises(ShapeError, match="same users and items"):
        laid_side_by_side(parts, weights)


def test_the_planted_weights_are_found():
    parts = [of_equal_spread(part(dim, dim)) for dim in (3, 5, 7)]
    truth = scores(laid_side_by_side(parts, [1.0, 0.4, 0.0]))

    def judge(vectors):
        return -float((scores(vectors) - truth).square().mean())

    choice = choose_weights(parts, judge, (1.0, 0.4, 0.0, 0.1), rounds=3)
    assert choice.weights == (0.4, 0.0)
    assert choice.value == pytest.approx(0.0, abs=1e-9)
    assert [set(values) for values in choice.tried] == [{0.0, 0.1, 0.4, 1.0}] * 2


def test_a_part_that_adds_nothing_gets_no_weight():
    choice = choose_weights([part(3, 1), part(5, 2)], lambda vectors: 0.5, (0.7, 0.0, 0.3))
    assert choice.weights == (0.0,)


@pytest.mark.parametrize("dim", [1, 4, 9, 40])
def test_compression_is_the_nearest_model_of_its_rank(dim):
    whole = part(9, 4)
    found = compressed(whole, dim)
    u, s, vh = torch.linalg.svd(scores(whole), full_matrices=False)
    rank = min(dim, 9)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close(scores(found), expected, rtol=1e-3, atol=1e-4)
    assert found.users.shape[1] == rank
