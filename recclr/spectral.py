"""The spectral solution of a log: a baseline of its own, and where id tables may start from.

Shape letters: U users, V items, D dimension.

With R the 0/1 matrix of interactions and D_u, D_v its row and column sums, D_u^-½ R D_v^-½ ≈ U S Wᵀ
by randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4). Folded into two
towers without training: user u is Σ d_v^-½ W_v over the user's items, item v is d_v^p W_v. That is
the model that graph filters on the same matrix come to (GF-CF, Shen et al. 2021), in D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.config import Config
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, LONG_S, Ranks
from recclr.errors import ConfigError
from recclr.kernels.bags import weighted_bags
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
    11 products of the log with D + 10 vectors and memory of 16 bytes per interaction, 40 at first.

    Args:
        log: pairs count once. dim: D, at least 1.
        item_power: p; ½ ranks by popularity as the log does, 0 by taste alone.
    """
    pairs = _Pairs.of(log.to("cpu"))
    rank = min(dim, log.num_users, log.num_items)
    spare = min(rank + _SPARE, log.num_users, log.num_items)
    basis = _right_singular_vectors(pairs, spare, seed)
    basis = torch.nn.functional.pad(basis[:, :rank], (0, dim - rank))
    users = pairs.of_users(basis / pairs.item_degree.sqrt())
    return users, basis * pairs.item_degree**item_power


@dataclass(frozen=True, eq=False)
class _Pairs:
    """R by rows and by columns, to be multiplied with narrow matrices.

    Attributes:
        items: int64 [n], those of each user, side by side. user_starts: int64 [U].
        users: int64 [n], those of each item. item_starts: int64 [V].
        user_degree, item_degree: float32 [U, 1] and [V, 1]; 1 of those without pairs.
    """

    items: Tensor
    user_starts: Tensor
    users: Tensor
    item_starts: Tensor
    user_degree: Tensor
    item_degree: Tensor

    @classmethod
    def of(cls, log: EncodedLog) -> _Pairs:
        items, users = log.known_pairs()
        return cls(
            items=items.values.long(),
            user_starts=items.offsets[:-1],
            users=users.values.long(),
            item_starts=users.offsets[:-1],
            user_degree=items.lengths().clamp(min=1).float()[:, None],
            item_degree=users.lengths().clamp(min=1).float()[:, None],
        )

    def of_users(self, vectors: Tensor) -> Tensor:
        """R @ vectors: [V, D] to [U, D]."""
        return weighted_bags(vectors, self.items, self.user_starts)

    def of_items(self, vectors: Tensor) -> Tensor:
        """R^T @ vectors: [U, D] to [V, D]."""
        return weighted_bags(vectors, self.users, self.item_starts)


def _right_singular_vectors(pairs: _Pairs, count: int, seed: int) -> Tensor:
    """The first of D_u^-½ R D_v^-½, float32 [V, count], in the draws of ``torch.svd_lowrank``."""
    user_root, item_root = pairs.user_degree.rsqrt(), pairs.item_degree.rsqrt()

    def of_users(x: Tensor) -> Tensor:
        return user_root * pairs.of_users(item_root * x)

    def of_items(x: Tensor) -> Tensor:
        return item_root * pairs.of_items(user_root * x)

    # As there: the basis lies on the longer side, and begins from draws on the shorter one.
    wide = len(user_root) < len(item_root)
    there, back = (of_items, of_users) if wide else (of_users, of_items)
    draws = torch.Generator().manual_seed(seed)
    start = torch.randn(min(len(user_root), len(item_root)), count, generator=draws)
    basis = torch.linalg.qr(there(start)).Q
    for _ in range(_PASSES):
        basis = torch.linalg.qr(back(basis)).Q
        basis = torch.linalg.qr(there(basis)).Q
    found = torch.linalg.svd(back(basis), full_matrices=False)
    right: Tensor = basis @ found.Vh.mT if wide else found.U
    return right


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
