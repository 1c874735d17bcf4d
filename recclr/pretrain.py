"""`recclr pretrain-items`: what a catalogue says of its items, before there is any interaction.

The features of an item tower learn to recognise an item from what either of two views shows of it
(``views``); ``model.init_from`` then starts a training from there (``starting``).

Shape letters: N items, M items of a step, Q queries of the report, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from recclr.building import build_model
from recclr.caching import Encoding
from recclr.config import Config
from recclr.data.features import FeatureEncoder, fit_encoders
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.data.side_tables import read_side_table
from recclr.errors import ConfigError
from recclr.files import sha256_of, write_bytes_atomic, write_json_atomic
from recclr.kernels import unit_rows
from recclr.load import pick_device
from recclr.monitors import alignment, uniformity
from recclr.ntxent import nt_xent
from recclr.optimizers import Optimizers
from recclr.order import permuted
from recclr.run_context import Context
from recclr.run_folder import (
    DATA,
    MANIFEST,
    begin_run,
    config_digest,
    fingerprints,
    locked,
    open_run,
    read_json,
    require_same_inputs,
)
from recclr.settings import IdSettings, SelfSupervisionSettings, TowerSettings, ViewSettings
from recclr.starting import ENCODERS, FORMAT_VERSION, WEIGHTS, tower_weights
from recclr.step_stats import StepStats
from recclr.stepping import use_bfloat16
from recclr.stopping import signals
from recclr.topk import top_k
from recclr.towers import Tower, TwoTower
from recclr.train import run_steps
from recclr.views import TwoViews, shown_by
from recclr.watching import OnEvent

PRETRAINING = "pretraining.json"
_ORDER, _QUERIES = 51, 52
_MAX_QUERIES, _CHUNK = 2000, 16_384
# Number of the views that are judged; steps count from 0.
_JUDGED = -1


@dataclass(frozen=True)
class Catalogue:
    """Items without interactions.

    Attributes:
        features: of N items. encoder: fitted on all of them. notes: rows that were dropped.
    """

    features: FeatureTable
    encoder: FeatureEncoder
    notes: tuple[str, ...]


def pretrain_items(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Pre-train the features of the item tower into a folder; the report of it.

    Reads ``data.items``, and no events. Of ``self_supervision.item`` temperature, batch size,
    dropout and projection count, each epoch of ``train`` shows every item once.

    Args:
        resume: go on with one that was stopped; a finished one is left as it is.
        on_event: as ``run.train_run`` has it.

    Returns:
        JSON values: "untrained", "trained" and "chance" (see ``judge_views``), items, queries,
        steps, seconds.

    Raises:
        ConfigError: no items table, no feature, or a folder that holds something else.
        DataError: the table is refused. InterruptedTraining: a signal came; the folder resumes.
    """
    device, emit, existed = pick_device(device), on_event or (lambda event: None), out.exists()
    _require_features(config)
    if not open_run(out, config, resume=resume, last=MANIFEST):
        return read_json(out / PRETRAINING)
    try:
        with locked(out), signals() as stop:
            context = Context(config, out, device, emit, resume, stop)
            context.enter("read")
            inputs = fingerprints(config, ("items",))
            if (out / DATA).exists():
                require_same_inputs(out, inputs)
            catalogue = read_catalogue(config)
            data = {"inputs": inputs, "items": catalogue.features.num_rows}
            begin_run(out, config, data | {"notes": catalogue.notes}, device)
            for note in catalogue.notes:
                emit({"kind": "note", "text": note})
            return _pretrained(context, catalogue)
    finally:
        if not existed:
            with suppress(OSError):  # no longer empty
                out.rmdir()


def read_catalogue(config: Config) -> Catalogue:
    """The items of ``data.items``, encoded for the features that need no interactions.

    Raises:
        DataError: the table is refused.
    """
    notes: list[str] = []
    frame = read_side_table(config.data.items, "item", config.data, notes)
    assert frame is not None, "required before"
    nobody = pl.Series("user_id", [], dtype=pl.Int64)
    _, encoder = fit_encoders(
        None, frame, TowerSettings(), _features_only(config.item), nobody, frame["item_id"]
    )
    features = encoder.encode(frame, np.arange(frame.height))
    return Catalogue(features, encoder, tuple(notes))


