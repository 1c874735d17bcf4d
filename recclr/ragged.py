"""Numbers of ragged rows: as many as there are, or padded to a grid of fixed shape.

Shape letters: M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.data.log import Csr


def ranges(start: Tensor, stop: Tensor) -> Csr:
    """Row r holds the numbers start[r], …, stop[r] - 1; empty where stop <= start."""
    lengths = (stop - start).clamp(min=0)
    offsets = torch.zeros(len(start) + 1, dtype=torch.int64, device=start.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    values = torch.arange(int(offsets[-1]), device=start.device)
    values += (start - offsets[:-1]).repeat_interleave(lengths, output_size=len(values))
    return Csr(offsets, values)


def longest(offsets: Tensor) -> int:
    """Of ragged rows; 0 where there are none."""
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


def grid(start: Tensor, stop: Tensor, width: int, size: int) -> tuple[Tensor, Tensor]:
    """As ``ranges``, padded: numbers below ``size`` [M, width], and which of them are meant."""
    numbers = start[:, None] + torch.arange(width, device=start.device)
    return numbers.clamp(max=size - 1), numbers < stop[:, None]
