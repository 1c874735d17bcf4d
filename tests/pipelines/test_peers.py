"""The peers do the work that recclr is compared with."""

import importlib

import pytest
import torch


@pytest.fixture
def log():
    from bench import data

    return data.LogSpec(num_users=70, num_items=50, num_rows=900)


@pytest.fixture
def told(log, tmp_path):
    from bench import data

    sizes = {"dim": 8, "batch_size": 64, "negatives": 32, "in_batch": False}
    return data.write_arrays(log, tmp_path) | sizes | {"threads": 1, "seconds": 0.01}


@pytest.mark.parametrize("loader", ["dataloader", "slices"])
@pytest.mark.parametrize("optimizer", ["sparse_adam", "adam", "fused_adam"])
def test_plain_pytorch_is_measured_and_trains(told, monkeypatch, loader, optimizer):
    from peers import plain_torch

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
def test_implicit_is_measured(told, log, model):
    pytest.importorskip("implicit")
    from bench import data
    from peers import implicit_factors

    found = implicit_factors.measure(told | {"model": model})
    made = data.make_log(log)
    # A matrix holds each pair once.
    pairs = set(zip(made.user_idx.tolist(), made.item_idx.tolist(), strict=True))
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