def catalogue_model(config: Config, features: FeatureTable) -> TwoTower:
    """An item tower of features alone, beside a user tower that nobody asks."""
    none = torch.empty(0, dtype=torch.int32)
    log = EncodedLog(none, none, num_users=1, num_items=features.num_rows)
    return build_model(
        Prepared(log, FeatureTable(1), features),
        user=TowerSettings(),
        item=_features_only(config.item),
        model=config.model,
        # What a log of the steps tells.
        loss=replace(config.loss, temperature=_view_settings(config).temperature),
        seed=config.seed,
    )


def _features_only(item: TowerSettings) -> TowerSettings:
    features = {n: f for n, f in item.features.items() if f.kind != "statistics"}
    names = tuple(f"features.{name}" for name in features)
    try:
        return replace(
            item,
            id=IdSettings(enabled=False),
            features=features,
            augment=item.augment.only(names),
        )
    except ValueError as error:
        raise ConfigError(
            f"pretrain-items hides features only, without the id and statistics: {error}"
        ) from None


def _require_features(config: Config) -> None:
    if config.data.items is None:
        raise ConfigError("pretrain-items learns from a table of items; name it in data.items")
    if all(feature.kind == "statistics" for feature in config.item.features.values()):
        raise ConfigError(
            "pretrain-items learns from item.features, and the configuration has none of a table's "
            "columns (an id and statistics tell nothing without interactions)"
        )


