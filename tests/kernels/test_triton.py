"""The GPU's log-sum-exp against the plain one: in Triton's interpreter, or on a GPU where one is.

``python -m pytest tests/kernels/test_triton.py`` on a machine with a GPU runs all of it compiled.
"""

import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import recclr.kernels.logsumexp as dispatch
from recclr.data.log import EncodedLog
from recclr.kernels import BitMask, PairMask, masked_logsumexp
from recclr.kernels.reference import masked_logsumexp_reference
from recclr.known_positives import KnownPositives

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="needs Triton: pip install triton, or PyTorch for CUDA")
import recclr.kernels.triton_logsumexp as twin  # noqa: E402
from recclr.kernels.triton_known import known_bits_triton  # noqa: E402
from recclr.kernels.triton_logsumexp import masked_logsumexp_triton  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def small_blocks(programs):
    """Blocks of 16 rows, so that small problems have several; walks whole (1) and in parts (7)."""
    blocks = twin.Blocks(16, 16, num_warps=4, num_stages=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "_blocks_for", lambda dim, dtype: blocks)
        patch.setattr(twin, "_num_programs", lambda device: programs)
        yield


@pytest.fixture(params=[1, 7])
def small(request):
    with small_blocks(request.param):
        yield request.param


def problem(seed, num_queries, num_candidates, dim, *, share=0.2, scale=1.0, repeats=0):
    draws = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=draws) * scale
    candidates = torch.randn(num_candidates, dim, generator=draws)
    weights = torch.randn(num_candidates, generator=draws)
    dead = torch.rand(num_queries, num_candidates, generator=draws) < share
    rows, columns = dead.nonzero(as_tuple=True)
    # Rows rising, columns in any order, some pairs again.
    again = torch.randint(len(rows), (repeats,), generator=draws) if len(rows) else rows
    mixed = torch.cat([torch.randperm(len(rows), generator=draws), again])
    order = mixed[rows[mixed].sort(stable=True).indices]
    return queries, candidates, weights, PairMask(rows[order], columns[order])


def value_and_gradients(function, queries, candidates, weights, mask):
    """On the function's device, brought back; upstream gradients differ from row to row."""
    device = "cpu" if function is masked_logsumexp_reference else DEVICE
    leaves = [t.to(device, copy=True).requires_grad_() for t in (queries, candidates, weights)]
    moved = None if mask is None else type(mask)(*(t.to(device) for t in vars(mask).values()))
    result = function(*leaves, moved)
    upstream = torch.linspace(-1.0, 2.0, len(queries), device=device)
    alive = result > -math.inf
    (torch.where(alive, result, 0.0) * upstream).sum().backward()
    return result.detach().cpu(), [leaf.grad.cpu() for leaf in leaves]


def rounded(queries, candidates, weights, mask):
    return queries.bfloat16().float(), candidates.bfloat16().float(), weights, mask


def in_bfloat16(*arguments):
    return masked_logsumexp_triton(*arguments, bfloat16=True)


def assert_twins(case, function=masked_logsumexp_triton, oracle=None, error=2e-5):
    expected, expected_grads = value_and_gradients(masked_logsumexp_reference, *(oracle or case))
    found, found_grads = value_and_gradients(function, *case)
    # Both sides round logits of this size, each in its own order of sums, whatever is left of them
    # where they cancel; exp passes that on.
    queries, candidates = case[:2]
    rounding = 0.0
    if len(queries) and len(candidates):
        rounding = 5e-7 * float(queries.norm(dim=1).max() * candidates.norm(dim=1).max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 + rounding)
    error += rounding
    for ours, theirs in zip(found_grads, expected_grads, strict=True):
        scale = float(theirs.abs().max().clamp_min(1.0)) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=5 * error, atol=error * scale)


random_problems = given(
    programs=st.sampled_from([1, 7]),
    seed=st.integers(0, 1000),
    num_queries=st.integers(1, 45),
    num_candidates=st.integers(1, 70),
    dim=st.sampled_from([1, 3, 16, 21]),
    share=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    scale=st.sampled_from([1e-4, 1.0, 30.0, 1000.0]),
    repeats=st.sampled_from([0, 5]),
)
few = settings(max_examples=16, deadline=None)


@random_problems
@few
def test_the_twin_equals_the_plain_one(programs, seed, num_queries, num_candidates, dim, **options):
    with small_blocks(programs):
        assert_twins(problem(seed, num_queries, num_candidates, dim, **options))


