"""``PreparedLog``: tensors with the vocabularies and encoders behind them, and its files.

``prepared.safetensors`` holds the tensors, ``vocabulary/`` the ids, and ``prepared.json``, written
last, everything else with the SHA-256 of the other files: what was cut short, mixed up or damaged
is refused at loading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recclr.data.features import FeatureEncoder
from recclr.data.log import (
    CategoricalColumn,
    Csr,
    DenseColumn,
    EncodedLog,
    FeatureColumn,
    FeatureTable,
    Prepared,
    RaggedColumn,
)
from recclr.data.vocabulary import Vocabulary
from recclr.errors import CheckpointError, ShapeError
from recclr.files import new_place, sha256_of, with_errno, write_json_atomic

FORMAT_VERSION = 1
_TENSORS, _STATE = "prepared.safetensors", "prepared.json"
_USERS, _ITEMS = "vocabulary/users.parquet", "vocabulary/items.parquet"
_LOG_DTYPES = {
    "user_idx": torch.int32,
    "item_idx": torch.int32,
    "timestamp": torch.int64,
    "weight": torch.float32,
}


@dataclass(frozen=True, eq=False)
class PreparedLog:
    """All that training sees, and the way back to raw ids.

    Attributes:
        tensors: the log and the feature tables. users, items: vocabularies; the index of an entity
            is its row in the feature tables.
        user_encoder, item_encoder: encode further rows of the tables in the same way.
        counts: rows, entities, and how many are outside or missing, by name.
    """

    tensors: Prepared
    users: Vocabulary
    items: Vocabulary
    user_encoder: FeatureEncoder
    item_encoder: FeatureEncoder
    counts: dict[str, int]

    def save(self, folder: Path | str) -> None:
        """Write the files into ``folder``, beside whatever else is there.

        Raises:
            StoreError: no space or no permission.
        """
        root = Path(folder)
        with new_place(root / _TENSORS) as place, with_errno(SafetensorError):
            # Straight from the tensors, which may lie on the disk themselves.
            save_file(_flatten(self.tensors), place)
        self.users.save(root / _USERS)
        self.items.save(root / _ITEMS)
        state = {
            "format": FORMAT_VERSION,
            "files": {name: sha256_of(root / name) for name in (_TENSORS, _USERS, _ITEMS)},
            "cutoff": self.tensors.cutoff,
            "columns": {
                "users": _describe(self.tensors.users),
                "items": _describe(self.tensors.items),
            },
            "encoders": {
                "user": self.user_encoder.to_json(),
                "item": self.item_encoder.to_json(),
            },
            "counts": self.counts,
        }
        write_json_atomic(root / _STATE, state)

    @classmethod
    def load(cls, folder: Path | str) -> PreparedLog:
        """Read what ``save`` wrote, verifying every byte and shape.

        Raises:
            CheckpointError: a file is missing, damaged, of another save, or of a newer format.
        """
        root = Path(folder)
        state = _read_state(root)
        try:
            users, items = Vocabulary.load(root / _USERS), Vocabulary.load(root / _ITEMS)
            reader = _Reader(load_file(root / _TENSORS))
            prepared = _assemble(reader, state, len(users), len(items))
            reader.finish()
            return cls(
                tensors=prepared,
                users=users,
                items=items,
                user_encoder=FeatureEncoder.from_json(state["encoders"]["user"]),
                item_encoder=FeatureEncoder.from_json(state["encoders"]["item"]),
                counts={str(name): int(count) for name, count in state["counts"].items()},
            )
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OSError,
            ShapeError,
            SafetensorError,
        ) as error:
            raise CheckpointError(f"{root} holds no whole prepared log: {error!r}") from error


def _read_state(root: Path) -> dict[str, Any]:
    """The JSON part, after checking the digests of the other files."""
    try:
        state: dict[str, Any] = json.loads((root / _STATE).read_text("utf-8"))
        version, files = int(state["format"]), dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{root} holds no prepared log: {_STATE} cannot be read ({error}); if the run was "
            "stopped, go on with recclr train and --resume"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{root / _STATE} has format {version}; this recclr reads up to {FORMAT_VERSION}"
        )
    for name in (_TENSORS, _USERS, _ITEMS):
        path = root / name
        if not path.is_file() or sha256_of(path) != files.get(name):
            raise CheckpointError(
                f"{path} is missing or damaged (its SHA-256 is not the one in {_STATE}); "
                "train again into another folder"
            )
    return state


def _flatten(prepared: Prepared) -> dict[str, Tensor]:
    """Every tensor by name; features by number, since a feature may have any name."""
    tensors: dict[str, Tensor] = {}
    for part, log in (("train", prepared.train), ("held_out", prepared.held_out)):
        for name in _LOG_DTYPES:
            value = None if log is None else getattr(log, name)
            if value is not None:
                tensors[f"{part}.{name}"] = value.contiguous()
    if prepared.explicit is not None:
        tensors["explicit.offsets"] = prepared.explicit.offsets
        tensors["explicit.values"] = prepared.explicit.values
    for side, table in (("users", prepared.users), ("items", prepared.items)):
        for number, column in enumerate(table.columns.values()):
            for name, value in _tensors_of(column).items():
                tensors[f"{side}.{number}.{name}"] = value.contiguous()
    return tensors


def _tensors_of(column: FeatureColumn) -> dict[str, Tensor]:
    if isinstance(column, CategoricalColumn):
        return {"idx": column.idx}
    if isinstance(column, RaggedColumn):
        return {"offsets": column.csr.offsets, "values": column.csr.values}
    return {"dense": column.values}


def _describe(table: FeatureTable) -> list[dict[str, Any]]:
    return [
        {"name": name, "type": type(column).__name__, "cardinality": _cardinality(column)}
        for name, column in table.columns.items()
    ]


def _cardinality(column: FeatureColumn) -> int | None:
    return None if isinstance(column, DenseColumn) else column.cardinality


class _Reader:
    """Hands out tensors by name, each checked, and at the end refuses those nobody asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *dtypes: torch.dtype, ndim: int = 1) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"prepared log: the tensor {name!r} is missing")
        tensor = self.tensors.pop(name)
        if tensor.dtype not in dtypes or tensor.ndim != ndim:
            raise CheckpointError(
                f"prepared log: tensor {name!r}: expected {ndim} dimensions of {dtypes}, "
                f"found {tuple(tensor.shape)} of {tensor.dtype}"
            )
        return tensor

    def finish(self) -> None:
        if self.tensors:
            raise CheckpointError(f"prepared log: unexpected tensors {sorted(self.tensors)}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CheckpointError(f"prepared log: {what}")


def _within(values: Tensor, low: int, high: int, name: str) -> None:
    """Out-of-range indices would read foreign memory in an embedding lookup."""
    if len(values):
        least, most = int(values.min()), int(values.max())
        _require(low <= least and most < high, f"{name} reaches from {least} to {most}")


def _assemble(
    reader: _Reader, state: Mapping[str, Any], num_users: int, num_items: int
) -> Prepared:
    cutoff, columns = state["cutoff"], state["columns"]
    held_out = "held_out.user_idx" in reader
    return Prepared(
        train=_read_log(reader, "train", num_users, num_items),
        users=_read_table(reader, "users", columns["users"], num_users),
        items=_read_table(reader, "items", columns["items"], num_items),
        held_out=_read_log(reader, "held_out", num_users, num_items) if held_out else None,
        cutoff=None if cutoff is None else int(cutoff),
        explicit=_read_csr(reader, "explicit", num_users, num_items)
        if "explicit.offsets" in reader
        else None,
    )


def _read_log(reader: _Reader, part: str, num_users: int, num_items: int) -> EncodedLog:
    columns: dict[str, Any] = {
        name: reader.take(f"{part}.{name}", dtype)
        for name, dtype in _LOG_DTYPES.items()
        if name in ("user_idx", "item_idx") or f"{part}.{name}" in reader
    }
    lengths = {len(value) for value in columns.values()}
    _require(len(lengths) == 1, f"the columns of {part} differ in length: {sorted(lengths)}")
    train = part == "train"
    _within(columns["user_idx"], 0, num_users if train else 1 << 31, f"{part}.user_idx")
    _within(columns["item_idx"], 0 if train else -1, num_items, f"{part}.item_idx")
    return EncodedLog(num_users=num_users, num_items=num_items, **columns)


def _read_table(
    reader: _Reader, side: str, described: list[Mapping[str, Any]], num_rows: int
) -> FeatureTable:
    columns = {
        str(column["name"]): _read_column(reader, f"{side}.{number}", column, num_rows)
        for number, column in enumerate(described)
    }
    return FeatureTable(num_rows, columns)


def _read_column(
    reader: _Reader, key: str, described: Mapping[str, Any], num_rows: int
) -> FeatureColumn:
    if described["type"] == DenseColumn.__name__:
        dense = reader.take(f"{key}.dense", torch.float32, torch.float16, ndim=2)
        _require(len(dense) == num_rows, f"{key} has {len(dense)} rows instead of {num_rows}")
        _require(bool(torch.isfinite(dense).all()), f"{key} holds values that are not finite")
        return DenseColumn(dense)
    cardinality = int(described["cardinality"])
    if described["type"] == CategoricalColumn.__name__:
        idx = reader.take(f"{key}.idx", torch.int32)
        _require(len(idx) == num_rows, f"{key} has {len(idx)} rows instead of {num_rows}")
        _within(idx, 0, cardinality, key)
        return CategoricalColumn(idx, cardinality)
    _require(described["type"] == RaggedColumn.__name__, f"{key} is a {described['type']!r}")
    return RaggedColumn(_read_csr(reader, key, num_rows, cardinality), cardinality)


def _read_csr(reader: _Reader, key: str, num_rows: int, cardinality: int) -> Csr:
    offsets = reader.take(f"{key}.offsets", torch.int64)
    values = reader.take(f"{key}.values", torch.int32)
    _require(
        len(offsets) == num_rows + 1
        and int(offsets[0]) == 0
        and int(offsets[-1]) == len(values)
        and bool((offsets.diff() >= 0).all()),
        f"the offsets of {key} do not fit",
    )
    _within(values, 0, cardinality, key)
    return Csr(offsets, values)