class CatalogueSource:
    """Items of a step: each epoch is a keyed permutation of all N, cut into steps of equal size."""

    def __init__(self, num_items: int, batch_size: int, *, seed: int, device: str) -> None:
        self.num_items, self.seed, self.device = num_items, seed, device
        self.steps_per_epoch = -(-num_items // batch_size)

    def step(self, step: int) -> Tensor:
        """int64 [M], all different."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start, stop = (self.num_items * p // self.steps_per_epoch for p in (position, position + 1))
        places = torch.arange(start, stop, device=self.device)
        return permuted(places, self.num_items, self.seed, epoch, _ORDER)


class CatalogueObjective:
    """NT-Xent on two views of the items of a step, the whole loss."""

    def __init__(self, views: TwoViews, encode: Encoding, num_steps: int) -> None:
        self.views, self.encode, self.bfloat16 = views, encode, encode.bfloat16
        self.num_steps = num_steps
        self.state = {name: p.detach() for name, p in views.parameters().items()}

    def backward(
        self, model: TwoTower, idx: Tensor, step: int, check: Callable[[Tensor], None] | None
    ) -> StepStats:
        """Forward and backward passes of a step."""
        progress = step / max(1, self.num_steps - 1)
        loss = self.views.loss(self.encode, shown_by(model, "item"), idx, None, step, progress)
        if check is not None:
            check(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        count = torch.tensor(len(idx))
        others = 2 * len(idx) - 1
        return StepStats(loss.detach(), others, 2 * len(idx) * others, 0, len(idx), count)


class CatalogueStepper:
    """The steps of a pre-training, as ``train.run_steps`` runs them.

    Args:
        model: on ``device``.
    """

    def __init__(self, config: Config, model: TwoTower, device: str) -> None:
        of = _view_settings(config)
        train = replace(config.train, batch_size=min(of.batch_size, model.num_items))
        self.model, self.train = model, train
        self.source = CatalogueSource(
            model.num_items, train.batch_size, seed=config.seed, device=device
        )
        place = torch.device(device)
        views = TwoViews("item", of, dim=config.model.embedding_dim, seed=config.seed, device=place)
        encode = Encoding(train.chunk_size, use_bfloat16(train, place))
        self.num_steps = max(1, round(train.epochs * self.source.steps_per_epoch))
        self.objective = CatalogueObjective(views, encode, self.num_steps)
        self.optimizers = Optimizers(model, train, self.num_steps, also=views.parameters())

    def __call__(
        self,
        step: int,
        *,
        check: Callable[[Tensor], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[StepStats, bool]:
        """As ``stepping.Stepper``."""
        idx = self.source.step(step)
        check = check if idx.device.type == "cpu" else None
        stats = self.objective.backward(self.model, idx, step, check)
        self.optimizers.step(step)
        return stats, stop is not None and stop()

    def look_again(self) -> None:
        """As ``stepping.Stepper``."""
        self.optimizers.forget()
        self.model.train()

    def give_back(self) -> None:
        """As ``stepping.Stepper``; one process shares nothing."""

    def close(self) -> None:
        """As ``stepping.Stepper``."""
        self.optimizers.forget()


def _view_settings(config: Config) -> ViewSettings:
    settings = config.self_supervision or SelfSupervisionSettings(item=ViewSettings())
    return settings.item or ViewSettings()


@torch.no_grad()
def judge_views(stepper: CatalogueStepper, seed: int) -> dict[str, float]:
    """What the embeddings of views are like, for at most 2,000 items against all.

    Returns:
        loss: NT-Xent of one batch, as trained. alignment: mean squared distance of two views,
        and uniformity: log of the mean of exp(-2 · squared distance) over different items, both of
        unit vectors and the lower the better (Wang and Isola 2020). recall@1, recall@10: share of
        items whose second view is among the first 1 and 10 by cosine with the first, among the
        second views of all N. Items that are alike in all features cannot be told apart.
    """
    model, objective, source = stepper.model.eval(), stepper.objective, stepper.source
    num_items, device = source.num_items, source.device
    count = min(num_items, _MAX_QUERIES)
    queries = permuted(torch.arange(count, device=device), num_items, seed, _QUERIES)
    every = torch.arange(num_items, device=device)
    encode = replace(objective.encode, chunk_size=_CHUNK)

    def embedded(idx: Tensor, view: int) -> Tensor:
        rows = objective.views.rows(idx, None, _JUDGED, view)
        return encode(shown_by(model, "item"), rows, len(idx)).float()

    first, second = embedded(queries, 0), embedded(every, 1)
    one, corpus = unit_rows(first), unit_rows(second)
    hits = top_k(one, corpus, 10).item_idx == queries[:, None]
    batch = slice(0, stepper.train.batch_size)
    head, temperature = objective.views.head, objective.views.settings.temperature
    loss = nt_xent(head(first[batch]), head(second[queries][batch]), temperature)
    model.train()
    return {
        "loss": float(loss),
        "alignment": alignment(one, corpus[queries]),
        "uniformity": uniformity(one) if count > 1 else 0.0,
        "recall@1": float(hits[:, :1].any(1).float().mean()),
        "recall@10": float(hits.any(1).float().mean()),
    }


def _pretrained(context: Context, catalogue: Catalogue) -> dict[str, Any]:
    config, out = context.config, context.out
    model = catalogue_model(config, catalogue.features).to(context.device)
    stepper = CatalogueStepper(config, model, context.device)
    context.enter("pre-training")
    untrained = judge_views(stepper, config.seed)
    result = run_steps(
        stepper,
        train=stepper.train,
        emit=context.log,
        checkpoints=out / "checkpoints",
        resume=context.resume,
        stop=context.stop,
    )
    num_items = catalogue.features.num_rows
    report = {
        "untrained": untrained,
        "trained": judge_views(stepper, config.seed),
        "chance": {f"recall@{k}": min(k / num_items, 1.0) for k in (1, 10)},
        "items": num_items,
        "queries": min(num_items, _MAX_QUERIES),
        "steps": result.steps,
        "seconds": result.seconds,
    }
    _write(out, config, model, catalogue.encoder, report)
    return report


def _write(
    out: Path, config: Config, model: TwoTower, encoder: FeatureEncoder, report: dict[str, Any]
) -> None:
    """Weights, encoders and report; last of all the manifest, which makes the folder a whole."""
    assert isinstance(model.item_tower, Tower)
    weights = {n: p.detach().cpu().clone() for n, p in tower_weights(model.item_tower).items()}
    write_bytes_atomic(out / WEIGHTS, save_tensors(weights))
    write_json_atomic(out / ENCODERS, encoder.to_json())
    write_json_atomic(out / PRETRAINING, report)
    manifest = {
        "format": FORMAT_VERSION,
        "embedding_dim": config.model.embedding_dim,
        "config_sha256": config_digest(config),
        "files": {name: sha256_of(out / name) for name in (WEIGHTS, ENCODERS, PRETRAINING)},
        "tensors": {name: list(value.shape) for name, value in weights.items()},
    }
    write_json_atomic(out / MANIFEST, manifest)
