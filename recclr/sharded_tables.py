"""Tables that outgrow a device: split by rows over the ranks, looked up and updated by TorchRec.

Each rank holds one block of rows and of the optimiser's state. A lookup sends the distinct rows to
the ranks that hold them and gets vectors back; everything after it is that of a whole ``Table``, to
the bit. The update sends each row's summed gradient the same way, to FBGEMM's fused kernel.

The kernel moves rows within a backward pass, so a table that was looked up twice in a step would
move twice, and a loss that is not finite would reach the weights. Lookups are therefore made
without gradient and end in leaves, as those of a whole table do; one more lookup of all their rows,
once the step is judged, is there only for its backward pass. It costs one exchange of ids and
vectors more, also where there was one lookup: the kernel takes its rate as it looks rows up.

Shape letters: G ranks, D dimension of a table.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from recclr.distributed import Ranks
from recclr.errors import ConfigError, require
from recclr.kernels.native_rows import unique
from recclr.optim import Table
from recclr.settings import TrainSettings

# Elements that are drawn, or sent to the first rank, at a time: 64 MiB.
_STRETCH = 1 << 24
# As that of ``optim``, which keeps a column where FBGEMM has a vector.
_EPSILON = 1e-8
_STATE = {"table.momentum1": "second"}
_LOOKUP, _UPDATE = "a lookup in a sharded table", "the update of a sharded table"


class NewTable(Protocol):
    """What makes the tables of a model: ``Table``, or what ``table_maker`` gives."""

    def __call__(
        self, num_rows: int, dim: int, *, std: float, generator: torch.Generator
    ) -> Table: ...


@dataclass(frozen=True)
class RowShard:
    """The rows that this rank holds of a tensor that is split over all ranks.

    Attributes:
        local: [n, …], seen and changed by whoever else holds it. starts: first row of every rank,
            then the number of all rows.
    """

    local: Tensor
    starts: tuple[int, ...]
    ranks: Ranks

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size((self.starts[-1], *self.local.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that holds all, a view."""
        return whole[self.starts[self.ranks.rank] : self.starts[self.ranks.rank + 1]]

    @torch.no_grad()
    def copy_(self, source: Tensor | RowShard) -> None:
        """Take this rank's rows from the whole, or from a clone."""
        self.local.copy_(source.local if isinstance(source, RowShard) else self.own(source))

    def clone(self) -> RowShard:
        """A copy of this rank's rows, on their device."""
        return replace(self, local=self.local.clone())

    def gathered(self, name: str) -> Tensor | None:
        """The whole on the CPU of the first rank, None elsewhere; called by all.

        Stretches bound what a device holds of it; they go to all ranks, which costs the network G
        times the table.

        Args:
            name: what it is, for errors.
        """
        lengths = [stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)]
        whole = torch.empty(self.shape, dtype=self.dtype) if self.ranks.first else None
        step = max(_STRETCH // (self.ranks.size * self.local[:1].numel()), 1)
        for begin in range(0, max(lengths), step):
            counts = [min(max(length - begin, 0), step) for length in lengths]
            stretch = self.ranks.gather(self.local[begin : begin + step], counts, name)
            if whole is not None:
                for start, part in zip(self.starts, torch.split(stretch, counts), strict=False):
                    whole[start + begin : start + begin + len(part)] = part
        return whole


class ShardedTable(Table):
    """A ``Table`` of which this rank holds ceil(num_rows / G) rows, the last one fewer.

    Lookups and ``update`` are collective: all ranks make them, in one order, also without any row.
    Starts from the values of a ``Table`` of the same arguments. There is no ``weight``: what is
    saved is in ``rows`` and ``state``.

    Args:
        num_rows: so many that every rank holds some. dim: a multiple of 4. optimizer: one of
            ``settings.SHARDED_OPTIMIZERS``. ranks: started. device: of this rank.

    Attributes:
        rows: float32 [num_rows, dim]. state: of the optimiser, by the names that it has in
            ``optim.TableOptimizer``.

    Raises:
        ConfigError: ``dim`` is no multiple of 4. MissingExtraError: TorchRec is not installed.
    """

    _collection: Any

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        std: float,
        generator: torch.Generator,
        optimizer: str,
        ranks: Ranks,
        device: str,
    ) -> None:
        torch.nn.Module.__init__(self)
        if dim % 4:
            raise ConfigError(
                f"train.sharded_tables needs a model.embedding_dim that is a multiple of 4 (so "
                f"does FBGEMM); found {dim}"
            )
        self.lookups = []
        self.ranks = ranks
        collection = _collection(num_rows, dim, optimizer, ranks, torch.device(device))
        # Unknown to torch.nn: its parameters are not this model's to move, save or decay.
        object.__setattr__(self, "_collection", collection)
        self.rows = _shard(collection.state_dict()["embeddings.table.weight"], ranks)
        found = collection.fused_optimizer.state_dict()["state"]["embeddings.table.weight"]
        self.state = {}
        for name, value in found.items():
            shard = _shard(value, ranks)
            self.state[_STATE[name]] = replace(shard, local=shard.local.unsqueeze(1))
        start, stop = self.rows.starts[ranks.rank], self.rows.starts[ranks.rank + 1]
        self.rows.local.copy_(drawn(num_rows, dim, start, stop, std=std, generator=generator))

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def mean(self, keep: Tensor) -> Tensor:
        """As that of a whole table, up to the order of sums; collective."""
        own = self.rows.own(keep)
        total = self.rows.local[own].sum(0)
        return self.ranks.sum_(total, "the mean of a sharded table") / keep.sum()

    def update(self, lr: float) -> None:
        """Apply and forget the lookups of this step; collective.

        Args:
            lr: absolute learning rate.
        """
        taken = self.take_gradient()
        if taken is None:
            none = torch.empty(0, dtype=torch.int64, device=self.rows.local.device)
            taken = none, self.rows.local.new_empty((0, self.dim))
        rows, grads = taken
        fused = self._collection.fused_optimizer
        for group in fused.param_groups:
            group["lr"] = lr
        # Hands the rate to the kernel, no more.
        fused.step()
        with self.ranks.operation(_UPDATE):
            self._exchanged(rows).backward(grads)  # type: ignore[no-untyped-call]
        self.ranks.watch()

    def _vectors(self, rows: Tensor) -> Tensor:
        distinct, places = unique(rows)
        return self._fetched(distinct).index_select(0, places)

    def _sums(self, values: Tensor, offsets: Tensor) -> Tensor:
        distinct, places = unique(values)
        vectors = self._fetched(distinct)
        if not len(values):
            return vectors.new_zeros((len(offsets), self.dim))
        return embedding_bag(places, vectors, offsets, mode="sum")

    @torch.no_grad()
    def _fetched(self, distinct: Tensor) -> Tensor:
        with self.ranks.operation(_LOOKUP):
            vectors = self._exchanged(distinct)
        if self.training:
            self.ranks.watch()
        return vectors

    def _exchanged(self, rows: Tensor) -> Tensor:
        """Vectors of ``rows`` (int64 [n]), from the ranks that hold them, float32 [n, D]."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        lengths = torch.tensor([len(rows)], device=rows.device)
        asked = KeyedJaggedTensor(keys=["rows"], values=rows, lengths=lengths)
        vectors: Tensor = self._collection(asked)["rows"].values()
        return vectors


def table_maker(train: TrainSettings, ranks: Ranks, device: str) -> NewTable:
    """Makes the tables that ``train.sharded_tables`` names split, and all others whole.

    A process alone has nothing to split, and a table of which some rank would get no row stays
    whole.

    Args:
        ranks: started. device: of this rank.

    Raises:
        ConfigError: from what is returned; see ``ShardedTable``.
    """
    if train.sharded_tables == "none" or ranks.size == 1:
        return Table
    least = 1 if train.sharded_tables == "all" else int(train.sharded_tables)

    def make(num_rows: int, dim: int, *, std: float, generator: torch.Generator) -> Table:
        block = -(-num_rows // ranks.size)
        if num_rows < least or block * (ranks.size - 1) >= num_rows:
            return Table(num_rows, dim, std=std, generator=generator)
        return ShardedTable(
            num_rows,
            dim,
            std=std,
            generator=generator,
            optimizer=train.table_optimizer,
            ranks=ranks,
            device=device,
        )

    return make


@torch.no_grad()
def write_rows(table: Table, rows: Tensor, vectors: Tensor) -> None:
    """Put vectors into a table, in place; of a sharded one into the rows that this rank holds.

    Args:
        rows: int64 [n], distinct, on the CPU. vectors: float32 [n, D].
    """
    target = table.rows.local if isinstance(table, ShardedTable) else table.weight
    if isinstance(table, ShardedTable):
        start, stop = table.rows.starts[table.ranks.rank], table.rows.starts[table.ranks.rank + 1]
        own = (rows >= start) & (rows < stop)
        rows, vectors = rows[own] - start, vectors[own]
    target[rows.to(target.device)] = vectors.to(target.device)


def drawn(
    num_rows: int, dim: int, start: int, stop: int, *, std: float, generator: torch.Generator
) -> Tensor:
    """Rows ``start`` to ``stop`` of the [num_rows, dim] that one draw would give, in float32.

    PyTorch makes normal values in groups of 16, so stretches of whole groups continue each other,
    and no more than a stretch is held. Leaves the generator where that one draw would.
    """
    own = torch.empty(stop - start, dim)
    step = 16 * max(_STRETCH // (16 * dim), 1)
    begin = 0
    while begin < num_rows:
        # A last stretch of less than a group would be drawn another way.
        end = begin + step if num_rows - begin - step >= 16 else num_rows
        stretch = torch.empty(end - begin, dim).normal_(0.0, std, generator=generator)
        low, high = max(begin, start), min(end, stop)
        if low < high:
            own[low - start : high - start] = stretch[low - begin : high - begin]
        begin = end
    return own


def _collection(num_rows: int, dim: int, optimizer: str, ranks: Ranks, device: torch.device) -> Any:
    """One table, "table", looked up by the feature "rows", in TorchRec's row-wise sharding."""
    require("torchrec", "torchrec")
    from torchrec.distributed.comm_ops import set_gradient_division
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.shard import shard
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.optim import SGD, RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    # Warns of a function of its own that TorchRec calls.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # By default gradients are divided by G; ours are parts of one mean, which sum up to it.
    set_gradient_division(False)
    whole = EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name="table", num_embeddings=num_rows, embedding_dim=dim, feature_names=["rows"]
            )
        ],
        device=torch.device("meta"),
    )
    kinds = {"rowwise_adagrad": (RowWiseAdagrad, {"eps": _EPSILON}), "sgd": (SGD, {})}
    kind, options = kinds[optimizer]
    apply_optimizer_in_backward(kind, whole.parameters(), {"lr": 0.0, **options})
    sharder: Any = EmbeddingCollectionSharder()
    plan = construct_module_sharding_plan(
        whole,
        {"table": row_wise(compute_kernel="fused")},
        sharder=sharder,
        world_size=ranks.size,
        local_size=ranks.local_size,
        device_type=device.type,
    )
    world = torch.distributed.group.WORLD
    # It draws first values of its own, of which the layers to come must not know.
    with ranks.operation("splitting a table"), torch.random.fork_rng(devices=[]):
        return shard(whole, plan, ShardingEnv.from_process_group(world), device, sharder)


def _shard(split: Any, ranks: Ranks) -> RowShard:
    """This rank's part of a ShardedTensor, sharing its memory."""
    metadata = split.metadata()
    starts = sorted(int(part.shard_offsets[0]) for part in metadata.shards_metadata)
    (own,) = split.local_shards()
    return RowShard(own.tensor.detach(), (*starts, int(metadata.size[0])), ranks)
