"""Ids with their neighbours against the normalised matrix of the log."""

import pytest
import torch

from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.propagation import PropagationPart
from recclr.rows import Rows
from recclr.settings import (
    HistorySettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    PropagationSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.train import fit

NUM_USERS, NUM_ITEMS, DIM = 7, 11, 5


def log_of(num_rows=40):
    draws = torch.Generator().manual_seed(6)
    users = torch.randint(NUM_USERS - 1, (num_rows,), generator=draws)
    return EncodedLog(
        users.int(),
        torch.randint(NUM_ITEMS - 1, (num_rows,), generator=draws).int(),
        NUM_USERS,
        NUM_ITEMS,
    )


LOG = log_of()
PREPARED = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))


def model_of(weight=0.7, most=100, *, user=True, item=True, history=None):
    propagation = PropagationSettings(weight=weight, max_neighbours=most)
    return build_model(
        PREPARED,
        user=TowerSettings(
            id=IdSettings(propagation=propagation if user else None), history=history
        ),
        item=TowerSettings(id=IdSettings(propagation=propagation if item else None)),
        model=ModelSettings(embedding_dim=DIM, similarity="dot"),
        loss=LossSettings(),
        seed=2,
    )


def part_of(tower):
    return next(part for part in tower.parts if isinstance(part, PropagationPart))


def normalised():
    matrix = torch.zeros(NUM_USERS, NUM_ITEMS)
    matrix[LOG.user_idx.long(), LOG.item_idx.long()] = 1
    rows, columns = (matrix.sum(d).clamp(min=1) for d in (1, 0))
    return matrix / (rows[:, None] * columns).sqrt()


def test_both_sides_are_ids_and_their_products_with_the_graph():
    model, graph = model_of(weight=0.7).eval(), normalised()
    users = model.user_tower.parts[0].table.weight[1:]
    items = model.item_tower.parts[0].table.weight[1:]
    found_users = part_of(model.user_tower)(Rows(torch.arange(NUM_USERS)))
    found_items = part_of(model.item_tower)(Rows(torch.arange(NUM_ITEMS)))
    torch.testing.assert_close(found_users, 0.7 * graph @ items)
    torch.testing.assert_close(found_items, 0.7 * graph.T @ users)
    # Nobody stands beside the last ones, nor beside an unknown one.
    assert not found_users[-1].any()
    assert not found_items[-1].any()
    assert not part_of(model.user_tower)(Rows(torch.tensor([NUM_USERS + 3]))).any()
    vectors, _ = model.all_vectors(None)
    bias = model.user_tower.bias
    torch.testing.assert_close(vectors[:-2], (users + 0.7 * graph @ items + bias)[:-1])


def test_a_target_is_no_neighbour_while_it_trains():
    model, graph = model_of(weight=1.0).train(), normalised()
    items = model.item_tower.parts[0].table.weight[1:]
    part, draws = part_of(model.user_tower), torch.Generator()
    user_idx, targets = LOG.user_idx[:9].long(), LOG.item_idx[:9].long()
    for without in (targets, torch.stack([targets, LOG.item_idx[9:18].long()], 1)):
        expected = graph[user_idx].clone()
        for row, left_out in enumerate(without.view(9, -1).tolist()):
            expected[row, left_out] = 0
        found = part(Rows(user_idx, None, without, draws))
        torch.testing.assert_close(found, expected @ items)
    # Served are all.
    torch.testing.assert_close(part(Rows(user_idx, None, targets)), graph[user_idx] @ items)


def test_a_part_of_the_neighbours_stands_for_all():
    model, graph = model_of(weight=1.0, most=2).train(), normalised()
    items = model.item_tower.parts[0].table.weight[1:]
    part, user_idx = part_of(model.user_tower), torch.arange(NUM_USERS)
    draws = [
        part(Rows(user_idx, generator=torch.Generator().manual_seed(seed))).detach().double()
        for seed in range(4000)
    ]
    each = torch.stack(draws)
    error = each.std(0) / len(each) ** 0.5
    assert ((each.mean(0) - graph @ items).abs() <= 5 * error + 1e-6).all()
    assert error.max() > 0
    torch.testing.assert_close(part(Rows(user_idx)), graph @ items)


def test_parts_of_a_step_draw_what_the_whole_draws():
    part = part_of(model_of(most=2).train().item_tower)
    idx = torch.tensor([3, 9, 0, 3, 7, 10])

    def rows():
        return Rows(idx, generator=torch.Generator().manual_seed(5))

    whole = part(rows())
    parts = torch.cat([part(rows().part(0, 2)), part(rows().part(2, 6))])
    torch.testing.assert_close(parts, whole)


def test_what_is_hidden_has_no_neighbours():
    part = part_of(model_of().train().user_tower)
    rows = Rows(torch.arange(4), generator=torch.Generator(), hide_rate=0.95)
    hidden = torch.tensor([True, False, True, False])
    found = part(Rows(torch.arange(4), generator=torch.Generator(), hidden=hidden))
    assert [bool(row.any()) for row in found] == [False, True, False, True]
    assert not part(rows).any(1).all()


def test_gradients_reach_the_ids_of_the_other_side():
    model, graph = model_of(weight=1.0).train(), normalised()
    table = model.item_tower.parts[0].table
    part_of(model.user_tower)(
        Rows(torch.tensor([1, 4]), generator=torch.Generator())
    ).sum().backward()
    rows, gradients = table.take_gradient()
    expected = graph[[1, 4]].sum(0)
    assert rows.tolist() == (expected > 0).nonzero().squeeze(1).add(1).tolist()
    torch.testing.assert_close(gradients, expected[rows - 1][:, None].expand(-1, DIM))


@pytest.mark.parametrize("sides", [{"user": False}, {"item": False}, {}])
def test_it_trains_beside_a_history_and_alone(sides):
    model = model_of(**sides, history=HistorySettings(length=3))
    assert len(model.tables()) == 2
    fit(
        model,
        LOG,
        loss=LossSettings(),
        negatives=NegativesSettings(in_batch=True, uniform=6),
        train=TrainSettings(batch_size=8, epochs=2),
    )
    assert all(vectors.isfinite().all() for vectors in model.all_vectors(None))
