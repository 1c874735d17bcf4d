"""Spaces from files and configurations; every mistake is refused before anything is trained."""

import pytest

from recclr.config import load_config, parse_config, with_changes
from recclr.errors import ConfigError
from recclr.settings import ChoiceSettings, RangeSettings, TuneSettings
from recclr.tune.space import Space, default_space, read_space


def config_of(**sections):
    return parse_config({"data": {"events": "events.parquet"}, **sections})


def read(tmp_path, text, config=None):
    path = tmp_path / "space.toml"
    path.write_text(text)
    return read_space(path, config or config_of())


def test_a_file_says_parameters_in_its_order_and_how_to_search(tmp_path):
    space, settings = read(
        tmp_path,
        """
        [space]
        "train.table_lr" = { low = 0.001, high = 0.1, log = true }
        loss.log_q_strength = { low = 0.0, high = 1.0, step = 0.25 }
        [space.negatives]
        uniform = { low = 8, high = 64, int = true, step = 8 }
        [space.model]
        similarity = { choices = ["cosine", "dot"] }
        [space.user]
        mlp = { choices = [[], [16], [16, 8]] }
        [tune]
        trials = 12
        eta = 2
        epochs = [0.5, 1.0]
        rows = [1.0, 1.0]
        """,
    )
    assert space.parameters == {
        "train.table_lr": RangeSettings(low=0.001, high=0.1, log=True),
        "loss.log_q_strength": RangeSettings(low=0.0, high=1.0, step=0.25),
        "negatives.uniform": RangeSettings(low=8, high=64, int=True, step=8),
        "model.similarity": ChoiceSettings(choices=("cosine", "dot")),
        "user.mlp": ChoiceSettings(choices=([], [16], [16, 8])),
    }
    assert next(iter(space.parameters)) == "train.table_lr"
    assert settings == TuneSettings(trials=12, eta=2, epochs=(0.5, 1.0), rows=(1.0, 1.0))


REFUSED = {
    '"train.table_rl" = { low = 0.1, high = 1 }': "table_rl: unknown key; did you mean 'table_lr",
    '"train.table_lr" = { low = 0.1, hihg = 1 }': "hihg: unknown key; did you mean 'high'",
    '"train.table_lr" = { low = 0.1 }': r"table_lr.high: ",
    '"train.table_lr" = { low = 0.1, high = 0.1 }': "low must be below high",
    '"train.table_lr" = { low = 0, high = 1, log = true }': "needs a low above 0, found 0",
    '"train.table_lr" = { low = 1, high = 2, log = true, step = 1 }': "exclude each other",
    '"train.table_lr" = { low = -1.0, high = 1.0 }': "table_lr must be between 0.0 and",
    '"train.table_lr" = 0.1': r"expected \{ low, high \} or \{ choices \}, found 0.1",
    '"negatives.uniform" = { low = 8, high = 64 }': "for whole numbers, add int = true",
    '"negatives.uniform" = { low = 8.5, high = 64, int = true }': "int = true needs whole numbers",
    '"model.similarity" = { choices = ["cosine", "cos"] }': "'dot' or 'euclidean', found 'cos'",
    '"model.similarity" = { choices = ["dot"] }': "at least two values",
    '"model.similarity" = { choices = ["dot", "dot"] }': "a value twice",
    '"split.valid" = { low = 0.1, high = 0.2 }': "split.valid cannot be tuned: all trials",
    '"seed" = { low = 1, high = 9, int = true }': "seed cannot be tuned",
    '"blend.seeds" = { low = 1, high = 9, int = true }': "blend.seeds would change nothing",
    '"data.k_core_user" = { low = 1, high = 9, int = true }': "data.k_core_user cannot be tuned",
    '"evaluate.select" = { choices = ["recall@20", "recall@50"] }': "evaluate.select cannot be",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_tuned_is_refused(tmp_path, line):
    with pytest.raises(ConfigError, match=REFUSED[line]) as caught:
        read(tmp_path, f"[space]\n{line}\n")
    assert "space.toml" in str(caught.value)


def test_how_data_are_encoded_cannot_be_tuned(tmp_path):
    config = config_of(item={"features": {"title": {"kind": "text", "buckets": 100}}})
    line = '"item.features.title.{}" = {{ low = {}, high = {}, int = {} }}'
    with pytest.raises(ConfigError, match="changes how the data are encoded"):
        read(tmp_path, "[space]\n" + line.format("buckets", 100, 200, "true"), config)
    space, _ = read(tmp_path, "[space]\n" + line.format("dropout", 0.0, 0.5, "false"), config)
    assert list(space.parameters) == ["item.features.title.dropout"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\[space\] names no key; give one, such as"),
        ("[spaces]\n", r"unknown section 'spaces'; expected \[space\] and \[tune\]"),
        ("[space\n", "expected TOML"),
        ('[space]\n"seed" = { choices = [1, 2] }\n[tune]\ntrial = 3\n', "seed cannot be tuned"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot read the space"):
        read_space(tmp_path / "absent.toml", config_of())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trial = 3", "tune.trial: unknown key; did you mean 'trials'"),
        ("trials = 0", "trials must be between 1 and 100000, found 0"),
        ("eta = 1", "eta must be between 2 and 1000, found 1"),
        ("bracket = 0", "bracket must be between 1"),
        ("startup = 0", "startup must be between 1"),
        ("epochs = [1.0]", "one share for each rung, found 1 and 3"),
        ("epochs = [0.5, 0.2, 1.0]", r"epochs must be shares .* found \[0.5, 0.2, 1.0\]"),
        ("rows = [0.0, 0.5, 1.0]", "rows must be shares above 0"),
        ("rows = [0.1, 0.5, 0.9]", "end with 1.0"),
    ],
)
def test_ways_to_search_that_make_no_sense(tmp_path, line, message):
    known = '[space]\n"loss.log_q_strength" = { low = 0.0, high = 1.0 }\n[tune]\n'
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, known + line)


