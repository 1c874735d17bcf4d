"""The spectral solution of a log: a baseline of its own, and where id tables may start from.

Shape letters: U users, V items, D dimension.

With R the 0/1 matrix of interactions and D_u, D_v its row and column sums, D_u^-½ R D_v^-½ ≈ U S Wᵀ
by randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4). Folded into two
towers without training: user u is Σ d_v^-½ W_v over the user's items, item v is d_v^p W_v. That is
the model that graph filters on the same matrix come to (GF-CF, Shen et al. 2021), in D dimensions.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from recclr.config import Config
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, LONG_S, Ranks
from recclr.errors import ConfigError
from recclr.parts import IdPart
from recclr.sharded_tables import write_rows
from recclr.towers import Tower, TwoTower

# Directions beyond those asked for, and passes over the matrix, whose singular values fall slowly.
_SPARE, _PASSES = 10, 4
# Of a log whose spectral solution nobody asked for: more would take minutes, and gigabytes.
_MAX_ROWS = 20_000_000


def spectral_factors(
    log: EncodedLog, *, dim: int, item_power: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Both towers' vectors, float32 [U, D] and [V, D], on the CPU.

    Entities without interactions are zero, as are coordinates beyond the rank of the matrix. Costs
    10 products of the log with 2·D vectors and memory of 12 bytes per interaction.

    Args:
        log: pairs count once. dim: D, at least 1.
        item_power: p; ½ ranks by popularity as the log does, 0 by taste alone.
    """
    log = log.to("cpu")
    pairs = torch.unique(log.user_idx.long() * log.num_items + log.item_idx)
    users, items = pairs // log.num_items, pairs % log.num_items
    user_degree = torch.bincount(users, minlength=log.num_users).clamp_(min=1).float()
    item_degree = torch.bincount(items, minlength=log.num_items).clamp_(min=1).float()
    root = item_degree.rsqrt()
    weights = user_degree.rsqrt()[users] * root[items]
    matrix = _csr(users, items, weights, log)
    rank = min(dim, log.num_users, log.num_items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spare = min(rank + _SPARE, log.num_users, log.num_items)
        _, _, basis = torch.svd_lowrank(matrix, q=spare, niter=_PASSES)
    basis = torch.nn.functional.pad(basis[:, :rank], (0, dim - rank))
    history = _csr(users, items, torch.ones_like(weights), log)
    return history @ (basis * root[:, None]), basis * item_degree[:, None] ** item_power


def starts_spectral(config: Config, num_rows: int) -> bool:
    """Whether id tables start there, of a log of so many rows. Where the rows lie does not matter,
    so that shards train as rows in memory do.
    """
    asked = config.model.init == "spectral"
    return asked or (config.spectral_by_default and num_rows <= _MAX_ROWS)


@torch.no_grad()
def start_from_spectral(
    model: TwoTower, log: EncodedLog, *, init_std: float, seed: int, ranks: Ranks = ALONE
) -> None:
    """Put the spectral solution into the id tables, in place.

    Under cosine and Euclidean distance, which orders rows of one length as the cosine does, every
    row gets the length that a fresh one has on average; under dot product all
    rows of a table do on average, so that popular items keep their longer vectors. Rows of entities
    without interactions, and the unknown id, keep their draws.

    Args:
        model: with towers from a configuration. init_std: as the tables were drawn with.
        ranks: the first one computes for all, since another machine may round otherwise.

    Raises:
        ConfigError: neither tower has an id.
    """
    parts = [_id_part(model.user_tower), _id_part(model.item_tower)]
    if model.user_tower is model.item_tower:
        parts[0] = None
    if parts == [None, None]:
        raise ConfigError('model.init = "spectral" needs user.id or item.id; both are switched off')
    dim = next(part for part in parts if part is not None).table.dim
    for part, vectors in zip(parts, _factors_of_first(log, dim, seed, ranks), strict=True):
        if part is None:
            continue
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        some = (lengths > 0).squeeze(1)
        lengths = lengths[some]
        if model.similarity == "dot":
            lengths = lengths.square().mean().sqrt()
        # A row of D draws of variance init_std² / D.
        write_rows(part.table, some.nonzero().squeeze(1) + 1, init_std * vectors[some] / lengths)


def _factors_of_first(log: EncodedLog, dim: int, seed: int, ranks: Ranks) -> list[Tensor]:
    """``spectral_factors``, on every rank in the bits of the first."""
    if ranks.first:
        found = list(spectral_factors(log, dim=dim, seed=seed))
    else:
        found = [torch.empty(0, dim), torch.empty(0, dim)]
    ranks.meet("the spectral solution", LONG_S)
    others = [0] * (ranks.size - 1)
    sizes = log.num_users, log.num_items
    return [
        ranks.gather(vectors, [size, *others], "the spectral solution")
        for vectors, size in zip(found, sizes, strict=True)
    ]


def _id_part(tower: torch.nn.Module) -> IdPart | None:
    parts = tower.parts if isinstance(tower, Tower) else ()
    return next((part for part in parts if isinstance(part, IdPart)), None)


def _csr(users: Tensor, items: Tensor, weights: Tensor, log: EncodedLog) -> Tensor:
    """Sparse [U, V] of pairs that rise by (user, item)."""
    offsets = torch.zeros(log.num_users + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(users, minlength=log.num_users), 0, out=offsets[1:])
    with warnings.catch_warnings():
        # "in beta state", once per process, which a user can do nothing about.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            offsets, items, weights, (log.num_users, log.num_items), check_invariants=False
        )
