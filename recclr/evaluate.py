"""Exact ranking evaluation: all users, the whole corpus, slices and intervals.

Shape letters: Q queries (users with something relevant), K cut-off, V corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from recclr.data.held_out import distinct_pairs, histories, joined, pairs_in, rows_of_users
from recclr.data.log import Csr, EncodedLog, Prepared
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError, DivergedError
from recclr.intervals import intervals, resampled
from recclr.metrics import Hits, PerUser
from recclr.ranking import Ranker
from recclr.settings.judging import SLICES, EvaluateSettings

_CHUNK = 8192
# Queries that stay together on one rank: a tile of ``topk``, so that every tile is scored by the
# same multiplication, to the bit, on any number of ranks.
_BLOCK = 256
_SHOWN = ("recall@", "ndcg@")
_HEAD, _TORSO = 0.2, 0.8


@dataclass(frozen=True)
class EvaluationSet:
    """What a ranking is judged against.

    Attributes:
        user_idx: int64 [Q], rising: users with at least one relevant item.
        relevant: Q rows of distinct relevant items (int32, rising); -1 marks an item outside the
            corpus, which counts as relevant and can never be hit.
        seen: Q rows of the user's train items, left out of rankings; None keeps them in.
        item_counts: int64 [V] train interactions.
        user_counts: int64 [Q] train interactions of each user.
        num_dropped: held-out users all of whose items they had before.
        num_repeats: held-out pairs dropped because the user had the item in train.
    """

    user_idx: Tensor
    relevant: Csr
    seen: Csr | None
    item_counts: Tensor
    user_counts: Tensor
    num_dropped: int = 0
    num_repeats: int = 0

    @classmethod
    def from_prepared(
        cls,
        prepared: Prepared,
        *,
        keep_seen: bool = False,
        also_seen: EncodedLog | None = None,
    ) -> EvaluationSet:
        """Held-out rows of ``prepared``, grouped by user.

        Args:
            keep_seen: rank items the user already has as well.
            also_seen: rows between train and the held-out ones, which nothing was fitted on, but
                whose items the user has by now (validation, when test is judged without a refit).

        Raises:
            ConfigError: nothing is held out, or nothing of it can be judged.
        """
        held_out, train = prepared.held_out, prepared.train
        if held_out is None or not len(held_out):
            raise ConfigError("there are no held-out rows to evaluate on")
        pairs = distinct_pairs(held_out)
        judged = torch.unique(pairs[:, 0])
        all_users = len(judged)
        # Most users of a large log may have nothing held out, and are neither sorted nor grouped.
        history = rows_of_users(train, judged)
        if also_seen is not None:
            history = joined(history, rows_of_users(also_seen, judged))
        num_repeats = 0
        if not keep_seen:
            again = pairs_in(pairs, history)
            pairs, num_repeats = pairs[~again], int(again.sum())
        user_idx, rows = torch.unique(pairs[:, 0], return_inverse=True)
        if not len(user_idx):
            raise ConfigError(
                "every held-out row repeats a train row, so nothing is left to find; "
                "set evaluate.keep_seen = true to judge repeat purchases"
            )
        counts = train.user_counts()
        counts = torch.nn.functional.pad(counts, (0, max(0, int(user_idx.max()) + 1 - len(counts))))
        return cls(
            user_idx=user_idx,
            relevant=Csr.from_pairs(rows, pairs[:, 1], len(user_idx)),
            seen=None if keep_seen else histories(history, user_idx),
            item_counts=train.item_counts(),
            user_counts=counts[user_idx],
            num_dropped=all_users - len(user_idx),
            num_repeats=num_repeats,
        )

    def bands(self) -> dict[str, Tensor]:
        """Bool [V] per item slice: warm, cold, and head / torso / tail by train interactions."""
        counts = self.item_counts
        warm = counts > 0
        order = torch.argsort(counts, descending=True, stable=True)
        # Share of interactions on more popular items: the item that crosses a border is above it.
        before = counts[order].cumsum(0) - counts[order]
        share = torch.empty(len(counts), dtype=torch.float64)
        share[order] = before.double() / max(int(counts.sum()), 1)
        return {
            "warm_items": warm,
            "cold_items": ~warm,
            "head": warm & (share < _HEAD),
            "torso": warm & (share >= _HEAD) & (share < _TORSO),
            "tail": warm & (share >= _TORSO),
        }

    def restricted(self, keep: Tensor) -> tuple[Tensor, Csr]:
        """Queries (int64 rows of this set) that have a relevant item in ``keep`` (bool [V]), and
        those items.
        """
        inside = (self.relevant.values >= 0) & keep[self.relevant.values.long().clamp(min=0)]
        rows, values = self.relevant.row_numbers()[inside], self.relevant.values[inside]
        queries, dense = torch.unique(rows, return_inverse=True)
        return queries, Csr.from_pairs(dense, values, len(queries))

    def require_slice(self, name: str) -> None:
        """Refuse to select by a slice that nobody is in, before hours of training.

        Raises:
            ConfigError: no query has anything relevant in the slice.
        """
        if name in ("warm_users", "cold_users"):
            some = bool(((self.user_counts > 0) == (name == "warm_users")).any())
        elif name == "all":
            some = True
        else:
            band = name.removesuffix("_among_cold")
            some = bool(len(self.restricted(self.bands()[band])[0]))
        if not some:
            raise ConfigError(
                f"evaluate.select_slice = {name!r}: nobody of validation is in that slice; "
                "expected one that somebody is in, for example 'all'"
            )


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one ranker.

    Attributes:
        metrics: {slice: {metric: mean}}. intervals: {slice: {metric: (low, high)}}.
        per_user: {slice: {metric: float64 [users of the slice]}}, in the order of ``user_idx``; of
            ``evaluate`` a ``PerUser``, which reckons a slice when it is asked for.
        counts: {slice: {"users", "relevant", "candidates"}}; of all users also ``dropped_users``,
            who had all their held-out items before, and ``repeated_rows``; of cold items among
            cold also ``chance_recall@k``, the expected recall of a random order of the cold items
            that each user does not have.
    """

    name: str
    metrics: dict[str, dict[str, float]]
    per_user: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    counts: dict[str, dict[str, float]] = field(repr=False)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """A table: a line per slice, a column per metric."""
        shown = [m for m in next(iter(self.metrics.values()), {}) if m.startswith(_SHOWN)]
        width = max((len(name) for name in self.metrics), default=5)
        lines = [" ".join([" " * width, "  users", *(f"{m:>10}" for m in shown)])]
        for name, values in self.metrics.items():
            cells = [f"{values[m]:>10.4f}" for m in shown]
            lines.append(" ".join([f"{name:<{width}}", f"{self.counts[name]['users']:>7}", *cells]))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The parts of metrics.json that belong to this ranker."""
        return {"metrics": self.metrics, "intervals": self.intervals, "counts": self.counts}


def left_out(counts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What of the held-out rows is in no figure, one sentence each.

    Args:
        counts: by slice, as ``Evaluation`` has them.
    """
    everyone, found = counts.get("all", {}), []
    if users := everyone.get("dropped_users"):
        found.append(
            f"{users:,} held-out users are not in the figures: they had all their held-out items "
            "before."
        )
    if pairs := everyone.get("repeated_rows"):
        found.append(
            f"{pairs:,} held-out pairs are not in the figures: their user had the item before."
        )
    return found


