"""Towers from a configuration: what is shared, what is normalised, what unknown entities get."""

import math

import pytest
import torch
from torch import nn

import recclr.towers as towers_module
from recclr.building import build_model
from recclr.data.log import (
    CategoricalColumn,
    Csr,
    DenseColumn,
    EncodedLog,
    FeatureTable,
    Prepared,
    RaggedColumn,
)
from recclr.errors import ConfigError
from recclr.keeping import load_weights
from recclr.losses import automatic_temperature
from recclr.rows import Rows
from recclr.settings import (
    FeatureSettings,
    HistorySettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.statistics import DAY_S
from recclr.towers import ResidualBlock, Tower, TwoTower
from recclr.train import fit

NUM_USERS, NUM_ITEMS, DIM = 7, 11, 5
CUTOFF = 60 * DAY_S


def prepared(*, timed=True):
    generator = torch.Generator().manual_seed(0)
    num_events = 40
    log = EncodedLog(
        torch.randint(NUM_USERS, (num_events,), generator=generator).int(),
        torch.randint(NUM_ITEMS - 1, (num_events,), generator=generator).int(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        timestamp=torch.arange(num_events) * DAY_S if timed else None,
    )
    lengths = torch.randint(4, (NUM_ITEMS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tags = torch.randint(6, (int(offsets[-1]),), generator=generator).int()
    items = {
        "kind": CategoricalColumn(torch.randint(4, (NUM_ITEMS,), generator=generator).int(), 4),
        "tags.all": RaggedColumn(Csr(offsets, tags), 6),
        "image": DenseColumn(torch.randn(NUM_ITEMS, 9, generator=generator).half()),
    }
    users = {
        "likes": CategoricalColumn(torch.randint(4, (NUM_USERS,), generator=generator).int(), 4)
    }
    return Prepared(
        log,
        FeatureTable(NUM_USERS, users),
        FeatureTable(NUM_ITEMS, items),
        cutoff=CUTOFF if timed else None,
    )


FEATURES = {
    "kind": FeatureSettings(kind="categorical"),
    "tags.all": FeatureSettings(kind="multi_hot"),
    "image": FeatureSettings(kind="vector"),
    "recent": FeatureSettings(kind="statistics", windows_d=(3.0,)),
}
RICH_ITEM = TowerSettings(features=FEATURES, mlp=(8,), dropout=0.1)
RICH_USER = TowerSettings(
    features={"likes": FeatureSettings(kind="categorical")},
    history=HistorySettings(length=4, half_life_d=5.0, use="both"),
    mlp=(6, 8),
)


def built(data=None, *, user=RICH_USER, item=RICH_ITEM, similarity="cosine", loss=None, seed=0):
    return build_model(
        prepared() if data is None else data,
        user=user,
        item=item,
        model=ModelSettings(embedding_dim=DIM, similarity=similarity),
        loss=loss or LossSettings(),
        seed=seed,
    )


def shaken(model):
    """Every parameter moved off its start, where many of them are zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_temperature":
                parameter += torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_cosine_gives_unit_vectors_and_dot_leaves_them(similarity):
    model = shaken(built(similarity=similarity))
    rows = Rows(torch.tensor([0, 3, NUM_USERS, 3]), torch.tensor(CUTOFF))
    for found, raw in (
        (model.embed_users(rows), model.user_tower(rows)),
        (model.embed_items(rows), model.item_tower(rows)),
    ):
        assert found.shape == (4, DIM)
        lengths = raw.norm(dim=1, keepdim=True)
        assert ((lengths - 1).abs() > 1e-3).all()
        if similarity == "dot":
            assert torch.equal(found, raw)
        else:
            torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
            torch.testing.assert_close(found * lengths, raw)


def test_a_tower_is_the_sum_of_its_parts_then_bias_and_blocks():
    tower = shaken(built()).item_tower
    rows = Rows(torch.arange(NUM_ITEMS), torch.tensor(CUTOFF))
    assert tower.names == ("id", *(f"features.{name}" for name in FEATURES))
    expected = sum(part(rows) for part in tower.parts) + tower.bias
    for block in tower.blocks:
        expected = block(expected)
    torch.testing.assert_close(tower(rows), expected)


def test_a_residual_block_starts_as_the_identity_and_can_leave_it():
    block = ResidualBlock(DIM, 17)
    x = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)
    (block(x) * x).sum().backward()
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    assert not torch.allclose(block(x), x)


def test_coordinate_dropout_zeroes_and_rescales_in_training_only():
    tower = built(item=TowerSettings(dropout=0.4)).item_tower
    rows = torch.arange(NUM_ITEMS).repeat(100)
    plain = tower(Rows(rows))
    shown = tower(Rows(rows, generator=torch.Generator().manual_seed(0)))
    known = rows < NUM_ITEMS - 1  # the last item is in no event, so training shows it otherwise
    kept = (shown != 0) & known[:, None]
    torch.testing.assert_close(shown[kept], plain[kept] / 0.6)
    share = kept.sum() / (known.sum() * DIM)
    assert abs(share - 0.6) < 5 * math.sqrt(0.6 * 0.4 / (int(known.sum()) * DIM))


def test_a_shared_table_is_one_parameter_of_both_towers():
    item = TowerSettings(features={"kind": FeatureSettings(kind="categorical", shared="k")})
    user = TowerSettings(features={"likes": FeatureSettings(kind="categorical", shared="k")})
    model = built(user=user, item=item)
    user_table = model.user_tower.parts[1].table
    assert user_table is model.item_tower.parts[1].table
    # Two id tables and the shared one.
    assert len(model.tables()) == 3
    assert sum(weight is user_table.weight for weight in model.weights().values()) == 1
    apart = built(
        user=TowerSettings(features={"likes": FeatureSettings(kind="categorical")}), item=item
    )
    assert len(apart.tables()) == 4


def test_sharing_between_features_of_different_size_is_refused():
    item = TowerSettings(
        features={
            "kind": FeatureSettings(kind="categorical", shared="k"),
            "tags.all": FeatureSettings(kind="multi_hot", shared="k"),
        }
    )
    with pytest.raises(ConfigError, match=r"shared table 'k'.*5 and 7 rows"):
        built(item=item)


def test_a_history_shares_the_item_tower_and_its_weights_are_saved_once():
    user = TowerSettings(id=IdSettings(enabled=False), history=HistorySettings())
    model = built(user=user, item=TowerSettings())
    item_table = model.item_tower.parts[0].table
    assert model.user_tower.parts[0].item_parts[0].table is item_table
    assert list(model.tables().values()) == [item_table]
    before = model.all_vectors(CUTOFF)[0]
    with torch.no_grad():
        item_table.weight.copy_(item_table.weight.flip(1))
    assert not torch.allclose(model.all_vectors(CUTOFF)[0], before)


@pytest.mark.parametrize(
    ("use", "kept"),
    [
        ("ids", ["id"]),
        ("features", ["features.kind", "features.tags.all", "features.image"]),
        ("both", ["id", "features.kind", "features.tags.all", "features.image"]),
    ],
)
def test_a_history_pools_what_it_is_told_and_never_statistics(use, kept):
    user = TowerSettings(history=HistorySettings(use=use))
    model = built(user=user)
    by_name = dict(zip(model.item_tower.names, model.item_tower.parts, strict=True))
    pooled = list(model.user_tower.parts[1].item_parts)
    assert len(pooled) == len(kept)
    assert all(part is by_name[name] for part, name in zip(pooled, kept, strict=True))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("timed", [True, False])
def test_all_vectors_are_those_of_each_entity_alone(monkeypatch, similarity, timed):
    item = RICH_ITEM
    if not timed:
        item = TowerSettings(features={k: v for k, v in FEATURES.items() if k != "recent"})
    data = prepared(timed=timed)
    model = shaken(built(data, item=item, similarity=similarity)).train()
    monkeypatch.setattr(towers_module, "_CHUNK", 3)
    users, items = model.all_vectors(data.cutoff)
    assert model.training
    assert users.shape == (NUM_USERS + 1, DIM)
    assert items.shape == (NUM_ITEMS, DIM)
    assert not users.requires_grad
    at = None if data.cutoff is None else torch.tensor(data.cutoff)
    model.eval()
    for found, embed in ((users, model.embed_users), (items, model.embed_items)):
        for entity, vector in enumerate(found):
            torch.testing.assert_close(vector, embed(Rows(torch.tensor([entity]), at))[0])
    stranger = model.embed_users(Rows(torch.tensor([NUM_USERS + 123]), at))[0]
    torch.testing.assert_close(users[-1], stranger)
    assert not any(table.lookups for table in model.tables().values())


def test_features_may_bear_any_name_and_their_weights_are_saved():
    names = ("a.b", "a", "weight", "über/größe", "parts.0")
    data = prepared()
    column = data.items.columns["kind"]
    data.items.columns.update(dict.fromkeys(names, column))
    item = TowerSettings(features={name: FeatureSettings(kind="categorical") for name in names})
    source, target = (built(data, item=item, seed=seed) for seed in (0, 1))
    load_weights(target, {f"model/{name}": w for name, w in source.weights().items()})
    for one, other in zip(source.all_vectors(CUTOFF), target.all_vectors(CUTOFF), strict=True):
        assert torch.equal(one, other)


def test_the_seed_alone_decides_the_start():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = built(seed=3).weights()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = built(seed=3).weights(), built(seed=4).weights()
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert {f"{name}.weight" for name in built().tables()} <= changed


def test_init_std_is_in_units_of_the_inverse_root_of_the_dimension():
    data = prepared()
    data.items.columns["kind"] = CategoricalColumn(torch.zeros(NUM_ITEMS).int(), 4000)
    item = TowerSettings(features={"kind": FeatureSettings(kind="categorical")})
    settings = ModelSettings(embedding_dim=16, init_std=0.5)
    model = build_model(
        data, user=TowerSettings(), item=item, model=settings, loss=LossSettings(), seed=0
    )
    weight = model.item_tower.parts[1].table.weight
    assert weight.std().item() == pytest.approx(0.5 / 4, rel=0.02)


@pytest.mark.parametrize(
    ("user", "item", "timed", "words"),
    [
        (TowerSettings(), TowerSettings(id=IdSettings(enabled=False)), True, "has nothing to read"),
        (TowerSettings(), TowerSettings(history=HistorySettings()), True, "only users"),
        (
            TowerSettings(history=HistorySettings(use="features")),
            TowerSettings(),
            True,
            "no such part",
        ),
        (TowerSettings(), TowerSettings(id=IdSettings(as_of=True)), False, "need timestamps"),
        (TowerSettings(), RICH_ITEM, False, "need timestamps"),
    ],
)
def test_what_cannot_be_built_is_refused(user, item, timed, words):
    with pytest.raises(ConfigError, match=words):
        built(prepared(timed=timed), user=user, item=item)


def test_a_fixed_temperature_is_saved_and_not_trained():
    model = built(loss=LossSettings(temperature=0.25))
    assert model.temperature().item() == pytest.approx(0.25)
    assert "log_temperature" in model.weights()
    assert "log_temperature" not in model.dense_parameters()


def test_a_temperature_that_nobody_set_is_fixed_by_the_number_of_items():
    model = built()
    assert model.temperature().item() == pytest.approx(automatic_temperature(model.num_items))
    assert "log_temperature" not in model.dense_parameters()


def test_a_learned_temperature_starts_where_told_and_stays_within_its_bounds():
    bounds = {"min_temperature": 0.05, "max_temperature": 0.7}
    loss = LossSettings(temperature="learned", initial_temperature=0.3, **bounds)
    model = built(loss=loss)
    assert "log_temperature" in model.dense_parameters()
    assert model.temperature().item() == pytest.approx(0.3)
    for value, expected in ((-20.0, 0.05), (20.0, 0.7)):
        with torch.no_grad():
            model.log_temperature.fill_(value)
        assert model.temperature().item() == pytest.approx(expected)
        model.clamp_temperature()
        # At the bound, unlike beyond it, there is a gradient that leads back.
        model.log_temperature.grad = None
        model.temperature().backward()
        assert model.log_temperature.grad.item() == pytest.approx(expected)


class Lookup(nn.Module):
    """Somebody's own tower: a plain embedding and batch normalisation."""

    def __init__(self, num_rows):
        super().__init__()
        self.embedding = nn.Embedding(num_rows, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, rows):
        return self.norm(self.embedding(rows.idx))


def test_any_module_may_take_a_towers_place_and_learns():
    # Three blocks of 6 items; each user has all but one of its block, and that one is the answer.
    num_users, num_items = 90, 18
    users = torch.arange(num_users).repeat_interleave(6)
    items = users % 3 * 6 + torch.arange(6).repeat(num_users)
    missing = items % 6 == users // 3 % 6
    train = users[~missing], items[~missing]
    torch.manual_seed(0)
    model = TwoTower(
        Lookup(num_users + 1),
        Lookup(num_items),
        num_users=num_users,
        num_items=num_items,
        similarity="cosine",
        loss=LossSettings(temperature=0.2),
    )
    assert model.tables() == {}
    saved = model.weights()
    assert {"user_tower.norm.running_mean", "item_tower.embedding.weight"} <= saved.keys()
    assert "user_tower.cache" not in saved
    fit(
        model,
        EncodedLog(train[0].int(), train[1].int(), num_users=num_users, num_items=num_items),
        loss=LossSettings(temperature=0.2),
        negatives=NegativesSettings(in_batch=True, uniform=18),
        train=TrainSettings(batch_size=60, epochs=40, dense_lr=0.05),
    )
    user_vectors, item_vectors = model.all_vectors(None)
    scores = user_vectors[:num_users] @ item_vectors.T
    scores[train] = -torch.inf
    assert torch.equal(scores.argmax(1), items[missing])
    # Asked in the middle of training, it answers as it would at the end, and learns nothing by it.
    before = {name: value.clone() for name, value in model.weights().items()}
    assert torch.equal(model.train().all_vectors(None)[0], user_vectors)
    assert all(torch.equal(value, before[name]) for name, value in model.weights().items())


def test_a_tower_without_parts_is_refused():
    with pytest.raises(ConfigError, match="needs an id"):
        Tower({}, DIM, mlp=(), dropout=0.0)