@random_problems
@few
def test_in_bfloat16_it_equals_the_plain_one_on_rounded_rows(
    programs, seed, num_queries, num_candidates, dim, **options
):
    case = problem(seed, num_queries, num_candidates, dim, **options)
    # Products of rounded rows are exact, so values are; gradients see rounded probabilities.
    with small_blocks(programs):
        assert_twins(case, in_bfloat16, rounded(*case), error=1e-2)


def as_bits(queries, candidates, weights, mask):
    """The same with one bit for each pair."""
    hidden = torch.zeros(len(queries), len(candidates), dtype=torch.bool)
    hidden[mask.rows, mask.columns] = True
    return queries, candidates, weights, BitMask.from_dense(hidden)


@random_problems
@settings(few, max_examples=8)
def test_a_mask_of_bits_hides_what_the_pairs_hide(programs, seed, num_queries, **options):
    case = problem(seed, num_queries, options.pop("num_candidates"), **options)
    with small_blocks(programs):
        assert_twins(as_bits(*case), oracle=case)


@pytest.mark.parametrize("dim", [64, 256])
def test_bits_with_the_blocks_of_every_dimension(dim):
    case = problem(dim, 70, 131, dim, scale=dim**-0.5)
    assert_twins(as_bits(*case), oracle=case)
    assert_twins(as_bits(*case), in_bfloat16, rounded(*case), error=1e-2)


