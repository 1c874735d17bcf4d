"""Mistakes of a user end with one clear message and the right exit code, and lose nothing."""

import shutil
import subprocess
import sys

import polars as pl
import pytest

from recclr.files import require_space

pytestmark = pytest.mark.usefixtures("no_power_cut")

QUICK = (
    *("--set", "train.epochs=1", "--set", 'baselines.names=["popularity"]'),
    *("--set", "evaluate.num_bootstrap=0"),
)


@pytest.fixture
def place(small_data, small_config, tmp_path):
    """A copy of the small log with its configuration, free to be spoiled."""
    shutil.copytree(small_data, tmp_path / "data")
    text = small_config.read_text("utf-8").replace(str(small_data), str(tmp_path / "data"))
    (tmp_path / "run.toml").write_text(text, "utf-8")
    return tmp_path


def rewrite(place, change, name="events"):
    path = place / "data" / f"{name}.parquet"
    change(pl.read_parquet(path)).write_parquet(path)


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(recclr, place, code, *words, arguments=()):
    before = snapshot(place)
    done = recclr(
        *("train", "--config", place / "run.toml", "--out", place / "run", *QUICK, *arguments)
    )
    assert done.code == code, done.err
    message = " ".join(done.err.split())
    assert message.count("error: ") == 1
    assert "Traceback" not in done.err
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    now = snapshot(place)
    assert {path: now.get(path) for path in before} == before
    assert not (place / "run" / "metrics.json").exists()


def test_misnamed_column(recclr, place):
    rewrite(place, lambda events: events.rename({"item_id": "itemid"}))
    refused(recclr, place, 3, "events.parquet", "'item_id'", "did you mean 'itemid'?")


def test_refused_data_leave_no_folder_in_the_way_of_the_next_try(recclr, place):
    rewrite(place, lambda events: events.rename({"item_id": "itemid"}))
    refused(recclr, place, 3, "'item_id'")
    assert not (place / "run").exists()
    (place / "run").mkdir()
    refused(recclr, place, 3, "'item_id'")
    assert list((place / "run").iterdir()) == []
    rewrite(place, lambda items: items.rename({"item_id": "itemid"}), "items")
    done = recclr(
        *("train", "--config", place / "run.toml", "--out", place / "run", *QUICK),
        *("--set", "data.columns.item=itemid"),
    )
    assert done.code == 0, done.err


def test_missing_feature_column(recclr, place):
    rewrite(place, lambda items: items.rename({"category": "categry"}), "items")
    refused(recclr, place, 3, "'category'", "did you mean 'categry'?", "item.features.category")


def test_column_of_a_condition(recclr, place):
    refused(
        *(recclr, place, 3, "data.where.evnt", "did you mean 'event'?"),
        arguments=("--set", 'data.where={evnt = "not null"}'),
    )


def test_unknown_key(recclr, place):
    path = place / "run.toml"
    path.write_text(path.read_text().replace("batch_size", "batchsize"))
    refused(recclr, place, 2, "run.toml", "train.batchsize", "did you mean 'batch_size'?")


def test_wrong_type(recclr, place):
    refused(
        *(recclr, place, 2, "train.batch_size", "integer", "'many'"),
        arguments=("--set", "train.batch_size=many"),
    )


def test_value_out_of_range(recclr, place):
    refused(
        *(
            recclr,
            place,
            2,
            "run.toml: model",
            "embedding_dim must be between 1 and 8192",
            "found 0",
        ),
        arguments=("--set", "model.embedding_dim=0"),
    )


def test_several_mistakes_are_told_at_once(recclr, place):
    refused(
        *(recclr, place, 2, "embeding_dim", "train.epochs"),
        arguments=("--set", "model.embeding_dim=8", "--set", "train.epochs=soon"),
    )


def test_no_toml(recclr, place):
    (place / "run.toml").write_text("seed = = 3")
    refused(recclr, place, 2, "run.toml", "no valid TOML")


def test_configuration_that_is_not_there(recclr, tmp_path):
    done = recclr("train", "--config", tmp_path / "no.toml", "--out", tmp_path / "run")
    assert done.code == 2
    assert "no.toml" in done.err
    assert not (tmp_path / "run").exists()


def test_file_that_is_not_there(recclr, place):
    (place / "data" / "events.parquet").unlink()
    refused(recclr, place, 3, "events.parquet")


def test_empty_file(recclr, place):
    (place / "data" / "events.parquet").write_bytes(b"")
    refused(recclr, place, 3, "events.parquet", "empty (0 bytes)")


