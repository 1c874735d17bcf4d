"""What to train, as plain frozen dataclasses: validated by ``config``, usable without pydantic.

Standard library only, so that the trainer also starts in a bare PyTorch container. Ranges are
checked here once, for the TOML file, ``--set`` and Python callers alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check

FeatureKind = Literal["categorical", "multi_hot", "numeric", "vector", "text", "statistics"]


def defaults_of(settings: Any) -> dict[str, Any]:
    """Field names and values of a settings object, one level deep."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """One feature column of a user or an item table."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: FeatureKind
    column: str | None = None
    """Column of the table; the feature's own name where not given."""
    dropout: float = 0.0
    """Probability that training replaces the whole feature by its learned "missing" vector."""
    buckets: int | None = None
    """Hash into this many buckets instead of a vocabulary (required for ``text``)."""
    min_count: int = 1
    """A category seen fewer times in train is treated as unknown."""
    transform: Literal["standardize", "quantile"] = "standardize"
    """How ``numeric`` values are scaled."""
    windows_d: tuple[float, ...] = (7.0, 30.0)
    """``statistics``: trailing windows in days."""
    age: bool = True
    """``statistics``: add age and time since last seen."""
    shared: str | None = None
    """Name of an embedding table that several features, also of the other tower, use together."""

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95), buckets=(2, 1 << 26), min_count=(1, 1 << 31))
        if self.kind == "text" and self.buckets is None:
            raise ValueError("a text feature needs 'buckets', for example buckets = 20000")
        if any(not (math.isfinite(w) and w > 0) for w in self.windows_d):
            raise ValueError(f"windows_d must be positive days, found {list(self.windows_d)}")
        if self.kind == "statistics" and not (self.windows_d or self.age):
            raise ValueError("a statistics feature needs windows_d, or age = true")


@dataclass(frozen=True, kw_only=True)
class IdSettings:
    """The id embedding of a tower."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    enabled: bool = True
    dropout: float = 0.0
    """Probability that training replaces an id by the unknown id, which trains the vector that
    unknown ids get."""
    as_of: bool = False
    """Use an item's id only where the item had been seen before the moment of the event, so that
    new items look in training as they will at evaluation. Needs timestamps."""

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95))


@dataclass(frozen=True, kw_only=True)
class HistorySettings:
    """The user's past items as a query feature, pooled with recency weights."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    length: int = 50
    """At most this many most recent items."""
    half_life_d: float | None = None
    """Weight of an item halves every so many days; None pools all equally."""
    dropout: float = 0.0
    """Probability that training drops the whole history of a row."""
    use: Literal["ids", "features", "both"] = "ids"
    """What represents an item of the history: the item tower's id table, its features (all but
    statistics), or their sum. Features make a history of rare or new items speak."""

    def __post_init__(self) -> None:
        _check(self, length=(1, 100_000), half_life_d=(1e-6, 1e6), dropout=(0.0, 0.95))


@dataclass(frozen=True, kw_only=True)
class TowerSettings:
    """One tower: id, features, history (users only), and what is done with their sum."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    id: IdSettings = field(default_factory=IdSettings)
    features: dict[str, FeatureSettings] = field(default_factory=dict)
    history: HistorySettings | None = None
    mlp: tuple[int, ...] = ()
    """Hidden widths of the residual MLP blocks; empty for none."""
    dropout: float = 0.0
    """Dropout on the coordinates of the summed embedding, before normalisation."""

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95))
        if any(not 1 <= width <= 65_536 for width in self.mlp):
            raise ValueError(f"mlp widths must be between 1 and 65536, found {list(self.mlp)}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What both towers share."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    embedding_dim: int = 64
    similarity: Literal["cosine", "dot"] = "cosine"
    init_std: float = 1.0
    """Standard deviation of a freshly drawn embedding row, as a multiple of embedding_dim^-1/2."""
    init: Literal["random", "spectral"] = "random"
    """Where id tables start: drawn, or from the truncated SVD of the normalised log, which takes
    seconds and saves epochs."""

    def __post_init__(self) -> None:
        _check(self, embedding_dim=(1, 8192), init_std=(1e-6, 100.0))


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The objective."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: Literal["infonce", "full_softmax"] = "infonce"
    temperature: float | Literal["learned"] = "learned"
    initial_temperature: float = 0.1
    min_temperature: float = 0.02
    max_temperature: float = 1.0
    second_temperature: float | None = None
    """BSL: exponent on the summed negatives; None for plain InfoNCE."""
    log_q_strength: float = 1.0
    """1 corrects the sampling bias in full, 0 not at all."""
    mask_known_positives: bool = True

    def __post_init__(self) -> None:
        _check(
            self,
            temperature=(1e-4, 1e4),
            initial_temperature=(1e-4, 1e4),
            min_temperature=(1e-4, 1e4),
            max_temperature=(1e-4, 1e4),
            second_temperature=(0.01, 100.0),
            log_q_strength=(0.0, 1.0),
        )
        if self.min_temperature > self.max_temperature:
            raise ValueError("min_temperature is above max_temperature")


@dataclass(frozen=True, kw_only=True)
class PopularitySettings:
    """Negatives drawn in proportion to train count ** alpha."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    count: int
    alpha: float = 0.75

    def __post_init__(self) -> None:
        _check(self, count=(1, 1 << 24), alpha=(0.0, 2.0))


