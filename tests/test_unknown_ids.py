"""Who has no id of its own is served what training showed in place of known ones, or the mean."""

import pytest
import torch

from recclr.building import build_model
from recclr.data.log import CategoricalColumn, EncodedLog, FeatureTable, Prepared
from recclr.rows import Rows
from recclr.settings import (
    AugmentSettings,
    FeatureSettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    SelfSupervisionSettings,
    TowerSettings,
    TrainSettings,
    ViewSettings,
)
from recclr.stepping import Stepper

NUM_USERS, NUM_ITEMS, NUM_ROWS = 11, 17, 90
QUIET = ViewSettings(dropout=0.0, batch_size=13, distribution="batch")
KIND = {"kind": FeatureSettings(kind="categorical")}
HALVES = AugmentSettings(mode="complementary")
GROUP = AugmentSettings(groups=(("id",),), dropout=0.5)


def prepared(*, all_known):
    """Every user has rows; unless all are known, the last five items have none."""
    draws = torch.Generator().manual_seed(1)
    num_known = NUM_ITEMS if all_known else NUM_ITEMS - 5
    log = EncodedLog(
        torch.cat(
            [torch.arange(NUM_USERS), torch.randint(NUM_USERS, (79,), generator=draws)]
        ).int(),
        torch.arange(num_known).repeat(8)[:NUM_ROWS].int(),
        NUM_USERS,
        NUM_ITEMS,
        timestamp=86_400 * torch.arange(NUM_ROWS),
    )
    kinds = torch.randint(4, (NUM_ITEMS,), generator=draws).int()
    columns = {"kind": CategoricalColumn(kinds, 4)}
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS, columns))


def moved_and_served(item, view, *, all_known, uniform=0):
    """Whether three steps moved the row of the unknown id of items, and whether it is served."""
    data = prepared(all_known=all_known)
    views = None if view is None else SelfSupervisionSettings(item=view)
    model = build_model(
        data,
        user=TowerSettings(),
        item=item,
        model=ModelSettings(embedding_dim=6, similarity="dot"),
        loss=LossSettings(),
        seed=2,
    ).train()
    part = model.item_tower.parts[0]
    before = part.table.weight[0].clone()
    stepper = Stepper(
        model,
        data.train,
        loss=LossSettings(),
        negatives=NegativesSettings(in_batch=True, uniform=uniform),
        train=TrainSettings(batch_size=30, table_optimizer="sgd"),
        self_supervision=views,
        seed=3,
    )
    for step in range(3):
        stepper(step)
    model.eval()
    stranger = part(Rows(torch.tensor([NUM_ITEMS]), torch.tensor(0)))[0]
    mean = part.table.weight[1:][: NUM_ITEMS if all_known else NUM_ITEMS - 5].mean(0)
    served = torch.equal(stranger, part.table.weight[0])
    assert served or torch.allclose(stranger, mean)
    return not torch.equal(part.table.weight[0], before), served


CASES = {
    "nothing": (TowerSettings(features=KIND), None, False),
    "dropout": (TowerSettings(features=KIND, id=IdSettings(dropout=0.5)), None, True),
    "as of": (TowerSettings(features=KIND, id=IdSettings(as_of=True)), None, True),
    "group": (TowerSettings(features=KIND, augment=GROUP), None, True),
    "group of another": (
        TowerSettings(
            features=KIND, augment=AugmentSettings(groups=(("id",), ("kind",)), dropout=(0.0, 0.5))
        ),
        None,
        False,
    ),
    "group in views, and none": (
        TowerSettings(
            features=KIND,
            augment=AugmentSettings(groups=(("id",),), dropout=0.5, views_only=True),
        ),
        None,
        False,
    ),
    "group in views": (
        TowerSettings(
            features=KIND,
            augment=AugmentSettings(groups=(("id",),), dropout=0.5, views_only=True),
        ),
        QUIET,
        False,
    ),
    "halves of views, and none": (TowerSettings(features=KIND, augment=HALVES), None, False),
    "halves of views": (TowerSettings(features=KIND, augment=HALVES), QUIET, False),
    "halves of rows": (
        TowerSettings(features=KIND, augment=AugmentSettings(mode="complementary", dropout=0.5)),
        None,
        True,
    ),
    "views that hide": (
        TowerSettings(features=KIND),
        ViewSettings(dropout=0.5, batch_size=13, distribution="batch"),
        False,
    ),
    "views that do not": (TowerSettings(features=KIND), QUIET, False),
}
MOVED_BY_VIEWS = ("group in views", "halves of views", "views that hide")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("all_known", [True, False])
def test_the_unknown_id_is_served_where_rows_of_a_step_showed_it(name, all_known):
    item, view, shown = CASES[name]
    moved, served = moved_and_served(item, view, all_known=all_known)
    assert served is shown
    # Views move it as well, but say nothing of whom it would suit.
    assert moved is (shown or name in MOVED_BY_VIEWS)


@pytest.mark.parametrize("view", [None, ViewSettings(batch_size=NUM_ITEMS)])
def test_what_is_only_pushed_away_is_not_served(view):
    """Draws from the catalogue show it as a negative, for every item that nobody has."""
    moved, served = moved_and_served(
        TowerSettings(features=KIND), view, all_known=False, uniform=40
    )
    assert (moved, served) == (True, False)
