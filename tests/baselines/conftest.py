"""Small prepared logs for the baselines."""

import pytest
import torch

from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.statistics import DAY_S

CUTOFF = 1_500_000_000


@pytest.fixture
def prepared_of():
    """(pairs, num_users, num_items, days=None, weights=None, columns=None) -> Prepared.

    ``days`` is the age of each event at the cut-off.
    """

    def make(pairs, num_users, num_items, *, days=None, weights=None, columns=None):
        times = None
        if days is not None:
            times = CUTOFF - (torch.as_tensor(days).double() * DAY_S).long()
        train = EncodedLog(
            user_idx=torch.tensor([user for user, _ in pairs], dtype=torch.int32),
            item_idx=torch.tensor([item for _, item in pairs], dtype=torch.int32),
            num_users=num_users,
            num_items=num_items,
            timestamp=times,
            weight=None if weights is None else torch.as_tensor(weights).float(),
        )
        return Prepared(
            train=train,
            users=FeatureTable(num_users),
            items=FeatureTable(num_items, columns or {}),
            cutoff=None if days is None else CUTOFF,
        )

    return make


@pytest.fixture
def random_prepared(prepared_of):
    """13 users, 11 items, repeated pairs, ages and weights; item 10 and user 12 are in no row."""

    def make(seed, *, num_rows=70, with_time=True, with_weights=False, columns=None):
        draws = torch.Generator().manual_seed(seed)
        # Squares of uniforms: some users and items are far more frequent than others.
        users = (torch.rand(num_rows, generator=draws) ** 2 * 12).long().tolist()
        items = (torch.rand(num_rows, generator=draws) ** 2 * 10).long().tolist()
        days = torch.rand(num_rows, generator=draws) * 60
        weights = torch.rand(num_rows, generator=draws) + 0.1
        return prepared_of(
            list(zip(users, items, strict=True)),
            13,
            11,
            days=days if with_time else None,
            weights=weights if with_weights else None,
            columns=columns,
        )

    return make
