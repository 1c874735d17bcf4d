"""The peers do the work that recclr is compared with."""

import importlib

import pytest
import torch
from bench import data
from peers import plain_torch, require_cpu
from torch.nn import functional

LOG = data.LogSpec(70, 50, 900)


@pytest.fixture
def told(tmp_path):
    return data.write_arrays(LOG, tmp_path) | {
        "dim": 8,
        "batch_size": 64,
        "negatives": 32,
        "in_batch": False,
        "threads": 1,
        "device": "cpu",
        "seconds": 0.01,
    }


@pytest.mark.parametrize("negatives", [None, 7])
def test_plain_logits_are_cosines_and_name_their_positive(negatives):
    model = plain_torch.TwoTower(70, 50, 8, sparse=False)
    users, items = torch.tensor([3, 9, 3]), torch.tensor([4, 4, 40])
    with torch.no_grad():
        logits, labels = model(users, items, negatives)
    assert logits.shape == (3, 3 if negatives is None else 8)
    for row in range(3):
        vectors = model.users.weight.data[users[row]], model.items.weight.data[items[row]]
        expected = functional.cosine_similarity(*vectors, dim=0) / 0.08
        assert float(logits[row, labels[row]]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("batches", [plain_torch.from_loader, plain_torch.from_slices])
def test_plain_batches_are_the_log_in_any_order(batches):
    users, items = torch.arange(10), torch.arange(10) + 100
    found = batches(users, items, 4)
    epoch = [next(found) for _ in range(2)]
    seen = torch.cat([batch[0] for batch in epoch])
    assert len(seen.unique()) == 8
    for own_users, own_items in epoch:
        assert torch.equal(own_items, own_users + 100)


@pytest.mark.parametrize("loader", ["dataloader", "slices"])
@pytest.mark.parametrize("optimizer", ["sparse_adam", "adam", "fused_adam"])
def test_plain_pytorch_is_measured_and_trains(told, monkeypatch, loader, optimizer):
    made = []
    make = plain_torch.make_optimizer

    def remembered(model, name):
        made.append((model, [p.detach().clone() for p in model.parameters()]))
        return make(model, name)

    monkeypatch.setattr(plain_torch, "make_optimizer", remembered)
    found = plain_torch.measure(told | {"loader": loader, "optimizer": optimizer})
    assert found["amount"] == 64
    assert min(found["seconds"]) > 0
    ((model, before),) = made
    after = list(model.parameters())
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("model", ["bpr", "als"])
def test_implicit_is_measured(told, model):
    pytest.importorskip("implicit")
    found = importlib.import_module("peers.implicit_factors").measure(told | {"model": model})
    log = data.make_log(LOG)
    # A matrix holds each pair once.
    pairs = set(zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True))
    assert found["amount"] == len(pairs)
    assert min(found["seconds"]) > 0


@pytest.mark.parametrize(
    ("library", "module", "changed"),
    [
        ("torch_rechub", "rechub_dssm", {"in_batch": True, "negatives": 63}),
        ("libreco", "libreco_two_tower", {"in_batch": True, "negatives": 63}),
        ("recbole", "recbole_models", {"negatives": 1, "model": "BPR"}),
    ],
)
@pytest.mark.slow
def test_other_trainers_are_measured_where_they_are_installed(told, library, module, changed):
    pytest.importorskip(library)
    found = importlib.import_module(f"peers.{module}").measure(told | changed)
    assert found["amount"] >= 64
    assert min(found["seconds"]) > 0


@pytest.mark.slow
def test_torchrec_is_measured_where_it_is_installed():
    pytest.importorskip("torchrec")
    asked = {"num_rows": 90, "dim": 8, "num_bags": 12, "bag_size": 5, "seconds": 0.01}
    found = importlib.import_module("peers.torchrec_bags").measure(asked | {"device": "cpu"})
    assert found["amount"] == 12


def test_what_is_for_the_cpu_says_so():
    require_cpu({"device": "cpu"})
    with pytest.raises(ValueError, match="on the CPU only, not on cuda"):
        require_cpu({"device": "cuda"})
