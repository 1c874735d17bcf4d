"""A metrics.json by hand, small enough to know every figure of it."""

import copy
import json
from pathlib import Path

import pytest

_MODEL = {
    "all": {"recall@20": 0.31, "ndcg@20": 0.17, "recall@5": 0.12, "ndcg@5": 0.14},
    "cold_items_among_cold": {"recall@20": 0.45},
}
_ITEM_KNN = {
    "all": {"recall@20": 0.26, "ndcg@20": 0.19, "recall@5": 0.11, "ndcg@5": 0.13},
    "cold_items_among_cold": {"recall@20": 0.22},
}
_POPULARITY = {"all": {"recall@20": 0.08, "ndcg@20": 0.04, "recall@5": 0.03, "ndcg@5": 0.02}}
_METRICS = {
    "definitions": {"recall@k": "hits in the top k / number of relevant items"},
    "test": {"model": _MODEL, "popularity": _POPULARITY, "item_knn": _ITEM_KNN},
    "counts": {
        "test": {
            "all": {"users": 1234, "relevant": 5678, "candidates": 4321, "dropped_users": 0},
            "cold_items": {"users": 77, "relevant": 99, "candidates": 4321},
            "cold_items_among_cold": {
                "users": 77,
                "relevant": 99,
                "candidates": 160,
                "chance_recall@20": 0.125,
            },
        }
    },
    "intervals": {"test": {"model": {"all": {"recall@20": [0.29, 0.33]}}}},
    "differences": {
        "test": {
            "popularity": {
                "all": {
                    "recall@20": {"difference": 0.23, "low": 0.21, "high": 0.25, "p_value": 0.001}
                }
            },
            "item_knn": {
                "all": {
                    "recall@20": {"difference": 0.05, "low": 0.03, "high": 0.07, "p_value": 0.001}
                },
                "cold_items_among_cold": {
                    "recall@20": {"difference": 0.23, "low": -0.01, "high": 0.4, "p_value": 0.061}
                },
            },
        }
    },
    "baselines": {"item_knn": {"name": "item_knn", "settings": {"shrink": 10.0}, "score": 0.2345}},
    "skipped_baselines": {},
    "selected_steps": 1500,
}
_CONFIG = """seed = 3
[data]
events = "events.parquet"
[evaluate]
ks = [5, 20]
select = "recall@20"
"""
_LOG = [
    {"kind": "step", "stage": "selection", "step": 500, "epoch": 1.0, "loss": 7.5},
    {"kind": "step", "stage": "selection", "step": 1000, "epoch": 2.0, "loss": 6.5},
    {"kind": "step", "stage": "refit", "step": 600, "epoch": 1.0, "loss": 7.25},
    {"kind": "evaluation", "stage": "selection", "step": 500, "epoch": 1.0, "metrics": {}},
    {"kind": "evaluation", "stage": "selection", "step": 1000, "epoch": 2.0, "metrics": {}},
]
_DATA = {
    "log": "Log(3 users, 5 items, 7,000 events)",
    "steps": [{"name": "bad_rows", "rows_in": 7001, "rows_out": 7000}],
    "quarantined": {"null item": 1},
    "notes": ["3 ids differ only in case"],
    "split": {
        "by": "time",
        "cutoffs": {"test": 1_735_689_600},
        "counts": {"train": {"rows": 6300, "users": 3, "items": 4}},
    },
    "inputs": {"events: events.parquet": {"bytes": 45_678, "tail_sha256": "ab" * 32}},
}


@pytest.fixture
def metrics():
    return copy.deepcopy(_METRICS)


@pytest.fixture
def run(tmp_path, metrics) -> Path:
    """A complete run folder; tests take away what they do without."""
    log = copy.deepcopy(_LOG)
    for event, value in zip(log[3:], (0.2, 0.3), strict=True):
        event["metrics"] = {"recall@20": value}
    for number, event in enumerate(log[:3]):
        event |= {"temperature": 0.1, "positives_per_s": 4000.0}
        event |= {"duplicate_share": 0.1 * number, "masked_share": 0.0123}
    folder = tmp_path / "runs" / "nightly"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(_CONFIG)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "data.json").write_text(json.dumps(_DATA))
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    (folder / "environment.json").write_text(
        json.dumps({"device": "cpu", "versions": {"torch": "2.13"}})
    )
    return folder
