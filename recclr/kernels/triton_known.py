"""Known positives of a step as bits, in Triton; importing this module needs Triton.

One program walks one row's own history, however long: the launch is the same in every step, and
nothing is sized by what is found, as a CUDA graph asks for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recclr.kernels.reference import WORD_BITS, BitMask

_CHUNK = 128


def known_bits_triton(
    offsets: Tensor, values: Tensor, rows: Tensor, slots: Tensor, num_candidates: int
) -> tuple[BitMask, Tensor]:
    """Which candidates stand in the list of each row.

    Cost: Σ list lengths of the rows, and B·C / 8 bytes set to zero.

    Args:
        offsets: int64 [n + 1], values: int32 [nnz]: distinct items of each list.
        rows: int64 [B]: which list each row has. slots: int64 [num_items]: place of each item among
            the candidates, -1 for none.

    Returns:
        the bits, and how many each row has, int32 [B].
    """
    width = -(-num_candidates // WORD_BITS)
    words = torch.zeros((len(rows), width), dtype=torch.int32, device=rows.device)
    counts = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    if len(rows):
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device_of(rows):
            known_bits_kernel[(len(rows),)](
                offsets, values, rows, slots, words, counts, width, CHUNK=_CHUNK, num_warps=4
            )
    return BitMask(words), counts


@triton.jit(do_not_specialize=["width"])
def known_bits_kernel(offsets, values, rows, slots, words, counts, width, CHUNK: tl.constexpr):
    """One row's bits, and their number."""
    row = tl.program_id(0)
    of = tl.load(rows + row)
    place, stop = tl.load(offsets + of), tl.load(offsets + of + 1)
    out = words + tl.cast(row, tl.int64) * width
    found = tl.zeros([CHUNK], tl.int32)
    while place < stop:
        at = place + tl.arange(0, CHUNK)
        item = tl.load(values + at, mask=at < stop, other=0)
        slot = tl.load(slots + item, mask=at < stop, other=-1).to(tl.int32)
        hit = slot >= 0
        # Several items of a chunk may share a word.
        tl.atomic_or(out + slot // 32, tl.full([CHUNK], 1, tl.int32) << (slot % 32), mask=hit)
        found += hit.to(tl.int32)
        place += CHUNK
    tl.store(counts + row, tl.sum(found))
