"""Where the features of an item tower start: weights that `recclr pretrain-items` wrote.

Tensors are matched by the name of their feature, not by its place, since a tower with an id has one
part more. Rows of a table are matched by category, so the catalogue may have had other ones; what
goes into a dense layer was scaled by other means and deviations, which its first layer takes up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recclr.data.dense import StandardNumberEncoder, VectorEncoder
from recclr.data.encoders import CategoryEncoder, CategorySpace, MultiHotEncoder, TextEncoder
from recclr.data.features import ColumnEncoder, FeatureEncoder
from recclr.errors import CheckpointError, ConfigError
from recclr.files import sha256_of
from recclr.parts import BagPart, CategoryPart, DensePart
from recclr.run_folder import MANIFEST
from recclr.sharded_tables import write_rows
from recclr.towers import Tower, TwoTower

FORMAT_VERSION = 1
WEIGHTS, ENCODERS = "weights.safetensors", "encoders.json"
_FEATURES = "features."


def tower_weights(tower: Tower) -> dict[str, Tensor]:
    """Every parameter, those of a part as "part/name"; a table that parts share is under each."""
    found = {
        f"{name}/{key}": value
        for name, part in zip(tower.names, tower.parts, strict=True)
        for key, value in part.named_parameters()
    }
    return found | _shared_by_parts(tower)


@torch.no_grad()
def start_from_catalogue(
    model: TwoTower, encoder: FeatureEncoder | None, folder: Path
) -> list[str]:
    """Load the weights into the item tower, in place.

    Args:
        model: on the CPU, with towers from a configuration. encoder: of its items.
        folder: with a manifest.

    Returns:
        What starts otherwise than from there, one sentence each.

    Raises:
        ConfigError: the weights are of another kind of tower. CheckpointError: they are damaged.
    """
    tower = model.item_tower
    if encoder is None or not isinstance(tower, Tower):
        raise ConfigError("model.init_from needs the encoders of an item tower's features")
    manifest, tensors, theirs = _read(folder)
    dim = len(tower.bias) if tower.bias is not None else 0
    if manifest["embedding_dim"] != dim:
        raise ConfigError(
            f"model.init_from: {folder} has embedding_dim {manifest['embedding_dim']}, the item "
            f"tower with features {dim or 'none'}; train both with the same"
        )
    parts = dict(zip(tower.names, tower.parts, strict=True))
    own = {name.removeprefix(_FEATURES) for name in parts if name.startswith(_FEATURES)}
    if not own & theirs.columns.keys():
        raise ConfigError(
            f"model.init_from: {folder} knows the features {sorted(theirs.columns)}, item.features "
            f"has {sorted(own)}; none starts from there"
        )
    notes = []
    for name in sorted(own & theirs.columns.keys()):
        found = {
            key.removeprefix(f"{_FEATURES}{name}/"): value
            for key, value in tensors.items()
            if key.startswith(f"{_FEATURES}{name}/")
        }
        loader = _Loader(name, folder, found)
        notes += loader.load(parts[_FEATURES + name], encoder.columns[name], theirs.columns[name])
    rest = {name: value for name, value in tensors.items() if not name.startswith(_FEATURES)}
    _copy(_shared_by_parts(tower), rest, f"{folder}, above the features", some=True)
    return notes + _unmatched(own, set(theirs.columns), folder)


class _Loader:
    """Weights of one feature.

    Args:
        tensors: by the name that they have within the part.
    """

    def __init__(self, name: str, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.name, self.folder, self.tensors = name, folder, dict(tensors)

    def load(self, part: nn.Module, own: ColumnEncoder, theirs: ColumnEncoder) -> list[str]:
        """Into a part; what has to be said of it."""
        if type(own) is not type(theirs):
            raise self._refusal(type(theirs).__name__, type(own).__name__)
        if isinstance(part, DensePart):
            _copy(dict(part.named_parameters()), self._scaled(own, theirs), self._where())
            return []
        assert isinstance(part, (BagPart, CategoryPart))
        rows, wanted, notes = self._rows(own, theirs)
        vectors = self.tensors["table.weight"]
        if len(vectors) != _cardinality(theirs) + 1 or vectors.shape[1] != part.table.dim:
            raise CheckpointError(f"{self._where()}: the table does not fit its encoder")
        write_rows(part.table, wanted, vectors[rows])
        return notes

    def _rows(self, own: ColumnEncoder, theirs: ColumnEncoder) -> tuple[Tensor, Tensor, list[str]]:
        """Rows of the table of theirs, the row of our own that each one is, and what to say."""
        cardinality = _cardinality(own)
        ours, others = _categories(own), _categories(theirs)
        if ours is None or others is None:
            if (ours is None) != (others is None) or cardinality != _cardinality(theirs):
                raise self._refusal(_buckets(theirs), _buckets(own))
            every = torch.arange(cardinality + 1)
            return every, every, []
        assert ours.categories is not None
        assert others.categories is not None
        found = torch.from_numpy(ours.categories.encode(others.categories.ids).astype(np.int64))
        known = (found >= 0).nonzero().squeeze(1)
        # Missing or unknown stands first, the empty list last.
        rows = torch.cat([torch.tensor([0]), known + 1, torch.tensor([others.cardinality])])
        wanted = torch.cat([torch.tensor([0]), found[known] + 1, torch.tensor([cardinality])])
        notes = []
        if len(known) < cardinality - 1:
            notes.append(
                f"item.features.{self.name}: {len(known):,} of {cardinality - 1:,} categories "
                f"start from {self.folder}, which does not know the others"
            )
        return rows, wanted, notes

    def _scaled(self, own: ColumnEncoder, theirs: ColumnEncoder) -> dict[str, Tensor]:
        """Weights that make of values scaled by ``own`` what theirs made of their own scaling.

        theirs = factor · own + shift, so the first layer takes both up; where a value is missing
        all coordinates but the flag are 0 in either, and the flag takes the shift back.
        """
        factor, shift = _change(own, theirs)
        tensors = {name: value.clone() for name, value in self.tensors.items()}
        first = "network.weight" if "network.weight" in tensors else "network.0.weight"
        weight, bias = tensors.get(first), tensors.get(first.replace("weight", "bias"))
        if weight is None or bias is None:
            raise CheckpointError(f"{self._where()}: the first layer is missing")
        offset = shift * weight[:, :-1].sum(1)
        bias += offset
        weight[:, -1] -= offset
        weight[:, :-1] *= factor
        return tensors

    def _where(self) -> str:
        return f"{self.folder}, feature {self.name!r}"

    def _refusal(self, found: str, expected: str) -> ConfigError:
        return ConfigError(
            f"model.init_from: item.features.{self.name} was pre-trained as {found} in "
            f"{self.folder}, here it is {expected}; give it the same settings in both, or leave "
            "one of them out"
        )


def _change(own: ColumnEncoder, theirs: ColumnEncoder) -> tuple[float, float]:
    """Factor and shift of ``_Loader._scaled``; ranks (``quantile``) stay what they are."""
    if isinstance(own, VectorEncoder) and isinstance(theirs, VectorEncoder):
        return own.length / theirs.length, 0.0
    if (
        isinstance(own, StandardNumberEncoder)
        and isinstance(theirs, StandardNumberEncoder)
        # A constant taught them nothing of scales.
        and theirs.std
    ):
        return own.std / theirs.std, (own.mean - theirs.mean) / theirs.std
    return 1.0, 0.0


def _categories(encoder: ColumnEncoder) -> CategorySpace | None:
    """The vocabulary of a feature; None where it has buckets."""
    if isinstance(encoder, (CategoryEncoder, MultiHotEncoder)) and encoder.space.categories:
        return encoder.space
    return None


def _cardinality(encoder: ColumnEncoder) -> int:
    if isinstance(encoder, TextEncoder):
        return encoder.buckets
    assert isinstance(encoder, (CategoryEncoder, MultiHotEncoder))
    return encoder.space.cardinality


def _buckets(encoder: ColumnEncoder) -> str:
    if _categories(encoder) is not None:
        return f"{encoder.kind} with a vocabulary"
    return f"{encoder.kind} with {_cardinality(encoder):,} buckets"


def _shared_by_parts(tower: Tower) -> dict[str, Tensor]:
    """What follows the sum of the parts: bias and blocks."""
    return {n: p for n, p in tower.named_parameters() if not n.startswith("parts.")}


def _copy(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, *, some: bool = False
) -> None:
    """Copy tensors of equal names and shapes.

    Args:
        some: not all of ``own`` need be found.
    """
    for name, value in found.items():
        if name not in own or own[name].shape != value.shape:
            expected = tuple(own[name].shape) if name in own else "none"
            raise ConfigError(
                f"model.init_from: {where}: {name} is {tuple(value.shape)}, the configuration has "
                f"{expected}; give item.features and item.mlp the same settings in both"
            )
    if not some and own.keys() != found.keys():
        raise CheckpointError(f"{where}: {sorted(own.keys() - found.keys())} are missing")
    for name, value in found.items():
        own[name].copy_(value)


def _unmatched(own: set[str], theirs: set[str], folder: Path) -> list[str]:
    notes = [f"item.features.{name} is not in {folder} and starts afresh" for name in own - theirs]
    notes += [f"{folder} knows a feature {name!r}, which is not used" for name in theirs - own]
    return sorted(notes)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], FeatureEncoder]:
    """Manifest, tensors and encoder, each file verified by its hash."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        version, files = int(manifest["format"]), dict(manifest["files"])
        manifest["embedding_dim"] = int(manifest["embedding_dim"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {version}; this recclr reads 1 to {FORMAT_VERSION}"
        )
    for name in (WEIGHTS, ENCODERS):
        path = folder / name
        if not path.is_file() or sha256_of(path) != files.get(name):
            raise CheckpointError(
                f"{path} is missing or damaged (its SHA-256 is not the manifest's)"
            )
    try:
        tensors = load_file(folder / WEIGHTS)
        encoder = FeatureEncoder.from_json(json.loads((folder / ENCODERS).read_text("utf-8")))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return manifest, tensors, encoder
