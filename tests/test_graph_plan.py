"""Which trainings can be captured as a CUDA graph; decided without one."""

import pytest
import torch
from torch import nn

import recclr.graph_plan as module
from recclr.building import build_model
from recclr.data.log import CategoricalColumn, Csr, EncodedLog, FeatureTable, Prepared, RaggedColumn
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError
from recclr.graph_plan import plan_graph
from recclr.settings import (
    AugmentSettings,
    ExplicitSettings,
    FeatureSettings,
    HistorySettings,
    IdSettings,
    LossSettings,
    MinedSettings,
    ModelSettings,
    NegativesSettings,
    QueueSettings,
    SelfSupervisionSettings,
    TowerSettings,
    TrainSettings,
    ViewSettings,
)
from recclr.statistics import DAY_S
from recclr.towers import TwoTower
from recclr.train import fit

NUM_USERS, NUM_ITEMS, DIM, NUM_ROWS = 9, 17, 4, 51


def prepared():
    draws = torch.Generator().manual_seed(0)
    log = EncodedLog(
        torch.randint(NUM_USERS, (NUM_ROWS,), generator=draws).int(),
        torch.randint(NUM_ITEMS, (NUM_ROWS,), generator=draws).int(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        timestamp=torch.arange(NUM_ROWS) * DAY_S,
    )
    # At most two words of five.
    lengths = torch.tensor([0, 1, 2]).repeat(6)[:NUM_ITEMS]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    columns = {
        "kind": CategoricalColumn(torch.randint(4, (NUM_ITEMS,), generator=draws).int(), 4),
        "words": RaggedColumn(Csr(offsets, torch.arange(int(offsets[-1])).int() % 5), 5),
    }
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS, columns))


DATA = prepared()
IDS = (TowerSettings(), TowerSettings())
RICH = (
    TowerSettings(history=HistorySettings(length=3, use="both"), mlp=(7,), dropout=0.1),
    TowerSettings(
        id=IdSettings(as_of=True, dropout=0.1),
        features={
            "kind": FeatureSettings(kind="categorical"),
            "words": FeatureSettings(kind="multi_hot", dropout=0.2),
            "recent": FeatureSettings(kind="statistics", windows_d=(9.0,)),
        },
        mlp=(5,),
    ),
)
WORDS = TowerSettings(features={"words": FeatureSettings(kind="multi_hot")})
LISTS, HISTORY = (IDS[0], WORDS), (TowerSettings(history=HistorySettings(length=3)), IDS[1])
BOTH = (TowerSettings(history=HistorySettings(length=3, use="both")), WORDS)

# Rates that stand still at half of what they are, and that rise to it.
STEADY, RAMPED = (
    (TowerSettings(augment=AugmentSettings(noise=0.1, start=0.5, end=end)), IDS[1])
    for end in (0.5, 1.0)
)


def model_of(towers=IDS, *, dim=DIM, similarity="cosine"):
    return build_model(
        DATA,
        user=towers[0],
        item=towers[1],
        model=ModelSettings(embedding_dim=dim, similarity=similarity),
        loss=LossSettings(),
        seed=0,
    )


VIEWS = SelfSupervisionSettings(item=ViewSettings())


