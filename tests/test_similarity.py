"""Similarities as dot products: lifted distances, and a bias of items in one coordinate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recclr.objective as objective_module
import recclr.symmetric as symmetric_module
from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.keeping import load_weights
from recclr.load import ranker_of
from recclr.objective import Objective
from recclr.settings import (
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
)
from recclr.similarity import as_candidates, as_queries, log_popularity, with_bias
from recclr.topk import top_k

NUM_USERS, NUM_ITEMS, DIM = 7, 13, 5


@given(
    seed=st.integers(0, 300),
    num_queries=st.integers(0, 9),
    num_items=st.integers(1, 31),
    dim=st.integers(1, 8),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_lifted_vectors_rank_as_distances_do(seed, num_queries, num_items, dim, scale):
    draws = torch.Generator().manual_seed(seed)
    users = torch.randn(num_queries, dim, generator=draws) * scale
    items = torch.randn(num_items, dim, generator=draws) * scale
    queries, candidates = as_queries(users, "euclidean"), as_candidates(items, "euclidean")
    assert queries.shape == (num_queries, dim + 2)
    assert candidates.shape == (num_items, dim + 2)
    squares = (users.double()[:, None] - items.double()).square().sum(2)
    size = float(1 + users.square().sum() + items.square().sum())
    torch.testing.assert_close(
        (queries @ candidates.T).double(), -squares, rtol=0, atol=1e-6 * size
    )
    k = min(4, num_items)
    found = top_k(queries, candidates, k)
    expected = squares.sort(dim=1).values[:, :k]
    torch.testing.assert_close(-found.scores.double(), expected, rtol=0, atol=1e-6 * size)
    # On a grid where float32 is exact, so are order and ties.
    users, items = (users / scale * 4).round() / 4, (items / scale * 4).round() / 4
    squares = (users[:, None] - items).square().sum(2)
    found = top_k(as_queries(users, "euclidean"), as_candidates(items, "euclidean"), num_items)
    assert torch.equal(found.item_idx, squares.sort(dim=1, stable=True).indices)


def test_the_search_by_way_of_bfloat16_is_exact_for_lifted_vectors():
    draws = torch.Generator().manual_seed(3)
    users, items = (torch.randn(n, DIM, generator=draws) * 3 for n in (17, 9001))
    found = top_k(as_queries(users, "euclidean"), as_candidates(items, "euclidean"), 6)
    nearest = torch.cdist(users.double(), items.double()).square().topk(6, largest=False)
    torch.testing.assert_close(-found.scores.double(), nearest.values, rtol=0, atol=1e-4)
    assert (found.item_idx == nearest.indices).float().mean() > 0.97  # but for ties by rounding


def test_the_plain_vectors_are_still_there():
    x = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_candidates(x, "euclidean")[:, :DIM], x)
    assert torch.equal(as_queries(x, "euclidean")[:, :DIM] / 2, x)


def test_bfloat16_outputs_are_squared_in_float32():
    x = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    for side in (as_queries, as_candidates):
        lifted = side(x, "euclidean")
        assert lifted.dtype == torch.float32
        torch.testing.assert_close(
            lifted[:, DIM:].abs().amax(1), x.float().square().sum(1).clamp_min(1.0)
        )


def test_a_bias_is_added_to_every_score():
    draws = torch.Generator().manual_seed(1)
    queries, candidates = torch.randn(4, DIM, generator=draws), torch.randn(9, DIM, generator=draws)
    bias = torch.randn(9, generator=draws)
    left, right = with_bias(queries, candidates, bias)
    assert left.shape == (4, DIM + 1)
    torch.testing.assert_close(left @ right.T, queries @ candidates.T + bias)


def test_log_popularity_of_an_item_without_interactions_is_that_of_one():
    found = log_popularity(torch.tensor([3, 0, 1]))
    torch.testing.assert_close(found.exp(), torch.tensor([4, 1, 2]) / 7)


def log_of():
    draws = torch.Generator().manual_seed(2)
    users = torch.cat([torch.arange(NUM_USERS), torch.randint(NUM_USERS, (40,), generator=draws)])
    # Everything once: what train never saw has another vector when it is served.
    items = torch.cat([torch.arange(NUM_ITEMS), torch.randint(4, (34,), generator=draws)])
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS)


LOG = log_of()


def model_of(similarity, bias=0.0, loss=None, mlp=()):
    prepared = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    return build_model(
        prepared,
        user=TowerSettings(mlp=mlp),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=DIM, similarity=similarity, popularity_bias=bias),
        loss=loss or LossSettings(),
        seed=4,
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_a_bias_is_served_and_not_trained(similarity):
    plain, biased = model_of(similarity), model_of(similarity, 0.7)
    assert plain.weights().keys() == biased.weights().keys()
    load_weights(biased, {f"model/{k}": v.detach() for k, v in plain.weights().items()})
    users, items = plain.all_vectors(None)
    served = biased.all_vectors(None)
    extra = 2 * (similarity == "euclidean")
    assert users.shape == (NUM_USERS + 1, DIM + extra)
    assert served[0].shape == (NUM_USERS + 1, DIM + extra + 1)
    shift = 0.7 * log_popularity(LOG.item_counts())
    torch.testing.assert_close(served[0] @ served[1].T, users @ items.T + shift)
    order = (users @ items.T + shift)[:NUM_USERS].argsort(1, descending=True)[:, :3]
    assert torch.equal(ranker_of(biased, None).top_k(torch.arange(NUM_USERS), 3).item_idx, order)
    assert not torch.equal(ranker_of(plain, None).top_k(torch.arange(NUM_USERS), 3).item_idx, order)
    rows = torch.arange(9)
    batch = Batch(LOG.user_idx[rows].long(), LOG.item_idx[rows].long(), None, None, None, None)
    losses = [
        Objective(LOG, LossSettings(), NegativesSettings(in_batch=True, uniform=5), seed=0)(
            model, batch, 0
        ).loss
        for model in (plain, biased)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize(("similarity", "allowed"), [("cosine", True), ("euclidean", False)])
def test_neither_direction_rounds_what_distances_subtract(monkeypatch, similarity, allowed):
    loss = LossSettings(temperature=0.4, symmetric=0.5)
    told = []
    for module in (objective_module, symmetric_module):
        scored_loss = module.scored_loss

        def heard(scored, loss, *, bfloat16=False, scored_loss=scored_loss):
            told.append(bfloat16)
            return scored_loss(scored, loss, bfloat16=bfloat16)

        monkeypatch.setattr(module, "scored_loss", heard)
    model = model_of(similarity, loss=loss)
    rows = torch.arange(30)
    batch = Batch(LOG.user_idx[rows].long(), LOG.item_idx[rows].long(), None, None, None, None)
    objective = Objective(LOG, loss, NegativesSettings(uniform=8), seed=0, bfloat16=True)
    objective(model.train(), batch, 0)
    assert told == [allowed, allowed]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_step_scores_distances(bfloat16):
    """In products of bfloat16 the squares would lose all but two digits."""
    loss = LossSettings(kind="full_softmax", temperature=0.4, mask_known_positives=False)
    model = model_of("euclidean", loss=loss)
    rows = torch.arange(30)
    batch = Batch(LOG.user_idx[rows].long(), LOG.item_idx[rows].long(), None, None, None, None)
    objective = Objective(LOG, loss, NegativesSettings(), seed=0, bfloat16=bfloat16)
    found = objective(model.train(), batch, 0).loss
    found.backward()
    taken = [table.take_gradient() for table in model.tables().values()]
    gradients = [
        torch.zeros_like(table.weight).index_add_(0, *each)
        for table, each in zip(model.tables().values(), taken, strict=True)
    ]
    leaves = [table.weight.double().requires_grad_() for table in model.tables().values()]
    users, items = leaves[0][1:][batch.user_idx], leaves[1][1:]
    logits = -(users[:, None] - items).square().sum(2) / 0.4
    expected = torch.nn.functional.cross_entropy(logits, batch.item_idx)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)