def test_a_candidate_of_no_weight_adds_exactly_nothing(small):
    """As the spare places of a step of fixed shapes."""
    queries, candidates, weights, mask = problem(13, 35, 20, 3)
    padded = torch.cat([candidates, candidates[-1:].expand(14, -1)])
    none = torch.cat([weights, torch.full((14,), -math.inf)])
    found, grads = value_and_gradients(
        masked_logsumexp_triton, *as_bits(queries, padded, none, mask)
    )
    expected, expected_grads = value_and_gradients(
        masked_logsumexp_triton, *as_bits(queries, candidates, weights, mask)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[0], expected_grads[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(grads[1][20:], torch.zeros(14, 3))


@pytest.mark.parametrize("dim", [1, 64, 65, 200, 256])
@pytest.mark.parametrize("function", [masked_logsumexp_triton, in_bfloat16])
def test_with_the_blocks_of_every_dimension(dim, function):
    case = problem(dim, 70, 131, dim, scale=dim**-0.5)
    if function is in_bfloat16:
        assert_twins(case, function, rounded(*case), error=1e-2)
    else:
        assert_twins(case)


def test_without_a_mask_or_with_an_empty_one(small):
    *leaves, _ = problem(2, 19, 37, 5)
    nothing = torch.empty(0, dtype=torch.int64)
    assert_twins((*leaves, None))
    assert_twins((*leaves, PairMask(nothing, nothing)))


def test_a_tile_with_more_pairs_than_a_chunk_and_one_with_exactly_that(small):
    *leaves, _ = problem(3, 33, 40, 4)
    rows = torch.tensor([0] * 16 + [1] * 40 + [17] * 32)
    columns = torch.cat([torch.arange(16), torch.arange(39, -1, -1), torch.arange(4, 36)])
    assert_twins((*leaves, PairMask(rows, columns)))


def test_rows_without_candidates_pull_at_nothing(small):
    queries, candidates, weights, _ = problem(4, 35, 20, 3)
    mask = PairMask(torch.full((20,), 17), torch.arange(20))
    result, grads = value_and_gradients(masked_logsumexp_triton, queries, candidates, weights, mask)
    assert (result == -math.inf).tolist() == [row == 17 for row in range(35)]
    assert torch.equal(grads[0][17], torch.zeros(3))
    assert all(grad.isfinite().all() for grad in grads)
    # An upstream gradient that is not a number stays out as well.
    leaf = queries.to(DEVICE, copy=True).requires_grad_()
    pairs = PairMask(mask.rows.to(DEVICE), mask.columns.to(DEVICE))
    result = masked_logsumexp_triton(leaf, candidates.to(DEVICE), weights.to(DEVICE), pairs)
    (upstream := torch.ones(35, device=DEVICE))[17] = math.nan
    result.backward(upstream)
    assert leaf.grad.isfinite().all()


def test_weights_of_minus_infinity_leave_a_candidate_out(small):
    queries, candidates, weights, mask = problem(5, 35, 33, 3)
    weights[[2, 16, 32]] = -math.inf
    assert_twins((queries, candidates, weights, mask))
    nothing = torch.full((33,), -math.inf)
    result, _ = value_and_gradients(masked_logsumexp_triton, queries, candidates, nothing, mask)
    assert torch.equal(result, torch.full((35,), -math.inf))


def test_the_probability_of_the_only_candidate_is_1_however_large_its_logit(small):
    """Gradients round a logit as the result did: across 2²⁰ another order is off by 1 / 16."""
    queries, weights = torch.full((20, 1), 2**20 - 0.0625), torch.tensor([0.53])
    _, grads = value_and_gradients(
        masked_logsumexp_triton, queries, torch.ones(1, 1), weights, None
    )
    upstream = torch.linspace(-1.0, 2.0, 20)
    assert torch.equal(grads[0].squeeze(1), upstream)
    torch.testing.assert_close(grads[2].squeeze(0), upstream.sum(), rtol=1e-6, atol=0)


def test_no_query_at_all(small):
    result, grads = value_and_gradients(
        masked_logsumexp_triton, torch.empty(0, 3), torch.randn(18, 3), torch.zeros(18), None
    )
    assert result.shape == (0,)
    assert torch.equal(grads[1], torch.zeros(18, 3))


def test_not_a_number_is_passed_on_and_not_hidden(small):
    queries = torch.ones(17, 2)
    queries[16, 1] = math.nan
    result, grads = value_and_gradients(
        masked_logsumexp_triton, queries, torch.ones(40, 2), torch.zeros(40), None
    )
    assert result[:16].isfinite().all()
    assert result[16].isnan()
    assert grads[1].isnan().all()


def test_the_same_bits_every_time(small):
    case = problem(6, 40, 50, 7)
    first, first_grads = value_and_gradients(masked_logsumexp_triton, *case)
    again, again_grads = value_and_gradients(masked_logsumexp_triton, *case)
    assert torch.equal(first, again)
    assert all(map(torch.equal, first_grads, again_grads))


def test_a_graph_is_walked_twice_and_second_derivatives_are_refused(small):
    *leaves, mask = problem(7, 20, 33, 5)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    mask = PairMask(mask.rows.to(DEVICE), mask.columns.to(DEVICE))
    result = masked_logsumexp_triton(*leaves, mask).sum()
    first = torch.autograd.grad(result, leaves, retain_graph=True)
    second = torch.autograd.grad(result, leaves, retain_graph=True)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.autograd.grad(result, leaves, create_graph=True)


def test_rows_that_are_not_contiguous(small):
    queries, candidates, weights, mask = problem(8, 20, 33, 5)
    expected, expected_grads = value_and_gradients(
        masked_logsumexp_reference, queries, candidates, weights, mask
    )

    def of_columns(queries, candidates, weights, mask):
        return masked_logsumexp_triton(
            queries.T.contiguous().T, candidates.T.contiguous().T, weights, mask
        )

    found, grads = value_and_gradients(of_columns, queries, candidates, weights, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


class Calls(TorchDispatchMode):
    """Every PyTorch operation with the shapes it gives; those that wait for the device fail."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.WAITING), name
        if name.startswith("index"):
            indices = [t for t in args[1] if t is not None]
            assert all(t.dtype != torch.bool for t in indices), "indexing by a mask waits"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append((name, tuple(result.shape), result.dtype))
        return result


@pytest.mark.parametrize("bfloat16", [False, True])
def test_nothing_waits_for_the_device_and_shapes_do_not_follow_from_data(small, bfloat16):
    """What a CUDA graph asks for."""

    def calls(seed, *, bits):
        queries, candidates, weights, mask = problem(seed, 40, 50, 7)
        masks = PairMask(mask.rows[:90].to(DEVICE), mask.columns[:90].to(DEVICE))
        if bits:
            masks = BitMask(as_bits(queries, candidates, weights, mask)[3].words.to(DEVICE))
        leaves = [t.to(DEVICE).requires_grad_() for t in (queries, candidates, weights)]
        with Calls() as mode:
            masked_logsumexp_triton(*leaves, masks, bfloat16=bfloat16).sum().backward()
        return mode.seen

    first = calls(9, bits=False)
    assert sum(name.startswith("searchsorted") for name, *_ in first) == 2
    assert calls(10, bits=False) == first
    # Pairs in any number.
    assert calls(9, bits=True) == calls(10, bits=True)


def test_nothing_as_large_as_all_pairs_is_ever_made(small):
    *leaves, mask = problem(11, 150, 250, 4, share=0.001)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    mask = PairMask(mask.rows.to(DEVICE), mask.columns.to(DEVICE))
    with Calls() as mode:
        masked_logsumexp_triton(*leaves, mask).sum().backward()
    largest = max(math.prod(shape) for _, shape, _ in mode.seen)
    # The interpreter copies by bytes: 250 rows of 4 numbers of 4.
    assert largest <= 250 * 4 * 4 < 150 * 250 // 8


@pytest.mark.parametrize("only_own", [False, True])
def test_known_positives_walk_to_the_bits_that_a_search_finds(only_own):
    draws = torch.Generator().manual_seed(3)
    users, items = (torch.randint(size, (90,), generator=draws).int() for size in (7, 41))
    log = EncodedLog(users.to(DEVICE), items.to(DEVICE), 7, 41)
    known = KnownPositives(log, only_own=only_own)
    rows = torch.arange(11, device=DEVICE)
    asked = log.user_idx[rows].long(), log.item_idx[rows].long()
    # Two spare places that repeat the last item, and one item that is no candidate.
    candidates = torch.tensor([*range(1, 40), 39, 39], device=DEVICE)
    places = torch.tensor([-1, *range(1, 39), 38, 38], device=DEVICE)
    for _ in range(2):
        # The second time over what the first left.
        bits, count = known._walked_bits(*asked, candidates, places)
        expected, number = known._searched_bits(*asked, candidates, places)
        assert torch.equal(bits.words, expected.words)
        assert int(count) == int(number) == int(bits.dense(41).sum()) > 5
    assert not bits.dense(41)[:, [0, 39, 40]].any()
    assert (known.item_slots == -1).all()


def test_which_twin_runs_where(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert dispatch._triton_for(cpu, 8, False) is None
    chosen = dispatch._triton_for(cuda, 256, True)
    assert (chosen.func, chosen.keywords) == (masked_logsumexp_triton, {"bfloat16": True})
    assert dispatch._triton_for(cuda, 257, False) is None
    assert dispatch.why_not_triton(256) is None
    assert "1 to 256" in dispatch.why_not_triton(257)
    monkeypatch.setitem(sys.modules, "triton", None)
    dispatch._has_triton.cache_clear()
    try:
        assert dispatch._triton_for(cuda, 8, False) is None
        assert dispatch.why_not_triton(8) == "Triton is not installed"
    finally:
        dispatch._has_triton.cache_clear()


def known_of(lists, rows, slots, num_candidates):
    """By loops: hidden pairs, and how many each row has."""
    hidden = torch.zeros(len(rows), num_candidates, dtype=torch.bool)
    for row, of in enumerate(rows):
        for item in lists[of]:
            if slots[item] >= 0:
                hidden[row, slots[item]] = True
    return hidden


@given(
    seed=st.integers(0, 1000),
    num_rows=st.integers(0, 9),
    num_candidates=st.integers(1, 75),
    longest=st.sampled_from([0, 3, 140, 300]),
)
@few
def test_every_row_walks_its_own_list(seed, num_rows, num_candidates, longest):
    draws = torch.Generator().manual_seed(seed)
    num_items, num_lists = 311, 5
    lengths = torch.randint(longest + 1, (num_lists,), generator=draws).tolist()
    lists = [torch.randperm(num_items, generator=draws)[:length].tolist() for length in lengths]
    rows = torch.randint(num_lists, (num_rows,), generator=draws)
    slots = torch.full((num_items,), -1)
    slots[torch.randperm(num_items, generator=draws)[:num_candidates]] = torch.arange(
        num_candidates
    )
    flat = torch.tensor([item for each in lists for item in each], dtype=torch.int32)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    bits, counts = known_bits_triton(
        offsets.to(DEVICE),
        # One more, so that no list at all is still an address.
        torch.cat([flat, torch.zeros(1, dtype=torch.int32)]).to(DEVICE),
        rows.to(DEVICE),
        slots.to(DEVICE),
        num_candidates,
    )
    expected = known_of(lists, rows.tolist(), slots.tolist(), num_candidates)
    assert bits.words.shape == (num_rows, -(-num_candidates // 32))
    assert torch.equal(bits.dense(num_candidates).cpu(), expected)
    assert torch.equal(bits.words.cpu(), BitMask.from_dense(expected).words)
    assert torch.equal(counts.cpu().long(), expected.sum(1))


def test_a_cpu_computes_in_float32_whatever_is_allowed():
    case = problem(12, 9, 14, 5)
    assert torch.equal(masked_logsumexp(*case, bfloat16=True), masked_logsumexp(*case))


# Both kernels for a real device, which needs Triton's compiler and no GPU.
COMPILE = """
import sys
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from recclr.kernels import triton_kernels, triton_known, triton_logsumexp

dim, capability, bits = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "bits"
for dtype, name, one in ((torch.float32, "fp32", tl.float32), (torch.bfloat16, "bf16", tl.float16)):
    blocks = triton_logsumexp._blocks_for(dim, dtype)
    for kernel in (triton_kernels.logsumexp_kernel, triton_kernels.gradient_kernel):
        fixed = dict(D=dim, PAD_D=dim, SIZE=blocks.size, TILE=blocks.tile, ONE=one)
        fixed |= dict(PAIRS=not bits, BITS=bits)
        fixed |= dict(PRECISION="ieee", WIDEN=False, OF_QUERIES=False)
        types = dict.fromkeys(kernel.arg_names, "*fp32")
        types |= dict.fromkeys(("owns", "others", "edges", "words"), "*i32")
        for at in kernel.arg_names:
            if at in ("queries", "candidates", "own_rows", "other_rows"):
                types[at] = "*" + name
            if at.startswith("num_") or at in ("tiles_per_part", "width"):
                types[at] = "i32"
            if at in fixed:
                types[at] = "constexpr"
        fixed = {(at,): fixed[n] for at, n in enumerate(kernel.arg_names) if n in fixed}
        aligned = {(at,): [["tt.divisibility", 16]] for at, n in enumerate(types.values())
                   if n.startswith("*")}
        made = triton.compile(
            ASTSource(kernel, types, fixed, aligned),
            target=GPUTarget("cuda", capability, 32),
            options=dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages,
                         enable_fp_fusion=True),
        )
        text = made.asm["ptx"]
        print(made.metadata.shared, "cp.async" in text, "mma" in text)
types = dict.fromkeys(triton_known.known_bits_kernel.arg_names, "*i64")
types |= dict.fromkeys(("values", "words", "counts"), "*i32")
types |= {"width": "i32", "CHUNK": "constexpr"}
place = triton_known.known_bits_kernel.arg_names.index("CHUNK")
made = triton.compile(
    ASTSource(triton_known.known_bits_kernel, types, {(place,): 128}, {}),
    target=GPUTarget("cuda", capability, 32),
    options=dict(num_warps=4),
)
assert "atom" in made.asm["ptx"] or "red" in made.asm["ptx"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["pairs", "bits"])
@pytest.mark.parametrize(("dim", "capability"), [(64, 80), (256, 90)])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(dim, capability, mask, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(dim), str(capability), mask],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    # 99 KiB is what the smallest of current devices gives a program; tiles are loaded ahead, also
    # with masked pairs; bfloat16 is multiplied by tensor cores.
    assert all(int(shared) <= 99 * 1024 for shared, *_ in rows), rows
    assert [loads for _, loads, _ in rows] == ["True"] * 4
    assert [mma for *_, mma in rows[2:]] == ["True"] * 2


@pytest.mark.gpu
@gpu
def test_memory_grows_with_rows_and_not_with_pairs_of_rows():
    size, dim = 65536, 64
    leaves = [torch.randn(size, dim, device="cuda", requires_grad=True) for _ in range(2)]
    rows = torch.arange(size, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    masked_logsumexp(
        *leaves, torch.zeros(size, device="cuda"), PairMask(rows, rows)
    ).sum().backward()
    # All pairs would take 16 GiB.
    assert torch.cuda.max_memory_allocated() - before < 16 * 4 * size * dim


@pytest.mark.gpu
@gpu
def test_a_cuda_graph_gives_what_eager_gives():
    def arguments(seed):
        queries, candidates, weights, mask = problem(seed, 300, 500, 64)
        moved = [t.cuda() for t in (queries, candidates, weights, mask.rows, mask.columns)]
        return moved[:3], [index[:9000] for index in moved[3:]]

    def step(leaves, pairs):
        result = masked_logsumexp(*leaves, PairMask(*pairs))
        return result, *torch.autograd.grad(result.sum(), leaves)

    leaves, pairs = arguments(1)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(leaves, pairs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, pairs)
    others, other_pairs = arguments(2)
    with torch.no_grad():
        for old, new in zip([*leaves, *pairs], [*others, *other_pairs], strict=True):
            old.copy_(new)
    graph.replay()
    for ours, theirs in zip(captured, step(leaves, pairs), strict=True):
        assert torch.equal(ours, theirs)
