"""A run's model with others laid beside it: weights chosen on validation, and what is served.

The served vectors are a file of the stage's folder, so that every later command ranks with exactly
what was judged, and fits nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch.nn.functional import pad

from recclr.blending import (
    Choice,
    Vectors,
    choose_weights,
    compressed,
    laid_side_by_side,
    of_equal_spread,
)
from recclr.config import Config
from recclr.data.prepared import PreparedLog
from recclr.distributed import Ranks
from recclr.files import sha256_of, write_bytes_atomic, write_json_atomic
from recclr.keeping import digest_of
from recclr.other_runs import BLEND_RUNS, named_runs, vectors_of_run
from recclr.run_folder import BLEND, BLEND_VECTORS, read_json
from recclr.spectral import spectral_factors
from recclr.topk import EmbeddingRanker

Judge = Callable[[EmbeddingRanker], float]


def blend_selected(
    config: Config,
    prepared: PreparedLog,
    rankers: Sequence[EmbeddingRanker],
    folder: Path,
    judge: Judge,
    ranks: Ranks,
) -> EmbeddingRanker:
    """The model of selection with the parts beside it, at the weights that ``judge`` likes best.

    Args:
        rankers: the model, and those of other seeds.
        folder: of the selection; gets the weights, with the value of each that was tried.
        judge: metric of a ranker on validation. ranks: all of which call this; the first writes.
    """
    parts = _parts(config, prepared, rankers, of_selection=True)

    def value(vectors: Vectors) -> float:
        return judge(EmbeddingRanker(rankers[0].name, *_compressed(config, vectors)))

    choice = Choice((), None, ())
    if len(parts) > 1:
        choice = choose_weights(parts, value, config.blend.weights)
    facts = {
        "seeds": config.blend.seeds,
        "parts": list(config.blend.parts),
        "weights": list(choice.weights),
        "value": choice.value,
        "tried": [{str(w): v for w, v in each.items()} for each in choice.tried],
    }
    return _keep(config, parts, facts, folder, rankers[0].name, ranks)


def blend_final(
    config: Config,
    prepared: PreparedLog,
    rankers: Sequence[EmbeddingRanker],
    folder: Path,
    selection: Path,
    ranks: Ranks,
) -> EmbeddingRanker:
    """The refitted model with refitted parts beside it, at the weights of the selection.

    Args:
        rankers: as there. folder: of the run. selection: folder that ``blend_selected`` wrote to.
            ranks: as there.
    """
    facts = read_json(selection / BLEND)
    parts = _parts(config, prepared, rankers, of_selection=False)
    return _keep(config, parts, facts, folder, rankers[0].name, ranks)


def _keep(
    config: Config,
    parts: list[Vectors],
    facts: dict[str, Any],
    folder: Path,
    name: str,
    ranks: Ranks,
) -> EmbeddingRanker:
    """Write what is served; blend.json last, since it says that the vectors are whole."""
    blended = laid_side_by_side(parts, [1.0, *facts["weights"]])
    vectors = _compressed(config, blended)
    held = {side: getattr(vectors, side).contiguous() for side in Vectors._fields}
    if ranks.size > 1:
        ranks.agree({"the blended vectors": digest_of(held)})
    if ranks.first:
        write_bytes_atomic(folder / BLEND_VECTORS, save(held))
        digest = sha256_of(folder / BLEND_VECTORS)
        dim = vectors.items.shape[1]
        write_json_atomic(folder / BLEND, {**facts, "sha256": digest, "embedding_dim": dim})
    ranks.meet("the blend")
    return EmbeddingRanker(name, *vectors)


def _compressed(config: Config, vectors: Vectors) -> Vectors:
    dim = config.blend.compress
    return vectors if dim is None else compressed(vectors, dim)


def _parts(
    config: Config, prepared: PreparedLog, rankers: Sequence[EmbeddingRanker], *, of_selection: bool
) -> list[Vectors]:
    """The model, all its seeds as one, then what stands beside it, all of equal spread."""
    found = [_together(rankers, config.seed)]
    if config.blend.spectral:
        dim, log = config.blend.spectral, prepared.tensors.train
        power = config.blend.spectral_item_power
        users, items = spectral_factors(log, dim=dim, item_power=power, seed=config.seed)
        found.append(Vectors(pad(users, (0, 0, 0, 1)), items))
    for key, run in named_runs(config):
        if key == BLEND_RUNS:
            found.append(vectors_of_run(run, prepared, key, of_selection=of_selection))
    return [of_equal_spread(part, seed=config.seed) for part in found]


def _together(rankers: Sequence[EmbeddingRanker], seed: int) -> Vectors:
    """Models of equal weight as one."""
    each = [Vectors(ranker.user_vectors, ranker.item_vectors) for ranker in rankers]
    if len(each) == 1:
        return each[0]
    even = [of_equal_spread(vectors, seed=seed) for vectors in each]
    return laid_side_by_side(even, [1 / len(even)] * len(even))
