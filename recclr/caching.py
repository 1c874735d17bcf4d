"""Gradient caching: towers of any batch at the memory of a few rows, with the exact gradient.

A contrastive loss needs all embeddings of a batch at once, but their gradient is all that its
towers need to know of it. So towers run twice (Gao et al. 2021, "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup"): once without a graph, chunk by chunk, to give the
embeddings; and once more in the backward pass, where each chunk is given the gradient of its own
embeddings and its graph is freed before that of the next is built. Costs a second forward pass of
the towers; the loss is computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recclr.rows import Rows

Embed = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Encoding:
    """How towers are run in a step.

    Attributes:
        chunk_size: rows that a tower encodes at once, at most; None for all. bfloat16: precision
            of the towers.
    """

    chunk_size: int | None
    bfloat16: bool

    def __call__(self, embed: Embed, rows: Rows, most: int) -> Tensor:
        """Embeddings of this rank's ``rows``, in as many chunks as those of any rank.

        Args:
            most: no rank has more rows than these. The same on all, which may exchange something
                for each chunk.
        """
        num_chunks = 1
        if self.chunk_size is not None and most:
            num_chunks = -(-most // self.chunk_size)

        def embed_mixed(rows: Rows) -> Tensor:
            # Entered here, since the backward pass of chunks runs outside.
            with torch.autocast(rows.idx.device.type, torch.bfloat16, enabled=self.bfloat16):
                return embed(rows)

        return embed_in_chunks(embed_mixed, rows, num_chunks)


def embed_in_chunks(embed: Embed, rows: Rows, num_chunks: int) -> Tensor:
    """``embed(rows)``, float [M, D], with the graph of one chunk at a time.

    What dropout hides is the same as without chunks, and in both passes. A ``backward`` of the
    result adds to the ``grad`` of parameters and of table lookups, as ``embed`` itself would;
    ``torch.autograd.grad`` with respect to them is not possible.

    Args:
        embed: maps rows to embeddings, each row by itself; draws from ``rows.generator``, or from
            PyTorch's own generators.
        num_chunks: at least 1; 1 is ``embed`` itself. Some are empty where rows are fewer.
    """
    if num_chunks == 1:
        return embed(rows)
    if not torch.is_grad_enabled():
        return torch.cat([chunk() for chunk in _chunks(embed, rows, num_chunks)])
    # A function all of whose inputs lack a gradient is left out of the graph.
    handle = torch.ones((), requires_grad=True, device=rows.idx.device)
    embeddings: Tensor = _Cached.apply(handle, _chunks(embed, rows, num_chunks))  # type: ignore[no-untyped-call]
    return embeddings


class _Cached(torch.autograd.Function):
    """The embeddings of chunks, whose gradient each chunk gets in a second pass of its own."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, chunks: list[_Chunk]) -> Tensor:
        ctx.chunks = chunks
        parts = [chunk() for chunk in chunks]
        ctx.lengths = [len(part) for part in parts]
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        parts = torch.split(grad_outputs[0], ctx.lengths)
        for chunk, grad in zip(ctx.chunks, parts, strict=True):
            with torch.enable_grad():
                embeddings = chunk()
            if embeddings.requires_grad:
                torch.autograd.backward(embeddings, grad)
        return None, None


class _Chunk:
    """A part of the rows, embedded with the same draws however often.

    Args:
        start, stop: which of the rows.
    """

    def __init__(self, embed: Embed, rows: Rows, start: int, stop: int) -> None:
        self.embed, self.rows = embed, rows.part(start, stop)
        self.draws = None if rows.generator is None else rows.generator.get_state()
        self.torch_draws: list[Tensor] | None = None

    def __call__(self) -> Tensor:
        # Each chunk draws for all rows and takes its own, as a rank does, so all start alike.
        if self.draws is not None:
            assert self.rows.generator is not None
            self.rows.generator.set_state(self.draws)
        if self.torch_draws is None:
            self.torch_draws = _torch_draws(self.rows.idx.device)
            return self.embed(self.rows)
        # A tower of one's own may use PyTorch's dropout, which must go on as if asked once.
        devices = [self.rows.idx.device] if self.rows.idx.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.torch_draws[0])
            if devices:
                torch.cuda.set_rng_state(self.torch_draws[1], devices[0])
            return self.embed(self.rows)


def _chunks(embed: Embed, rows: Rows, num_chunks: int) -> list[_Chunk]:
    """Chunks of nearly equal length."""
    cuts = [len(rows.idx) * number // num_chunks for number in range(num_chunks + 1)]
    return [_Chunk(embed, rows, start, stop) for start, stop in itertools.pairwise(cuts)]


def _torch_draws(device: torch.device) -> list[Tensor]:
    """States of PyTorch's generators that a tower on the device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
