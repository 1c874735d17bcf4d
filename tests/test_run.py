"""A whole run on a small log, and every command that starts from its folder."""

import json
from html import escape

import polars as pl
import pytest

import recclr.data.reading as reading
import recclr.data.sharding as sharding
from recclr.config import load_config


def test_the_run_folder_is_that_of_the_contract(small_run):
    for name in (
        "config.toml",
        "environment.json",
        "data.json",
        "vocabulary/users.parquet",
        "vocabulary/items.parquet",
        "checkpoints/LAST",
        "log.jsonl",
        "metrics.json",
        "report.html",
    ):
        assert (small_run / name).is_file(), name
    last = small_run / "checkpoints" / (small_run / "checkpoints/LAST").read_text().strip()
    assert (last / "tensors.safetensors").is_file()
    assert not list(small_run.rglob(".*tmp*"))
    assert not (small_run / ".lock").exists()


def test_metrics_hold_model_and_baselines_with_definitions_and_counts(small_run):
    metrics = json.loads((small_run / "metrics.json").read_text())
    assert 0 <= metrics["test"]["model"]["all"]["recall@10"] <= 1
    assert set(metrics["test"]) == {"model", "popularity", "recent_popularity", "item_knn"}
    assert set(metrics["valid"]) == set(metrics["test"])
    assert metrics["definitions"]["recall@k"].startswith("hits")
    assert metrics["counts"]["test"]["all"]["candidates"] == 70
    low, high = metrics["intervals"]["test"]["model"]["all"]["recall@10"]
    assert low <= metrics["test"]["model"]["all"]["recall@10"] <= high
    assert "popularity" in metrics["differences"]["test"]


def test_a_slice_selects_checkpoint_and_baselines(small_config, tmp_path, recclr):
    """On held-out items, where the figure of the slice is another than that of everybody."""
    part = "cold_items_among_cold"
    out, asked = tmp_path / "run", ("--config", small_config, "--set", "split.by=items")
    done = recclr("train", *asked, "--out", out, "--set", f"evaluate.select_slice={part}")
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    model, select = metrics["valid"]["model"], load_config(small_config).evaluate.select
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    judged = [e["metrics"][select] for e in events if e["kind"] == "evaluation"]
    assert max(judged) == pytest.approx(model[part][select], abs=1e-12)
    assert model[part][select] != model["all"][select]
    assert f"test, {part}: {metrics['counts']['test'][part]['users']} users" in done.out
    shown = f"{metrics['test']['model'][part][select]:.4f}"
    assert f"(cold items, among cold candidates), the model&#x27;s {select} is {shown}" in (
        (out / "report.html").read_text("utf-8")
    )
    for choice in json.loads((out / "baselines.json").read_text())["choices"]:
        found = metrics["valid"][choice["name"]][part][select]
        assert choice["score"] == pytest.approx(found, abs=1e-12)


def test_a_slice_that_nobody_is_in_is_refused_before_training(small_config, tmp_path, recclr):
    asked = ("--set", "split.by=items", "--set", "evaluate.select_slice=head")
    done = recclr("train", "--config", small_config, "--out", tmp_path / "run", *asked)
    assert done.code == 2
    assert "evaluate.select_slice = 'head': nobody of validation is in that slice" in done.err
    assert not (tmp_path / "run").exists()


def test_the_stored_configuration_is_complete_and_equal(small_run, small_config):
    assert load_config(small_run / "config.toml") == load_config(small_config)


def test_vocabulary_counts_train_and_validation_after_a_refit(small_run):
    data = json.loads((small_run / "data.json").read_text())
    counts = data["split"]["counts"]
    items = pl.read_parquet(small_run / "vocabulary" / "items.parquet")
    count = next(name for name in items.columns if "count" in name)
    assert items[count].sum() == counts["train"]["rows"] + counts["valid"]["rows"]


def test_log_has_steps_and_evaluations_of_both_stages(small_run):
    events = [json.loads(line) for line in (small_run / "log.jsonl").read_text().splitlines()]
    kinds = {(event["stage"], event["kind"]) for event in events}
    assert {("selection", "step"), ("selection", "evaluation"), ("refit", "step")} <= kinds
    assert ("refit", "evaluation") not in kinds


