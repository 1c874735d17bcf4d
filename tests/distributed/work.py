"""What each rank of a test does; run by path in processes of its own, or alone in the test's.

A function gets its ``Ranks``, a folder for results, and JSON arguments.
"""

import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from recclr import sharded_tables
from recclr import towers as towers_module
from recclr.building import build_model
from recclr.co_interactions import co_interactions
from recclr.data.log import (
    CategoricalColumn,
    Csr,
    DenseColumn,
    EncodedLog,
    FeatureTable,
    Prepared,
    RaggedColumn,
)
from recclr.data.sharding import rows_for_training
from recclr.distillation import Teacher
from recclr.distributed import ALONE
from recclr.evaluate import EvaluationSet, evaluate
from recclr.exchange import StepExchange
from recclr.host_tables import shared_tables
from recclr.mining import Miner, Refresher, Triplets
from recclr.mining_report import Tally
from recclr.optim import Table, TableOptimizer, summed_rows
from recclr.settings import (
    AugmentSettings,
    ExplicitSettings,
    FeatureSettings,
    HistorySettings,
    IdSettings,
    LossSettings,
    MinedSettings,
    MiningSettings,
    ModelSettings,
    NegativesSettings,
    PairSettings,
    PopularitySettings,
    QueueSettings,
    SelfSupervisionSettings,
    TowerSettings,
    TrainSettings,
    ViewSettings,
)
from recclr.sharded_tables import ShardedTable, table_maker
from recclr.siamese import build_siamese
from recclr.spectral import start_from_spectral
from recclr.statistics import DAY_S
from recclr.step_stats import StepStats
from recclr.stepping import Stepper
from recclr.topk import EmbeddingRanker
from recclr.train import fit
from recclr.within import item_groups

NUM_USERS, NUM_ITEMS, NUM_ROWS, DIM = 11, 17, 53, 6

LOSSES = {
    "infonce": LossSettings(temperature="learned"),
    "bsl": LossSettings(temperature=0.2, second_temperature=1.5),
    "full_softmax": LossSettings(kind="full_softmax", temperature="learned"),
    "own_only": LossSettings(mask_known_positives=False),
    "family": LossSettings(
        log_q="classic", hardness=0.4, top_k=3, symmetric=0.3, positives=3, temperature=0.3
    ),
    "both_ways": LossSettings(symmetric=0.5, decoupled=True),
    "bpr": LossSettings(kind="bpr", temperature="learned"),
    "bce": LossSettings(kind="bce", temperature=0.4, negative_weight=2.0),
    "ccl": LossSettings(kind="ccl", margin=0.2),
    "margin": LossSettings(kind="margin", margin=0.8),
    "distance_weighted": LossSettings(kind="triplet", mining="distance_weighted"),
    "semi_hard": LossSettings(kind="triplet", margin=0.6, mining="semi_hard"),
    "spread": LossSettings(kind="alignment_uniformity", uniformity_weight=1.3),
}
NEGATIVES = {
    "mixed": NegativesSettings(
        in_batch=True, uniform=5, popularity=PopularitySettings(count=3, alpha=0.7)
    ),
    "not_in_batch": NegativesSettings(in_batch=False, uniform=6),
    "own": NegativesSettings(
        in_batch=True,
        uniform=6,
        mined=MinedSettings(
            count=2, pool=4, depth=9, skip=1, share=0.0, warmup_epochs=0.5, refresh_epochs=0.5
        ),
        explicit=ExplicitSettings(events=("shown",), count=2),
    ),
    "within": NegativesSettings(in_batch=True, uniform=9, within="kind"),
    # No more than a rank's share of the rows.
    "few": NegativesSettings(in_batch=False, uniform=3),
    "none": NegativesSettings(),
    "queue": NegativesSettings(
        in_batch=True,
        uniform=5,
        available=True,
        queue=QueueSettings(size=19, momentum=0.8, warmup=0.2),
    ),
    "streaming": NegativesSettings(
        in_batch=True,
        uniform=5,
        counts="streaming",
        queue=QueueSettings(size=19, momentum=0.0, warmup=0.0),
    ),
}
IDS = (TowerSettings(), TowerSettings())
# Everything that draws: dropout of ids, features, histories (of items that drop) and coordinates.
RICH = (
    TowerSettings(
        id=IdSettings(dropout=0.2),
        features={"tags": FeatureSettings(kind="multi_hot", dropout=0.2)},
        history=HistorySettings(length=3, half_life_d=4.0, dropout=0.3, use="both"),
        mlp=(5,),
    ),
    TowerSettings(
        id=IdSettings(dropout=0.1),
        features={
            "kind": FeatureSettings(kind="categorical", dropout=0.2),
            "image": FeatureSettings(kind="vector", dropout=0.1),
        },
        mlp=(5,),
        dropout=0.2,
    ),
)
# Everything else that draws, at rates that change from step to step.
AUGMENTED = (
    TowerSettings(
        id=IdSettings(dropout=0.1),
        features={"tags": FeatureSettings(kind="multi_hot", subsample=0.5, swap=0.3)},
        history=HistorySettings(
            length=5, half_life_d=4.0, crop=0.6, mask=0.2, reorder=0.7, use="both"
        ),
        augment=AugmentSettings(
            mode="complementary", dropout=0.4, dimension_mask=0.3, noise=0.2, start=0.5
        ),
    ),
    TowerSettings(
        features={
            "kind": FeatureSettings(kind="categorical", swap=0.3),
            "size": FeatureSettings(kind="numeric", jitter=0.3, swap=0.2),
        },
        augment=AugmentSettings(
            groups=(("kind", "size"), ("id",)), dropout=(0.3, 0.2), dimension_mask=0.2, end=0.2
        ),
        dropout=0.1,
    ),
)
RECENT = {"recent": FeatureSettings(kind="statistics", windows_d=(9.0,))}
TOWERS = {
    "ids": IDS,
    "rich": RICH,
    "augmented": AUGMENTED,
    # Histories of items that never drop: a rank without any item has none to ask for.
    "history": (TowerSettings(history=HistorySettings(length=3)), TowerSettings()),
    "timed": (RICH[0], TowerSettings(id=IdSettings(as_of=True), features=RECENT)),
}