def evaluate(
    ranker: Ranker,
    examples: EvaluationSet,
    *,
    ks: Sequence[int],
    num_bootstrap: int = 0,
    seed: int = 0,
    slices: Sequence[str] = SLICES,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Rank the whole corpus for every query, once, and judge every slice of it.

    A slice of items keeps the full ranking and counts only its own relevant items, in hits and in
    the denominator. ``cold_items_among_cold`` ranks the cold items alone. Users without a relevant
    item in a slice are not part of it; a slice without users is left out.

    Args:
        ks: cut-offs; may exceed the corpus. num_bootstrap: resamples per interval; 0 for none.
        progress: called with (queries done, queries), of this rank.
        ranks: processes that share the queries; all of them get the whole result.

    Raises:
        DivergedError: the ranker's scores are NaN.
    """
    ranked = _Ranked(ranker, max(ks), ranks)
    top = ranked(examples.user_idx, examples.seen, progress=progress)
    metrics: dict[str, dict[str, float]] = {}
    found_hits: dict[str, Hits] = {}
    counts: dict[str, dict[str, float]] = {}

    def add(name: str, queries: Tensor, relevant: Csr, hits: Tensor, candidates: int) -> None:
        if not len(queries):
            return
        found_hits[name] = Hits.of(hits, relevant.lengths(), ks)
        metrics[name] = {m: float(v.mean()) for m, v in found_hits[name].metrics().items()}
        counts[name] = {
            "users": len(queries),
            "relevant": len(relevant.values),
            "candidates": candidates,
        }

    everyone = torch.arange(len(examples.user_idx))
    corpus = len(examples.item_counts)
    hits = _hits(top, examples.relevant, corpus)
    if "all" in slices:
        add("all", everyone, examples.relevant, hits, corpus)
        counts["all"]["dropped_users"] = examples.num_dropped
        counts["all"]["repeated_rows"] = examples.num_repeats
    for name, keep in (("warm_users", True), ("cold_users", False)):
        if name in slices:
            queries = ((examples.user_counts > 0) == keep).nonzero().squeeze(1)
            add(name, queries, examples.relevant.take(queries), hits[queries], corpus)
    bands = examples.bands()
    for name in ("warm_items", "cold_items", "head", "torso", "tail"):
        if name in slices:
            queries, relevant = examples.restricted(bands[name])
            # A hit of the slice is a hit on an item of it; none is at -1.
            own = hits[queries] & bands[name][top[queries].clamp(min=0)]
            add(name, queries, relevant, own, corpus)
    if "cold_items_among_cold" in slices:
        queries, relevant = examples.restricted(bands["cold_items"])
        cold = bands["cold_items"].nonzero().squeeze(1)
        if len(queries):
            users = examples.user_idx[queries]
            # Nobody has a cold item from train, but some from the rows between (``also_seen``).
            seen = None if examples.seen is None else examples.seen.take(queries)
            best = ranked(users, seen, items=cold)
            found = _hits(best, relevant, corpus)
            add("cold_items_among_cold", queries, relevant, found, len(cold))
            choices = len(cold) - _num_seen(seen, bands["cold_items"], len(queries))
            for k in ks:
                chance = float((k / choices).clamp(max=1).mean())
                counts["cold_items_among_cold"][f"chance_recall@{k}"] = chance
    result = Evaluation(
        name=ranker.name,
        metrics=metrics,
        per_user=PerUser(found_hits),
        counts=counts,
    )
    if not num_bootstrap:
        return result
    (means,) = resampled([result.per_user], num_bootstrap, seed=seed)
    return replace(result, intervals=intervals(means))


def selecting_metrics(
    ranker: Ranker, examples: EvaluationSet, settings: EvaluateSettings
) -> dict[str, float]:
    """Metrics of the slice that selects, and of nothing else; of validation, never of test.

    Raises:
        DivergedError: as ``evaluate``.
    """
    part = settings.select_slice
    return evaluate(ranker, examples, ks=settings.ks, slices=(part,)).metrics[part]


class _Ranked:
    """Rankings of a ranker for all queries, whichever rank makes them."""

    def __init__(self, ranker: Ranker, k: int, ranks: Ranks) -> None:
        self.ranker, self.k, self.ranks = ranker, k, ranks

    def __call__(
        self,
        user_idx: Tensor,
        seen: Csr | None,
        *,
        items: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """int64 [Q, k] ranked items, in chunks of queries so that memory stays bounded."""
        num_queries, num_blocks = len(user_idx), -(-len(user_idx) // _BLOCK)
        first, last = self.ranks.part(num_blocks)
        first, last = min(first * _BLOCK, num_queries), min(last * _BLOCK, num_queries)
        parts = [torch.empty((0, self.k), dtype=torch.int64)]
        for start in range(first, last, _CHUNK):
            stop = min(start + _CHUNK, last)
            rows = torch.arange(start, stop)
            taken = None if seen is None else seen.take(rows)
            found = self.ranker.top_k(user_idx[rows], self.k, seen=taken, items=items)
            if torch.isnan(found.scores).any():
                raise DivergedError(f"the ranker {self.ranker.name!r} produced NaN scores")
            parts.append(found.item_idx.cpu())
            if progress is not None:
                progress(stop - first, last - first)
        # The last block may be shorter than the others.
        counts = [_BLOCK * blocks for blocks in self.ranks.counts(num_blocks)]
        counts[-1] -= _BLOCK * num_blocks - num_queries
        return self.ranks.gather(torch.cat(parts), counts, "rankings")


def _hits(ranked_QK: Tensor, relevant: Csr, num_items: int) -> Tensor:
    """Bool [Q, K]: whether each ranked item is relevant to its query."""
    # One key per pair, shifted by one so that -1 ("outside the corpus", "no candidate") has a
    # place of its own in every row.
    width = num_items + 1
    keys = relevant.row_numbers() * width + relevant.values.long() + 1
    keys = keys.sort().values
    wanted = torch.arange(len(ranked_QK))[:, None] * width + ranked_QK + 1
    place = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
    return torch.logical_and(keys[place] == wanted, ranked_QK >= 0)


def _num_seen(seen: Csr | None, among: Tensor, num_queries: int) -> Tensor:
    """float64 [Q]: distinct seen items of each query that are in ``among`` (bool [V])."""
    if seen is None:
        return torch.zeros(num_queries, dtype=torch.float64)
    keys = torch.unique(seen.row_numbers() * len(among) + seen.values.long())
    rows = (keys // len(among))[among[keys % len(among)]]
    return torch.bincount(rows, minlength=num_queries).double()
