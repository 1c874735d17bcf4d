"""A run with other models beside its own: what is chosen, served, refused, and found again."""

import json
import shutil

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from recclr.blending import Vectors, compressed, laid_side_by_side, of_equal_spread
from recclr.load import load_model, load_ranker, load_run, ranker_of
from recclr.report.page import _log
from recclr.spectral import spectral_factors
from recclr.trials import with_seed

WEIGHTS = "blend.weights=[0.0, 0.3, 1.0]"


@pytest.fixture(scope="module")
def blended(recclr, small_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "blended"
    done = recclr(
        *("train", "--config", small_config, "--out", out, "--device", "cpu"),
        *("--set", "blend.spectral=5", "--set", "blend.spectral_item_power=0.4"),
        *("--set", WEIGHTS),
    )
    assert done.code == 0, done.err
    return out


def facts_of(folder):
    return json.loads((folder / "blend.json").read_text())


def test_the_best_weight_on_validation_is_taken(blended):
    facts = facts_of(blended / "selection")
    (tried,) = facts["tried"]
    assert set(tried) == {"0.0", "0.3", "1.0"}
    assert facts["parts"] == ["spectral"]
    assert facts["value"] == max(tried.values()) == tried[str(facts["weights"][0])]
    metrics = json.loads((blended / "metrics.json").read_text())
    assert metrics["valid"]["model"]["all"]["recall@10"] == pytest.approx(facts["value"])
    assert metrics["blend"]["weights"] == facts["weights"] == facts_of(blended)["weights"]
    # The model alone is as good as a run without the blend.
    assert tried["0.0"] <= facts["value"]


def test_what_is_served_is_the_refitted_model_beside_the_refitted_solution(blended):
    config, prepared, ranker = load_ranker(blended)
    _, _, model = load_run(blended)
    own = ranker_of(model, prepared.tensors.cutoff)
    users, items = spectral_factors(prepared.tensors.train, dim=5, item_power=0.4, seed=config.seed)
    users = torch.cat([users, torch.zeros(1, 5)])
    pair = [Vectors(own.user_vectors, own.item_vectors), Vectors(users, items)]
    (weight,) = facts_of(blended)["weights"]
    expected = laid_side_by_side([of_equal_spread(part) for part in pair], [1.0, weight])
    scores = ranker.user_vectors @ ranker.item_vectors.T
    torch.testing.assert_close(scores, expected.users @ expected.items.T, rtol=1e-3, atol=1e-4)


def test_every_command_ranks_with_what_was_judged(recclr, blended, tmp_path):
    metrics = json.loads((blended / "metrics.json").read_text())
    done = recclr("evaluate", blended, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["metrics"]["all"]["recall@10"]
    assert found == pytest.approx(metrics["test"]["model"]["all"]["recall@10"])
    _, prepared, ranker = load_ranker(blended)
    out = tmp_path / "rows.parquet"
    assert recclr("recommend", blended, "-k", "3", "--keep-seen", "--out", out).code == 0
    first = pl.read_parquet(out).filter(pl.col("rank") == 1)
    scores = ranker.user_vectors[:-1] @ ranker.item_vectors.T
    best = dict(zip(prepared.users.ids.to_list(), scores.max(1).values.tolist(), strict=True))
    found = {row["user_id"]: row["score"] for row in first.to_dicts()}
    assert len(found) > 50
    assert found == pytest.approx({user: best[user] for user in found})


def test_the_store_is_told_that_vectors_have_no_unit_length(recclr, blended, tmp_path):
    done = recclr("export", blended, "--to", f"parquet:{tmp_path / 'store'}", "--json")
    assert done.code == 0, done.err
    (manifest,) = (tmp_path / "store").rglob("manifest.json")
    stored = json.loads(manifest.read_text())
    assert (stored["similarity"], stored["embedding_dim"]) == (
        "dot",
        facts_of(blended)["embedding_dim"],
    )


def test_damaged_vectors_are_refused(recclr, blended, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(blended, copy)
    path = copy / "blend.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    done = recclr("recommend", copy)
    assert done.code == 4
    assert "blend.safetensors is missing or damaged" in done.err
    (copy / "blend.json").unlink()
    done = recclr("recommend", copy)
    assert done.code == 4
    assert "has no blend.json" in done.err


def test_another_run_stands_beside_and_the_whole_is_compressed(
    recclr, small_config, small_run, tmp_path
):
    out = tmp_path / "run"
    arguments = ("train", "--config", small_config, "--out", out, "--device", "cpu")
    changes = (f'blend.runs=["{small_run}"]', "blend.weights=[0.5]", "blend.compress=6", "seed=9")
    arguments += tuple(part for change in changes for part in ("--set", change))
    done = recclr(*arguments)
    assert done.code == 0, done.err
    _, prepared, model = load_run(out)
    own = ranker_of(model, prepared.tensors.cutoff)
    _, other, theirs = load_ranker(small_run)
    assert other.items.ids.equals(prepared.items.ids)
    pair = [
        Vectors(own.user_vectors, own.item_vectors),
        Vectors(theirs.user_vectors, theirs.item_vectors),
    ]
    whole = laid_side_by_side([of_equal_spread(part) for part in pair], [1.0, 0.5])
    expected = compressed(whole, 6)
    found = load_file(out / "blend.safetensors")
    assert found["items"].shape == (70, 6)
    torch.testing.assert_close(
        found["users"] @ found["items"].T,
        expected.users @ expected.items.T,
        rtol=1e-3,
        atol=1e-4,
    )
    # A second call finds everything done.
    before = (out / "metrics.json").read_bytes()
    assert recclr(*arguments, "--resume").code == 0
    assert (out / "metrics.json").read_bytes() == before


@pytest.fixture(scope="module")
def seeded(recclr, small_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "seeded"
    arguments = ("train", "--config", small_config, "--out", out, "--device", "cpu")
    arguments += ("--set", "blend.seeds=2")
    done = recclr(*arguments)
    assert done.code == 0, done.err
    return out, arguments


def test_models_of_further_seeds_are_served_as_one(recclr, seeded, small_config, tmp_path):
    out, arguments = seeded
    config, prepared, ranker = load_ranker(out)
    _, _, first = load_run(out)
    models = [first]
    for seed in (1, 2):
        own = with_seed(config, seed)
        models.append(load_model(own, prepared.tensors, out / f"seed-{seed}" / "checkpoints"))
    rankers = [ranker_of(model, prepared.tensors.cutoff) for model in models]
    even = [of_equal_spread(Vectors(r.user_vectors, r.item_vectors)) for r in rankers]
    whole = of_equal_spread(laid_side_by_side(even, [1.0, 1.0, 1.0]))
    torch.testing.assert_close(
        ranker.user_vectors @ ranker.item_vectors.T,
        whole.users @ whole.items.T,
        rtol=1e-3,
        atol=1e-4,
    )
    assert ranker.item_vectors.shape[1] == 3 * config.model.embedding_dim
    # Each is what a run of its seed would have come to.
    alone = tmp_path / "alone"
    seed = f"seed={config.seed + 2}"
    assert recclr(*arguments[:4], alone, *arguments[5:7], "--set", seed).code == 0
    _, _, model = load_run(alone)
    for name, weight in model.weights().items():
        assert torch.equal(weight, models[2].weights()[name]), name
    facts = facts_of(out / "selection")
    assert (facts["seeds"], facts["parts"], facts["weights"]) == (2, [], [])


def test_the_report_shows_the_training_of_the_first_seed(seeded):
    out, _ = seeded
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {line["seed"] for line in lines if "seed" in line} == {4, 5}
    shown = _log(out / "log.jsonl")
    of = [line for line in lines if line.get("kind") == "evaluation" and "seed" not in line]
    assert [line for line in shown if line.get("kind") == "evaluation"] == of


def test_seeds_alone_need_no_validation(recclr, small_config, tmp_path):
    out = tmp_path / "run"
    done = recclr(
        *("train", "--config", small_config, "--out", out, "--device", "cpu"),
        *("--set", "blend.seeds=1", "--set", "split.valid=0", "--set", "train.refit=false"),
    )
    assert done.code == 0, done.err
    assert (facts_of(out)["seeds"], facts_of(out)["value"]) == (1, None)


def test_a_run_of_several_seeds_resumes_where_it_was(recclr, seeded, tmp_path):
    out, arguments = seeded
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for gone in ("metrics.json", "blend.json", "seed-2/refit.json", "report.html"):
        (copy / gone).unlink()
    shutil.rmtree(copy / "seed-2" / "checkpoints")
    done = recclr(*arguments[:4], copy, *arguments[5:], "--resume")
    assert done.code == 0, done.err
    one, other = (load_file(folder / "blend.safetensors") for folder in (out, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_validation_nothing_can_choose_the_weights(recclr, small_config, tmp_path):
    out = tmp_path / "run"
    done = recclr(
        *("train", "--config", small_config, "--out", out, "--device", "cpu"),
        *("--set", "split.valid=0", "--set", "train.refit=false", "--set", "blend.spectral=4"),
    )
    assert done.code == 2
    assert "blend chooses its weights on validation" in done.err
    assert not out.exists()


def test_a_folder_that_is_no_run_is_refused_before_training(recclr, small_config, tmp_path):
    out = tmp_path / "run"
    done = recclr(
        *("train", "--config", small_config, "--out", out, "--device", "cpu"),
        *("--set", f'blend.runs=["{tmp_path / "nothing"}"]'),
    )
    assert done.code == 2
    assert "nothing" in done.err
    assert not out.exists()
