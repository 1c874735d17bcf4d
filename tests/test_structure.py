"""The floors of the package, and what must start without the optional libraries."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recclr"
# DESIGN, "Layout": a module imports only from its own floor or from floors below.
FLOORS = {
    0: {
        "errors",
        "strict",
        "settings",
        "config",
        "toml_text",
        "unread",
        "read_where",
        "files",
        "memory",
        "order",
        "distinct",
        "stopping",
    },
    1: {
        "data",
        "metrics",
        "bootstrap",
        "intervals",
        "losses",
        "kernels",
        "host_memory",
        "notices",
        "distributed",
        "joining",
    },
    2: {
        "caching",
        "spectral",
        "sharded_tables",
        "statistics",
        "optim",
        "rows",
        "augment",
        "mutual_information",
        "sequences",
        "ragged",
        "parts",
        "history",
        "propagation",
        "towers",
        "co_interactions",
        "siamese",
        "blending",
        "pair_losses",
        "building",
        "alignment",
        "similarity",
        "correlation",
        "scoring",
        "ntxent",
        "views",
        "quantiles",
        "step_stats",
        "symmetric",
        "distillation",
        "more_positives",
        "negatives",
        "own_negatives",
        "availability",
        "momentum",
        "streaming",
        "within",
        "known_positives",
    }
    | {"windows", "batches", "apportioning", "objective", "optimizers", "ranking", "exchange"}
    | {"host_tables"},
    3: {
        "topk",
        "coarse",
        "compiled_scan",
        "selection",
        "checkpoint",
        "keeping",
        "monitors",
        "causes",
        "watching",
        "graphs",
        "graph_plan",
        "compiling",
        "stepping",
        "mining_report",
    },
    4: {"train", "mining", "evaluate", "baselines", "export", "recommend"},
    5: {
        "ablation",
        "ablation_parts",
        "api",
        "batch_size",
        "blend_stage",
        "checking",
        "cli",
        "cli_mine",
        "commands",
        "console",
        "curves",
        "demo",
        "fitting",
        "ids_input",
        "judge",
        "little_data",
        "load",
        "monitoring",
        "other_runs",
        "stages",
        "pretrain",
        "starting",
        "report",
        "triplets",
        "options",
        "served",
        "trials",
        "tune",
        "work_folder",
    }
    | {"run", "run_context", "run_folder", "shipping", "__main__", "__init__"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
BARE = ("train", "objective", "towers", "evaluate", "topk", "checkpoint", "statistics", "bootstrap")


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def top_of(path):
    relative = path.relative_to(PACKAGE).with_suffix("")
    return relative.parts[0]


def imports(path, *, everywhere=False):
    """Names of imported modules at module level (or anywhere), those for type checking left out."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_module_has_a_floor():
    assert {top_of(path) for path in sources()} == set(FLOOR_OF)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = top_of(path)
    for name in imports(path):
        if name.startswith("recclr."):
            other = name.split(".")[1]
            assert FLOOR_OF[other] <= FLOOR_OF[own], f"{own} imports {name}"


def test_there_are_no_cycles():
    graph = {}
    for path in sources():
        module = ".".join(["recclr", *path.relative_to(PACKAGE).with_suffix("").parts])
        module = module.removesuffix(".__init__")
        graph[module] = {name for name in imports(path) if name.startswith("recclr")}
    done, on_path = set(), []

    def visit(module):
        assert module not in on_path, " -> ".join([*on_path, module])
        if module in done or module not in graph:
            return
        on_path.append(module)
        for other in graph[module]:
            # A package's own __init__ names its modules for others.
            if other != module.rpartition(".")[0]:
                visit(other)
        on_path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_siblings_of_floor_4_do_not_know_each_other():
    for path in sources():
        if FLOOR_OF[top_of(path)] == 4:
            others = {name.split(".")[1] for name in imports(path) if name.startswith("recclr.")}
            assert not (others & FLOORS[4]) - {top_of(path)}, path


def test_nothing_is_pickled():
    for path in sources():
        names = set(imports(path, everywhere=True))
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
        assert "torch.load" not in path.read_text("utf-8"), path


def test_imports_are_spelled_out():
    """What the other tests look at are absolute names."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


# `recommend` answers in tables; it stands beside the trainer, not below it.
FRAMES_ALLOWED = {"baselines", "export", "recommend"}


def test_the_trainer_knows_tensors_only():
    trainer = set().union(*(FLOORS[floor] for floor in (2, 3, 4))) - FRAMES_ALLOWED
    for path in sources():
        if top_of(path) in trainer:
            outside = {name.partition(".")[0] for name in imports(path, everywhere=True)}
            outside -= sys.stdlib_module_names | {"recclr"}
            # A GPU's kernels, imported where there is a GPU; TorchRec, where tables are split.
            allowed = {"triton"} if "kernels" in path.parts else set()
            allowed |= {"torchrec"} if path.name == "sharded_tables.py" else set()
            assert outside <= {"torch", "numpy", "safetensors"} | allowed, path


def test_pandas_is_never_imported():
    for path in sources():
        names = {name.partition(".")[0] for name in imports(path, everywhere=True)}
        assert "pandas" not in names, path


OF_ONE_MACHINE = {
    "a path of one machine": r"(?<![\w.:/])/(?:work|home|root|Users|mnt|tmp|private)/\w",
    "a mirror of packages": r"(?i)artifactory|\bnexus\b|jfrog|devpi|codeartifact|[-_]index[-_]url",
    "a private address": r"\b(?:10(?:\.\d{1,3}){3}|192\.168(?:\.\d{1,3}){2})(?::\d+)?\b",
}


def test_nothing_tracked_knows_the_machine_it_was_written_on():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(paths) > 100
    for path in paths:
        # This file names what it looks for.
        if not path.is_file() or path == Path(__file__):
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        for what, pattern in OF_ONE_MACHINE.items():
            found = re.search(pattern, text)
            assert not found, f"{path} holds {what}: {found and found.group()}"


def test_files_stay_short():
    for path in sources():
        assert len(path.read_text("utf-8").splitlines()) <= 420, path


def test_training_starts_in_a_bare_container():
    blocked = ["polars", "pydantic", "pyarrow", "sklearn", "implicit", "lancedb", "scipy"]
    blocked += ["pandas", "triton", "torchrec", "fbgemm_gpu"]
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import recclr
for name in {BARE!r}:
    __import__("recclr." + name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
