"""The two Triton kernels of the masked log-sum-exp; importing this module needs Triton.

Shape letters: D dimension, R rows of a block, T rows of a tile, K pairs of a chunk.

One program keeps a block of R rows of one side ("own") and walks tiles of T rows of the other side
("other"): queries over candidates for the result and the queries' gradient, candidates over queries
for theirs. A tile of R × T logits lives in registers and is gone after its turn. No two programs
write to the same place, so sums have one order and the result is the same from run to run.

Masked pairs come sorted by block and then by other row, so a program meets them in the order of its
tiles. A chunk of K of them becomes the product of two one-hot matrices, [R, K] and [K, T], a
fraction of the tile's own product with D in the middle; K comparisons with the whole tile would
cost several times the exponentials. A tile without pairs costs one comparison of scalars.
Where shapes must not follow from the number of pairs, the mask has one bit for every pair instead.

``WIDEN`` is for the interpreter, whose tl.dot multiplies the bit patterns of bfloat16. ``ONE`` is
the type of the one-hot matrices, in which a product lies in registers as that of the rows does.
"""

import triton
import triton.language as tl

# The shortest inner dimension that tl.dot takes.
_CHUNK = tl.constexpr(16)
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _load_rows(matrix, start, num_rows, D: tl.constexpr, PAD_D: tl.constexpr, SIZE: tl.constexpr):
    """Rows ``start`` onwards of [num_rows, D] as [SIZE, PAD_D], zero outside."""
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, PAD_D)[None, :]
    inside = (start + rows < num_rows) & (columns < D)
    # Only the start may lie beyond 2³¹ elements.
    first = matrix + tl.cast(start, tl.int64) * D
    return tl.load(first + rows * D + columns, mask=inside, other=0.0)


@triton.jit
def _load_shifts(vector, start, num_rows, SIZE: tl.constexpr):
    """Elements ``start`` onwards as [SIZE], -inf outside: no probability comes from there."""
    rows = start + tl.arange(0, SIZE)
    return tl.load(vector + rows, mask=rows < num_rows, other=-float("inf"))


