"""What the compiled kernels refuse, leave to PyTorch, or must not be confused by."""

import math
import os
import subprocess
import sys

import pytest
import torch

from recclr.data.log import Csr, EncodedLog
from recclr.errors import ShapeError
from recclr.kernels import masked_logsumexp, native, native_rows, native_softmax
from recclr.kernels.bags import weighted_bags
from recclr.kernels.reference import masked_logsumexp_reference
from recclr.known_positives import KnownPositives
from recclr.optim import Table, TableOptimizer
from recclr.topk import top_k

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, device="meta"),
    ],
)
def test_no_kernel_is_given_what_it_would_misread(wrong):
    with pytest.raises(ShapeError, match="a kernel needs"):
        native.floats(wrong)


def test_small_work_is_done_by_the_thread_that_asks():
    assert native.threads_for(100) == 1
    assert native.threads_for(1 << 20) == torch.get_num_threads()


@pytest.mark.parametrize("item", [5, 6, -1, -5])
def test_a_seen_item_that_is_none_of_the_corpus_hides_nothing(item):
    queries = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    corpus = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    offsets, values = torch.tensor([0, 1, 2, 2]), torch.tensor([item, 3], dtype=torch.int32)
    found = top_k(queries, corpus, 5, seen=Csr(offsets, values))
    expected = (queries @ corpus.T).argsort(1, descending=True)
    assert torch.equal(found.item_idx[[0, 2]], expected[[0, 2]])
    assert set(found.item_idx[1].tolist()) == {0, 1, 2, 4, -1}


def test_the_default_type_of_numbers_does_not_matter():
    queries, candidates, weights = torch.randn(5, 3), torch.randn(40, 3), torch.randn(40)
    expected = masked_logsumexp_reference(queries, candidates, weights)
    best = (queries @ candidates.T).argmax(1)
    torch.set_default_dtype(torch.float64)
    try:
        found = masked_logsumexp(queries, candidates, weights)
        top = top_k(queries, candidates, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)
    assert torch.equal(top.item_idx[:, 0], best)


def test_vectors_without_coordinates_weigh_what_their_log_weights_say():
    queries = torch.empty(3, 0).requires_grad_()
    found = masked_logsumexp(queries, torch.empty(4, 0), torch.zeros(4))
    torch.testing.assert_close(found, torch.full((3,), math.log(4)))
    found.sum().backward()
    assert queries.grad.shape == (3, 0)


def test_weights_of_bags_may_have_gaps():
    vectors, rows = torch.eye(3).requires_grad_(), torch.tensor([0, 1, 1, 2, 2, 2])
    weights = torch.arange(12.0)[::2]
    found = weighted_bags(vectors, rows, torch.tensor([0, 4]), weights)
    assert found.tolist() == [[0.0, 6.0, 6.0], [0.0, 0.0, 18.0]]
    found.sum().backward()
    assert vectors.grad[:, 0].tolist() == [0.0, 6.0, 24.0]


@pytest.mark.parametrize(
    ("offsets", "weights"), [([1], None), ([0, 9], None), ([0], torch.ones(1)), ([0, 2, 1], None)]
)
def test_bags_that_do_not_lie_within_their_rows_are_refused(offsets, weights):
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        weighted_bags(torch.zeros(3, 2), torch.tensor([0, 1]), torch.tensor(offsets), weights)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_bags_may_be_of_either_integer_type(dtype):
    vectors = torch.arange(6.0).view(3, 2)
    rows, offsets = torch.tensor([2, 0, 1], dtype=dtype), torch.tensor([0, 1], dtype=dtype)
    assert weighted_bags(vectors, rows, offsets).tolist() == [[4.0, 5.0], [2.0, 4.0]]


@pytest.mark.parametrize("kind", ["adam", "rowwise_adagrad"])
@pytest.mark.parametrize(("rows", "width"), [([1, 5_000_000], 4), ([1, 10], 4), ([1, 2], 2)])
def test_gradients_that_do_not_fit_the_table_are_refused(kind, rows, width):
    table = Table(10, 4, std=1.0, generator=torch.Generator().manual_seed(0))
    optimizer = TableOptimizer({"t": table}, kind)
    before = table.weight.clone()
    with pytest.raises((IndexError, RuntimeError)):
        optimizer.step(0.1, [("t", [(torch.tensor(rows), torch.ones(len(rows), width), None)])])
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("values", [torch.tensor([[1, 2], [2, 1]]), torch.tensor([3, 1, 3]).int()])
def test_unique_of_other_shapes_and_types_is_that_of_torch(values):
    found = native_rows.unique(values)
    expected = torch.unique(values, return_inverse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_interruption_leaves_no_candidate_behind(monkeypatch):
    log = EncodedLog(torch.tensor([0, 1]).int(), torch.tensor([2, 3]).int(), 2, 5)
    known = KnownPositives(log)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recclr.known_positives.known_of_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            known._from_rows(torch.tensor([0]), torch.tensor([2]))
    assert len(known._from_rows(torch.tensor([0]), torch.tensor([3]))) == 0


def test_processors_without_kernels_are_told_so_and_not_to_install_a_compiler():
    code = "from recclr.kernels import native; print(native.kernels_exist(), native.why_not())"
    variables = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables
    )
    assert done.stdout.startswith("False there are none for")


def test_memory_of_whole_rows_is_bounded_for_many_threads_and_long_vectors():
    """C that fits a row's cache, but not once for each of 64 threads at 768 dimensions."""
    room = native.library().recclr_room(4096, 10_912, 768, 64, native_softmax._FLOATS, 1)
    assert room < 120 << 20
