"""Top-k by way of bfloat16 scores equals float32, and its error bound holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.coarse as coarse_module
import recclr.topk as topk_module
from recclr.coarse import CoarseCorpus, supports_bfloat16
from recclr.data.log import Csr
from recclr.errors import DivergedError
from recclr.topk import BFloat16Scan, Float32Scan, top_k

pytestmark = [
    pytest.mark.usefixtures("plain_kernels"),
    pytest.mark.skipif(
        not supports_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16 GEMM"
    ),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small corpora take the coarse path, over several blocks of 64 columns."""
    monkeypatch.setattr(topk_module, "smallest_corpus", lambda k: 32 * k)
    monkeypatch.setattr(coarse_module, "_BLOCK", 64)


def random_seen(num_rows, num_items, generator):
    lengths = torch.randint(0, 1 + num_items // 2, (num_rows,), generator=generator)
    rows = torch.arange(num_rows).repeat_interleave(lengths)
    values = torch.randint(0, num_items, (len(rows),), generator=generator)
    return Csr.from_pairs(rows, values, num_rows)


def in_float64(queries, corpus, seen=None):
    scores = queries.double() @ corpus.double().T
    if seen is not None:
        for row in range(seen.num_rows):
            scores[row, seen.row(row).long()] = -torch.inf
    return scores


@given(
    seed=st.integers(0, 10_000),
    num_queries=st.integers(1, 9),
    num_items=st.integers(1, 700),
    k=st.integers(1, 13),
    top=st.integers(1, 6),
    columns=st.sampled_from([97, 256, 4096]),
    with_seen=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_a_stable_sort_with_many_ties(
    seed, num_queries, num_items, k, top, columns, with_seen
):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers up to 6: products are exact in every precision but that of the result.
    queries = torch.randint(-top, top + 1, (num_queries, 5), generator=generator).float()
    corpus = torch.randint(-top, top + 1, (num_items, 5), generator=generator).float()
    seen = random_seen(num_queries, num_items, generator) if with_seen else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_module, "_MAX_COLUMNS", columns)
        patch.setitem(topk_module._MAX_ROWS, "cpu", 2)
        found = top_k(queries, corpus, k, seen=seen)
    scores = in_float64(queries, corpus, seen)
    for row in range(num_queries):
        order = np.argsort(-scores[row].numpy(), kind="stable")[:k]
        order = order[scores[row].numpy()[order] > -np.inf]
        missing = k - len(order)
        assert found.item_idx[row].tolist() == order.tolist() + [-1] * missing
        expected = scores[row][order.copy()].tolist() + [-np.inf] * missing
        assert found.scores[row].tolist() == expected


@pytest.mark.parametrize("columns", [1000, 1 << 16])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_equals_float64_where_items_differ_by_less_than_bfloat16_can_tell(
    spread, columns, monkeypatch
):
    monkeypatch.setattr(topk_module, "_MAX_COLUMNS", columns)
    generator = torch.Generator().manual_seed(4)
    # Thirty families of a hundred near copies, at norms from e^-9 to e^9 with the spread.
    centres = torch.randn(30, 24, generator=generator)
    corpus = centres.repeat(100, 1) + 1e-4 * torch.randn(3000, 24, generator=generator)
    corpus *= torch.exp(spread * torch.randn(3000, 1, generator=generator))
    queries = torch.randn(41, 24, generator=generator) * torch.logspace(-12, 12, 41)[:, None]
    seen = random_seen(41, 3000, generator)
    found = top_k(queries, corpus, 17, seen=seen)
    scores = in_float64(queries, corpus, seen)
    best = scores.sort(dim=1, descending=True)
    scale = best.values[:, :1].abs()
    assert ((found.scores - best.values[:, :17]).abs() <= 3e-6 * scale).all()
    chosen = scores.gather(1, found.item_idx)
    assert ((chosen - best.values[:, :17]).abs() <= 3e-6 * scale).all()
    assert all(len(set(row)) == 17 for row in found.item_idx.tolist())


def rounds_one_way(num_rows, dim, generator):
    """Values just above halfway between two bfloat16 numbers: all are rounded up."""
    steps = torch.randint(0, 128, (num_rows, dim), generator=generator)
    return 1 + (steps + 0.501) / 128


def tiny_and_large(num_rows, dim, generator):
    values = torch.randn(num_rows, dim, generator=generator)
    return values * torch.exp(4 * torch.randn(num_rows, dim, generator=generator))


@pytest.mark.parametrize(
    "draw", [rounds_one_way, tiny_and_large, lambda n, d, g: torch.randn(n, d, generator=g)]
)
@pytest.mark.parametrize("dim", [1, 3, 64, 700])
def test_the_bound_holds_and_is_not_idle(draw, dim):
    generator = torch.Generator().manual_seed(dim)
    queries, corpus = draw(23, dim, generator), draw(301, dim, generator)
    prepared = CoarseCorpus.build(corpus)
    unit = queries / queries.norm(dim=1, keepdim=True)
    rounded = unit.bfloat16()
    error = prepared.error((rounded.float() - unit).norm(dim=1))
    buffer = prepared.buffer(23)
    coarse_module._score(rounded, prepared, None, buffer)
    exact = unit.double() @ (corpus / prepared.scale).double().T
    start, worst = 0, 0.0
    for block in prepared.blocks:
        width = block.shape[1]
        coarse = buffer[23 * start : 23 * (start + width)].view(23, width).float()
        real = min(301 - start, width)
        groups = torch.arange(real) % (width // 32) + start // 32
        low = coarse_module._lowest(coarse[:, :real], error[groups])
        high = coarse_module._highest(coarse[:, :real], error[groups])
        true = exact[:, start : start + real]
        assert (low <= true).all()
        assert (true <= high).all()
        assert (coarse[:, real:] == -torch.inf).all()
        worst = max(worst, float(((coarse[:, :real] - true).abs() / (high - low)).max()))
        start += width
    # A bound a hundred times too wide would send everything to float32.
    assert worst > 0.005


def test_the_bound_holds_where_all_roundings_of_an_item_add_up():
    """Query exact, score near 0, each coordinate rounded in the direction of the query's sign."""
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    up, down = 1 + 0.51 / 128, 1 + 0.49 / 128
    corpus = torch.full((64, 64), 2.0)  # norm 16: scaling by it rounds nothing
    corpus[5] = torch.where(signs > 0, up, down)
    prepared = CoarseCorpus.build(corpus)
    rounded = (signs / 8).bfloat16()[None]
    buffer = prepared.buffer(1)
    coarse_module._score(rounded, prepared, None, buffer)
    error = prepared.error(torch.zeros(1))
    exact = float(signs.double() @ corpus[5].double()) / (8 * 16)
    coarse = buffer[5].float()
    assert abs(coarse - exact) > 0.9 * error[1] / 2  # group 1 of 2 holds columns 1, 3, 5, …
    assert (
        coarse_module._lowest(coarse, error[1]) <= exact <= coarse_module._highest(coarse, error[1])
    )


def test_scores_that_float32_alone_can_tell_are_ranked_by_it():
    """Differences of 2^-20: one bfloat16 value for all, so the coarse scan must leave it open."""
    corpus = torch.ones(1024, 2)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    corpus[:, 1] = 1 + order * 2.0**-20
    queries = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    found = top_k(queries, corpus, 3)
    best = order.argsort(descending=True)
    assert found.item_idx.tolist() == [best[:3].tolist(), best.flip(0)[:3].tolist()]


def scan_of(corpus, k):
    return BFloat16Scan([CoarseCorpus.build(corpus)], corpus, k)


def test_queries_that_the_bound_leaves_open_are_ranked_in_float32():
    generator = torch.Generator().manual_seed(8)
    corpus = torch.randn(5000, 6, generator=generator)
    corpus[:4000] = 0.0
    queries = torch.randn(7, 6, generator=generator)
    queries[2] = 0.0
    seen = random_seen(7, 5000, generator)
    rows = torch.arange(7).repeat_interleave(seen.lengths())
    pairs = rows, seen.values.long()
    scan = scan_of(corpus, 5)
    found = scan(queries, pairs)
    assert scan.float32 is not None, "the query of zeros was not handed back"
    expected = Float32Scan(corpus, 5)(queries, pairs)
    assert torch.equal(found.item_idx, expected.item_idx)
    assert torch.allclose(found.scores, expected.scores)


def test_usual_vectors_need_no_float32_scan():
    generator = torch.Generator().manual_seed(9)
    corpus = torch.randn(9000, 32, generator=generator)
    scan = scan_of(corpus, 20)
    scan(torch.randn(50, 32, generator=generator), None)
    assert scan.float32 is None


@pytest.mark.parametrize("where", ["corpus", "queries"])
def test_nan_is_refused(where):
    corpus, queries = torch.rand(3000, 3), torch.rand(4, 3)
    {"corpus": corpus, "queries": queries}[where][2, 1] = torch.nan
    with pytest.raises(DivergedError, match="NaN"):
        top_k(queries, corpus, 5)


def test_infinite_scores_are_ranked_first():
    corpus = torch.rand(3000, 3, generator=torch.Generator().manual_seed(2)) + 1
    corpus[77] = torch.inf
    assert top_k(torch.ones(2, 3), corpus, 2).item_idx[:, 0].tolist() == [77, 77]


def test_everything_seen_leaves_nothing():
    seen = Csr(torch.tensor([0, 2000, 2000]), torch.arange(2000, dtype=torch.int32))
    corpus = torch.rand(2000, 4, generator=torch.Generator().manual_seed(3))
    found = top_k(torch.ones(2, 4), corpus, 3, seen=seen)
    assert found.item_idx[0].tolist() == [-1, -1, -1]
    assert found.scores[0].tolist() == [-np.inf] * 3
    assert found.item_idx[1].tolist() == corpus.sum(1).sort(descending=True).indices[:3].tolist()