def test_rows_leave_memory_when_there_is_little_and_nothing_else_changes(
    recclr, small_run, small_config, tmp_path, monkeypatch, no_power_cut
):
    # Enough for baselines, which hold the log, but not for training, which gets half of it.
    rows = json.loads((small_run / "prepared.json").read_text())["counts"]["train_rows"]
    free = rows * sharding._RESIDENT_BYTES
    monkeypatch.setattr(sharding, "available_bytes", lambda: free)
    out = tmp_path / "run"
    done = recclr("train", "--config", small_config, "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    notes = [(event["stage"], event["text"]) for event in events if event["kind"] == "note"]
    assert [stage for stage, _ in notes] == ["selection", "refit"]
    assert all(f"from files (0 MB for now, in {out})" in text for _, text in notes)
    assert {path.name for path in out.iterdir()} == {path.name for path in small_run.iterdir()}
    ours, theirs = ((folder / "metrics.json").read_text() for folder in (out, small_run))
    assert json.loads(ours) == json.loads(theirs)
    # Enough memory, as in the run that it is compared with: no word of files.
    assert "from files" not in (small_run / "log.jsonl").read_text()


def test_a_log_that_is_read_piece_by_piece_gives_the_same_run(
    recclr, small_run, small_config, tmp_path, monkeypatch, no_power_cut
):
    monkeypatch.setattr(reading, "available_bytes", lambda: 5 * reading._ROW_BYTES * 97)
    monkeypatch.setattr(reading, "_LEAST_ROWS", 97)
    out = tmp_path / "run"
    done = recclr("train", "--config", small_config, "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    assert f"are read piece by piece and lie in files without a name in {out}" in done.err
    kept, expected = (json.loads((f / "data.json").read_text()) for f in (out, small_run))
    assert kept["notes"] == expected["notes"]
    assert {path.name for path in out.iterdir()} == {path.name for path in small_run.iterdir()}
    ours, theirs = ((folder / "metrics.json").read_text() for folder in (out, small_run))
    assert json.loads(ours) == json.loads(theirs)
    judged = recclr("evaluate", out, "--json")
    assert json.loads(judged.out)["metrics"] == json.loads(ours)["test"]["model"]


def test_evaluate_repeats_the_run(recclr, small_run):
    done = recclr("evaluate", small_run, "--json")
    found = json.loads(done.out)["metrics"]
    assert found == json.loads((small_run / "metrics.json").read_text())["test"]["model"]
    shown = recclr("evaluate", small_run, "--ks", "3,7")
    assert (done.code, shown.code) == (0, 0)
    assert "recall@7" in shown.out


def test_a_refitted_model_is_not_judged_on_validation(recclr, small_run):
    done = recclr("evaluate", small_run, "--split", "valid")
    assert done.code == 2
    assert "refitted" in done.err


def test_recommend_leaves_out_what_users_have_and_says_who_is_unknown(
    recclr, small_run, small_data, tmp_path
):
    out = tmp_path / "best.parquet"
    assert recclr("recommend", small_run, "-k", "4", "--out", out).code == 0
    table = pl.read_parquet(out)
    assert table.columns == ["user_id", "item_id", "rank", "score"]
    cutoff = json.loads((small_run / "data.json").read_text())["split"]["cutoffs"]["test"]
    had = pl.read_parquet(small_data / "events.parquet").filter(pl.col("timestamp") < cutoff)
    assert not len(table.join(had, on=["user_id", "item_id"]))
    some = recclr("recommend", small_run, "--users", "u01,nobody", "-k", "3", "--json")
    rows = json.loads(some.out)
    assert [row["user_id"] for row in rows] == ["u01"] * 3 + ["nobody"] * 3
    assert "1 of 2 users are unknown" in some.err


def test_similar_never_names_the_item_itself(recclr, small_run):
    done = recclr("similar", small_run, "-k", "3", "--items", "sku-01,sku-02", "--json")
    rows = json.loads(done.out)
    assert [row["item_id"] for row in rows] == ["sku-01"] * 3 + ["sku-02"] * 3
    assert all(row["item_id"] != row["similar_id"] for row in rows)


@pytest.mark.parametrize("kind", ["parquet", "lancedb"])
def test_export_answers_as_recommend_does(recclr, small_run, tmp_path, kind):
    from recclr.export import recommend_from_store

    done = recclr("export", small_run, "--to", f"{kind}:{tmp_path / kind}")
    assert done.code == 0, done.err
    assert "verified" in done.out
    asked = recclr("recommend", small_run, "--keep-seen", "-k", "10", "--json")
    expected = pl.DataFrame(json.loads(asked.out))
    users = expected["user_id"].unique(maintain_order=True)
    found = recommend_from_store(f"{kind}:{tmp_path / kind}", users, k=10)
    assert found["item_id"].to_list() == expected["item_id"].to_list()
    assert found["score"].to_list() == pytest.approx(expected["score"].to_list(), abs=1e-5)


def test_check_tells_steps_and_split(recclr, small_config):
    done = recclr("check", "--config", small_config, "--json")
    found = json.loads(done.out)
    assert found["split"]["by"] == "time"
    assert found["split"]["counts"]["train"]["rows"] > 0
    assert recclr("check", "--config", small_config).code == 0


def test_check_of_a_log_on_the_disk_tries_steps_on_its_last_rows(
    recclr, small_config, tmp_path, monkeypatch
):
    asked = ("check", "--config", small_config, "--batch-sizes", "--device", "cpu", "--json")
    expected = json.loads(recclr(*asked).out)
    monkeypatch.setattr(reading, "available_bytes", lambda: 5 * reading._ROW_BYTES * 97)
    monkeypatch.setattr(reading, "_LEAST_ROWS", 97)
    monkeypatch.setattr("recclr.fitting._SOME_ROWS", 300)
    done = recclr(*asked)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {trial["batch_size"] for trial in found.pop("batch_sizes")} >= {256}
    for figures in (found, expected):
        figures.pop("fastest_batch_size")
    expected.pop("batch_sizes")
    notes = found.pop("notes")
    (said,) = [note for note in notes if "piece by piece" in note]
    assert [note for note in notes if note != said] == expected.pop("notes")
    assert found == expected


def test_resuming_a_finished_run_changes_nothing(recclr, small_run, small_config):
    before = {p: p.read_bytes() for p in small_run.rglob("*") if p.is_file()}
    done = recclr("train", "--config", small_config, "--out", small_run, "--resume")
    assert done.code == 0
    assert {p: p.read_bytes() for p in small_run.rglob("*") if p.is_file()} == before


def test_a_run_without_validation_test_or_baselines(recclr, small_config, tmp_path):
    done = recclr(
        *("train", "--config", small_config, "--out", tmp_path / "run"),
        *("--set", "split.valid=0", "--set", "split.test=0", "--set", "train.refit=false"),
        *("--set", "baselines.names=[]", "--set", "train.epochs=1"),
    )
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "test" not in metrics
    assert "valid" not in metrics
    assert "Nothing was held out" in (tmp_path / "run" / "report.html").read_text()
    assert recclr("recommend", tmp_path / "run", "-k", "2").code == 0


@pytest.fixture(scope="module")
def plain_run(recclr, small_data, tmp_path_factory):
    """A run on the events alone, without a refit."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain.toml").write_text(
        f"""
        data.events = "{small_data}/events.parquet"
        model.embedding_dim = 8
        negatives.uniform = 32
        train = {{ batch_size = 64, epochs = 4 }}
        evaluate = {{ ks = [10, 70], select = "recall@10", num_bootstrap = 0 }}
        baselines.names = ["popularity"]
        """
    )
    done = recclr("train", "--config", folder / "plain.toml", "--out", folder / "run")
    assert done.code == 0, done.err
    return folder / "run"


def mean_reciprocal_rank(model, had, relevant):
    """The slow way: every user, every item, one after the other."""
    users = {user: idx for idx, user in enumerate(model.prepared.users.ids)}
    items = list(model.prepared.items.ids)
    found = []
    for user, wanted in relevant.items():
        scores = model.ranker.item_vectors @ model.ranker.user_vectors[users.get(user, -1)]
        order = sorted(range(len(items)), key=lambda idx: (-float(scores[idx]), idx))
        ranked = [items[idx] for idx in order if items[idx] not in had.get(user, ())]
        places = [place for place, item in enumerate(ranked, 1) if item in wanted]
        found.append(1 / places[0] if places else 0.0)
    return sum(found) / len(found)


def items_of(*logs):
    found = {}
    for log in logs:
        for user, item in log.events.select("user_id", "item_id").iter_rows():
            found.setdefault(user, set()).add(item)
    return found


def test_without_a_refit_test_leaves_out_what_users_had_in_validation(
    recclr, plain_run, small_data
):
    from recclr import TwoTower, read

    train, valid, test = read(str(small_data / "events.parquet")).split_by_time()
    model = TwoTower.load(plain_run)
    metrics = json.loads((plain_run / "metrics.json").read_text())
    found = metrics["test"]["model"]
    expected = mean_reciprocal_rank(model, items_of(train, valid), items_of(test))
    assert found["all"]["mrr@70"] == pytest.approx(expected, abs=1e-9)
    assert mean_reciprocal_rank(model, items_of(train), items_of(test)) < expected - 1e-6
    again = recclr("evaluate", plain_run, "--json")
    assert json.loads(again.out)["metrics"] == found
    on_valid = recclr("evaluate", plain_run, "--split", "valid", "--json")
    assert json.loads(on_valid.out)["metrics"] == metrics["valid"]["model"]


def test_without_a_refit_the_model_knows_the_ids_of_validation(plain_run, small_data):
    from recclr import read

    train, valid, _ = read(str(small_data / "events.parquet")).split_by_time()
    for side in ("user", "item"):
        table = pl.read_parquet(plain_run / "vocabulary" / f"{side}s.parquet")
        name = next(column for column in table.columns if column.endswith("id"))
        known = {i for log in (train, valid) for i in log.events[f"{side}_id"]}
        assert set(table[name]) == known
    assert not (plain_run / "selection").exists()


def test_every_ranker_is_announced_and_counted_to_its_last_user(small_config, tmp_path):
    from recclr.config import load_config
    from recclr.run import train_run

    events = []
    config = load_config(small_config, ["train.epochs=1", 'baselines.names=["popularity"]'])
    train_run(config, tmp_path / "run", device="cpu", on_event=events.append)
    stages = [event["name"] for event in events if event["kind"] == "stage"]
    assert stages == ["read", "selection", "baselines", "refit", "test", "report"]
    last = max(n for n, e in enumerate(events) if e == {"kind": "stage", "name": "test"})
    judged = [
        (e["name"], e["done"], e["total"])
        for e in events[last:]
        if e["kind"] == "judging" and "done" in e
    ]
    counts = json.loads((tmp_path / "run" / "metrics.json").read_text())["counts"]
    total = counts["test"]["all"]["users"]
    assert judged == [
        (name, done, total) for name in ("model", "popularity") for done in (0, total)
    ]


@pytest.fixture(scope="module")
def sick_run(recclr, small_data, tmp_path_factory):
    """A user tower that knows nothing of its users, and a temperature that wants beyond its bound.

    The one feature is of categories that are all too rare, so that everybody has the unknown one.
    """
    folder = tmp_path_factory.mktemp("sick")
    (folder / "sick.toml").write_text(
        f"""
        data = {{ events = "{small_data}/events.parquet", users = "{small_data}/users.parquet" }}
        model.embedding_dim = 8
        loss = {{ temperature = "learned", initial_temperature = 0.5, max_temperature = 0.5 }}
        negatives.uniform = 32
        train = {{ batch_size = 64, epochs = 4, dense_lr = 0.01 }}
        evaluate = {{ ks = [10], select = "recall@10", num_bootstrap = 0 }}
        baselines.names = []
        [user]
        id.enabled = false
        features.country = {{ kind = "categorical", min_count = 1000 }}
        """
    )
    done = recclr("train", "--config", folder / "sick.toml", "--out", folder / "run")
    assert done.code == 0, done.err
    return folder / "run", done


def test_causes_are_named_in_log_terminal_metrics_and_report(sick_run):
    out, done = sick_run
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    warned = [(e["stage"], e["cause"]) for e in events if e["kind"] == "warning"]
    names = ["constant_user_tower", "temperature_at_upper_bound"]
    assert warned == [(stage, name) for stage in ("selection", "final") for name in names]
    looked = [e for e in events if e["kind"] == "monitor" and e["stage"] == "selection"]
    assert [e["epoch"] for e in looked] == [1.0, 2.0, 3.0, 4.0]
    monitors = json.loads((out / "metrics.json").read_text())["monitors"]
    assert [cause["cause"] for cause in monitors["causes"]] == names
    assert monitors["figures"]["user_variance"] < 1e-6
    assert monitors["figures"]["temperature"] == pytest.approx(0.5)
    page = (out / "report.html").read_text()
    for cause in monitors["causes"]:
        assert f"warning: {cause['text']}; {cause['advice']}" in done.err
        assert escape(f"The final model: {cause['text']}.") in page
    assert "Effective rank by epoch" in page


def test_a_sound_model_has_figures_and_no_causes(small_run):
    monitors = json.loads((small_run / "metrics.json").read_text())["monitors"]
    assert monitors["causes"] == []
    assert monitors["figures"]["item_rank"] <= monitors["figures"]["item_rank_limit"] == 8
    assert "alignment" in monitors["figures"]
    assert "effective rank" in monitors["definitions"]
    events = [json.loads(line) for line in (small_run / "log.jsonl").read_text().splitlines()]
    assert "warning" not in {event["kind"] for event in events}
    stored = json.loads((small_run / "selection" / "selection.json").read_text())["evaluations"]
    logged = [e for e in events if e["kind"] == "monitor" and e["stage"] == "selection"]
    assert [e["monitors"] for e in stored] == [e["figures"] for e in logged]
