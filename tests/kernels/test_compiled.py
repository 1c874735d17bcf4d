"""The compiled kernels against float64 and slow loops, at every way that they cut a problem."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.compiled_scan import CompiledScan
from recclr.errors import DivergedError, ShapeError
from recclr.kernels import (
    PairMask,
    masked_logsumexp,
    native,
    native_rows,
    native_softmax,
    total_contrastive_loss,
)
from recclr.kernels.bags import bags_of_distinct, weighted_bags
from recclr.kernels.reference import masked_logsumexp_reference

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))

CUTS = {
    "seed": st.integers(0, 1000),
    "num_queries": st.sampled_from([1, 11, 12, 13, 97, 205]),
    "num_candidates": st.sampled_from([1, 15, 33, 64, 100, 301]),
    "dim": st.sampled_from([1, 7, 16, 33, 64, 100]),
    "threads": st.sampled_from([1, 2, 3]),
    # Exponentials of whole rows that are kept, in one block or several; blocks that are made twice.
    "floats": st.sampled_from([1 << 22, 1 << 14, 96 * 32, 24 * 32]),
}


@pytest.fixture(autouse=True, scope="module")
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(seed, num_queries, num_candidates, dim, scale=1.0, share=0.2):
    draws = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=draws) * scale / math.sqrt(dim)
    candidates = torch.randn(num_candidates, dim, generator=draws)
    weights = torch.randn(num_candidates, generator=draws)
    weights[torch.rand(num_candidates, generator=draws) < 0.1] = -math.inf
    dead = torch.rand(num_queries, num_candidates, generator=draws) < share
    return queries, candidates, weights, PairMask(*dead.nonzero(as_tuple=True))


def gradients(function, arguments, upstream):
    leaves = [x.clone().requires_grad_() for x in arguments]
    value = function(*leaves)
    finite = torch.where(value > -math.inf, value, 0.0)
    (finite * upstream.to(value.dtype)).sum().backward()
    return value.detach(), [x.grad for x in leaves]


@given(**CUTS, scale=st.sampled_from([1e-3, 1.0, 60.0]), share=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=150)
def test_logsumexp_and_its_gradients_are_those_of_float64(
    seed, num_queries, num_candidates, dim, threads, floats, scale, share
):
    *arguments, mask = problem(seed, num_queries, num_candidates, dim, scale, share)
    upstream = torch.randn(num_queries, generator=torch.Generator().manual_seed(seed + 1))
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_softmax, "_FLOATS", floats)
        found, ours = gradients(lambda *x: masked_logsumexp(*x, mask), arguments, upstream)
    expected, theirs = gradients(
        lambda *x: masked_logsumexp_reference(*x, mask), [x.double() for x in arguments], upstream
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-5 * max(scale, 1))
    for one, other in zip(ours, theirs, strict=True):
        size = float(other.abs().max().clamp_min(1.0))
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 * size * max(scale, 1))


@given(
    **CUTS,
    scale=st.sampled_from([1e-3, 1.0, 60.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    power=st.sampled_from([None, 0.7, 1.2]),
    with_own=st.booleans(),
)
@settings(max_examples=150)
def test_the_loss_in_one_pass_is_that_of_float64(
    seed, num_queries, num_candidates, dim, threads, floats, scale, share, power, with_own
):
    queries, candidates, weights, mask = problem(
        seed, num_queries, num_candidates, dim, scale, share
    )
    draws = torch.Generator().manual_seed(seed + 1)
    positives, own = (torch.randn(num_queries, generator=draws) for _ in range(2))
    own[torch.rand(num_queries, generator=draws) < 0.3] = -math.inf
    row_weights = torch.rand(num_queries, generator=draws)
    arguments = [queries, candidates, positives] + ([own] if with_own else [])

    def loss(q, c, p, o=None):
        function = total_contrastive_loss
        options = {"second_temperature": power, "own_partition": o}
        return function(q, c, weights.to(q), p, row_weights.to(q), mask, **options)

    def in_float64(*x):
        with pytest.MonkeyPatch.context() as plain:
            # The same composition of parts, without a kernel, and without the check for float32.
            plain.setattr("recclr.kernels.fused.require_shapes", None)
            plain.setattr("recclr.kernels.fused.masked_logsumexp", reference)
            plain.setattr("torch.is_grad_enabled", lambda: False)
            return loss(*x)

    def reference(*x, bfloat16):
        return masked_logsumexp_reference(*x)

    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_softmax, "_FLOATS", floats)
        patch.setattr("recclr.kernels.fused.masked_logsumexp", None)  # the other way is not taken
        found, ours = gradients(loss, arguments, torch.tensor(-1.7))
    wide = [x.double() for x in arguments]
    expected, theirs = gradients(in_float64, wide, torch.tensor(-1.7))
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5, atol=1e-5 * num_queries * max(scale, 1)
    )
    for one, other in zip(ours, theirs, strict=True):
        size = float(other.abs().max().clamp_min(1.0))
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 * size * max(scale, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_candidates_by_the_hundred_thousand_come_in_slices(threads):
    """Two slices, the second of them small; the mask counts columns across both."""
    torch.set_num_threads(threads)
    num_candidates = (1 << 24) // (16 * (threads + 2)) + 1_234
    *arguments, _ = problem(5, 13, num_candidates, 5, share=0.0)
    columns = torch.tensor([7, num_candidates - 900, num_candidates - 1])
    mask = PairMask(torch.tensor([0, 4, 12]), columns)
    upstream = torch.linspace(-1.0, 2.0, 13)
    found, ours = gradients(lambda *x: masked_logsumexp(*x, mask), arguments, upstream)
    wide = [x.double() for x in arguments]
    expected, theirs = gradients(
        lambda *x: masked_logsumexp_reference(*x, mask), wide, upstream.double()
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * size)
    positives, row_weights = torch.zeros(13), torch.rand(13)
    leaves = [arguments[0].requires_grad_(), arguments[1].requires_grad_()]
    loss = total_contrastive_loss(*leaves, arguments[2], positives, row_weights, mask)
    by_queries, by_candidates = torch.autograd.grad(loss, leaves)
    leaves = [x.double() for x in leaves]
    partition = masked_logsumexp_reference(*leaves, arguments[2].double(), mask)
    slow = (torch.logaddexp(torch.zeros(13).double(), partition) * row_weights).sum()
    torch.testing.assert_close(loss.double(), slow, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(slow, leaves)
    for one, other in zip((by_queries, by_candidates), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * float(other.max()))


def test_memory_beside_the_candidates_does_not_grow_with_them():
    sizes = [
        native.library().recclr_room(96, n, 64, 16, native_softmax._FLOATS, 1)
        for n in (10**6, 10**8)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert sizes[1] < 40 << 20  # floats, for 16 threads


def test_the_same_threads_give_the_same_bits():
    queries, candidates, weights, mask = problem(3, 205, 301, 33)
    upstream = torch.ones(205)

    def run():
        return gradients(
            lambda *x: masked_logsumexp(*x, mask), [queries, candidates, weights], upstream
        )

    (first, ones), (second, others) = run(), run()
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_exponentials_are_right_to_three_units_in_the_last_place():
    """Where the log-sum-exp rounds to 0, so that what is raised is not rounded beforehand."""
    logits = torch.linspace(-86.9, -17.0, 7_001)
    queries = logits[:, None].clone().requires_grad_()
    # A row each: two candidates, the larger at 0.
    masked_logsumexp(queries, torch.tensor([[1.0], [0.0]]), torch.zeros(2)).sum().backward()
    exact = logits.double().exp()
    assert ((queries.grad[:, 0].double() - exact) / exact).abs().max() < 3 * 2**-23


def test_what_is_no_number_is_passed_on():
    queries, candidates, weights, mask = problem(1, 13, 33, 7)
    queries[5, 2] = math.nan
    assert masked_logsumexp(queries, candidates, weights, mask).isnan().nonzero().tolist() == [[5]]


def test_values_of_rows_have_their_shape_checked():
    queries, candidates, weights, mask = problem(1, 13, 33, 7)
    queries.requires_grad_()
    rows = torch.zeros(13)
    for wrong in (torch.zeros(12), torch.zeros(13, 1), torch.zeros(13, dtype=torch.float64)):
        with pytest.raises(ShapeError, match="each value of a row"):
            total_contrastive_loss(queries, candidates, weights, rows, wrong, mask)


@given(
    seed=st.integers(0, 1000),
    num_queries=st.sampled_from([1, 12, 97, 205]),
    num_items=st.sampled_from([1, 31, 33, 511, 700, 1300]),
    k=st.sampled_from([1, 5, 64, 70, 900]),
    levels=st.sampled_from([2, 9, 10_000]),
    threads=st.sampled_from([1, 2, 3]),
    share=st.sampled_from([0.0, 0.1, 0.99, 1.0]),
)
@settings(max_examples=150)
def test_top_k_is_that_of_a_stable_sort(seed, num_queries, num_items, k, levels, threads, share):
    """Small integers: scores are exact, and many are equal."""
    draws = torch.Generator().manual_seed(seed)
    dim = 5
    queries = torch.randint(-levels, levels, (num_queries, dim), generator=draws).float()
    corpus = torch.randint(-9, 9, (num_items, dim), generator=draws).float()
    seen = (torch.rand(num_queries, num_items, generator=draws) < share).nonzero(as_tuple=True)
    shuffled = torch.randperm(len(seen[0]), generator=draws)
    torch.set_num_threads(threads)
    scan = CompiledScan(corpus, k, native.library())
    found = scan(queries, (seen[0][shuffled], seen[1][shuffled]))
    scores = queries @ corpus.T
    scores[seen] = -math.inf
    values, items = scores.sort(dim=1, descending=True, stable=True)
    kept = min(k, num_items)
    expected = torch.where(values > -math.inf, items, -1)[:, :kept]
    assert torch.equal(found.scores, values[:, :kept])
    assert torch.equal(found.item_idx, expected)


def test_scores_of_any_sign_and_size_keep_their_order():
    corpus = torch.tensor([0.0, -0.0, math.inf, -1e-40, 1e-40, -3e38, 3e38, -1.0, 1.0])[:, None]
    found = CompiledScan(corpus, 9, native.library())(torch.ones(1, 1), None)
    assert found.item_idx.tolist() == [[2, 6, 8, 4, 0, 1, 3, 7, 5]]


@pytest.mark.parametrize("item", [0, 15, 16, 699])
def test_a_score_that_is_no_number_is_refused(item):
    corpus = torch.randn(700, 5, generator=torch.Generator().manual_seed(1))
    corpus[item, 3] = math.nan
    scan = CompiledScan(corpus, 3, native.library())
    with pytest.raises(DivergedError, match="NaN"):
        scan(torch.ones(13, 5), None)


@given(
    values=st.lists(st.integers(0, 1 << 31) | st.integers(0, 40), max_size=300),
)
def test_unique_is_that_of_torch(values):
    given_values = torch.tensor(values, dtype=torch.int64)
    found = native_rows.unique(given_values)
    expected = torch.unique(given_values, return_inverse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [1, 40, 1 << 11, 100_003, (1 << 32) - 1])
def test_equal_values_are_found_the_same_by_any_number_of_threads(threads, most):
    # Enough numbers for as many threads; 40 of them stand in several slices each.
    values = torch.randint(most, (50_021,), generator=torch.Generator().manual_seed(most))
    torch.set_num_threads(threads)
    found = native_rows.equal_values(native.library(), values, inverse=True)
    distinct, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    assert torch.equal(found.distinct, distinct)
    assert torch.equal(found.inverse, inverse)
    assert torch.equal(found.starts.diff(), counts)
    assert torch.equal(found.order, values.argsort(stable=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("most", [1, 40, 100_003])
def test_equal_values_of_a_share_are_those_that_its_owner_has(threads, most):
    values = torch.randint(most, (50_021,), generator=torch.Generator().manual_seed(most))
    torch.set_num_threads(threads)
    seen = []
    for rank in range(3):
        # The twin: neighbours by sixteens, in turns.
        own = torch.tensor([value // 16 % 3 == rank for value in values.tolist()])
        assert torch.equal(native_rows.owned(values, (rank, 3)), own)
        found = native_rows.equal_values(native.library(), values, share=(rank, 3))
        distinct, counts = values[own].unique(return_counts=True)
        assert torch.equal(found.distinct, distinct)
        assert torch.equal(found.starts.diff(), counts)
        places = own.nonzero().squeeze(1)
        assert torch.equal(found.order, places[values[own].argsort(stable=True)])
        seen.append(found.order)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(values)))


@pytest.mark.parametrize("value", [-1, 1 << 32, 1 << 62])
def test_values_beyond_32_bits_are_sorted_by_torch(value):
    given_values = torch.tensor([5, value, 5, 0, value])
    found = native_rows.unique(given_values)
    expected = torch.unique(given_values, return_inverse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    num_vectors=st.integers(1, 30),
    # Vectors by eight, by four and one by one, and coordinates that fill none, of 8 or 16 lanes.
    dim=st.sampled_from([1, 5, 16, 33, 72, 107, 211]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bags_are_those_of_torch(lengths, num_vectors, dim, weighted, seed):
    draws = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    rows = torch.randint(num_vectors, (n,), generator=draws)
    offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    weights = torch.randn(n, generator=draws) if weighted else None
    vectors = torch.randn(num_vectors, dim, generator=draws).requires_grad_()
    upstream = torch.randn(len(lengths), dim, generator=draws)
    found = weighted_bags(vectors, rows, offsets, weights)
    (ours,) = torch.autograd.grad((found * upstream).sum(), vectors)
    with native.turned_off():
        expected = weighted_bags(vectors, rows, offsets, weights)
        (theirs,) = torch.autograd.grad((expected * upstream).sum(), vectors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    most=st.sampled_from([1, 9, 1 << 40]),
    seed=st.integers(0, 1000),
)
def test_bags_of_values_embed_each_distinct_one_once(lengths, most, seed):
    draws = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    values = torch.randint(most, (n,), generator=draws)
    offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    weights, upstream = torch.randn(n, generator=draws), torch.randn(len(lengths), 3)
    leaves = []

    def embed(distinct):
        assert torch.equal(distinct, values.unique())
        leaves.append(torch.stack([distinct % 7, distinct % 5, distinct % 3], 1).float())
        return leaves[0].requires_grad_()

    found = bags_of_distinct(values, offsets, weights, embed)
    expected = torch.zeros(len(lengths), 3)
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    slope = torch.zeros(len(leaves[0]), 3)
    places = torch.searchsorted(values.unique(), values)
    for bag, place, weight in zip(owners, places, weights, strict=True):
        expected[bag] += weight * leaves[0][place].detach()
        slope[place] += weight * upstream[bag]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    if n:
        (ours,) = torch.autograd.grad((found * upstream).sum(), leaves)
        torch.testing.assert_close(ours, slope, rtol=1e-5, atol=1e-4)


def test_bags_of_vectors_that_do_not_exist_are_refused():
    with pytest.raises(IndexError, match="none of 3"):
        weighted_bags(torch.zeros(3, 2), torch.tensor([0, 3]), torch.tensor([0]))


def loaded(folder, **environment):
    """Why the kernels of a folder are not used, by a fresh process."""
    code = (
        "from pathlib import Path; from recclr.kernels import native; "
        f"native.FOLDER = Path({str(folder)!r}); print(native.library() is None, native.why_not())"
    )
    variables = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_environment_turns_them_off():
    assert loaded(native.FOLDER, RECCLR_NATIVE="0") == "True RECCLR_NATIVE=0 turns them off"


def test_libraries_of_other_sources_are_not_used(tmp_path):
    folder = tmp_path / "cpp"
    shutil.copytree(native.FOLDER, folder)
    assert loaded(folder) == "False None"
    with (folder / "product.h").open("a") as file:
        file.write("// changed\n")
    assert "compiled from other sources" in loaded(folder)


@pytest.mark.parametrize("content", [None, b"no library"])
def test_missing_or_broken_libraries_are_not_used(tmp_path, content):
    folder = tmp_path / "cpp"
    shutil.copytree(native.FOLDER, folder)
    for path in folder.glob("*.so"):
        path.unlink() if content is None else path.write_bytes(content)
    found = loaded(folder)
    assert found.startswith("True")
    assert "missing" in found if content is None else ".so" in found


def test_the_older_instruction_set_gives_the_same(tmp_path):
    """PyTorch's choice among instruction sets is followed, and can be told."""
    code = (
        "import torch; from recclr.kernels import masked_logsumexp, native; "
        "assert native.library() is not None, native.why_not(); "
        "torch.manual_seed(0); q = torch.randn(97, 33).requires_grad_(); c = torch.randn(301, 33); "
        "masked_logsumexp(q, c, torch.zeros(301)).sum().backward(); "
        "from recclr.compiled_scan import CompiledScan; "
        "top = CompiledScan(c, 7, native.library())(q.detach(), None); "
        "torch.save([q.grad, top.scores, top.item_idx], {path!r})"
    )
    found = []
    for kind in ("default", "avx2"):
        path = str(tmp_path / f"{kind}.pt")
        variables = os.environ | ({} if kind == "default" else {"ATEN_CPU_CAPABILITY": kind})
        script = code.replace("{path!r}", repr(path))
        subprocess.run([sys.executable, "-c", script], check=True, env=variables)
        found.append(torch.load(path, weights_only=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