def prepared():
    generator = torch.Generator().manual_seed(0)
    log = EncodedLog(
        torch.randint(NUM_USERS, (NUM_ROWS,), generator=generator).int(),
        torch.randint(NUM_ITEMS, (NUM_ROWS,), generator=generator).int(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        timestamp=torch.arange(NUM_ROWS) * DAY_S,
        weight=1 + torch.rand(NUM_ROWS, generator=generator),
    )
    items = {
        "kind": CategoricalColumn(torch.randint(4, (NUM_ITEMS,), generator=generator).int(), 4),
        "image": DenseColumn(torch.randn(NUM_ITEMS, 7, generator=generator)),
        # A number, and the flag of one that is missing.
        "size": DenseColumn(
            torch.stack([torch.linspace(-1, 1, NUM_ITEMS), torch.zeros(NUM_ITEMS)], 1)
        ),
    }
    lengths = torch.tensor([0, 2, 0, 3, 1, 0, 0, 1, 2, 1, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randint(5, (int(offsets[-1]),), generator=generator).int()
    users = {"tags": RaggedColumn(Csr(offsets, values), 5)}
    return Prepared(log, FeatureTable(NUM_USERS, users), FeatureTable(NUM_ITEMS, items))


def refused():
    """Items that users refused: none of some, more than are drawn of others."""
    rows, values = torch.tensor([0, 0, 0, 2, 5, 5, 10]), torch.tensor([1, 5, 9, 2, 16, 0, 3])
    return Csr.from_pairs(rows, values, NUM_USERS)


def model_of(towers, loss, dim=DIM, new_table=Table, log=None, similarity="cosine"):
    settings = ModelSettings(embedding_dim=dim, similarity=similarity)
    (user, item), data = TOWERS[towers], prepared()
    data = data if log is None else replace(data, train=log)
    return build_model(
        data,
        user=user,
        item=item,
        model=settings,
        loss=loss,
        seed=2,
        new_table=new_table,
    )


def siamese_of(towers, loss, similarity):
    """One tower for both sides, and the pairs of items that it learns from."""
    settings = ModelSettings(embedding_dim=DIM, similarity=similarity, mode="item_item")
    item, data = TOWERS[towers][1], prepared()
    model = build_siamese(data, item=item, model=settings, loss=loss, seed=2)
    return model, co_interactions(data.train, PairSettings(window=2))


def views_of(options):
    """Two views of both towers, drawn in unlike ways, with the given settings; None for none."""
    if options is None:
        return None
    return SelfSupervisionSettings(
        item=ViewSettings(batch_size=7, **options),
        user=ViewSettings(batch_size=10, distribution="popularity", projection=0, **options),
    )


def teacher_of(weight):
    draws = torch.Generator().manual_seed(12)
    users = torch.randn(NUM_USERS + 1, 4, generator=draws)
    items = torch.randn(NUM_ITEMS, 4, generator=draws)
    users[3], items[5] = 0.0, 0.0
    return Teacher.of_scaled(users, items, weight)


def gradients(
    ranks,
    folder,
    *,
    towers,
    loss,
    negatives="mixed",
    batch_size=13,
    chunk_size=None,
    accumulate=1,
    steps=(0, 3, 4),
    views=None,
    taught=None,
    dim=DIM,
    similarity="cosine",
    siamese=False,
):
    """Loss, masked pairs and every gradient of a few steps, before any update.

    ``taught``: share of the loss that a teacher has, who knows no user 3 and no item 5.
    """
    found, log, explicit = {}, prepared().train, refused()
    if siamese:
        (model, log), explicit = siamese_of(towers, LOSSES[loss], similarity), None
    else:
        model = model_of(towers, LOSSES[loss], dim, similarity=similarity)
    train = TrainSettings(batch_size=batch_size, chunk_size=chunk_size, accumulate=accumulate)
    model.train()
    stepper = Stepper(
        model,
        log,
        loss=LOSSES[loss],
        negatives=NEGATIVES[negatives],
        train=train,
        self_supervision=views_of(views),
        seed=4,
        explicit=explicit,
        ranks=ranks,
        item_group=item_groups(NEGATIVES[negatives], prepared().items),
        teacher=None if taught is None else teacher_of(taught),
    )
    if stepper.objective.own.mined is not None:
        refresher = Refresher(
            prepared().train, NEGATIVES[negatives].mined, seed=4, cutoff=None, ranks=ranks
        )
        table, report = refresher(model, 0)
        stepper.objective.own.refill(table)
        found["mined"] = table
        found["report"] = torch.tensor([report["mined"], report["candidates"], report["kept"]])
    optimizers = stepper.optimizers
    for step in steps:
        stats, stopped = stepper.objective.backward(model, stepper.source.step(step)), False
        tables = optimizers.tables.gradients()
        if ranks.size > 1:
            asked = ranks.rank == 1 and step == steps[-1]
            stats, merged, stopped = stepper.exchange(stats, stopped=asked)
            tables = [(name, *summed_rows(parts)) for name, parts in merged]
            assert stopped == (step == steps[-1])
        found[f"{step}/loss"] = stats.loss.detach()
        found[f"{step}/masked"] = torch.tensor(stats.num_masked)
        found |= {f"{step}/{name}": term for name, term in stats.auxiliary.items()}
        for name, rows, grads in tables:
            found[f"{step}/{name}/rows"], found[f"{step}/{name}/gradients"] = rows, grads
        for name, p in optimizers.dense.items():
            if p.grad is not None:
                found[f"{step}/{name}"] = p.grad.clone()
        optimizers.forget()
    save_file(found, folder / f"gradients-{ranks.rank}.safetensors")


def train(ranks, folder, *, resident=True, **options):
    """A short training; see ``_train``.

    ``resident``: what each rank says of the log, by rank; one value for all.
    """
    asked = resident[ranks.rank] if isinstance(resident, list) else resident
    own, said = {"device": "cpu", "resident": asked}, []
    with rows_for_training(prepared().train, folder, **own, ranks=ranks, say=said.append) as log:
        (folder / f"mapped-{ranks.rank}.json").write_text(json.dumps(log.mapped_for is not None))
        _train(ranks, folder, log, **options)


def _train(
    ranks,
    folder,
    log,
    *,
    towers,
    loss="infonce",
    negatives="mixed",
    checkpoints=None,
    resume=False,
    num_steps=None,
    odd=None,
    dim=DIM,
    sharded="none",
    optimizer="rowwise_adagrad",
    batch_size=13,
    chunk_size=None,
    accumulate=1,
    precision="auto",
    worse=False,
    spectral=False,
    views=None,
):
    """The weights at its end (of sharded tables on the first rank), how many of its elements are
    held sharded, and the evaluations on the way.

    ``odd``: the rank on which one bit of one weight flips at the first evaluation, or one value of
    a sharded table becomes NaN. ``worse``: whether the first evaluation is the best.
    """
    settings = TrainSettings(
        batch_size=batch_size,
        chunk_size=chunk_size,
        accumulate=accumulate,
        epochs=2.5,
        table_optimizer=optimizer,
        table_lr=0.05,
        dense_lr=0.01,
        clip_norm=0.5,
        checkpoint_every=0.5,
        sharded_tables=sharded,
        precision=precision,
    )
    model = model_of(towers, LOSSES[loss], dim, table_maker(settings, ranks, "cpu"), log)
    if spectral:
        # By another seed the others would find another solution; that of the first holds for all.
        seed = 1 + ranks.rank
        start_from_spectral(model, log, init_std=0.9, seed=seed, ranks=ranks)
    steps = []

    def judged(candidate):
        users, items = candidate.all_vectors(NUM_ROWS * DAY_S)
        if ranks.rank == odd and candidate.shards():
            next(iter(candidate.shards().values())).local[1, 2] = torch.nan
        elif ranks.rank == odd:
            weight = next(iter(candidate.tables().values())).weight
            weight.view(torch.int32)[3, 2] ^= 1
        found = float((users[:-1] @ items.T).abs().sum())
        return {"recall@20": -found if worse else found}

    sources, refresher = NEGATIVES[negatives], None
    if sources.mined is not None:
        moment = NUM_ROWS * DAY_S
        refresher = Refresher(log, sources.mined, seed=4, cutoff=moment, ranks=ranks)
    result = fit(
        model,
        log,
        loss=LOSSES[loss],
        negatives=sources,
        refresh_negatives=refresher,
        explicit=refused(),
        train=settings,
        self_supervision=views_of(views),
        seed=4,
        evaluate=judged,
        checkpoints=None if checkpoints is None else folder / checkpoints,
        resume=resume,
        num_steps=num_steps,
        on_event=steps.append,
        ranks=ranks,
    )
    weights = {name: value.detach().clone() for name, value in model.weights().items()}
    held = {name: shard.local.numel() for name, shard in model.shards().items()}
    for name, shard in model.shards().items():
        whole = shard.gathered(name)
        if whole is not None:
            weights[name] = whole
    save_file(weights, folder / f"weights-{ranks.rank}.safetensors")
    (folder / f"steps-{ranks.rank}.json").write_text(json.dumps([result.steps, steps]))
    (folder / f"held-{ranks.rank}.json").write_text(json.dumps(held))


def sharded_table(ranks, folder, *, num_rows, dim, optimizer):
    """Lookups, bags, means and three updates of a sharded table, beside those of a whole one.

    The whole one learns from the lookups of all ranks, which each rank can draw. Some ask for no
    row, some repeat rows; in the second step nobody asks for any; in the third there is one lookup,
    of which no gradient comes back on rank 1, and in the last there is none.
    """
    # Three rows of each rank at a time.
    sharded_tables._STRETCH = 3 * dim * ranks.size
    generators = [torch.Generator().manual_seed(6) for _ in range(2)]
    sharded = ShardedTable(
        num_rows,
        dim,
        std=0.7,
        generator=generators[0],
        optimizer=optimizer,
        ranks=ranks,
        device="cpu",
    )
    whole = Table(num_rows, dim, std=0.7, generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert (sharded.num_rows, sharded.dim) == (num_rows, dim)
    assert not list(sharded.parameters())
    assert not sharded.state_dict()
    twin, draws = TableOptimizer({"table": whole}, optimizer), torch.Generator().manual_seed(8)
    rate = {"rowwise_adagrad": 0.3, "sgd": 0.05}[optimizer]

    def look(table, rows, weights, used):
        vectors = table(rows)
        if used:
            (vectors * weights[: len(rows)]).sum().backward()
        return (vectors.detach(),)

    def learn(table, rows, values, offsets, weights):
        vectors, bags = table(rows), table.bag(values, offsets)
        again = table(rows.flip(0))
        loss = (vectors * weights[: len(rows)]).sum() + (bags * bags).sum() + again.sum()
        loss.backward()
        return vectors.detach(), bags.detach(), again.detach()

    for step, lr in enumerate((rate, 2 * rate, rate / 3, rate)):
        for rank in range(ranks.size if step < 3 else 0):
            count = 0 if step == 1 or (step == 0 and rank == 1) else 5 + 2 * rank
            rows = torch.randint(num_rows, (count,), generator=draws)
            values = torch.randint(num_rows, (2 * count,), generator=draws)
            offsets = torch.tensor([0, 0, count // 2, 2 * count])
            weights = torch.randn(count, dim, generator=draws)
            asked = (rows, weights, rank != 1) if step == 2 else (rows, values, offsets, weights)
            expected = (look if step == 2 else learn)(whole, *asked)
            if rank == ranks.rank:
                found = (look if step == 2 else learn)(sharded, *asked)
                # To the bit before the first update; the kernel's roundings are its own.
                tolerance = 0.0 if step == 0 else 4e-6
                torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        sharded.update(lr)
        twin.step(lr)
        assert not sharded.lookups
        start, stop = sharded.rows.starts[ranks.rank], sharded.rows.starts[ranks.rank + 1]
        assert len(sharded.rows.local) == stop - start > 0
        torch.testing.assert_close(sharded.rows.local, whole.weight[start:stop], atol=2e-6, rtol=0)
        assert sharded.state.keys() == {key.split("/")[1] for key in twin.state_dict()}
        for name, shard in sharded.state.items():
            assert shard.shape == twin.state["table"][name].shape
            torch.testing.assert_close(shard.local, shard.own(twin.state["table"][name]))
    with torch.no_grad():
        keep = torch.arange(num_rows) % 3 != 1
        torch.testing.assert_close(sharded.mean(keep), sharded_mean(sharded, keep))
        assert sharded(torch.tensor([0])).requires_grad is False
    whole_again = sharded.rows.gathered("the table")
    assert (whole_again is None) == (ranks.rank > 0)
    if whole_again is not None:
        torch.testing.assert_close(whole_again, whole.weight.data, atol=2e-6, rtol=0)
    (folder / f"done-{ranks.rank}").touch()


def sharded_mean(table, keep):
    """By looking every row up."""
    return table(torch.arange(table.num_rows))[keep].mean(0)


def embeds(ranks, folder, *, towers, chunk, siamese=False, similarity="cosine"):
    """Vectors of all users and items, and how many this rank was asked for."""
    if siamese:
        model, _ = siamese_of(towers, LOSSES["infonce"], similarity)
    else:
        model = model_of(towers, LOSSES["infonce"], similarity=similarity)
    asked = []
    model.item_tower.register_forward_hook(lambda _, rows, __: asked.append(len(rows[0].idx)))
    towers_module._CHUNK = chunk
    users, items = model.all_vectors(NUM_ROWS * DAY_S, ranks)
    found = {"users": users, "items": items, "asked": torch.tensor(sum(asked))}
    save_file(found, folder / f"vectors-{ranks.rank}.safetensors")


def judge(ranks, folder, *, num_users):
    """Every slice of an evaluation, and what each user got."""
    generator = torch.Generator().manual_seed(5)
    num_items = 67
    counts = torch.randint(0, 4, (num_items,), generator=generator)
    lengths = torch.randint(1, 4, (num_users,), generator=generator)
    rows = torch.arange(num_users).repeat_interleave(lengths)
    pairs = torch.randint(num_items, (2 * len(rows),), generator=generator).int()
    examples = EvaluationSet(
        user_idx=torch.arange(num_users),
        relevant=Csr.from_pairs(rows, pairs[: len(rows)], num_users),
        seen=Csr.from_pairs(rows, pairs[len(rows) :], num_users),
        item_counts=counts,
        user_counts=torch.randint(0, 3, (num_users,), generator=generator),
    )
    # Coarse values: many ties, which every world size must break alike.
    vectors = torch.randint(-2, 3, (num_users + 1 + num_items, 5), generator=generator).float()
    ranker = EmbeddingRanker("model", vectors[: num_users + 1], vectors[num_users + 1 :])
    shown = []
    found = evaluate(
        ranker, examples, ks=(3, 80), progress=lambda done, total: shown.append(done), ranks=ranks
    )
    per_user = {
        f"{part}/{metric}": value.clone()
        for part, metrics in found.per_user.items()
        for metric, value in metrics.items()
    }
    save_file(per_user, folder / f"judged-{ranks.rank}.safetensors")
    result = [found.metrics, found.counts, len(shown)]
    (folder / f"judged-{ranks.rank}.json").write_text(json.dumps(result))


def mines(ranks, folder, *, num_users):
    """Triplets of a planted model, tile by tile, and their report."""
    draws = torch.Generator().manual_seed(6)
    num_items = 31
    # Nobody has a row among some users in the middle: tiles without pairs.
    users = torch.randint(num_users, (5 * num_users,), generator=draws)
    users = users[(users < 9) | (users >= 17)]
    items = torch.randint(num_items, (len(users),), generator=draws)
    log = EncodedLog(users.int(), items.int(), num_users, num_items)
    settings = MiningSettings(count=3, depth=12, skip=1, share=0.0)
    vectors = torch.randn(num_users + num_items, 6, generator=draws)
    held = EncodedLog(items.int() % num_users, users.int() % num_items, num_users, num_items)
    miner, tally = Miner(log, settings, held), Tally(settings.count, torch.device("cpu"))
    # Small tiles, here only: this may be the process of the tests.
    miner.height = 4
    shown = []
    blocks = list(
        miner.triplets(
            vectors[:num_users],
            vectors[num_users:],
            temperature=0.5,
            keys=(3,),
            tally=tally,
            progress=lambda done, total: shown.append((done, total)),
            ranks=ranks,
        )
    )
    tally.sum_over(ranks)
    assert shown[-1] == (num_users, num_users)
    found = {
        each.name: torch.cat([getattr(block, each.name) for block in blocks])
        for each in fields(Triplets)
    }
    save_file(found, folder / f"mined-{ranks.rank}.safetensors")
    (folder / f"mined-{ranks.rank}.json").write_text(json.dumps(tally.report().to_json()))


def exchanges(ranks, folder):
    """Each primitive against what it must give, with blocks of unequal lengths, some empty."""
    counts = [(3, 0, 5)[rank] for rank in range(ranks.size)]
    whole = torch.arange(sum(counts) * 2, dtype=torch.float64).view(-1, 2)
    own = whole.split(counts)[ranks.rank].clone().requires_grad_(True)
    gathered = ranks.gather_rows(own, counts, "blocks")
    assert torch.equal(gathered, whole)
    # Rank r weights the sum of squares by r + 1, so every row's gradient has a part of each rank.
    ((ranks.rank + 1) * gathered.square().sum()).backward()
    factor = sum(range(1, ranks.size + 1))
    assert torch.equal(own.grad, 2 * factor * own.detach())
    empty = ranks.gather(torch.empty(0, 4), [0] * ranks.size, "nothing")
    assert empty.shape == (0, 4)
    # The strides differ by rank, as those of a gradient may.
    summed = torch.arange(6.0).view(2, 3)
    if ranks.first:
        summed = summed.T.contiguous().T
    assert summed.is_contiguous() == (ranks.rank > 0)
    expected = ranks.size * torch.arange(6.0).view(2, 3)
    assert torch.equal(ranks.sum_(summed, "strides"), expected)
    values = [{"text": "é" * (10 * rank), "rank": rank} for rank in range(ranks.size)]
    assert ranks.gather_json(values[ranks.rank], "values") == values
    assert ranks.from_first(f"of {ranks.rank}", "a value") == "of 0"
    for count in (0, 1, 7):
        own_part = torch.arange(*ranks.part(count))
        parts = ranks.gather(own_part, ranks.counts(count), "parts")
        assert torch.equal(parts, torch.arange(count))
    for _ in range(3):
        ranks.meet("a meeting")
    (folder / f"done-{ranks.rank}").touch()


def through(ranks, folder, *, memory):
    """Blocks of every kind, at the sizes where the way that they go changes."""
    assert (ranks._memory is not None) == memory
    for number, dtype in enumerate((torch.float32, torch.int64, torch.bfloat16, torch.bool)):
        counts = [(2, 5, 0)[(rank + number) % 3] for rank in range(ranks.size)]
        whole = (torch.arange(3 * sum(counts)) % 7).to(dtype).view(-1, 3)
        blocks = ranks.gather_blocks(whole.split(counts)[ranks.rank], counts, "blocks")
        assert all(map(torch.equal, blocks, whole.split(counts)))
    kinds = set()
    # 4 MiB, a byte more, twice as much, and more than all memory there may be.
    for size in (4 << 20, (4 << 20) + 1, 9 << 20, (129 << 20) // ranks.size):
        own = torch.full((size,), 1 + ranks.rank, dtype=torch.uint8)
        before = None if ranks._memory is None else ranks._memory.capacity
        for whole in (True, False):
            if whole:
                # In stretches, which need no more memory than there is.
                blocks = ranks.gather(own, [size] * ranks.size, "much").split(size)
                assert before == (None if ranks._memory is None else ranks._memory.capacity)
            else:
                blocks = ranks.gather_blocks(own, [size] * ranks.size, "much")
            assert [int(block.amin()) for block in blocks] == list(range(1, ranks.size + 1))
            assert [int(block.amax()) for block in blocks] == list(range(1, ranks.size + 1))
        kinds.add(None if ranks._memory is None else ranks._memory.capacity >> 20)
    assert kinds == ({4, 8, 16} if memory else {None})
    # Stretches of unequal blocks, some of which have ended, and rows longer than a stretch.
    for counts, width in (([3 << 20, 0, 5 << 20], 1), ([2, 3, 1], 5 << 20)):
        counts = counts[: ranks.size]
        own = torch.arange(counts[ranks.rank], dtype=torch.uint8).remainder_(251)[:, None]
        found = ranks.gather(own.expand(-1, width).contiguous(), counts, "stretches")
        assert [len(block) for block in found.split(counts)] == counts
        for block in found.split(counts):
            expected = torch.arange(len(block), dtype=torch.uint8).remainder_(251)
            assert torch.equal(block[:, 0], expected)
            assert torch.equal(block[:, -1], expected)
    # Many in a row, by ranks that come late in turn: no block is written before it was read.
    for number in range(60):
        if number % 7 == ranks.rank:
            time.sleep(0.002)
        own = torch.full((50,), 100 * number + ranks.rank)
        blocks = ranks.gather_blocks(own, [50] * ranks.size, "turns")
        if number % 5 == ranks.rank:
            time.sleep(0.002)
        for rank, block in enumerate(blocks):
            assert (block == 100 * number + rank).all()
    generator = torch.Generator().manual_seed(ranks.rank)
    odd = torch.randn(1000, generator=generator)
    save_file({"sum": ranks.sum_(odd, "a sum")}, folder / f"sum-{ranks.rank}.safetensors")
    assert ranks.sum_(torch.tensor(3), "a number") == 3 * ranks.size
    assert ranks.sum_(torch.empty(0), "nothing").shape == (0,)


def messages(ranks, folder, *, memory):
    """Parts of lengths that differ by rank, small, grown, and more than there is memory for."""
    for size in (3, (4 << 20) // 8, 1 << 20, (129 << 20) // ranks.size // 8):
        own = size + 7 * ranks.rank if ranks.rank != 1 else 0
        numbers = torch.arange(own) + ranks.rank
        few = torch.full((2, ranks.rank), ranks.rank + 0.5)
        found = ranks.gather_parts([torch.tensor([own]), few, numbers], "parts")
        if not memory or size == (129 << 20) // ranks.size // 8:
            assert found is None
            continue
        assert len(found) == ranks.size
        for rank, message in enumerate(found):
            length = int(message.take(torch.int64, 1))
            assert length == (0 if rank == 1 else size + 7 * rank)
            assert torch.equal(
                message.take(torch.float32, 2, rank), torch.full((2, rank), rank + 0.5)
            )
            assert torch.equal(message.take(torch.int64, length), torch.arange(length) + rank)
        ranks.wait("the reading")
    assert ranks.room(100) is None or memory


def host_tables(ranks, folder, *, kind, shares, refused=None):
    """Steps of two tables that ranks share beside the same by copies of one's own, to the bit.

    ``shares``: whether they are able to. ``refused``: how many tensors find memory before the
    system has no more, on rank 0 alone.
    """
    from recclr import host_memory

    if refused is not None and ranks.first:
        made, left = host_memory._made, [True] * refused
        host_memory._made = lambda *arguments: made(*arguments) if left and left.pop() else None
    sizes = {"wide": (203, 5), "narrow": (71, 1)}
    pairs = []
    for _ in range(2):
        tables = {
            name: Table(*size, std=1.0, generator=torch.Generator().manual_seed(3))
            for name, size in sizes.items()
        }
        pairs.append((tables, TableOptimizer(tables, kind)))
    (own_tables, own), (tables, optimizer) = pairs

    def step(number):
        gradients = []
        for name, (num_rows, dim) in sizes.items():
            draws = torch.Generator().manual_seed(number)
            count = 90 if number else 2
            rows = torch.randint(num_rows, (count,), generator=draws)
            gradients.append((name, [(rows, torch.randn(count, dim, generator=draws), None)]))
        own.step(0.1, gradients)
        optimizer.step(0.1, gradients)

    def held(tables, optimizer):
        return [*optimizer.state_dict().values(), *(table.weight for table in tables.values())]

    def same():
        return all(map(torch.equal, held(tables, optimizer), held(own_tables, own)))

    step(0)
    for _ in range(2):
        shared = shared_tables(optimizer, ranks)
        assert (shared is not None) == shares
        for number in range(1, 4):
            step(number)
            if shared is not None:
                shared.moved()
            assert same()
            ranks.wait("the comparison")
        if shared is not None:
            # One memory: what a rank writes all see.
            tables["wide"].weight[ranks.rank, 0] = 100.0 + ranks.rank
            ranks.wait("writing")
            seen = tables["wide"].weight[: ranks.size, 0].tolist()
            assert seen == [100.0 + rank for rank in range(ranks.size)]
            own_tables["wide"].weight[: ranks.size, 0] = torch.tensor(seen)
            ranks.wait("reading")
            shared.give_back()
            assert optimizer.share == (0, 1)
            # Each has its own again.
            for name, table in tables.items():
                table.weight[0, 0] = ranks.rank
                ranks.wait("writing")
                assert table.weight[0, 0] == ranks.rank
                table.weight[0, 0] = own_tables[name].weight[0, 0]
    assert same()


def growth_refused(ranks, folder):
    """The system has no more memory for exchanges: what fits goes through what there is."""
    from recclr import host_memory

    memory = ranks._memory
    asked = []
    host_memory._made = lambda *arguments: asked.append(arguments)
    for _ in range(3):
        own = torch.full((6 << 20,), 1 + ranks.rank, dtype=torch.uint8)
        blocks = ranks.gather_blocks(own, [len(own)] * ranks.size, "much")
        assert [int(block.amin()) for block in blocks] == list(range(1, ranks.size + 1))
        assert ranks.gather_parts([own], "parts") is None
        assert len(ranks.gather_parts([own[:9]], "few parts")) == ranks.size
        ranks.wait("a wait")
    assert ranks._memory is memory
    # Of those that share memory only the first one asks for it; once is enough.
    assert len(asked) == (1 if ranks.first else 0)


def meanwhile_fails(ranks, folder):
    """What rank 1 does before it waits is an error of its own, not one of an exchange."""

    def meanwhile():
        if ranks.rank == 1:
            raise RuntimeError("can't allocate memory: timeout")

    ranks.wait("a wait", meanwhile)
    ranks.sum_(torch.ones(1), "a sum")


def hangs_after_a_wait(ranks, folder):
    """Rank 0 waits long for the others' update, and hangs after it."""
    tables = SimpleNamespace(tables={})
    optimizers = SimpleNamespace(dense={}, tables=tables, step=lambda *arguments: None)
    exchange = StepExchange(optimizers, ranks)
    exchange.shared = SimpleNamespace(moved=lambda meanwhile: ranks.wait("an update", meanwhile))
    ranks.watch()
    time.sleep(0.3 * ranks.rank)
    exchange.update(0, [], lambda: None)
    time.sleep(60.0 if ranks.first else 0.0)
    ranks.sum_(torch.ones(1), "a sum")


def wide_dense(ranks, folder):
    """Dense parameters in float64 beside others, one of which has a gradient on one rank alone."""
    wide = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    narrow, unused = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    wide.grad = torch.full((2, 3), 1e-12 + ranks.rank, dtype=torch.float64)
    if ranks.rank == 1:
        narrow.grad = torch.arange(3.0)
    parts = {"wide": wide, "narrow": narrow, "unused": unused}
    optimizers = SimpleNamespace(dense=parts, tables=SimpleNamespace(tables={}))
    stats = StepStats(torch.tensor(0.5), 7, 21, 0, 3, torch.tensor(2))
    told, gradients, stopped = StepExchange(optimizers, ranks)(stats, stopped=ranks.rank == 1)
    assert (float(told.loss), gradients, stopped) == (0.5 * ranks.size, [], True)
    total = sum(1e-12 + rank for rank in range(ranks.size))
    assert wide.grad.dtype == torch.float64
    assert (wide.grad == total).all()
    assert narrow.grad.tolist() == [0.0, 1.0, 2.0]
    assert unused.grad is None


def disagrees(ranks, folder, *, odd):
    """Digests that one rank has otherwise."""
    ranks.agree({"colour": "red", "shape": "round"})
    ranks.agree({"colour": "red", "shape": "square" if ranks.rank in odd else "round"})


def fails(ranks, folder, *, who, error, where):
    """One rank raises while the others wait for it."""
    from recclr import errors

    if ranks.rank == who:
        time.sleep(0.2)
        raise getattr(errors, error, ValueError)("the third row is odd")
    if where == "collective":
        ranks.sum_(torch.ones(3), "a sum")
    else:
        ranks.meet("a long wait", 60.0)


def sleeps(ranks, folder, *, who, where):
    """One rank never arrives."""
    if where in ("lookup", "update"):
        settings = TrainSettings(table_optimizer="sgd", sharded_tables="all")
        make = table_maker(settings, ranks, "cpu")
        table = make(9, 4, std=1.0, generator=torch.Generator())
        if where == "update":
            table(torch.tensor([1, 8])).sum().backward()
    if ranks.rank == who:
        ranks.watch()
        time.sleep(30)
    if where == "collective":
        ranks.sum_(torch.ones(3), "a sum")
    elif where == "lookup":
        table(torch.tensor([1, 8]))
    elif where == "update":
        table.update(0.1)
    else:
        ranks.meet("a meeting")


def dies(ranks, folder, *, who):
    started = Path(folder) / "started"
    if ranks.rank == who:
        # Not before the other is past the start, which it would rightly name instead.
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    started.touch()
    ranks.sum_(torch.ones(3), "a sum")


def comes_late(ranks, folder):
    """Rank 1 comes when rank 0 has waited for most of its time, rank 2 never."""
    time.sleep((0.0, 2.0, 60.0)[ranks.rank])
    ranks.sum_(torch.ones(3), "a sum")


def cannot_share(ranks, folder, *, refused):
    """A system that refuses one of the calls on one rank: all go on without."""
    from recclr import host_memory

    def refuses(*arguments, **options):
        raise PermissionError(1, "not here")

    if ranks.rank == (1 if refused == "mmap" else 0):
        owner = host_memory.mmap if refused == "mmap" else host_memory.os
        setattr(owner, refused, refuses)
    open_before = len(os.listdir("/proc/self/fd"))
    assert host_memory.shared_by(ranks, 4096) is None
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert ranks.sum_(torch.ones(2), "a sum").tolist() == [2.0, 2.0]


def alone(function, folder, **arguments):
    """The same in this process."""
    globals()[function](ALONE, folder, **arguments)


def main(function, folder, timeout_s, arguments):
    """One rank, ending as the command line would."""
    import sys

    from recclr import notices
    from recclr.errors import PeerError, RecclrError
    from recclr.joining import joined

    torch.set_num_threads(1)
    # A rank that hangs or is dead will not say that it ends.
    notices._GRACE_S = 1.0
    try:
        with joined() as ranks:
            ranks.start("cpu", timeout_s)
            globals()[function](ranks, Path(folder), **arguments)
    except PeerError as error:
        sys.exit(error.exit_code)
    except RecclrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
