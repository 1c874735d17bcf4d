"""``recclr ablate``: rows equal single runs, differences are paired, and work goes on where it
stopped.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from recclr.ablation_parts import Part, derived_parts, parse_part, read_parts
from recclr.bootstrap import paired_differences
from recclr.commands import _print_rows
from recclr.config import load_config, parse_config, with_changes
from recclr.errors import ConfigError, DivergedError
from recclr.report.ablation import ablation_page
from recclr.run_folder import config_digest

SETTINGS = (
    *("--set", "train.epochs=1", "--set", "baselines.names=[]", "--set", "train.refit=false"),
    *("--set", "train.table_lr=0.05"),
)
PARTS = (
    *("--part", "dot=model.similarity=dot,loss.temperature=0.5"),
    *("--part", "no_category=-item.features.category"),
)


def config_of(**sections):
    return parse_config({"data": {"events": "events.parquet"}, **sections})


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a=loss.temperature=0.5", Part("a", {"loss.temperature": 0.5})),
        (
            "a b = user.mlp=[8, 4], -user.history",
            Part("a b", {"user.mlp": [8, 4]}, ("user.history",)),
        ),
        (
            "p=negatives.popularity={count = 8, alpha = 0.5},negatives.in_batch=false",
            Part(
                "p",
                {"negatives.popularity": {"count": 8, "alpha": 0.5}, "negatives.in_batch": False},
            ),
        ),
        ("t=train.decay=none", Part("t", {"train.decay": "none"})),
        (
            'c=item.features.x={kind = "text", column = "a,b"}',
            Part("c", {"item.features.x": {"kind": "text", "column": "a,b"}}),
        ),
    ],
)
def test_a_part_is_a_name_and_changes(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dot", "expected name=key=value"),
        ("=loss.temperature=1", "expected name=key=value"),
        ("a=loss.temperature", "'loss.temperature': expected key=value or -key"),
        ("a=", "nothing to change"),
        ("base=-user.history", "'base' is the row without changes"),
        ("a=seed=3", "seed is the same for all rows"),
        ("a=-split.valid", "split.valid is the same for all rows"),
        ("a=evaluate.select=ndcg@10", "evaluate.select is the same for all rows"),
        ("a=blend.seeds=2", "blend.seeds would change nothing"),
        ("a=-blend", "blend would change nothing"),
    ],
)
def test_parts_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_part(text)


def test_parts_from_a_file(tmp_path):
    path = tmp_path / "parts.toml"
    path.write_text('[parts]\nno_history = ["-user.history"]\ndot = ["model.similarity=dot"]\n')
    assert read_parts(path) == [
        Part("no_history", {}, ("user.history",)),
        Part("dot", {"model.similarity": "dot"}),
    ]
    for text, message in [
        ("[part]\n", r"expected a section \[parts\]"),
        ("[parts]\n", r"expected a section \[parts\]"),
        ('[parts]\na = "-user.history"\n', "a: expected an array of texts"),
        ("[parts\n", "expected TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_parts(path)


def names(config):
    return [part.name for part in derived_parts(config)]


ALWAYS = [
    "without loss.log_q_strength",
    "without loss.mask_known_positives",
    "without user.id.enabled",
    "without item.id.enabled",
    "random start",
]


def test_what_is_on_is_switched_off_in_turn():
    assert names(config_of()) == ALWAYS
    assert names(config_of(blend={"seeds": 2, "spectral": 8})) == ALWAYS
    config = config_of(
        user={
            "history": {"half_life_d": 3.0},
            "id": {"dropout": 0.2, "enabled": False},
            "mlp": [8],
        },
        item={"features": {"year": {"kind": "numeric", "dropout": 0.1}}},
        model={"init": "spectral", "embedding_dim": 8},
        loss={"second_temperature": 2.0, "temperature": 0.2, "log_q_strength": 0.0},
        negatives={"in_batch": True, "popularity": {"count": 4}, "uniform": 0},
        train={"patience": 3, "clip_norm": 1.0, "refit": True, "epochs": 3.0},
    )
    parts = {part.name: part for part in derived_parts(config)}
    assert list(parts) == [
        "without user.id.dropout",
        "without user.history",
        "without user.history.half_life_d",
        "without user.mlp",
        "without item.features.year",
        "without item.features.year.dropout",
        "without loss.second_temperature",
        "without negatives.in_batch",
        "without negatives.popularity",
        "without train.clip_norm",
        "without loss.mask_known_positives",
        "random start",
    ]
    assert parts["without user.history"].apply(config).user.history is None
    assert parts["without user.history.half_life_d"].apply(config).user.history.half_life_d is None
    assert parts["without item.features.year"].apply(config).item.features == {}
    assert parts["without user.mlp"].apply(config).user.mlp == ()
    learned = config_of(loss={"temperature": "learned"})
    fixed = {p.name: p for p in derived_parts(learned)}["fixed temperature"]
    assert fixed.apply(learned).loss.temperature == "auto"
    random = {p.name: p for p in derived_parts(config_of())}["random start"]
    assert random.apply(config_of()).model.init == "random"
    both = names(config_of(negatives={"in_batch": True}))
    assert {"without negatives.in_batch", "without negatives.uniform"} <= set(both)


def test_what_cannot_be_without_or_says_nothing_is_no_part():
    # With neither, there would be no negatives; with a full softmax, none are drawn.
    alone = names(config_of(negatives={"in_batch": True, "uniform": 0}))
    assert "without negatives.in_batch" not in alone
    full = names(config_of(loss={"kind": "full_softmax"}))
    assert not any("negatives" in name or "log_q" in name for name in full)


def test_every_derived_part_changes_the_configuration(small_config):
    config = load_config(small_config)
    parts = derived_parts(config)
    assert len({part.name for part in parts}) == len(parts) > 10
    for part in parts:
        assert part.apply(config) != config


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(small_config):
    def arguments(out, *extra, parts=PARTS):
        base = ("ablate", "--config", small_config, "--out", out, "--seeds", 2, "--device", "cpu")
        return (*base, *SETTINGS, *parts, *extra)

    return arguments


@pytest.fixture(scope="module")
def compared(recclr, command, tmp_path_factory):
    """A finished ablation, also on test."""
    out = tmp_path_factory.mktemp("ablations") / "finished"
    done = recclr(*command(out, "--test"))
    assert done.code == 0, done.err
    return out, done


def result(out):
    found = json.loads((out / "ablation.json").read_text())
    for row in found["rows"]:
        row.pop("seconds", None)
    return found


def test_a_row_is_what_single_runs_give(compared, recclr, small_config, tmp_path):
    out, _ = compared
    rows = {row["name"]: row for row in result(out)["rows"]}
    assert list(rows) == ["base", "dot", "no_category"]
    dot = ("--set", "model.similarity=dot", "--set", "loss.temperature=0.5")
    for name, extra, number in (("base", (), 0), ("dot", dot, 1)):
        run = tmp_path / name
        settings = (*SETTINGS, "--set", f"seed={3 + number}", *extra)
        base = ("train", "--config", small_config, "--out", run, "--device", "cpu")
        done = recclr(*base, *settings)
        assert done.code == 0, done.err
        metrics = json.loads((run / "metrics.json").read_text())
        for split in ("valid", "test"):
            single = metrics[split]["model"]
            assert rows[name]["by_seed"][split][number] == single["all"], split
        assert rows[name]["best_steps"][number] == metrics["selected_steps"]


def test_differences_are_those_of_users_over_the_mean_of_seeds(compared):
    out, _ = compared
    config = with_changes(load_config(out / "config.toml"), {"train.refit": False})
    dot = {"model.similarity": "dot", "loss.temperature": 0.5}
    files = {}
    for name, values in (("base", {}), ("dot", dot)):
        for seed in (3, 4):
            changed = with_changes(config, {**values, "seed": seed})
            path = out / "rows" / f"{config_digest(changed)[:16]}.safetensors"
            files[name, seed] = load_file(path)
    (row,) = (row for row in result(out)["rows"] if row["name"] == "dot")
    for split in ("valid", "test"):
        key = f"{split}/all/recall@10"
        by_user = sum(files["dot", seed][key] - files["base", seed][key] for seed in (3, 4)) / 2
        assert bool((by_user != 0).any())
        (expected,) = paired_differences(by_user[:, None], num_resamples=50, seed=3)
        assert row["differences"][split]["all"]["recall@10"] == pytest.approx(expected)
        value = sum(metrics["recall@10"] for metrics in row["by_seed"][split]) / 2
        assert row["metrics"][split]["all"]["recall@10"] == pytest.approx(value)
        assert torch.isclose(by_user.mean(), torch.tensor(expected["difference"]).double())


def test_what_is_shown(compared):
    out, done = compared
    for text in ("base", "dot", "no_category", "valid:", "test:", "mean over 2 seeds"):
        assert text in done.out
    page = (out / "report.html").read_text("utf-8")
    assert page.count("<svg") == 2
    for text in ("Rows, on validation", "Rows, on test", "By slice", "row minus base"):
        assert text in page
    assert "model.similarity = dot, loss.temperature = 0.5" in page
    assert "item.features.category at its default" in page


def test_the_slice_that_selects_comes_first(compared, capsys):
    out, _ = compared
    found = json.loads((out / "ablation.json").read_text())
    assert found["select_slice"] == "all"
    part = "warm_items"
    found["select_slice"] = part
    base, dot, _ = found["rows"]
    value = base["metrics"]["valid"][part]["recall@10"]
    assert value != base["metrics"]["valid"]["all"]["recall@10"]
    page = ablation_page(found, load_config(out / "config.toml"), "finished")
    assert f"on validation (warm items) of {value:.4f}" in page
    users = found["counts"]["valid"][part]["users"]
    assert f"validation (warm items): mean over 2 seeds and {users} users" in page
    _print_rows(found, "valid")
    shown = capsys.readouterr().out
    assert f"valid, {part}: {users} users" in shown
    assert f"{value:.4f}" in shown
    difference = dot["differences"]["valid"][part]["recall@10"]["difference"]
    assert f"{difference:+.4f}" in shown


@pytest.mark.slow
def test_it_goes_on_by_row_and_seed(compared, recclr, command, tmp_path, monkeypatch):
    out = tmp_path / "ablation"
    monkeypatch.setattr("recclr.files._reached", {})
    monkeypatch.setenv("RECCLR_FAULT", "train.step:40:term")
    stopped = recclr(*command(out, "--test"))
    monkeypatch.delenv("RECCLR_FAULT")
    assert stopped.code == 75, stopped.err
    kept = {path.name for path in (out / "rows").iterdir()}
    assert 0 < len(kept) < 6
    trained = []
    from recclr import trials

    once = trials.train_once
    monkeypatch.setattr(
        trials, "train_once", lambda *args, name: trained.append(name) or once(*args, name=name)
    )
    refused = recclr(*command(out, "--resume"))
    assert refused.code == 2
    assert "test = true there, false here" in refused.err
    assert recclr(*command(out, "--test", "--resume")).code == 0
    assert len(trained) == 6 - len(kept)
    assert not {f"{name}.safetensors" for name in trained} & kept
    assert result(out) == result(compared[0])
    again = recclr(*command(out, "--test", "--resume", "--json"))
    assert json.loads(again.out) == json.loads((out / "ablation.json").read_text())
    assert len(trained) == 6 - len(kept)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "typo=loss.temprature=1",
            "part 'typo': with loss.temprature = 1: loss.temprature: unknown",
        ),
        ("wide=train.epochs=-1", "epochs must be between"),
        ("same=model.embedding_dim=8", "part 'same' changes nothing"),
        ("gone=-user.nothing", "part 'gone' changes nothing"),
        ("dot=model.similarity=dot", "two parts are called 'dot'"),
        ("wild=negatives.uniform=0,negatives.in_batch=false", "no source of negatives is left"),
    ],
)
def test_wrong_parts_are_refused_before_anything_is_read(
    recclr, command, tmp_path, monkeypatch, part, message
):
    monkeypatch.setattr("recclr.ablation.read_data", None)
    done = recclr(*command(tmp_path / "ablation", "--part", part))
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "ablation").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--part", "few=data.k_core_user=12"), "part 'few' changes who is judged"),
        (("--part", "no=-item.features,item.id.enabled=false"), "part 'no': "),
        (("--set", "split.valid=0"), "ablate needs validation"),
        (("--test", "--set", "split.test=0"), "there is no test part"),
    ],
)
def test_what_shows_with_the_data_is_refused_before_anything_is_trained(
    recclr, command, tmp_path, extra, message
):
    done = recclr(*command(tmp_path / "ablation", *extra))
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "ablation" / "rows").exists()


def test_without_test_its_rows_are_not_looked_at(recclr, command, tmp_path, monkeypatch):
    from recclr.data.interactions import Log

    class Poison:
        def __getattribute__(self, name):
            raise AssertionError(f"test rows were looked at: {name}")

    cut = Log.split
    monkeypatch.setattr(
        Log, "split", lambda log, settings: replace(cut(log, settings), test=Poison())
    )
    part = ("--part", "dot=model.similarity=dot")
    out = tmp_path / "ablation"
    done = recclr(*command(out, "--seeds", 1, "--set", "blend.seeds=2", parts=part))
    assert done.code == 0, done.err
    assert list(result(out)["counts"]) == ["valid"]
    assert "what [blend] lays beside them is left out" in done.err
    with pytest.raises(AssertionError, match="test rows were looked at"):
        recclr(*command(tmp_path / "with", "--seeds", 1, "--test", parts=part))


def test_a_row_that_diverges_is_said_and_the_others_stand(recclr, command, tmp_path, monkeypatch):
    from recclr import trials

    once = trials.train_once

    def diverging(config, *arguments, **options):
        if config.model.similarity == "dot":
            raise DivergedError("the loss is nan at step 3")
        return once(config, *arguments, **options)

    monkeypatch.setattr(trials, "train_once", diverging)
    out = tmp_path / "ablation"
    done = recclr(*command(out, "--seeds", 1))
    assert done.code == 0, done.err
    base, dot, other = result(out)["rows"]
    assert dot["reason"] == "seed 3: the loss is nan at step 3"
    assert "metrics" in base
    assert "metrics" in other
    assert "diverged" in done.out
    assert "the loss is nan at step 3" in (out / "report.html").read_text("utf-8")