@triton.jit
def _product(x, y, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """``x @ y`` in float32."""
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _other_row(others, place, stop):
    """The other row of the pair at ``place``; beyond every row after the last pair."""
    return tl.load(others + place, mask=place < stop, other=_NOWHERE)


@triton.jit
def _hide(
    logits,
    owns,
    others,
    place,
    stop,
    start,
    first,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ONE: tl.constexpr,
):
    """Logits [R, T] with -inf at the tile's pairs, and the place of the first pair after them."""
    own_rows = start + tl.arange(0, SIZE)[:, None]
    other_rows = first + tl.arange(0, TILE)[None, :]
    end = first + TILE
    # The branch looks idle, but a loop that stands right inside the loop over tiles would keep
    # Triton from loading tiles ahead (no cp.async in the assembly).
    if _other_row(others, place, stop) < end:
        while _other_row(others, place, stop) < end:
            chunk = place + tl.arange(0, _CHUNK)
            own = tl.load(owns + chunk, mask=chunk < stop, other=_NOWHERE)
            other = tl.load(others + chunk, mask=chunk < stop, other=_NOWHERE)
            in_rows = (own_rows == own[None, :]).to(ONE)
            in_columns = (other[:, None] == other_rows).to(ONE)
            # Counts of at most K, exact. Pairs of later tiles match no column of this one.
            hits = tl.dot(in_rows, in_columns, input_precision="ieee")
            logits = tl.where(hits > 0.5, -float("inf"), logits)
            place += tl.sum((other < end).to(tl.int32))
    return logits, place


@triton.jit
def _hide_bits(
    logits,
    words,
    width,
    start,
    first,
    num_own,
    num_other,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):
    """Logits [R, T] with -inf where the bit of the pair is set; words are [queries, width].

    Every logit loads its word, which the cache has: 32 of them share one.
    """
    own = start + tl.arange(0, SIZE)[:, None]
    other = first + tl.arange(0, TILE)[None, :]
    if OF_QUERIES:
        query, candidate = own, other
    else:
        query, candidate = other, own
    at = words + tl.cast(query, tl.int64) * width + candidate // 32
    word = tl.load(at, mask=(own < num_own) & (other < num_other), other=0)
    return tl.where(((word >> (candidate % 32)) & 1) != 0, -float("inf"), logits)


# Counts differ from step to step; a kernel of its own for those divisible by 16 gains nothing.
@triton.jit(do_not_specialize=["num_queries", "num_candidates", "tiles_per_part", "width"])
def logsumexp_kernel(
    queries,
    candidates,
    log_weights,
    results,
    owns,
    others,
    edges,
    words,
    num_queries,
    num_candidates,
    tiles_per_part,
    width,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    BITS: tl.constexpr,
    ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Log-sum-exp of a block of queries over one part of the candidates, to [parts, queries]."""
    block, part = tl.program_id(0), tl.program_id(1)
    start = block * SIZE
    own = _load_rows(queries, start, num_queries, D, PAD_D, SIZE)
    peak = tl.full([SIZE], -float("inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    if PAIRS:
        edge = edges + block * tl.num_programs(1) + part
        place, stop = tl.load(edge), tl.load(edge + 1)
    last = tl.minimum((part + 1) * tiles_per_part, tl.cdiv(num_candidates, TILE))
    for tile in range(part * tiles_per_part, last):
        first = tile * TILE
        other = _load_rows(candidates, first, num_candidates, D, PAD_D, TILE)
        logits = _product(own, tl.trans(other), PRECISION, WIDEN)
        logits += _load_shifts(log_weights, first, num_candidates, TILE)[None, :]
        if PAIRS:
            logits, place = _hide(logits, owns, others, place, stop, start, first, SIZE, TILE, ONE)
        if BITS:
            logits = _hide_bits(
                logits, words, width, start, first, num_queries, num_candidates, SIZE, TILE, True
            )
        higher = tl.maximum(peak, tl.max(logits, 1))
        # The peak of a row that has had no candidate yet is -inf, and -inf - -inf would be NaN.
        shift = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        peak = higher
    # Where nothing was left, the peak alone: -inf. A row of NaN has a total of NaN.
    result = peak + tl.log(tl.where(total == 0.0, 1.0, total))
    rows = start + tl.arange(0, SIZE)
    out = results + tl.cast(part, tl.int64) * num_queries + rows
    tl.store(out, result, mask=rows < num_queries)


@triton.jit(do_not_specialize=["num_own", "num_other", "tiles_per_part", "width"])
def gradient_kernel(
    own_rows,
    other_rows,
    own_shifts,
    other_shifts,
    upstream,
    gradients,
    totals,
    owns,
    others,
    edges,
    words,
    num_own,
    num_other,
    tiles_per_part,
    width,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    PAIRS: tl.constexpr,
    BITS: tl.constexpr,
    ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient of a block of one side from one part of the other, to [parts, own rows, D].

    Shifts are log_weights on the candidates' side and minus the result on the queries'; with them
    the product is the logarithm of the probability. ``upstream`` is [queries]. Candidates also get
    the gradient of their log_weights, in ``totals`` [parts, own rows].
    """
    block, part = tl.program_id(0), tl.program_id(1)
    start = block * SIZE
    own = _load_rows(own_rows, start, num_own, D, PAD_D, SIZE)
    own_shift = _load_shifts(own_shifts, start, num_own, SIZE)[:, None]
    gradient = tl.zeros([SIZE, PAD_D], tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    if PAIRS:
        edge = edges + block * tl.num_programs(1) + part
        place, stop = tl.load(edge), tl.load(edge + 1)
    last = tl.minimum((part + 1) * tiles_per_part, tl.cdiv(num_other, TILE))
    for tile in range(part * tiles_per_part, last):
        first = tile * TILE
        other = _load_rows(other_rows, first, num_other, D, PAD_D, TILE)
        other_shift = _load_shifts(other_shifts, first, num_other, TILE)[None, :]
        logits = _product(own, tl.trans(other), PRECISION, WIDEN)
        # log_weights first, so that a huge logit is rounded as it was for the result.
        if OF_QUERIES:
            logits = (logits + other_shift) + own_shift
        else:
            logits = (logits + own_shift) + other_shift
        if PAIRS:
            logits, place = _hide(logits, owns, others, place, stop, start, first, SIZE, TILE, ONE)
        if BITS:
            logits = _hide_bits(
                logits, words, width, start, first, num_own, num_other, SIZE, TILE, OF_QUERIES
            )
        pull = tl.exp(logits)
        if not OF_QUERIES:
            rows = first + tl.arange(0, TILE)
            pull *= tl.load(upstream + rows, mask=rows < num_other, other=0.0)[None, :]
            total += tl.sum(pull, 1)
        gradient += _product(pull.to(other.dtype), other, PRECISION, WIDEN)
    local = tl.arange(0, SIZE)
    inside = start + local < num_own
    out = tl.cast(part, tl.int64) * num_own + start
    if OF_QUERIES:
        gradient *= tl.load(upstream + start + local, mask=inside, other=0.0)[:, None]
    else:
        tl.store(totals + out + local, total, mask=inside)
    columns = tl.arange(0, PAD_D)[None, :]
    at = gradients + out * D + local[:, None] * D + columns
    tl.store(at, gradient, mask=inside[:, None] & (columns < D))
