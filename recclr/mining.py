"""Hard negatives: what a model ranks high for users who do not have it, behind guards.

Shape letters: Q queries, V corpus, D dimension, K ranks looked at, W taken for a query.

Every user's best ``depth`` items are found exactly, known positives left out. Of these the first
``skip`` ranks, items that are too popular, and items that score too close to the positive are
refused: they are the likeliest to be positives that nobody has seen yet. Raw hard negatives cost
RocketQA (Qu et al., NAACL 2021) a fifth of its MRR; the bound by the score of the positive is that
of NV-Retriever (Moreira et al. 2024), the report that of sentence-transformers'
``mine_hard_negatives``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recclr.data.log import Csr, EncodedLog
from recclr.distributed import ALONE, Ranks
from recclr.errors import DivergedError
from recclr.mining_report import MiningReport, Tally
from recclr.order import generator
from recclr.ranking import TopK
from recclr.settings import MinedSettings, MiningSettings
from recclr.topk import top_k
from recclr.towers import TwoTower

# Users at most that are ranked together, on one rank: the same tiles, to the bit, on any number.
_TILE = 4096
# Pairs of query and rank that are looked at together; they take about 40 bytes each.
_PAIRS = 1 << 22
# Elements of the vectors that are multiplied at once for the scores of positives: 256 MiB.
_ELEMENTS = 1 << 26
_CHOICE = 31


@dataclass(frozen=True)
class Triplets:
    """Negatives of some positives.

    Attributes:
        user_idx, positive_idx: int64 [Q]. positive_scores: float32 [Q].
        item_idx: int64 [Q, W]; -1 after the last. scores: float32 [Q, W]; -inf there.
        ranks: int64 [Q, W], from 1 for the user's best item that is no known positive; 0 there.
    """

    user_idx: Tensor
    positive_idx: Tensor
    positive_scores: Tensor
    item_idx: Tensor
    scores: Tensor
    ranks: Tensor


class Miner:
    """Ranks users of a log by given vectors, and takes what passes the guards.

    Args:
        log: train rows: known positives, and popularity. held_out: rows of validation, from which
            the report estimates false negatives; nothing is chosen by them. None for no estimate.
    """

    def __init__(
        self, log: EncodedLog, settings: MiningSettings, held_out: EncodedLog | None = None
    ) -> None:
        self.settings = settings
        self.size = max(_PAIRS // settings.depth, 1)
        self.height = min(self.size, _TILE)
        self.num_users, self.num_items = log.num_users, log.num_items
        self.known, _ = log.known_pairs()
        self.too_popular = _too_popular(log.item_counts(), settings)
        self.held_out = None if held_out is None else _held_out_keys(held_out, log, self.known)

    def table(
        self,
        users: Tensor,
        items: Tensor,
        settings: MinedSettings,
        *,
        temperature: float,
        keys: tuple[int, ...],
        ranks: Ranks = ALONE,
    ) -> tuple[Tensor, MiningReport]:
        """Negatives of every user with train rows, by one score for all their positives.

        Args:
            users: float32 [num_users or more, D]. items: float32 [V, D], on the same device.
            temperature: of ``choice = "score"``. keys: of the draws, for example (seed, epoch).
            ranks: who share the users; all of them get the whole result.

        Returns:
            int32 [num_users, settings.width] in order of rank, -1 after the last, on the device of
            the vectors; the report, the same on all ranks.

        Raises:
            DivergedError: a score is NaN.
        """
        tally = Tally(settings.count, users.device)
        tiles = -(-self.num_users // self.height)
        first, last = (min(place * self.height, self.num_users) for place in ranks.part(tiles))
        known = self.known.to(users.device)
        parts = [torch.empty((0, settings.width), dtype=torch.int32, device=users.device)]
        for start in range(first, last, self.height):
            user_idx = self._users_of(start, users.device)
            mine = known.take(user_idx)
            ranked = self._ranked(users[user_idx], items, mine)
            positives = _positive_scores(users[user_idx], items, mine, settings.positive)
            draws = generator(users.device, *keys, start, _CHOICE)
            taken = self._take(
                ranked, positives, settings.width, draws, temperature, tally, user_idx, mine
            )
            parts.append(taken[0].int())
        counts = [self.height * number for number in ranks.counts(tiles)]
        counts[-1] -= self.height * tiles - self.num_users
        table = ranks.gather(torch.cat(parts), counts, "mined negatives")
        tally.sum_over(ranks)
        return table, tally.report()

    def triplets(
        self,
        users: Tensor,
        items: Tensor,
        *,
        temperature: float,
        keys: tuple[int, ...],
        tally: Tally,
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> Iterator[Triplets]:
        """Negatives of every distinct pair of train, each by the score of its own positive.

        In blocks of bounded size, users rising, and within each its positives. With several ranks
        each holds the triplets of a tile beside.

        Args:
            users, items, temperature, keys: as ``table`` takes them.
            tally: what the blocks of this rank so far came to.
            progress: called with (users done, users).
            ranks: who take turns with tiles of users; all of them get all blocks.

        Raises:
            DivergedError: a score is NaN.
        """
        known = self.known.to(users.device)
        starts = list(range(0, self.num_users, self.height))
        for turn in range(0, len(starts), ranks.size):
            tiles = [self._users_of(start, users.device) for start in starts[turn:][: ranks.size]]
            blocks: Iterator[Triplets] = iter(())
            if ranks.rank < len(tiles):
                own, start = tiles[ranks.rank], starts[turn + ranks.rank]
                draws = generator(users.device, *keys, start, _CHOICE)
                blocks = self._blocks(own, users, items, known.take(own), draws, temperature, tally)
            if ranks.size == 1:
                yield from blocks
            else:
                ends = known.offsets
                lengths = [int(ends[tile[-1] + 1] - ends[tile[0]]) for tile in tiles]
                yield from self._exchanged(blocks, lengths, users.device, ranks)
            if progress is not None:
                progress(min((turn + ranks.size) * self.height, self.num_users), self.num_users)

    def _exchanged(
        self, blocks: Iterator[Triplets], lengths: list[int], device: torch.device, ranks: Ranks
    ) -> Iterator[Triplets]:
        """The triplets of each rank's tile in turn, for all ranks.

        Args:
            blocks: of this rank's tile, if it has one. lengths: pairs of each rank's.
        """
        own = _joined([_no_triplets(self.settings.count, device), *blocks])
        for owner, length in enumerate(lengths):
            for low in range(0, length, self.size):
                counts = [0] * ranks.size
                counts[owner] = min(self.size, length - low)
                some = slice(low, low + counts[ranks.rank])
                fields = (getattr(own, each.name)[some] for each in dataclasses.fields(own))
                yield Triplets(*(ranks.gather(x, counts, "mined negatives") for x in fields))

    def _users_of(self, start: int, device: torch.device) -> Tensor:
        """Of one tile, int64."""
        return torch.arange(start, min(start + self.height, self.num_users), device=device)

    def _blocks(
        self,
        user_idx: Tensor,
        users: Tensor,
        items: Tensor,
        mine: Csr,
        draws: torch.Generator,
        temperature: float,
        tally: Tally,
    ) -> Iterator[Triplets]:
        """The triplets of one tile."""
        width = self.settings.count
        row_numbers = mine.row_numbers()
        ranked = self._ranked(users[user_idx], items, mine)
        every = torch.arange(len(mine.values), device=users.device)
        for pairs in torch.split(every, self.size):
            rows, positive_idx = row_numbers[pairs], mine.values[pairs].long()
            of_pairs = TopK(ranked.item_idx[rows], ranked.scores[rows])
            scores = _pair_scores(users[user_idx], items, rows, positive_idx)
            taken = self._take(
                of_pairs, scores, width, draws, temperature, tally, user_idx[rows], None
            )
            yield Triplets(user_idx[rows], positive_idx, scores, *taken)

    def _ranked(self, queries: Tensor, items: Tensor, known: Csr) -> TopK:
        ranked = top_k(queries, items, self.settings.depth, seen=known)
        if torch.isnan(ranked.scores).any():
            raise DivergedError("the model gives NaN scores, by which nothing can be mined")
        return ranked

    def _take(
        self,
        ranked: TopK,
        positives: Tensor,
        width: int,
        draws: torch.Generator,
        temperature: float,
        tally: Tally,
        user_idx: Tensor,
        known: Csr | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Items, scores and ranks of at most ``width`` items for each query, in order of rank."""
        asked = torch.ones_like(positives, dtype=torch.bool)
        if known is not None:
            asked = known.lengths() > 0
        alive = (ranked.item_idx >= 0) & asked.unsqueeze(1)
        tally.add_candidates(alive, asked)
        for name, refused in self._guards(ranked, positives):
            tally.add_skipped(name, alive & refused)
            alive = alive & ~refused
        tally.add_kept(alive, asked)
        places = _chosen(alive, ranked.scores, width, self.settings.choice, draws, temperature)
        here = places >= 0
        columns = places.clamp(min=0)
        items = torch.where(here, ranked.item_idx.gather(1, columns), -1)
        scores = torch.where(here, ranked.scores.gather(1, columns), -torch.inf)
        tally.add_taken(positives, scores, here)
        self._add_held_out(tally, user_idx, items)
        return items, scores, torch.where(here, places + 1, 0)

    def _guards(self, ranked: TopK, positives: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each guard by name, and what it refuses, bool [Q, K]; in the order of the settings."""
        settings, scores, positive = self.settings, ranked.scores, positives.unsqueeze(1)
        columns = torch.arange(scores.shape[1], device=scores.device)
        yield "skip", (columns < settings.skip).expand(scores.shape)
        popular = self.too_popular.to(scores.device)[ranked.item_idx.clamp(min=0)]
        yield "popular", popular
        gap = positive - scores
        yield "margin", ~(gap >= settings.margin)
        if settings.relative_margin:
            yield "relative_margin", ~(gap >= settings.relative_margin * positive.abs())
        if settings.share:
            yield "share", (positive > 0) & ~(scores < settings.share * positive)

    def _add_held_out(self, tally: Tally, user_idx: Tensor, items: Tensor) -> None:
        """How many of the items are held-out positives of their user, and of chance draws."""
        if self.held_out is None:
            return
        keys, chance = (each.to(items.device) for each in self.held_out)
        here = items >= 0
        wanted = user_idx.unsqueeze(1) * self.num_items + items
        if len(keys):
            found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            hits = (keys[found] == wanted) & here
        else:
            hits = torch.zeros_like(here)
        tally.add_held_out(hits.sum(), (chance[user_idx].unsqueeze(1) * here).sum())


class Refresher:
    """Mines for a model in training; what ``train.fit`` is handed as ``refresh_negatives``.

    Args:
        log: train rows on the training device. cutoff: the moment that users and items are shown
            at, as they are served. held_out: see ``Miner``.
    """

    def __init__(
        self,
        log: EncodedLog,
        settings: MinedSettings,
        *,
        seed: int,
        cutoff: int | None,
        held_out: EncodedLog | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.log, self.settings, self.held_out = log, settings, held_out
        self.seed, self.cutoff, self.ranks = seed, cutoff, ranks
        self.miner: Miner | None = None

    def __call__(self, model: TwoTower, step: int) -> tuple[Tensor, dict[str, Any]]:
        """The users' items as ``Miner.table`` gives them, and its report as JSON values.

        Args:
            step: number of steps that the model was trained for, which keys the draws.
        """
        if self.miner is None:
            self.miner = Miner(self.log, self.settings, self.held_out)
        # What is hard is what training scores high; a bias of served scores is no part of that.
        users, items = model.all_embeddings(self.cutoff, self.ranks)
        table, report = self.miner.table(
            users,
            items,
            self.settings,
            temperature=float(model.temperature().detach()),
            keys=(self.seed, step),
            ranks=self.ranks,
        )
        return table, report.to_json()


def _no_triplets(width: int, device: torch.device) -> Triplets:
    none = torch.empty(0, dtype=torch.int64, device=device)
    scores, wide = none.float(), none.new_empty(0, width)
    return Triplets(none, none, scores, wide, wide.float(), wide)


def _joined(blocks: Sequence[Triplets]) -> Triplets:
    names = [each.name for each in dataclasses.fields(Triplets)]
    return Triplets(*(torch.cat([getattr(block, name) for block in blocks]) for name in names))


def _too_popular(counts: Tensor, settings: MiningSettings) -> Tensor:
    """Bool [V]: items that are never taken; of equally popular ones the first go first."""
    most = torch.argsort(counts, descending=True, stable=True)
    found = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    found[most[: int(settings.drop_popular * len(counts))]] = True
    if settings.max_train_rows:
        found |= counts > settings.max_train_rows
    return found


def _held_out_keys(held_out: EncodedLog, log: EncodedLog, known: Csr) -> tuple[Tensor, Tensor]:
    """Sorted keys of held-out pairs that are not known, and each user's chance to draw one."""
    users, items = held_out.user_idx.long(), held_out.item_idx.long()
    inside = (users < log.num_users) & (items >= 0)
    keys = torch.unique(users[inside] * log.num_items + items[inside]).to(known.values.device)
    had = known.row_numbers() * log.num_items + known.values
    keys = keys[~torch.isin(keys, had)]
    counts = torch.bincount(keys // log.num_items, minlength=log.num_users)
    choices = (log.num_items - known.lengths()).clamp(min=1)
    return keys, counts / choices


def _pair_scores(users: Tensor, items: Tensor, rows: Tensor, item_idx: Tensor) -> Tensor:
    """Scores of pairs, float32 [P], a stretch at a time."""
    size = max(_ELEMENTS // max(users.shape[1], 1), 1)
    parts = [
        (users[some] * items[others.long()]).sum(1)
        for some, others in zip(torch.split(rows, size), torch.split(item_idx, size), strict=True)
    ]
    return torch.cat(parts)


def _positive_scores(users: Tensor, items: Tensor, known: Csr, kind: str) -> Tensor:
    """One score for the positives of each user, float32 [Q]; 0 without any."""
    rows = known.row_numbers()
    scores = _pair_scores(users, items, rows, known.values)
    found = scores.new_zeros(known.num_rows)
    how = "amin" if kind == "lowest" else "mean"
    return found.scatter_reduce(0, rows, scores, how, include_self=False)


def _chosen(
    alive: Tensor,
    scores: Tensor,
    width: int,
    choice: str,
    draws: torch.Generator,
    temperature: float,
) -> Tensor:
    """Columns of at most ``width`` items of each row, rising, int64 [Q, width]; -1 for none.

    By keys, of which the largest are taken: exponential clocks (Efraimidis and Spirakis 2006) draw
    in proportion to weights and without replacement.
    """
    if choice == "top":
        keys = -torch.arange(alive.shape[1], device=alive.device).float().expand(alive.shape)
    else:
        clocks = torch.empty(alive.shape, device=alive.device).exponential_(generator=draws)
        keys = -clocks.log()
        if choice == "score":
            keys = keys + scores / temperature
    keys = torch.where(alive, keys, -torch.inf)
    width_here = min(width, alive.shape[1])
    columns = keys.topk(width_here, dim=1).indices
    places = torch.where(alive.gather(1, columns), columns, alive.shape[1]).sort(dim=1).values
    places = torch.where(places < alive.shape[1], places, -1)
    return torch.nn.functional.pad(places, (0, width - width_here), value=-1)