def test_file_without_rows(recclr, place):
    rewrite(place, lambda events: events.clear())
    refused(recclr, place, 3, "events.parquet", "no rows")


def test_truncated_parquet(recclr, place):
    path = place / "data" / "events.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(recclr, place, 3, "events.parquet", "damaged")


def test_empty_split(recclr, place):
    rewrite(place, lambda events: events.unique("user_id", keep="first", maintain_order=True))
    refused(
        *(recclr, place, 3, "the validation part is empty", "split.valid"),
        arguments=(
            "--set",
            "split.by=leave_last",
            "--set",
            "split.valid=1",
            "--set",
            "split.test=1",
        ),
    )


def test_one_user(recclr, place):
    rewrite(place, lambda events: events.with_columns(user_id=pl.lit("u01")))
    refused(recclr, place, 3, "1 user", "at least 2 users", "data.columns.user")


def test_one_item(recclr, place):
    rewrite(place, lambda events: events.with_columns(item_id=pl.lit("sku-01")))
    refused(recclr, place, 3, "1 item", "2 items", "data.columns.item")


def test_ids_as_floats(recclr, place):
    number = pl.col("item_id").str.slice(4).cast(pl.Float64)
    rewrite(place, lambda events: events.with_columns(item_id=number))
    refused(recclr, place, 3, "'item_id'", "floats", "data.id_type")


def test_mixed_time_units(recclr, place):
    early = pl.int_range(pl.len()) < pl.len() // 2
    time = pl.when(early).then(pl.col("timestamp") * 1000).otherwise(pl.col("timestamp"))
    rewrite(place, lambda events: events.with_columns(timestamp=time))
    refused(recclr, place, 3, "'timestamp'", "mixes time units", "data.time_unit")


def test_missing_ids_are_refused_and_can_be_dropped(recclr, place):
    user = pl.when(pl.int_range(pl.len()) < 3).then(None).otherwise(pl.col("user_id"))
    rewrite(place, lambda events: events.with_columns(user_id=user))
    refused(recclr, place, 3, "3 bad rows", "'user_id'", "data.bad_rows")
    done = recclr(
        *("train", "--config", place / "run.toml", "--out", place / "dropped", *QUICK),
        *("--set", "data.bad_rows=drop", "--set", "data.max_bad_share=0.05"),
    )
    assert done.code == 0, done.err
    assert len(pl.read_parquet(place / "dropped" / "quarantine.parquet")) == 3


def test_k_larger_than_the_catalogue_is_no_mistake(recclr, place):
    done = recclr(
        *("train", "--config", place / "run.toml", "--out", place / "run", *QUICK),
        *("--set", "evaluate.ks=[10, 500]"),
    )
    assert done.code == 0, done.err
    assert "evaluate.ks has 500, but the catalogue has 70 items" in done.err
    best = recclr("recommend", place / "run", "--users", "u01", "-k", "500", "--json")
    assert best.code == 0
    assert 1 < best.out.count('"rank"') <= 70


def test_unknown_store_is_told_before_the_training(recclr, place):
    refused(
        *(recclr, place, 2, "lancedbx", "did you mean lancedb:store?"),
        arguments=("--set", 'export=["lancedbx:store"]'),
    )
    assert not (place / "run").exists()


