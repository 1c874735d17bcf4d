"""What the README shows is there, and what is there is shown."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import typer

from recclr.cli import app
from recclr.config import load_config
from recclr.export import open_store

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
# Beside what the tree lists, these may lie in a checkout and are no part of it.
LEFT_OUT = ("__pycache__",)


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", TEXT, flags=re.S | re.M)


def tree() -> dict[str, str]:
    """Path -> caption of "What is where"."""
    section = TEXT.split("## What is where")[1]
    (block,) = re.findall(r"```\n(.*?)```", section, flags=re.S)[:1]
    found, folder = {}, ""
    for line in filter(None, block.splitlines()):
        name, caption = line.strip().split(None, 1)
        folder = folder if line.startswith(" ") else ""
        found[folder + name] = caption
        if not line.startswith(" ") and name.endswith("/"):
            folder = name
    return found


def test_every_path_of_the_tree_exists():
    for path in tree():
        assert (ROOT / path).is_dir() == path.endswith("/"), path
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("folder", ["recclr", "pipelines", "datasets"])
def test_everything_in_a_folder_has_a_caption(folder):
    for path in (ROOT / folder).iterdir():
        if path.name not in LEFT_OUT:
            shown = f"{folder}/{path.name}" + ("/" if path.is_dir() else "")
            assert shown in tree(), shown


def test_the_table_of_commands_is_that_of_the_command_line():
    shown = re.findall(r"^\| `recclr ([\w-]+)` \|", TEXT, flags=re.M)
    assert shown == list(typer.main.get_command(app).commands)


def test_the_configuration_is_valid(tmp_path):
    (block,) = blocks("toml")
    path = tmp_path / "mine.toml"
    path.write_text(block)
    config = load_config(path)
    assert set(tomllib.loads(block)) <= set(type(config).model_fields)


def test_the_lines_of_python_run(small_data, tmp_path, monkeypatch, capsys):
    (block,) = blocks("python")
    shutil.copytree(small_data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "recall@20" in capsys.readouterr().out
    assert len(open_store("lancedb:vectors").items) == 70


def test_make_targets_exist():
    shown = set(re.findall(r"^make (\w+) ", TEXT, flags=re.M))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {"demo", "test", "lint", "types", "slow"} <= shown <= targets