class Others(nn.Module):
    """A tower of somebody's own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(NUM_ITEMS, DIM)

    def forward(self, rows):
        return self.embedding(rows.idx)


def own_tower():
    return TwoTower(
        model_of().user_tower,
        Others(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        similarity="cosine",
        loss=LossSettings(),
    )


def planned(model, said, *, device="cuda", ranks=ALONE, wanted="auto", loss=None, **options):
    views = options.pop("self_supervision", None)
    return plan_graph(
        model,
        loss=loss or LossSettings(),
        negatives=options.pop("negatives", NegativesSettings(in_batch=True, uniform=7)),
        batch_size=options.pop("batch_size", 12),
        train=TrainSettings(cuda_graph=wanted, **options),
        device=torch.device(device),
        ranks=ranks,
        emit=said.append,
        self_supervision=views,
    )


@pytest.fixture
def with_triton(monkeypatch):
    """As on a GPU, where PyTorch brings Triton along."""
    monkeypatch.setattr(
        module,
        "why_not_triton",
        lambda dim: None if dim <= 256 else "Triton's kernels are for 1 to 256 dimensions",
    )


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (own_tower, {}, "item_tower is a Others"),
        (model_of, {"ranks": Ranks(0, 2)}, "several processes"),
        (model_of, {"chunk_size": 5}, "train.chunk_size and"),
        (model_of, {"accumulate": 2}, "train.accumulate run"),
        (
            model_of,
            {"negatives": NegativesSettings(in_batch=True, queue=QueueSettings())},
            "queue fills step by",
        ),
        (
            model_of,
            {"negatives": NegativesSettings(in_batch=True, within="kind")},
            "within compares the groups",
        ),
        (lambda: model_of(dim=300), {}, "256 dimensions"),
        (lambda: model_of(RAMPED), {}, "user_tower.augment changes its rates from step to step"),
        (model_of, {"self_supervision": VIEWS}, "self_supervision draws"),
        (
            model_of,
            {"negatives": NegativesSettings(in_batch=True, mined=MinedSettings())},
            "draw for each row",
        ),
        (
            model_of,
            {
                "negatives": NegativesSettings(
                    in_batch=True, explicit=ExplicitSettings(events=("hide",))
                )
            },
            "draw for each row",
        ),
        (model_of, {"loss": LossSettings(top_k=3)}, "loss.top_k, symmetric and positives make"),
        (model_of, {"loss": LossSettings(symmetric=0.5)}, "shapes that differ"),
        (model_of, {"loss": LossSettings(positives=2)}, "shapes that differ"),
        (lambda: model_of(dim=255, similarity="euclidean"), {}, "256 dimensions"),
        (model_of, {"loss": LossSettings(kind="alignment_uniformity")}, "pairs of one user"),
    ],
    ids=[
        "own tower",
        "ranks",
        "chunks",
        "accumulated",
        "queue",
        "within",
        "wide",
        "ramped",
        "views",
        "mined",
        "explicit",
        "top k",
        "symmetric",
        "positives",
        "lifted",
        "uniformity",
    ],
)
def test_what_stands_against_capture_is_said_or_refused(with_triton, model, options, words):
    said = []
    assert planned(model_of(), said)
    assert planned(model_of(RICH), said)
    assert planned(model_of(STEADY), said)
    assert planned(model_of(dim=254, similarity="euclidean"), said)
    assert planned(model_of(), said, loss=LossSettings(kind="bpr"))
    # What has a fixed shape may be captured.
    fixed = {"available": True, "counts": "streaming", "queue": QueueSettings(size=0)}
    assert planned(model_of(), said, negatives=NegativesSettings(uniform=7, **fixed))
    assert said == []
    assert not planned(model(), said, **options)
    (event,) = said
    assert (event["kind"], event["captured"]) == ("graph", False)
    with pytest.raises(ConfigError, match=f"train.cuda_graph = true, but .*{words}"):
        planned(model(), said, wanted=True, **options)
    assert not planned(model(), said, wanted=False, **options)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("options", "num_candidates"),
    [
        ({"negatives": NegativesSettings(in_batch=True, uniform=3), "batch_size": 8}, 11),
        # No more than there are items, of which a full softmax has all.
        ({"negatives": NegativesSettings(in_batch=True, uniform=3000), "batch_size": 8}, 17),
        ({"loss": LossSettings(kind="full_softmax"), "batch_size": 8}, 17),
    ],
    ids=["drawn", "all drawn", "full softmax"],
)
def test_a_mask_that_takes_too_much_stands_against_capture(
    with_triton, monkeypatch, options, num_candidates
):
    said = []
    monkeypatch.setattr(module, "_MAX_MASK_BYTES", num_candidates)
    assert planned(model_of(), said, **options)
    monkeypatch.setattr(module, "_MAX_MASK_BYTES", num_candidates - 1)
    assert not planned(model_of(), said, **options)
    assert f"each of 8 rows and {num_candidates} candidates" in said[0]["reason"]


MOST = int(DATA.train.user_counts().max())


@pytest.mark.parametrize(
    ("towers", "dim", "num_bytes"),
    [
        # 12 users, three items each, a vector of four float32 for each of those.
        (HISTORY, 4, 12 * 3 * 4 * 4),
        # No history is longer than the longest.
        ((TowerSettings(history=HistorySettings(length=50)), IDS[1]), 4, 12 * MOST * 4 * 4),
        # All 17 items, two words each, as int64.
        (LISTS, 4, 17 * 2 * 8),
        # Gradients of the six rows that there are, in float32.
        (LISTS, 40, 6 * 40 * 4),
        # Both words of every item of every history.
        (BOTH, 2, 12 * 3 * 2 * 8),
    ],
    ids=["history", "longest history", "lists", "gradients", "lists in a history"],
)
def test_padding_that_takes_too_much_stands_against_capture(
    with_triton, monkeypatch, towers, dim, num_bytes
):
    said = []
    monkeypatch.setattr(module, "_MAX_PADDED_BYTES", num_bytes)
    assert planned(model_of(towers, dim=dim), said)
    monkeypatch.setattr(module, "_MAX_PADDED_BYTES", num_bytes - 1)
    assert not planned(model_of(towers, dim=dim), said)
    assert f"would take {num_bytes:,} bytes" in said[0]["reason"]


def test_on_a_cpu_there_is_nothing_to_say():
    said = []
    assert not planned(model_of(), said, device="cpu")
    assert said == []
    with pytest.raises(ConfigError, match="cuda_graph = true, but training is on cpu"):
        fit(
            model_of(),
            DATA.train,
            loss=LossSettings(),
            negatives=NegativesSettings(in_batch=True, uniform=7),
            train=TrainSettings(cuda_graph=True),
        )


def test_without_triton_steps_are_not_captured(monkeypatch):
    monkeypatch.setattr("recclr.kernels.logsumexp._has_triton", lambda: False)
    said = []
    assert not planned(model_of(), said)
    assert said[0]["reason"] == "Triton is not installed"
