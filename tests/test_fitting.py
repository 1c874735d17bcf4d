"""Trainer and evaluation put together: where a model in training is judged."""

import pytest
import torch

from recclr.config import parse_config
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.fitting import fit_model, fresh_stepper
from recclr.topk import EmbeddingRanker

NUM_USERS, NUM_ITEMS = 9, 14
CONFIG = parse_config(
    {
        "data": {"events": "unused.parquet"},
        "model": {"embedding_dim": 4},
        "negatives": {"uniform": 5},
        "train": {"epochs": 2.0, "batch_size": 16},
    }
)


def prepared():
    draws = torch.Generator().manual_seed(2)
    log = EncodedLog(
        torch.randint(NUM_USERS, (60,), generator=draws).int(),
        torch.randint(NUM_ITEMS, (60,), generator=draws).int(),
        NUM_USERS,
        NUM_ITEMS,
    )
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))


def test_a_model_is_judged_on_the_device_that_it_is_trained_on(monkeypatch):
    places, judged = [], []
    move = EmbeddingRanker.to

    def to(ranker, place):
        places.append(place)
        return move(ranker, place)

    def judge(ranker):
        judged.append(ranker)
        return {"recall@20": 1.0 / len(judged)}

    monkeypatch.setattr(EmbeddingRanker, "to", to)
    model, result = fit_model(CONFIG, prepared(), judge, device="cpu", on_event=lambda event: None)
    assert len(result.evaluations) == len(judged) == 2
    assert places == [model.log_temperature.device] * 2
    # The first was the best, and is what comes back.
    assert torch.equal(judged[0].item_vectors, model.all_vectors(None)[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_that_is_the_gpu():
    seen = []

    def judge(ranker):
        seen.append(ranker.item_vectors.device.type)
        return {"recall@20": 0.5}

    fit_model(CONFIG, prepared(), judge, device="cuda", on_event=lambda event: None)
    assert seen == ["cuda"] * 2


def test_a_stepper_of_a_fresh_model_takes_the_steps_of_a_training():
    first, again = (fresh_stepper(CONFIG, prepared(), device="cpu") for _ in range(2))
    losses = [[float(stepper(step)[0].loss) for step in range(4)] for stepper in (first, again)]
    assert losses[0] == losses[1]
    assert first.num_steps == 8
