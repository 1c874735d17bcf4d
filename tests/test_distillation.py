"""A teacher's part of the loss: what it is, whom it teaches, and what a student learns from it."""

from dataclasses import replace

import pytest
import torch

from recclr.blending import Vectors
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.distillation import Teacher
from recclr.kernels.distilled import total_distillation_loss_reference
from recclr.settings import (
    DistillationSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.stepping import Stepper

NUM_USERS, NUM_ITEMS, DIM = 40, 60, 8


def settings_of(**options):
    return DistillationSettings(run="somewhere", **options)


def truth(seed=0):
    draws = torch.Generator().manual_seed(seed)
    users = torch.randn(NUM_USERS + 1, 3, generator=draws)
    return Vectors(users, torch.randn(NUM_ITEMS, 3, generator=draws))


def random_log(seed=1, num_rows=300):
    draws = torch.Generator().manual_seed(seed)
    users = torch.randint(NUM_USERS, (num_rows,), generator=draws)
    items = torch.randint(NUM_ITEMS, (num_rows,), generator=draws)
    pairs = torch.unique(users * NUM_ITEMS + items)
    return EncodedLog((pairs // NUM_ITEMS).int(), (pairs % NUM_ITEMS).int(), NUM_USERS, NUM_ITEMS)


def stepper_of(log, teacher, *, loss=None, negatives=None, **train):
    ids = TowerSettings()
    loss = loss or LossSettings(temperature=0.2)
    prepared = Prepared(log, FeatureTable(NUM_USERS, {}), FeatureTable(NUM_ITEMS, {}))
    model = build_model(
        prepared,
        user=ids,
        item=ids,
        model=ModelSettings(embedding_dim=DIM, init="random"),
        loss=loss,
        seed=3,
    ).train()
    return Stepper(
        model,
        log,
        loss=loss,
        negatives=negatives or NegativesSettings(in_batch=False, uniform=30),
        train=TrainSettings(batch_size=37, **train),
        seed=4,
        teacher=teacher,
    )


def loss_of(stepper, step=2):
    return stepper.objective.backward(stepper.model, stepper.source.step(step))


def test_the_loss_is_a_mean_of_the_logs_and_the_teachers():
    log = random_log()
    of = {
        weight: loss_of(stepper_of(log, Teacher.of(truth(), settings_of(weight=weight))))
        for weight in (0.0, 0.3, 1.0)
    }
    alone = loss_of(stepper_of(log, None))
    assert not alone.auxiliary
    assert float(of[0.0].loss) == pytest.approx(float(alone.loss))
    told = float(of[0.3].auxiliary["distillation"])
    assert told > 0.1
    assert float(of[1.0].loss) == pytest.approx(told)
    assert float(of[0.3].loss) == pytest.approx(0.7 * float(alone.loss) + 0.3 * told, rel=1e-5)
    # Of such a loss no bound on what the log tells would follow.
    assert of[0.3].information is None
    assert alone.information is not None


@pytest.mark.parametrize(
    "negatives",
    [
        NegativesSettings(in_batch=False, uniform=30),
        NegativesSettings(in_batch=True, uniform=11),
    ],
)
def test_whom_the_teacher_does_not_know_it_does_not_teach(negatives):
    log, vectors = random_log(), truth()
    vectors.users[5], vectors.items[9] = 0.0, 0.0
    teacher = Teacher.of(vectors, settings_of(temperature=0.7))
    stepper = stepper_of(log, teacher, negatives=negatives)
    stats = loss_of(stepper)
    (batch,) = stepper.source.step(2).values()
    candidates = stepper.objective._candidates(batch, 2)
    total = 0.0
    model = stepper.model
    users, items = model.all_vectors(None)
    even = users[batch.user_idx] / model.temperature()
    for row, user in enumerate(batch.user_idx.tolist()):
        kept = [place for place, item in enumerate(candidates.candidate_idx.tolist()) if item != 9]
        if user == 5:
            continue
        of = candidates.candidate_idx[kept]
        total += float(
            total_distillation_loss_reference(
                even[row : row + 1],
                items[of],
                teacher.users[user : user + 1],
                teacher.items[of],
                candidates.log_weights[kept],
                torch.ones(1),
            )
        )
    assert 5 in batch.user_idx.tolist()
    assert float(stats.auxiliary["distillation"]) == pytest.approx(
        total / len(batch.user_idx), rel=1e-4
    )


def test_a_student_learns_what_only_the_teacher_knows():
    """The log is noise; all that there is to know is in the teacher, of 3 dimensions."""
    log, vectors = random_log(), truth()
    teacher = Teacher.of(vectors, settings_of(weight=0.95))
    known = torch.zeros(NUM_USERS, NUM_ITEMS, dtype=torch.bool)
    known[log.user_idx.long(), log.item_idx.long()] = True
    wanted = (teacher.users[:-1] @ teacher.items.T).masked_fill(known, -torch.inf).topk(5).indices
    shares = {}
    for name, each in (("taught", teacher), ("alone", None)):
        stepper = stepper_of(log, each, epochs=60, table_lr=0.03)
        for step in range(stepper.num_steps):
            stepper(step)
        users, items = stepper.model.all_vectors(None)
        found = (users[:-1] @ items.T).masked_fill(known, -torch.inf).topk(5).indices
        shares[name] = float((found[:, :, None] == wanted[:, None]).any(2).float().mean())
    assert shares["taught"] > 0.85
    assert shares["alone"] < 0.2  # 5 of some 52 are a tenth


def test_the_temperature_is_in_deviations_whatever_the_scale():
    log, vectors = random_log(), truth()
    told = [
        float(loss_of(stepper_of(log, Teacher.of(each, settings_of()))).auxiliary["distillation"])
        for each in (vectors, Vectors(vectors.users * 40.0, vectors.items / 3.0))
    ]
    assert told[0] == pytest.approx(told[1], rel=1e-4)
    users, items = Teacher.of(vectors, settings_of(temperature=0.5)).to("cpu").users[:-1], None
    items = Teacher.of(vectors, settings_of(temperature=0.5)).items
    assert float((users @ items.T).std(1).mean()) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("options", [{"kind": "full_softmax"}, {"symmetric": 0.4}])
def test_a_teacher_stands_beside_other_objectives(options):
    teacher = Teacher.of(truth(), settings_of(weight=0.5))
    full = options.get("kind") == "full_softmax"
    negatives = NegativesSettings(in_batch=True) if full else None
    loss = LossSettings(temperature=0.2, **options)
    both = loss_of(stepper_of(random_log(), teacher, loss=loss, negatives=negatives))
    alone = loss_of(stepper_of(random_log(), None, loss=loss, negatives=negatives))
    told = float(both.auxiliary["distillation"])
    assert float(both.loss) == pytest.approx(0.5 * float(alone.loss) + 0.5 * told, rel=1e-5)


def test_batches_of_a_step_add_their_parts():
    teacher = Teacher.of(truth(), settings_of(weight=0.5))
    stepper = stepper_of(random_log(), teacher, accumulate=3)
    stats = loss_of(stepper, step=1)
    alone = loss_of(stepper_of(random_log(), None, accumulate=3), step=1)
    told = float(stats.auxiliary["distillation"])
    assert float(stats.loss) == pytest.approx(0.5 * float(alone.loss) + 0.5 * told, rel=1e-5)


def test_settings_out_of_range_are_refused():
    for options in ({"weight": 1.1}, {"weight": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            settings_of(**options)
    with pytest.raises(ValueError, match="folder of a finished run"):
        replace(settings_of(), run="")