@dataclass(frozen=True, kw_only=True)
class NegativesSettings:
    """Sources of negatives, shared by all rows of a batch, under one log_q."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    in_batch: bool = True
    uniform: int = 1024
    popularity: PopularitySettings | None = None

    def __post_init__(self) -> None:
        _check(self, uniform=(0, 1 << 24))
        if not self.in_batch and self.uniform == 0 and self.popularity is None:
            raise ValueError("no source of negatives is left: set in_batch, uniform or popularity")


# Whose fused updates are those of ``optim``; FBGEMM's Adams count the steps of the whole table.
SHARDED_OPTIMIZERS = ("rowwise_adagrad", "sgd")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The loop."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    batch_size: int = 4096
    chunk_size: int | None = None
    """Encode at most so many rows at once, in two passes (gradient caching): the same gradients in
    less memory, for one more forward pass of the towers. None: all rows of a batch at once."""
    accumulate: int = 1
    """Batches whose gradients make one update. Each row still meets the negatives of its own batch
    only; ``chunk_size`` with a larger ``batch_size`` is what adds in-batch negatives."""
    epochs: float = 20.0
    table_optimizer: Literal["adam", "rowwise_adam", "rowwise_adagrad", "sgd"] = "adam"
    table_moments: Literal["float32", "bfloat16"] = "float32"
    """What Adam's moments of the tables are stored in; bfloat16 halves their memory."""
    table_lr: float = 0.005
    dense_lr: float = 0.001
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Both rates times (batch_size / base_batch_size) to the power 0, 1/2 (Adam) or 1 (SGD)."""
    base_batch_size: int = 4096
    weight_decay: float = 0.01
    """Decoupled decay of the dense layers; tables have none."""
    warmup: float = 0.02
    """Share of all steps in which the rate rises from zero."""
    decay: Literal["linear", "cosine", "none"] = "cosine"
    final_lr: float = 0.0
    """Rate at the end, as a share of the peak."""
    clip_norm: float | None = None
    """Largest gradient norm of the dense layers."""
    patience: int = 0
    """Evaluations without improvement before stopping; 0 never stops early."""
    evaluate_every: float = 1.0
    """Epochs between evaluations on validation."""
    checkpoint_every: float = 1.0
    """Epochs between checkpoints; one is also written at every best evaluation and at the end."""
    refit: bool = False
    """After selection, train afresh on train + validation for the selected number of steps."""
    time_cells: bool | None = None
    """Make each batch from neighbouring rows in time, and show items as they stood when it began.
    None: on where a feature needs it (statistics, ``as_of`` ids)."""
    staleness_d: float = 0.0
    """Show users and items as they stood up to so many days before the event, drawn uniformly, as
    at an evaluation that freezes them at the cut-off."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """``bfloat16``: towers and the products of the loss, with sums and the loss itself in float32;
    faster on GPUs and on CPUs with AVX-512 BF16 or AMX. ``auto``: on a GPU only."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Capture a step as a CUDA graph and replay it: on a GPU, where nothing stands against it."""
    compile: bool | Literal["auto"] = "auto"
    """Dense layers by ``torch.compile``; ``auto``: on a GPU. What fails to compile runs plain."""
    sharded_tables: int | Literal["none", "all"] = "none"
    """With several processes: tables of at least so many rows are split by rows among them; each
    holds its part of the table and of the optimiser's state (see ``sharded_tables``)."""
    collective_timeout_s: float = 120.0
    """With several processes: how long each waits for the others before it gives up."""

    def __post_init__(self) -> None:
        _check(
            self,
            batch_size=(1, 1 << 24),
            chunk_size=(1, 1 << 24),
            accumulate=(1, 1 << 16),
            base_batch_size=(1, 1 << 24),
            epochs=(0.001, 1e6),
            table_lr=(0.0, 1e4),
            dense_lr=(0.0, 1e3),
            weight_decay=(0.0, 10.0),
            warmup=(0.0, 1.0),
            final_lr=(0.0, 1.0),
            clip_norm=(1e-9, 1e9),
            patience=(0, 1 << 20),
            evaluate_every=(0.001, 1e6),
            checkpoint_every=(0.001, 1e6),
            staleness_d=(0.0, 1e5),
            sharded_tables=(1, 1 << 40),
            collective_timeout_s=(1.0, 1e6),
        )
        if self.sharded_tables != "none" and self.table_optimizer not in SHARDED_OPTIMIZERS:
            raise ValueError(
                f"sharded_tables = {self.sharded_tables!r} needs a table_optimizer that does the "
                f"same on a part of a table, {' or '.join(SHARDED_OPTIMIZERS)}; found "
                f"{self.table_optimizer!r}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How rankings are judged."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    ks: tuple[int, ...] = (5, 10, 20, 50)
    select: str = "recall@20"
    """Metric on validation that picks the checkpoint, and the settings of the baselines."""
    keep_seen: bool = False
    """Rank items the user already has as well (repeat purchases)."""
    num_bootstrap: int = 1000
    """Resamples of users behind each interval; 0 for none."""

    def __post_init__(self) -> None:
        _check(self, num_bootstrap=(0, 1_000_000))
        if self.num_bootstrap == 1:
            raise ValueError("num_bootstrap = 1 gives no interval: 0 for none, or 2 and more")
        if not self.ks or any(not 1 <= k <= 100_000 for k in self.ks):
            raise ValueError(f"ks must be cut-offs between 1 and 100000, found {list(self.ks)}")
        name, _, cutoff = self.select.partition("@")
        if cutoff not in map(str, self.ks):
            raise ValueError(f"select = {self.select!r} must name one of ks = {list(self.ks)}")
        if name not in METRIC_NAMES:
            raise ValueError(f"select = {self.select!r}: choose one of {', '.join(METRIC_NAMES)}")


@dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """Names of the columns that carry the log; ``user`` and ``item`` also key the tables."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = "timestamp"
    """None (in TOML ""), or absent in the data: a log without time."""
    event: str | None = None
    """Column of the event type, needed for ``event_weights``."""
    weight: str | None = None
    """Column of a positive weight per row."""

    def __post_init__(self) -> None:
        if self.timestamp == "":
            object.__setattr__(self, "timestamp", None)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the tables are and which of their rows count. Steps run in the order of the fields."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    events: str
    """File, folder of shards or glob; Parquet, CSV or JSONL. ``${NAME}`` is an environment
    variable."""
    users: str | None = None
    items: str | None = None
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    id_type: Literal["auto", "string"] = "auto"
    """``string`` keeps "0012" and "12" apart in CSV."""
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What happens to null ids, NaN and impossible times; dropped rows go to the quarantine."""
    max_bad_share: float = 0.001
    """With ``drop``: refuse all the same above this share of bad rows."""
    where: dict[str, str] = field(default_factory=dict)
    """Column -> condition, for example ``rating = ">= 7"`` (a rating threshold) or
    ``is_product_code = "== true"``; columns of the item and user tables may be named as well."""
    event_weights: dict[str, float] = field(default_factory=dict)
    """Event type -> weight; types not named are dropped."""
    deduplicate: Literal["first", "last", "sum", "none"] = "first"
    """One row per (user, item): the first or last in time, or the sum of weights at the last."""
    k_core_user: int = 0
    k_core_item: int = 0
    """Keep users / items with at least so many rows, repeated until stable; 0 keeps all."""
    max_per_user: int | None = None
    """Keep the most recent rows of each user."""
    decay_half_life_d: float | None = None
    """Weight of a train row halves every so many days before the last train row."""
    resident: bool | Literal["auto"] = "auto"
    """Train from rows in memory, or (false) from memory-mapped files in the run folder, which are
    removed at the end; ``auto``: from files if memory would be short. The result is the same."""

    def __post_init__(self) -> None:
        _check(
            self,
            max_bad_share=(0.0, 1.0),
            k_core_user=(0, 1 << 31),
            k_core_item=(0, 1 << 31),
            max_per_user=(1, 1 << 31),
            decay_half_life_d=(1e-6, 1e6),
        )
        for name, weight in self.event_weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"event_weights.{name} must be above 0, found {weight!r}")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How validation and test are held out."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    by: Literal["auto", "time", "given", "leave_last", "random"] = "auto"
    """``auto``: by global time where there is a timestamp, else random per user."""
    valid: float = 0.1
    """Share of rows (``leave_last``: number of rows per user, a whole number of at least 1)."""
    test: float = 0.1
    """As ``valid``; 0 for none."""
    valid_events: str | None = None
    """``given``: file(s) of validation rows; without it, ``valid`` of train is cut per user at
    random (or by time where there is one)."""
    test_events: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, valid=(0.0, 1e6), test=(0.0, 1e6), seed=(0, 1 << 62))
        if self.by in ("auto", "time", "random") and not self.valid + self.test < 1:
            raise ValueError(f"valid + test must leave rows for train: {self.valid} + {self.test}")
        if self.by == "given" and self.test_events is None:
            raise ValueError("split.by = 'given' needs split.test_events")


METRIC_NAMES = ("recall", "capped_recall", "hit_rate", "ndcg", "mrr", "map", "precision")
