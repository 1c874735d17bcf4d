"""Gradient caching: a step in chunks is the step at once, whatever its towers draw."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from recclr.caching import embed_in_chunks
from recclr.order import generator
from recclr.rows import Rows
from recclr.settings import NegativesSettings, TrainSettings
from recclr.stepping import Stepper
from recclr.train import fit

WORK = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("distributed") / "work.py")))


class Drawing(nn.Module):
    """A tower of one's own that draws from PyTorch's generator, and says what it was asked."""

    def __init__(self, num_rows):
        super().__init__()
        self.vectors = nn.Embedding(num_rows, 6)
        self.asked = []

    def forward(self, rows):
        self.asked.append((len(rows.idx), torch.is_grad_enabled()))
        return nn.functional.dropout(self.vectors(rows.idx), 0.4, training=self.training)


def rows_of(num_rows, draws=None):
    return Rows(torch.arange(num_rows), generator=draws)


def gradients(towers, loss, step, **options):
    """Loss and all gradients of one step."""
    model = WORK.model_of(towers, WORK.LOSSES[loss]).train()
    settings = TrainSettings(batch_size=13, **options)
    stepper = Stepper(
        model,
        WORK.prepared().train,
        loss=WORK.LOSSES[loss],
        negatives=WORK.NEGATIVES["mixed"],
        train=settings,
        seed=4,
    )
    stats = stepper.objective.backward(model, stepper.source.step(step))
    found = {"loss": stats.loss}
    found |= {
        name: torch.cat([rows[:, None], grad], 1)
        for name, rows, grad in stepper.optimizers.tables.gradients()
    }
    found |= {n: p.grad for n, p in model.dense_parameters().items() if p.grad is not None}
    return found, stats


@pytest.mark.parametrize("chunk_size", [1, 5, 7, 100])
@pytest.mark.parametrize(
    ("towers", "loss"),
    [("ids", "infonce"), ("rich", "bsl"), ("timed", "full_softmax"), ("augmented", "infonce")],
)
def test_chunks_give_the_loss_and_every_gradient_of_the_whole(towers, loss, chunk_size):
    whole, told = gradients(towers, loss, 1)
    found, stats = gradients(towers, loss, 1, chunk_size=chunk_size)
    assert found.keys() == whole.keys()
    assert sum(value.abs().max() > 1e-4 for value in whole.values()) > len(whole) / 2
    for name, value in whole.items():
        # Sums in another order.
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=2e-5, msg=name)
    assert (stats.num_masked, stats.num_rows) == (told.num_masked, told.num_rows)


def test_no_tower_meets_more_rows_than_a_chunk_and_all_meet_them_twice():
    tower = Drawing(50)
    embed_in_chunks(tower, rows_of(50), 7).sum().backward()
    assert max(length for length, _ in tower.asked) == 8
    for grad_mode in (False, True):
        assert sum(length for length, mode in tower.asked if mode is grad_mode) == 50
    first = [mode for _, mode in tower.asked[:7]]
    assert first == [False] * 7


def test_the_second_pass_draws_what_the_first_one_drew():
    tower, draws = Drawing(50), torch.Generator().manual_seed(1)
    torch.manual_seed(3)
    embeddings = embed_in_chunks(tower, rows_of(50), 7)
    before = torch.get_rng_state()
    weight = torch.rand(embeddings.shape, generator=draws)
    (embeddings * weight).sum().backward()
    # Of a vector v that is kept, v / .6 is the embedding: gradient and embedding vanish together.
    kept = embeddings != 0
    assert 0.5 < kept.float().mean() < 0.7
    expected = torch.where(kept, weight / 0.6, 0.0)
    torch.testing.assert_close(tower.vectors.weight.grad, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_chunks", [1, 3, 60])
def test_chunks_leave_the_generator_where_the_whole_would(num_chunks):
    def embed(rows):
        return rows.uniform(4) + rows.uniform()[:, None]

    one, other = generator("cpu", 1, 2), generator("cpu", 1, 2)
    with torch.no_grad():
        whole = embed(rows_of(50, one))
        assert torch.equal(embed_in_chunks(embed, rows_of(50, other), num_chunks), whole)
    assert torch.equal(one.get_state(), other.get_state())


def test_a_part_of_a_part_draws_its_own_share():
    whole = rows_of(20, generator("cpu", 5))
    drawn = whole.uniform(3)
    for places in (slice(4, 16), None):
        outer = rows_of(20, generator("cpu", 5)).part(4, 16)
        if places is None:
            outer = Rows(outer.idx, None, None, outer.generator, outer.whole, torch.arange(4, 16))
        inner = outer.part(3, 8)
        assert torch.equal(inner.idx, torch.arange(7, 12))
        assert torch.equal(inner.uniform(3), drawn[7:12])


def test_training_in_chunks_ends_in_the_same_weights():
    ends = []
    for chunk_size in (None, 4):
        model = WORK.model_of("rich", WORK.LOSSES["infonce"])
        fit(
            model,
            WORK.prepared().train,
            loss=WORK.LOSSES["infonce"],
            negatives=NegativesSettings(in_batch=True, uniform=5),
            train=TrainSettings(
                batch_size=13, epochs=2, table_optimizer="rowwise_adagrad", chunk_size=chunk_size
            ),
        )
        ends.append(model.weights())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=2e-5, rtol=2e-5, msg=name)


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_batches_are_the_mean_over_their_positives(weighted):
    """53 rows in batches of 13: the second step of an epoch has 13 and 1 of them."""

    def parts(accumulate):
        model = WORK.model_of("ids", WORK.LOSSES["infonce"]).train()
        log = WORK.prepared().train
        if not weighted:
            log = type(log)(log.user_idx, log.item_idx, log.num_users, log.num_items)
        settings = TrainSettings(batch_size=13, accumulate=accumulate)
        stepper = Stepper(
            model,
            log,
            loss=WORK.LOSSES["infonce"],
            negatives=WORK.NEGATIVES["mixed"],
            train=settings,
            seed=4,
        )
        return model, stepper.source, stepper.objective, stepper.optimizers

    model, source, objective, optimizers = parts(3)
    assert (source.batches_per_epoch, source.steps_per_epoch) == (5, 2)
    assert [list(source.step(step)) for step in range(3)] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    stats = objective.backward(model, source.step(3))
    found = {name: (rows, grad) for name, rows, grad in optimizers.tables.gradients()}

    model, source, objective, optimizers = parts(1)
    batches = [source.batch(number) for number in (8, 9)]
    totals = torch.stack([torch.as_tensor(batch.total()) for batch in batches])
    dense, losses = {}, []
    for number, batch, share in zip((8, 9), batches, totals / totals.sum(), strict=True):
        one = objective.backward(model, {number: batch})
        losses.append(share * one.loss)
        for name, rows, grad in optimizers.tables.gradients():
            sums = dense.setdefault(name, torch.zeros_like(model.tables()[name].weight))
            sums.index_add_(0, rows, share * grad)
    assert [len(batch.user_idx) for batch in batches] == [13, 1]
    torch.testing.assert_close(stats.loss, sum(losses))
    assert stats.num_rows == 14
    for name, (rows, grad) in found.items():
        torch.testing.assert_close(grad, dense[name][rows], atol=1e-6, rtol=1e-5)
        assert set(rows.tolist()) >= set(dense[name].abs().sum(1).nonzero().flatten().tolist())
    assert found
