"""When rows leave memory for training, what is made for it, and that nothing is left behind."""

import pytest
import torch

import recclr.data.sharding as sharding
from recclr.data.log import EncodedLog
from recclr.data.sharding import rows_for_training, stays_resident, wanted_groups
from recclr.errors import StoreError
from recclr.settings import (
    FeatureSettings,
    HistorySettings,
    IdSettings,
    LossSettings,
    MinedSettings,
    NegativesSettings,
    TowerSettings,
)

pytestmark = pytest.mark.usefixtures("no_power_cut")
ROWS = torch.arange(40)


def log(*, timed=True):
    return EncodedLog(
        (ROWS % 7).int(), (ROWS % 5).int(), 7, 5, timestamp=3 * ROWS if timed else None
    )


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("free", [None, 0, 1 << 60])
def test_who_says_it_is_obeyed(monkeypatch, resident, free):
    monkeypatch.setattr(sharding, "available_bytes", lambda: free)
    assert stays_resident(1 << 30, "cpu", resident) is resident


def test_auto_keeps_what_takes_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(sharding, "available_bytes", lambda: 140_000)
    assert stays_resident(1_000, "cpu")
    assert not stays_resident(1_001, "cpu")
    monkeypatch.setattr(sharding, "available_bytes", lambda: None)
    assert stays_resident(1 << 40, "cpu")


def test_auto_looks_at_the_memory_of_the_gpu(monkeypatch):
    monkeypatch.setattr(sharding, "available_bytes", lambda: 0)
    asked = []

    def free(device):
        asked.append(device)
        return 140_000, 1 << 50

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    assert stays_resident(1_000, "cuda:1")
    assert not stays_resident(1_001, "cuda")
    assert asked == ["cuda:1", "cuda"]


STATISTICS = {"recent": FeatureSettings(kind="statistics")}
COUNTS = {"price": FeatureSettings(kind="numeric")}


@pytest.mark.parametrize(
    ("user", "item", "groups"),
    [
        ({}, {}, set()),
        ({"history": HistorySettings()}, {}, {"user_items", "user_times"}),
        ({"features": STATISTICS}, {"features": COUNTS}, {"user_times"}),
        ({"features": COUNTS}, {"features": STATISTICS}, {"item_times"}),
        (
            {"id": IdSettings(as_of=True)},
            {"id": IdSettings(as_of=True)},
            {"user_times", "item_times"},
        ),
    ],
)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(("masked", "mined"), [(False, False), (True, False), (False, True)])
def test_what_a_model_asks_for(user, item, groups, timed, masked, mined):
    found = wanted_groups(
        log(timed=timed),
        user=TowerSettings(**user),
        item=TowerSettings(**item),
        loss=LossSettings(mask_known_positives=masked),
        negatives=NegativesSettings(in_batch=True, mined=MinedSettings() if mined else None),
    )
    expected = groups if timed else groups - {"user_times", "item_times"}
    assert found == expected | ({"known"} if masked or mined else set())


def test_rows_in_memory_are_handed_on_and_nothing_is_written(tmp_path):
    whole, said = log(), []
    with rows_for_training(whole, tmp_path, device="cpu", resident=True, say=said.append) as rows:
        assert rows is whole
        assert list(tmp_path.iterdir()) == []
    assert said == []


def test_rows_in_files_are_there_for_the_block(tmp_path):
    whole, said = log(), []
    with rows_for_training(whole, tmp_path, device="cpu", resident=False, say=said.append) as rows:
        (folder,) = tmp_path.iterdir()
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        assert rows.mapped_for == torch.device("cpu")
        for name, column in whole.columns():
            assert torch.equal(getattr(rows, name), column)
    assert list(tmp_path.iterdir()) == []
    (text,) = said
    assert str(tmp_path) in text
    assert f"{num_bytes / 1e6:,.0f} MB" in text
    # What was opened stays readable for the model that keeps it.
    assert torch.equal(rows.timestamp, whole.timestamp)


def test_files_go_when_the_work_fails(tmp_path):
    def work():
        with rows_for_training(log(), tmp_path, device="cpu", resident=False):
            assert len(list(tmp_path.iterdir())) == 1
            raise OSError("the work")

    with pytest.raises(OSError, match="the work"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_files_of_an_earlier_process_are_replaced(tmp_path):
    from recclr.files import is_leftover

    with rows_for_training(log(), tmp_path, device="cpu", resident=False):
        (folder,) = tmp_path.iterdir()
        # What a killed run leaves is known for what it is.
        assert is_leftover(folder.name)
    folder.mkdir()
    (folder / "user_idx.bin").write_bytes(b"old")
    with rows_for_training(log(), tmp_path, device="cpu", resident=False) as rows:
        assert torch.equal(rows.user_idx, log().user_idx)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_file_bytes", lambda log, groups: 1 << 60)
    with (
        pytest.raises(StoreError, match="free some space"),
        rows_for_training(log(), tmp_path, device="cpu", resident=False),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("groups", [(), ("known",), sharding.GROUPS])
def test_the_space_that_is_asked_for_is_what_the_files_take(tmp_path, timed, groups):
    # Each pair once and times where groups ask for them, so that the bound is met.
    rows = torch.arange(35)
    whole = EncodedLog((rows % 7).int(), (rows // 7).int(), 7, 5, timestamp=rows if timed else None)
    asked = [name for name in groups if timed or not name.endswith("times")]
    with rows_for_training(whole, tmp_path, device="cpu", resident=False, groups=asked):
        (folder,) = tmp_path.iterdir()
        taken = sum(file.stat().st_size for file in folder.glob("*.bin"))
    most = sharding._file_bytes(whole, asked)
    assert most - 8 * (2 * 7 + 5 + 3) <= taken <= most
