"""Losses of pairs against loops over plain vectors, and trainings whose answers are forced."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError
from recclr.kernels import BitMask, PairMask
from recclr.objective import Objective
from recclr.pair_losses import Distances, Triplet, require_objective
from recclr.scoring import Scored, scored_loss
from recclr.settings import (
    LossSettings,
    ModelSettings,
    NegativesSettings,
    PopularitySettings,
    TowerSettings,
    TrainSettings,
)
from recclr.similarity import as_candidates, as_queries
from recclr.stepping import Stepper
from recclr.topk import EmbeddingRanker
from recclr.train import fit

B, U, C, M, D = 6, 13, 9, 3, 5
TEMPERATURE = 0.7
SETTINGS = {
    "bpr": LossSettings(kind="bpr", temperature=TEMPERATURE),
    "bce": LossSettings(kind="bce", temperature=TEMPERATURE, negative_weight=2.5),
    "bce, by default": LossSettings(kind="bce", temperature=TEMPERATURE),
    "ccl": LossSettings(kind="ccl", margin=0.2, negative_weight=7.0),
    "ccl, by default": LossSettings(kind="ccl"),
    "margin": LossSettings(kind="margin", margin=1.2),
    "margin, by default": LossSettings(kind="margin"),
    "triplet": LossSettings(kind="triplet", margin=0.4),
    "triplet, by default": LossSettings(kind="triplet"),
    "semi_hard": LossSettings(kind="triplet", margin=0.4, mining="semi_hard"),
    "distance_weighted": LossSettings(kind="triplet", margin=0.6, mining="distance_weighted"),
    "hardest": LossSettings(kind="triplet", margin=0.3, mining="hardest"),
}
COSINE = ("cosine",)
SIMILARITIES = {"ccl": COSINE, "distance_weighted": COSINE} | dict.fromkeys(
    ("margin", "triplet", "semi_hard", "hardest"), ("cosine", "euclidean")
)
CASES = [
    (name, similarity)
    for name in SETTINGS
    for similarity in SIMILARITIES.get(name.split(",")[0], ("cosine", "dot", "euclidean"))
]


def case_of(similarity, *, own=True, bits=False):
    """What the towers came to, as leaves, and what a step makes of it."""
    draws = torch.Generator().manual_seed(3)
    users = torch.randn(B, D, generator=draws).mul_(0.6).requires_grad_()
    items = torch.randn(U, D, generator=draws).mul_(0.6).requires_grad_()
    own_weights = torch.randn(B, M, generator=draws)
    own_weights[1] = -math.inf
    own_weights[2, 1:] = -math.inf
    # Row 3 has no shared negative left, row 1 has none of either.
    hidden = torch.rand(B, C, generator=draws) < 0.2
    hidden[1], hidden[3] = True, True
    positive_row = torch.tensor([0, 8, 3, 3, 5, 12])
    # The positive is no negative of its row, as no mask of a training leaves it.
    hidden |= positive_row[:, None] == torch.arange(C)
    own_row = torch.randint(U, (B, M), generator=draws)
    own_row = torch.where(own_row == positive_row[:, None], (own_row + 1) % U, own_row)
    mask = BitMask.from_dense(hidden) if bits else PairMask(*hidden.nonzero(as_tuple=True))
    weights = torch.randn(C, generator=draws)
    weights[4] = -math.inf
    embedded = as_candidates(items, similarity)
    scored = Scored(
        as_queries(users, similarity),
        embedded,
        torch.tensor(TEMPERATURE),
        torch.arange(B),
        torch.arange(B),
        positive_row,
        embedded[:C],
        weights,
        mask,
        torch.rand(B, generator=draws),
        own_row if own else None,
        own_weights if own else None,
        similarity=similarity,
    )
    return scored, hidden, users, items


def density(distance):
    """Of the distance between random points of the sphere in D dimensions, up to a constant."""
    return distance ** (D - 2) * (1 - distance**2 / 4) ** ((D - 3) / 2)


def mined(settings, pairs, positive):
    """(weight, distance) of the negatives that count."""
    margin = 0.2 if settings.margin is None else settings.margin
    if settings.mining == "semi_hard":
        return [(w, d) for w, d in pairs if positive < d < positive + margin]
    if settings.mining == "hardest":
        nearest = min((float(d.detach()) for _, d in pairs), default=None)
        return [(1.0, d) for _, d in pairs if float(d.detach()) == nearest][:1]
    if settings.mining == "distance_weighted":
        clipped = [min(max(float(d.detach()), 0.5), math.sqrt(2)) for _, d in pairs]
        return [(w / density(x), d) for (w, d), x in zip(pairs, clipped, strict=True)]
    return pairs


def loop(settings, scored, hidden, users, items, similarity):
    """The loss in float64, from vectors whose distances are taken as they are."""
    if similarity == "cosine":
        users, items = normalize(users), normalize(items)
    kind, total = settings.kind, 0.0
    weight = settings.negative_weight
    weight = {"bce": 1.0, "ccl": 150.0}.get(kind, 1.0) if weight is None else weight
    defaults = {"ccl": 0.9, "margin": 1.0, "triplet": 0.2}
    margin = defaults.get(kind) if settings.margin is None else settings.margin

    def distance(b, item):
        return (users[b] - items[item]).norm()

    def score(b, item):
        if similarity == "euclidean":
            return -(distance(b, item) ** 2)
        return users[b] @ items[item]

    def softplus(x):
        return torch.log1p(torch.exp(x))

    for b in range(B):
        negatives = [
            (math.exp(float(scored.log_weights[c])), c) for c in range(C) if not hidden[b, c]
        ]
        if scored.own_row is not None:
            exponents = scored.own_log_weights[b].tolist()
            rows = scored.own_row[b].tolist()
            negatives += [(math.exp(e), row) for e, row in zip(exponents, rows, strict=True)]
        negatives = [(w, item) for w, item in negatives if w > 0]
        positive, found = int(scored.positive_row[b]), 0.0
        if kind == "bpr":
            costs = [
                (w, softplus((score(b, j) - score(b, positive)) / TEMPERATURE))
                for w, j in negatives
            ]
        elif kind == "bce":
            found = softplus(-score(b, positive) / TEMPERATURE)
            costs = [(w, softplus(score(b, j) / TEMPERATURE)) for w, j in negatives]
        elif kind == "ccl":
            found = 1 - score(b, positive)
            costs = [(w, (score(b, j) - margin).clamp_min(0)) for w, j in negatives]
        elif kind == "margin":
            found = distance(b, positive) ** 2
            costs = [(w, (margin - distance(b, j)).clamp_min(0) ** 2) for w, j in negatives]
        else:
            near = distance(b, positive)
            pairs = [(w, distance(b, j)) for w, j in negatives]
            pairs = mined(settings, pairs, float(near.detach()))
            costs = [(w, (margin + near - d).clamp_min(0)) for w, d in pairs]
        if costs:
            whole = sum(w for w, _ in costs)
            found = found + weight * sum(w * cost for w, cost in costs) / whole
        total = total + float(scored.row_weights[b]) * found
    return total


@pytest.mark.parametrize(("name", "similarity"), CASES)
@pytest.mark.parametrize(("own", "bits"), [(True, False), (False, True)])
def test_loss_and_gradients_are_those_of_a_loop(name, similarity, own, bits):
    settings = SETTINGS[name]
    scored, hidden, users, items = case_of(similarity, own=own, bits=bits)
    found = scored_loss(scored, settings, bfloat16=True)
    assert found.dtype == torch.float32
    assert found.shape == ()
    ours = torch.autograd.grad(found, (users, items))
    exact = [leaf.detach().double().requires_grad_() for leaf in (users, items)]
    expected = loop(settings, scored, hidden, *exact, similarity)
    theirs = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    size = float(expected.detach()) + 1
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=2e-5 * size)


@pytest.mark.parametrize(
    ("mining", "counted"),
    [
        ("all", [0.5, 0.9, 1.0, 1.2, 1.6]),
        ("semi_hard", [0.9, 1.0]),
        ("hardest", [0.5]),
    ],
)
def test_the_negatives_that_mining_names(mining, counted):
    """A positive at distance 0.8, a margin of 0.3, negatives at distances written down."""
    distances = torch.tensor([[0.5, 0.9, 1.0, 1.2, 1.6]])
    function = Triplet(0.3, Distances("cosine"), mining, D)
    weights = function.selected(torch.ones(1, 5), 1 - distances**2 / 2, torch.tensor([[0.8]]))
    assert distances[weights > 0].tolist() == pytest.approx(counted)
    assert weights[weights > 0].tolist() == [1.0] * len(counted)


def test_a_row_without_a_semi_hard_negative_has_none():
    function = Triplet(0.3, Distances("cosine"), "semi_hard", D)
    scores = 1 - torch.tensor([[0.2, 1.9]]) ** 2 / 2
    assert function.selected(torch.ones(1, 2), scores, torch.tensor([[0.8]])).sum() == 0


@pytest.mark.parametrize("dim", [3, 64, 4096])
def test_near_negatives_weigh_by_how_rare_they_are_up_to_a_bound(dim):
    distances = torch.tensor([[0.1, 0.5, 0.9, 1.3, math.sqrt(2), 1.8, 2.0]])
    function = Triplet(0.3, Distances("cosine"), "distance_weighted", dim)
    found = function.selected(torch.ones(1, 7), 1 - distances**2 / 2, torch.tensor([[0.8]]))
    assert found.isfinite().all()
    assert found[0, 0] == pytest.approx(float(found[0, 1]), rel=1e-3)
    assert found[0, 4] == pytest.approx(float(found[0, 5]), rel=1e-3)
    assert found[0, 5] == pytest.approx(float(found[0, 6]), rel=1e-3)
    if dim == 3:
        # The density is d: on the sphere in three dimensions it grows linearly.
        torch.testing.assert_close(found[0, 1:5], 0.5 / distances[0, 1:5])
    else:
        assert (found[0, 1:4] >= found[0, 2:5]).all()
        assert found[0, 1] > 100 * found[0, 3]
    # Weights are relative, so that a row whose negatives are all far away has some too.
    far = function.selected(torch.ones(1, 1), torch.tensor([[-0.2]]), torch.tensor([[0.8]]))
    assert far.tolist() == [[1.0]]


NUM_USERS, NUM_ITEMS = 90, 18


def blocks():
    """Three blocks of six items; each user has all but one of its block, and that is the answer."""
    users = torch.arange(NUM_USERS).repeat_interleave(6)
    items = users % 3 * 6 + torch.arange(6).repeat(NUM_USERS)
    missing = items % 6 == users // 3 % 6
    log = EncodedLog(users[~missing].int(), items[~missing].int(), NUM_USERS, NUM_ITEMS)
    return log, items[missing]


LOG, ANSWERS = blocks()
PREPARED = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))


def model_of(loss, similarity="cosine", mlp=()):
    return build_model(
        PREPARED,
        user=TowerSettings(mlp=mlp),
        item=TowerSettings(mlp=mlp),
        model=ModelSettings(embedding_dim=8, similarity=similarity),
        loss=loss,
        seed=0,
    )


TRAINED = [
    ("bpr", "dot", {"temperature": 0.3}),
    ("bpr", "euclidean", {}),
    ("bce", "cosine", {"temperature": 0.2}),
    ("ccl", "cosine", {"margin": 0.0, "negative_weight": 5.0}),
    ("margin", "cosine", {}),
    ("margin", "euclidean", {}),
    ("triplet", "cosine", {"margin": 1.0}),
    ("triplet", "cosine", {"margin": 1.0, "mining": "semi_hard"}),
    ("triplet", "cosine", {"margin": 1.0, "mining": "distance_weighted"}),
    ("alignment_uniformity", "cosine", {"uniformity_weight": 0.2}),
    ("infonce", "euclidean", {"temperature": 0.5}),
]


@pytest.mark.parametrize(("kind", "similarity", "options"), TRAINED)
def test_a_training_finds_the_answers_that_are_forced(kind, similarity, options):
    loss = LossSettings(kind=kind, **options)
    negatives = NegativesSettings(in_batch=True, uniform=18)
    if kind == "alignment_uniformity":
        negatives = NegativesSettings()
    model, lr = model_of(loss, similarity), 0.03 if kind == "infonce" else 0.1
    fit(
        model,
        LOG,
        loss=loss,
        negatives=negatives,
        train=TrainSettings(batch_size=90, epochs=20, table_lr=lr),
    )
    ranker = EmbeddingRanker("model", *model.all_vectors(None))
    users = torch.arange(NUM_USERS)
    found = ranker.top_k(users, 1, seen=LOG.user_items()).item_idx.squeeze(1)
    assert torch.equal(found, ANSWERS)


def batch():
    rows = torch.arange(0, len(LOG), 7)
    weight = torch.linspace(0.5, 2.0, len(rows))
    return Batch(LOG.user_idx[rows].long(), LOG.item_idx[rows].long(), weight, None, None, None)


@pytest.mark.parametrize("name", [name for name in SETTINGS if "," not in name])
def test_a_step_of_fixed_shapes_has_the_same_loss_and_gradients(name):
    """What a CUDA graph would hold: bits for pairs, and spare places that weigh nothing."""
    loss, found = SETTINGS[name], []
    negatives = NegativesSettings(in_batch=True, uniform=7, popularity=PopularitySettings(count=5))
    for fixed in (False, True):
        model = model_of(loss).train()
        objective = Objective(LOG, loss, negatives, seed=3, fixed_shapes=fixed)
        objective.prepare(2)
        stats = objective(model, batch(), 2)
        stats.loss.backward()
        found.append([stats.loss.detach()])
        for table in model.tables().values():
            taken = table.take_gradient()
            assert taken is not None
            found[-1].append(torch.zeros_like(table.weight).index_add_(0, *taken))
    assert all(each.abs().sum() > 0 for each in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "similarity"), [("bce", "dot"), ("hardest", "euclidean")])
def test_towers_in_bfloat16_keep_a_float32_loss_near_by(name, similarity):
    loss = SETTINGS[name]
    model = model_of(loss, similarity, mlp=(7,)).train()
    draws = torch.Generator().manual_seed(0)
    for tower in (model.user_tower, model.item_tower):
        # A block starts as the identity, in which there is nothing to round.
        torch.nn.init.normal_(tower.blocks[0].fall.weight, generator=draws)
    exact, rough = (
        Objective(
            LOG, loss, NegativesSettings(in_batch=True, uniform=9), seed=3, bfloat16=bfloat16
        )(model, batch(), 0).loss.detach()
        for bfloat16 in (False, True)
    )
    assert rough.dtype == torch.float32
    assert 0 < abs(float(rough / exact) - 1) < 0.02


def test_negatives_of_any_mixture_estimate_the_mean_over_all_other_items():
    """Popular items come many times as often; what they weigh takes that back."""
    draws = torch.Generator().manual_seed(1)
    users = torch.arange(60).repeat(5)
    items = (torch.rand(300, generator=draws) ** 4 * 12).int()
    items[:12] = torch.arange(12)
    log = EncodedLog(users.int(), items, 60, 12)
    prepared = Prepared(log, FeatureTable(60), FeatureTable(12))
    settings = ModelSettings(embedding_dim=6, similarity="dot", init_std=2.0)
    losses = {}
    for strength in (0.0, 1.0):
        loss = LossSettings(kind="bce", temperature=1.0, log_q_strength=strength)
        model = build_model(
            prepared,
            user=TowerSettings(),
            item=TowerSettings(),
            model=settings,
            loss=loss,
            seed=1,
        ).train()
        with torch.no_grad():
            # Popular items score higher, so that their share of the mean shows.
            model.user_tower.parts[0].table.weight.abs_()
            liked = log.item_counts().float().log().unsqueeze(1) / 4
            model.item_tower.parts[0].table.weight[1:] = liked
        negatives = NegativesSettings(
            in_batch=True, uniform=4000, popularity=PopularitySettings(count=60_000, alpha=1.0)
        )
        rows = torch.arange(0, 300, 4)
        whole = Batch(users[rows], items[rows].long(), None, None, None, None)
        losses[strength] = float(
            Objective(log, loss, negatives, seed=2)(model, whole, 0).loss.detach()
        )
    with torch.no_grad():
        vectors = model.user_tower.parts[0].table.weight[1:], model.item_tower.parts[0].table.weight
        scores = vectors[0] @ vectors[1][1:].T
        known = torch.zeros(60, 12, dtype=torch.bool)
        known[users, items.long()] = True
        costs = torch.where(known, 0.0, torch.nn.functional.softplus(scores)).sum(1)
        costs = costs / (~known).sum(1)
        pulled = torch.nn.functional.softplus(-scores[users[rows], items[rows].long()])
        expected = float((pulled + costs[users[rows]]).mean())
    assert losses[1.0] == pytest.approx(expected, rel=0.01)
    assert abs(losses[0.0] / expected - 1) > 0.03


def test_a_learned_temperature_is_trained_where_there_is_one_and_is_1_elsewhere():
    learned = LossSettings(kind="bpr", temperature="learned")
    assert model_of(learned).log_temperature.requires_grad
    for kind in ("ccl", "margin", "triplet", "alignment_uniformity"):
        model = model_of(LossSettings(kind=kind))
        assert not model.log_temperature.requires_grad
        assert model.temperature() == 1
    scored, *_ = case_of("cosine")
    warm = replace(scored, temperature=torch.tensor(0.2))
    for name, settings in SETTINGS.items():
        same = torch.equal(scored_loss(scored, settings), scored_loss(warm, settings))
        assert same == (settings.kind not in ("bpr", "bce")), name


@pytest.mark.parametrize(
    ("loss", "similarity", "negatives", "num_rows", "words"),
    [
        (LossSettings(kind="ccl"), "dot", {}, 9, "kind = 'ccl' needs .*'cosine', found 'dot'"),
        (LossSettings(kind="margin"), "dot", {}, 9, "'cosine' or 'euclidean', found 'dot'"),
        (SETTINGS["distance_weighted"], "euclidean", {}, 9, "mining = 'distance_weighted' needs"),
        (SETTINGS["distance_weighted"], "dot", {}, 9, "kind = 'triplet' needs"),
        (LossSettings(kind="alignment_uniformity"), "euclidean", {}, 9, "found 'euclidean'"),
        (LossSettings(kind="alignment_uniformity"), "cosine", {"uniform": 3}, 9, "negatives"),
        (LossSettings(kind="alignment_uniformity"), "cosine", {}, 1, "at least 2, found 1"),
    ],
)
def test_what_contradicts_itself_is_refused(loss, similarity, negatives, num_rows, words):
    settings = NegativesSettings(**negatives)
    with pytest.raises(ConfigError, match=words):
        require_objective(loss, settings, similarity, num_rows=num_rows)
    require_objective(LossSettings(), settings, similarity, num_rows=num_rows)
    if num_rows > 1:
        with pytest.raises(ConfigError, match=words):
            Stepper(
                model_of(loss, similarity),
                LOG,
                loss=loss,
                negatives=settings,
                train=TrainSettings(batch_size=num_rows),
                seed=0,
            )