def test_the_default_space_follows_the_configuration():
    plain = default_space(config_of(train={"table_lr": 0.01}, negatives={"uniform": 100}))
    assert plain.parameters == {
        "loss.temperature": RangeSettings(low=0.02, high=0.5, log=True),
        "loss.log_q_strength": RangeSettings(low=0.0, high=1.0),
        "negatives.uniform": RangeSettings(low=25, high=400, log=True, int=True),
        "user.dropout": RangeSettings(low=0.0, high=0.5),
        "train.table_lr": RangeSettings(low=0.002, high=0.05, log=True),
        "model.init": ChoiceSettings(choices=("random", "spectral")),
    }
    rich = default_space(
        config_of(
            user={"history": {}, "id": {"enabled": False}},
            item={"features": {"year": {"kind": "numeric"}}, "id": {"enabled": False}},
            loss={"kind": "full_softmax", "second_temperature": 2.0},
        )
    )
    assert set(rich.parameters) == {
        "loss.temperature",
        "loss.second_temperature",
        "user.dropout",
        "user.history.dropout",
        "train.table_lr",
    }
    assert rich.parameters["loss.temperature"].high == 0.5
    dot = default_space(config_of(model={"similarity": "dot"}))
    assert dot.parameters["loss.temperature"].high == 5.0
    with_ids = default_space(
        config_of(user={"history": {}}, item={"features": {"year": {"kind": "numeric"}}})
    )
    assert {"user.id.dropout", "item.id.dropout"} <= set(with_ids.parameters)


def test_every_value_of_the_default_space_is_a_valid_setting(small_config, tmp_path):
    config = load_config(small_config)
    for key, parameter in default_space(config).parameters.items():
        choices = isinstance(parameter, ChoiceSettings)
        for value in parameter.choices if choices else (parameter.low, parameter.high):
            with_changes(config, {key: int(value) if not choices and parameter.int else value})


@pytest.mark.parametrize(
    "sections",
    [
        *({"loss": {"kind": kind}} for kind in ("ccl", "bpr", "bce", "full_softmax")),
        {"loss": {"kind": "margin"}},
        {"loss": {"kind": "triplet"}},
        {"loss": {"kind": "alignment_uniformity"}},
        {"loss": {"temperature": "learned", "initial_temperature": 0.2}},
        {"model": {"mode": "item_item"}},
    ],
)
def test_the_default_space_holds_only_what_the_configuration_allows(sections):
    config = config_of(**sections)
    space = default_space(config)
    assert "train.table_lr" in space.parameters
    for key, parameter in space.parameters.items():
        ends = getattr(parameter, "choices", None) or (parameter.low, parameter.high)
        for value in ends:
            with_changes(config, {key: int(value) if getattr(parameter, "int", False) else value})


def test_a_space_knows_what_lies_in_it():
    space = Space(
        {
            "loss.temperature": RangeSettings(low=0.1, high=1.0),
            "negatives.uniform": RangeSettings(low=8, high=64, int=True, step=8),
            "user.mlp": ChoiceSettings(choices=([], [16])),
        }
    )
    inside = {"loss.temperature": 0.1, "negatives.uniform": 24, "user.mlp": (16,)}
    assert space.holds(inside)
    for key, value in [
        ("loss.temperature", "learned"),
        ("loss.temperature", 1.01),
        ("negatives.uniform", 25),
        ("negatives.uniform", True),
        ("user.mlp", (8,)),
    ]:
        assert not space.holds(inside | {key: value}), key
    config = config_of(loss={"temperature": 0.5}, negatives={"uniform": 16})
    assert space.holds(space.values_of(config))
