"""The rows of others, each beside recclr at the same work: trainers, and embedding tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.data import LogSpec
from bench.grid import Row, Settings, training_row

# (loader, optimiser) of plain PyTorch: sparse as often advised, the default one, and at its best.
_PLAIN = (
    ("dataloader", "sparse_adam"),
    ("dataloader", "adam"),
    ("slices", "fused_adam"),
)
# A step of a table takes milliseconds.
_TABLE_S = 1.0


def peer_rows(
    preset: str, log: LogSpec, arrays: dict[str, Any], settings: Settings, *, threads: int
) -> list[Row]:
    """The rows of all trainers, recclr's among them.

    Args:
        preset: ``smoke`` is small and leaves out what needs seconds to start.
        arrays: what ``data.write_arrays`` says of the log.
        threads: for libraries that have to be told.
    """
    small = preset == "smoke"
    dim, uniform_batch, uniform, batch = (8, 64, 32, 64) if small else (64, 8_192, 1_024, 1_024)
    told = arrays | {"dim": dim, "threads": threads, "device": "cpu", "seconds": settings.seconds}
    rows = [
        *_uniform(log, told, settings, batch_size=uniform_batch, negatives=uniform, small=small),
        *_in_batch(log, told, settings, batch_size=batch, small=small),
    ]
    if not small:
        rows += _references(told)
    return rows


def table_rows(preset: str, settings: Settings) -> list[Row]:
    """An embedding table alone: recclr's, PyTorch's and TorchRec's, on the same bags."""
    small = preset == "smoke"
    num_rows, dim, num_bags, size = (90, 8, 12, 5) if small else (100_000, 64, 4_096, 10)
    task = {
        "num_rows": num_rows,
        "dim": dim,
        "num_bags": num_bags,
        "bag_size": size,
        "optimizer": "rowwise_adagrad",
        "seconds": min(settings.seconds, _TABLE_S),
        "device": settings.device,
        "gemm_size": settings.gemm_size,
    }
    shown = f"{num_rows:,} x {dim}, {num_bags:,} bags of {size}"
    own = Row("tables", f"recclr, row-wise Adagrad, {shown}", "bench.tables", task)
    torch_bags = "PyTorch EmbeddingBag(sparse=True), Adagrad"
    return [
        own,
        _peer("embedding_bags", "torch", torch_bags, task, own),
        _peer("torchrec_bags", "torchrec", "TorchRec fused, row-wise Adagrad", task, own),
    ]


def _own(
    log: LogSpec,
    told: dict[str, Any],
    settings: Settings,
    *,
    batch_size: int,
    negatives: int,
    in_batch: bool,
) -> Row:
    kind = "in-batch" if in_batch else "uniform"
    return training_row(
        "peers",
        log,
        settings,
        dim=told["dim"],
        batch_size=batch_size,
        negatives=negatives,
        in_batch=in_batch,
        what=f"recclr, {negatives:,} {kind}, B {batch_size:,}",
    )


def _uniform(
    log: LogSpec,
    told: dict[str, Any],
    settings: Settings,
    *,
    batch_size: int,
    negatives: int,
    small: bool,
) -> Iterator[Row]:
    """Negatives drawn uniformly: for the whole batch, or (RecBole) for each row."""
    own = _own(log, told, settings, batch_size=batch_size, negatives=negatives, in_batch=False)
    yield own
    task = told | {"batch_size": batch_size, "negatives": negatives, "in_batch": False}
    yield from _plain(task, own, f"{negatives:,} uniform, B {batch_size:,}", small=small)
    if not small:
        # A batch of 8,192 rows with 1,024 negatives each would gather 2 GB of vectors.
        task |= {"batch_size": 512, "model": "SimpleX"}
        what = f"RecBole SimpleX, {negatives:,} per row, B 512"
        yield _peer("recbole_models", "recbole", what, task, own)


def _in_batch(
    log: LogSpec, told: dict[str, Any], settings: Settings, *, batch_size: int, small: bool
) -> Iterator[Row]:
    """The other items of the batch as negatives."""
    negatives = batch_size - 1
    own = _own(log, told, settings, batch_size=batch_size, negatives=negatives, in_batch=True)
    yield own
    task = told | {"batch_size": batch_size, "negatives": negatives, "in_batch": True}
    shown = f"{negatives:,} in-batch, B {batch_size:,}"
    yield from _plain(task, own, shown, small=small)
    yield _peer("rechub_dssm", "torch_rechub", f"torch-rechub DSSM, {shown}", task, own)
    yield _peer("libreco_two_tower", "libreco", f"LibRecommender TwoTower, {shown}", task, own)


def _plain(task: dict[str, Any], own: Row, shown: str, *, small: bool) -> Iterator[Row]:
    for loader, optimizer in _PLAIN[:1] if small else _PLAIN:
        what = f"PyTorch {loader}, {optimizer}, {shown}"
        told = task | {"loader": loader, "optimizer": optimizer}
        yield _peer("plain_torch", "torch", what, told, own)


def _references(told: dict[str, Any]) -> Iterator[Row]:
    """Trainers with one negative or none: no equals of the rows above, so not compared."""
    task = told | {"batch_size": 8_192, "negatives": 1, "in_batch": False}
    yield _peer("recbole_models", "recbole", "RecBole BPR, 1 per row", task | {"model": "BPR"})
    for model, shown in (("bpr", "BPR, 1 per row, an epoch"), ("als", "ALS, a sweep")):
        told = task | {"model": model}
        yield _peer("implicit_factors", "implicit", f"implicit {shown}", told)


def _peer(
    module: str, library: str, what: str, task: dict[str, Any], own: Row | None = None
) -> Row:
    against = None if own is None else own.what
    section = "peers" if own is None else own.section
    return Row(section, what, f"peers.{module}", task, library=library, against=against)
