"""What is measured: the rows of each preset, and what each of them needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from bench.data import HISTORY_LENGTH, LogSpec

SECTIONS = ("ids", "features", "evaluation", "tables", "growth", "peers")
DIMS = (64, 128, 256)
BATCH_SIZES = (2_048, 8_192, 32_768, 131_072)
NEGATIVES = (1_024, 8_192, None)
# (dim, batch size, negatives) that the default shows: every value of each at least once.
STANDARD = (
    (64, 2_048, 1_024),
    (64, 8_192, 1_024),
    (64, 32_768, 1_024),
    (64, 131_072, 1_024),
    (64, 8_192, None),
    (128, 8_192, 1_024),
    (128, 8_192, 8_192),
    (256, 8_192, 1_024),
)
STANDARD_FEATURES = ((64, 8_192, 1_024), (128, 8_192, 8_192))
SMOKE = ((8, 64, 32),)
_GROWTH_QUERIES = 2_048

# Bytes: of an interpreter with its libraries; of a row of the log while it is indexed; of a user
# or item beside its vectors. Vectors that a step makes of an embedded row.
_PROCESS, _PER_ROW, _PER_ENTITY, _PER_STEP_ROW = 500 << 20, 72, 80, 12
# Table-sized tensors, the weights included, that an optimiser keeps.
_COPIES = {"adam": 3, "rowwise_adam": 2, "rowwise_adagrad": 1, "sgd": 1}
# Peak of an exact ranking: score tiles, and the corpus once more for its coarse copy and layout.
_TILES, _CORPUS_COPIES = 256 << 20, 1


@dataclass(frozen=True)
class Row:
    """A row of the table: what a child process is asked to measure.

    Attributes:
        section: one of SECTIONS. what: the row's name. module: its function ``measure``.
        task: what that function is told.
        needed_bytes: estimate of the memory it needs.
        library: import name that the interpreter must have, beside what ``module`` is part of.
        against: name of the recclr row that a peer is compared with.
    """

    section: str
    what: str
    module: str
    task: dict[str, Any]
    needed_bytes: int = 0
    library: str | None = None
    against: str | None = None


@dataclass(frozen=True)
class Settings:
    """How every row is measured: where, for how many seconds, at which size the machine's rate.

    ``precision`` is that of recclr's training, as ``train.precision`` has it.
    """

    device: str
    seconds: float
    gemm_size: int = 2_048
    precision: str = "auto"

    def task(self, log: LogSpec) -> dict[str, Any]:
        return asdict(self) | {"log": asdict(log)}


def training_row(
    section: str,
    log: LogSpec,
    settings: Settings,
    *,
    dim: int,
    batch_size: int,
    negatives: int | None,
    in_batch: bool = False,
    features: bool = False,
    optimizer: str = "adam",
    what: str | None = None,
) -> Row:
    """Training steps; ``negatives`` None is the full catalogue."""
    shown = "all" if negatives is None else f"{negatives:,}"
    name = what or f"d {dim}, B {batch_size:,}, N {shown}"
    task = settings.task(log) | {
        "dim": dim,
        "batch_size": batch_size,
        "negatives": negatives,
        "in_batch": in_batch,
        "features": features,
        "optimizer": optimizer,
    }
    entities = log.num_users + log.num_items
    candidates = log.num_items if negatives is None else batch_size + negatives
    embedded = batch_size * (1 + HISTORY_LENGTH * features) + candidates
    needed = (
        _PROCESS
        + _PER_ROW * log.num_rows
        + entities * (_PER_ENTITY + 4 * dim * _COPIES[optimizer])
        + embedded * 4 * dim * _PER_STEP_ROW
    )
    return Row(section, name, "bench.training", task, needed)


def evaluation_row(
    section: str,
    log: LogSpec,
    settings: Settings,
    *,
    dim: int,
    k: int,
    num_queries: int | None = None,
    what: str | None = None,
) -> Row:
    """Exact top-k of the first ``num_queries`` users (None: all) over the catalogue."""
    queries = min(num_queries or log.num_users, log.num_users)
    name = what or f"d {dim}, top {k} of {queries:,} x {log.num_items:,}"
    task = settings.task(log) | {"dim": dim, "k": k, "num_queries": num_queries}
    needed = (
        _PROCESS
        + _TILES
        + _PER_ROW * log.num_rows
        + 4 * dim * (queries + log.num_items * (1 + _CORPUS_COPIES))
    )
    return Row(section, name, "bench.ranking", task, needed)


def growth_rows(settings: Settings, *, most_rows: int) -> Iterator[Row]:
    """Steps and rankings as users, items and rows grow by tens, one at a time and then together.

    The tables' optimiser is row-wise Adagrad, which large catalogues use: its state is a float per
    row, so that 10 M users and 10 M items of 64 dimensions are 5 GB.

    Args:
        most_rows: of the largest log; the largest catalogue is a tenth of it.
    """
    base = LogSpec(num_users=100_000, num_items=100_000, num_rows=1_000_000)
    specs = [base]
    factor = 10
    while base.num_rows * factor <= most_rows:
        users, items, rows = (value * factor for value in list(asdict(base).values())[:3])
        specs += [
            LogSpec(base.num_users, base.num_items, rows),
            LogSpec(users, base.num_items, base.num_rows),
            LogSpec(base.num_users, items, base.num_rows),
        ]
        if factor > 10:
            specs.append(LogSpec(users, items, rows))
        factor *= 10
    shape = {"dim": 64, "batch_size": 8_192, "negatives": 1_024, "optimizer": "rowwise_adagrad"}
    for spec in specs:
        yield training_row("growth", spec, settings, **shape, what=f"step, {_sizes(spec)}")
    for num_items in sorted({spec.num_items for spec in specs}):
        spec = LogSpec(base.num_users, num_items, base.num_rows)
        name = f"top 20, {_GROWTH_QUERIES:,} users x {num_items:,} items"
        yield evaluation_row(
            "growth", spec, settings, dim=64, k=20, num_queries=_GROWTH_QUERIES, what=name
        )


def _sizes(spec: LogSpec) -> str:
    users, items, rows = map(_short, (spec.num_users, spec.num_items, spec.num_rows))
    return f"{users} users, {items} items, {rows} rows"


def _short(number: int) -> str:
    return f"{number // 1_000_000} M" if number >= 1_000_000 else f"{number // 1_000}k"


def own_rows(preset: str, log: LogSpec, settings: Settings, *, most_rows: int) -> list[Row]:
    """The rows of recclr alone.

    Args:
        preset: ``smoke``, ``standard`` or ``full``.
        most_rows: see ``growth_rows``.
    """
    if preset == "smoke":
        shapes, featured, dims, k = SMOKE, SMOKE, (8,), 5
    elif preset == "standard":
        shapes, featured, dims, k = STANDARD, STANDARD_FEATURES, (64,), 20
    else:
        shapes = featured = tuple(product(DIMS, BATCH_SIZES, NEGATIVES))
        dims, k = DIMS, 20
    rows = []
    for features, some in ((False, shapes), (True, featured)):
        section = "features" if features else "ids"
        rows += [
            training_row(
                section,
                log,
                settings,
                dim=dim,
                batch_size=batch_size,
                negatives=negatives,
                features=features,
            )
            for dim, batch_size, negatives in some
        ]
    rows += [evaluation_row("evaluation", log, settings, dim=dim, k=k) for dim in dims]
    if preset != "smoke":
        rows += growth_rows(settings, most_rows=most_rows)
    return rows
