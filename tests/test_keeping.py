"""What an objective carries from step to step comes back with a resumed run, in place."""

import pytest
import torch

from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.errors import CheckpointError
from recclr.keeping import Keeper, Progress
from recclr.optimizers import Optimizers
from recclr.settings import LossSettings, ModelSettings, TowerSettings, TrainSettings


def keeper_of(root, state):
    log = EncodedLog(torch.arange(5).int(), torch.tensor([0, 2, 1, 6, 3]).int(), 5, 7)
    model = build_model(
        Prepared(log, FeatureTable(5), FeatureTable(7)),
        user=TowerSettings(),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=3),
        loss=LossSettings(),
        seed=1,
    )
    return Keeper(model, Optimizers(model, TrainSettings(), 11), root, state=state)


def test_carried_state_comes_back_into_the_same_tensors(tmp_path):
    written = {"queue": torch.randn(4, 3), "filled": torch.tensor(2)}
    keeper_of(tmp_path, written).keep(Progress(step=6), best=False)
    own = {"queue": torch.zeros(4, 3), "filled": torch.tensor(0)}
    held = dict(own)
    assert keeper_of(tmp_path, own).begun(resume=True).step == 6
    for name, value in written.items():
        assert own[name] is held[name]
        assert torch.equal(own[name], value)


@pytest.mark.parametrize("state", [{}, {"queue": torch.zeros(5, 3), "filled": torch.tensor(0)}])
def test_state_of_another_objective_is_refused(tmp_path, state):
    written = {"queue": torch.randn(4, 3), "filled": torch.tensor(2)}
    keeper_of(tmp_path, written).keep(Progress(step=6), best=False)
    with pytest.raises(CheckpointError, match="state of the objective"):
        keeper_of(tmp_path, state).begun(resume=True)
