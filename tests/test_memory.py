"""Memory of a step grows with B + N, not with B × N; asserted by an address-space limit."""

import subprocess
import sys

import pytest

LIMIT = 4 << 30
STEP = """
import resource
import sys

import torch

from recclr.batches import BatchSource
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.memory import forget_peak, held_bytes, peak_bytes
from recclr.objective import Objective
from recclr.optimizers import Optimizers
from recclr.settings import *
from recclr.building import build_model

size, limit = int(sys.argv[1]), int(sys.argv[2])
num_items, num_rows = 8 * size, 2 * size
draws = torch.Generator().manual_seed(0)
users = torch.randint(size, (num_rows,), generator=draws).int()
items = torch.randint(num_items, (num_rows,), generator=draws).int()
log = EncodedLog(users, items, size, num_items)
mlp = tuple(map(int, sys.argv[3].split(","))) if len(sys.argv) > 3 else ()
chunk_size = int(sys.argv[4]) if len(sys.argv) > 4 else None
loss, train = LossSettings(temperature=0.1), TrainSettings(batch_size=size)
prepared = Prepared(log, FeatureTable(size), FeatureTable(num_items))
model = build_model(
    prepared, user=TowerSettings(mlp=mlp), item=TowerSettings(mlp=mlp),
    model=ModelSettings(embedding_dim=64),
    loss=loss, seed=0,
).train()
negatives = NegativesSettings(in_batch=False, uniform=size)
objective = Objective(log, loss, negatives, seed=0, chunk_size=chunk_size)
optimizers = Optimizers(model, train, 2)
batches = BatchSource(log, train, seed=0, time_cells=False).step(0)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
forget_peak()
before = held_bytes()
stats = objective.backward(model, batches)
optimizers.step(0)
print(stats.num_rows, int(stats.num_candidates), float(stats.loss), peak_bytes() - before)
"""


def one_step(size, limit, *tower):
    """Positives, candidates, loss and memory of one whole step in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", STEP, str(size), str(limit), *map(str, tower)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    rows, candidates, loss, num_bytes = found.stdout.split()
    return int(rows), int(candidates), float(loss), int(num_bytes)


@pytest.mark.slow
def test_a_large_batch_against_as_many_candidates_trains_within_4_gb():
    """The matrix of logits alone would take 64 GB."""
    rows, candidates, loss, _ = one_step(131_072, LIMIT)
    assert rows == 131_072
    # 131,072 draws from a million items: 123,200 distinct ones are expected.
    assert candidates == pytest.approx(123_200, abs=400)
    # A fresh model tells nothing apart: the log of the number of items.
    assert loss == pytest.approx(13.9, abs=0.5)


@pytest.mark.slow
def test_towers_in_chunks_hold_what_a_chunk_needs():
    """Three layers of 512: 12 KB of activations for a row of a tower, 8,192 rows, two towers."""
    whole, chunked = (one_step(8_192, LIMIT, "512,512,512", size) for size in (8_192, 256))
    assert chunked[:2] == whole[:2]
    assert chunked[2] == pytest.approx(whole[2], rel=1e-6)
    # What else a step takes (embeddings, tiles of logits, optimiser) is the same for both.
    assert whole[3] - chunked[3] > 0.8 * 2 * 8_192 * 3 * 2 * 512 * 4