def test_finished_and_foreign_folders_are_left_alone(recclr, small_config, small_run, tmp_path):
    before = snapshot(small_run)
    done = recclr("train", "--config", small_config, "--out", small_run)
    assert (done.code, "finished run" in done.err) == (2, True)
    assert snapshot(small_run) == before
    (tmp_path / "thesis.txt").write_text("precious")
    done = recclr("train", "--config", small_config, "--out", tmp_path)
    assert (done.code, "not empty" in done.err) == (2, True)
    done = recclr("train", "--config", small_config, "--out", tmp_path / "thesis.txt")
    assert (done.code, "expected a folder" in done.err) == (2, True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_no_space(recclr, place, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    refused(recclr, place, 5, "space")


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [("enospc", 5, "No space left"), ("eacces", 2, "permission")],
)
def test_a_disk_that_fails_on_the_way(recclr, place, monkeypatch, action, code, words):
    monkeypatch.setenv("RECCLR_FAULT", f"files.write:3:{action}")
    refused(recclr, place, code, words)


def test_commands_on_what_is_no_run(recclr, tmp_path):
    for arguments in (
        ("recommend", tmp_path),
        ("similar", tmp_path),
        ("evaluate", tmp_path),
        ("report", tmp_path),
        ("export", tmp_path, "--to", "parquet:x"),
    ):
        done = recclr(*arguments)
        assert done.code == 2, arguments
        assert "no run folder" in done.err
        assert "Traceback" not in done.err


def test_damaged_checkpoint(recclr, small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/tensors.safetensors"):
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 2] ^= 1
        path.write_bytes(blob)
    done = recclr("recommend", tmp_path / "run")
    assert done.code == 4, done.err
    assert "tensors.safetensors" in done.err
    assert "SHA-256" in done.err


def test_divergence_has_a_code_and_a_cause(recclr, place):
    refused(
        *(recclr, place, 6, "the loss is", "at step", "temperature"),
        arguments=(
            *("--set", "train.table_optimizer=sgd", "--set", "train.table_lr=1e4"),
            *("--set", "model.similarity=dot", "--set", "loss.temperature=1e-4"),
            *("--set", "train.epochs=3"),
        ),
    )


def test_wrong_arguments(recclr, small_run, small_config, tmp_path):
    for arguments, word in (
        (("train",), "--config"),
        (("frobnicate",), "frobnicate"),
        (("check",), "EVENTS"),
        (("evaluate", small_run, "--ks", "ten"), "10,20"),
        (("evaluate", small_run, "--split", "train"), "test or valid"),
        (("recommend", small_run, "--users", "a", "--users-from", "b"), "not both"),
        (("recommend", small_run, "--users", " "), "names none"),
        (("recommend", small_run, "--out", tmp_path / "x.xlsx"), ".parquet"),
        (("export", small_run, "--to", "ftp:x"), "lancedb"),
        (("export", small_run, "--to", "parquet:x", "--name", "../x"), "name"),
        (("train", "--config", small_config, "--out", tmp_path / "r", "--device", "tpu"), "tpu"),
        (("train", "--config", small_config, "--out", tmp_path / "r", "--set", "x"), "--set"),
    ):
        done = recclr(*arguments)
        assert done.code == 2, (arguments, done.err)
        assert word in done.err, (arguments, done.err)
        assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_null_ids_are_refused(recclr, small_run, tmp_path):
    pl.DataFrame({"user_id": ["u01", None]}).write_parquet(tmp_path / "users.parquet")
    done = recclr("recommend", small_run, "--users-from", tmp_path / "users.parquet")
    assert done.code == 3
    assert "1 of 2 ids are null" in done.err


def test_check_refuses_what_training_would(recclr, small_config):
    for settings, word in (
        (['export=["ftp:store"]'], "no kind of store"),
        (["model.init_from=nowhere"], "pretrain-items"),
        (["item.id.enabled=false", "item.features={}"], "item.id.enabled = true"),
        (
            ["negatives.in_batch=true", "negatives.uniform=0", "train.batch_size=1"],
            "at least 2 rows",
        ),
        (["negatives.in_batch=true", "negatives.counts=streaming"], "time cells"),
        (["train.cuda_graph=true"], "train.cuda_graph"),
        (["blend.spectral=4", "split.valid=0", "train.refit=false"], "weights on validation"),
    ):
        chosen = [word for setting in settings for word in ("--set", setting)]
        done = recclr("check", "--config", small_config, *chosen)
        assert done.code == 2, (settings, done.err)
        assert word in done.err


def test_what_an_unfinished_run_serves_is_said_to_be_that(recclr, small_run, tmp_path):
    out = shutil.copytree(small_run, tmp_path / "run")
    ask = ("recommend", out, "--users", "u01")
    assert "not finished" not in recclr(*ask).err
    (out / "metrics.json").unlink()
    mined = tmp_path / "mined.parquet"
    for command in (ask, ("mine", out, "--out", mined, "--depth", "9", "--skip", "1")):
        done = recclr(*command)
        assert done.code == 0, done.err
        assert "is not finished" in done.err


def test_events_of_items_that_nobody_knows_are_no_zero(recclr, small_run, small_data, tmp_path):
    rows = pl.read_parquet(small_data / "events.parquet").head(1)
    rows.with_columns(item_id=pl.lit("other")).write_parquet(tmp_path / "other.parquet")
    done = recclr("evaluate", small_run, "--events", tmp_path / "other.parquet")
    assert done.code == 2
    assert "none of the 1 held-out rows has an item" in done.err


def test_unknown_ids(recclr, small_run):
    done = recclr("similar", small_run, "--items", "sku-01,sku-9999")
    assert done.code == 3
    assert "'sku-9999'" in done.err


def test_the_installed_command_says_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "recclr", "recommend", "no-such-folder"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no-such-folder is no run folder")


def test_space_is_asked_for_where_the_folder_will_be(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
