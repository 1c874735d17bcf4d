"""Learning curves: model and baselines on nested samples of the train rows, judged alike.

Each share is a run folder of its own, of a configuration that can be run again; validation, what
users already have and the catalogue are those of the whole, so that only what is learned from
differs. Test is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recclr.config import Config, dump_toml
from recclr.errors import ConfigError
from recclr.files import require_writable, write_bytes_atomic, write_json_atomic
from recclr.load import pick_device
from recclr.other_runs import named_runs
from recclr.report.curve import write_curve_page
from recclr.run import train_run
from recclr.run_folder import (
    CONFIG,
    DATA,
    METRICS,
    fingerprints,
    locked,
    read_json,
    require_same_config,
    require_same_inputs,
)
from recclr.watching import OnEvent

CURVE = "curve.json"
SAMPLING = (
    "Of each user's train rows so large a share is kept, rounded up or down at random, and one at "
    "least; smaller samples are parts of larger ones. Validation, the items that users have by "
    "then, and the catalogue are the same for all."
)


def learning_curve(
    config: Config,
    out: Path,
    shares: Sequence[float],
    *,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Train and judge on every share, and write ``curve.json`` and ``curve.html`` into ``out``.

    Both are written after each share, so that a curve that was stopped shows what is done.

    Args:
        config: of the whole; ``train.refit`` and ``export`` have no part in a curve.
        shares: of the train rows, above 0, at most 1; in any order, repeats count once.
        resume: go on with a curve that was begun in ``out``, or add shares to it; those that are
            done are not trained again.
        on_event: see ``run.train_run``; also {"kind": "share", "share": …} as one begins.

    Returns:
        The contents of curve.json: ``select``, ``sampling`` and ``shares``, rising, each with
        ``share`` asked for, ``rows``, ``rows_share`` of all train rows, ``users``, ``items``,
        ``run`` and ``rankers``: name -> ``value``, and ``low`` and ``high`` where there are
        intervals, of the metric of selection on validation.

    Raises:
        ConfigError: a share out of range, no validation, or ``out`` is of another configuration.
        RecclrError: as ``run.train_run``.
    """
    wanted = sorted(set(shares))
    base = _base(config, wanted)
    device = pick_device(device)
    _open(out, base, resume=resume)
    emit = on_event or (lambda event: None)
    with locked(out):
        if not (out / CONFIG).exists():
            write_bytes_atomic(out / CONFIG, dump_toml(base).encode("utf-8"))
        inputs = fingerprints(base)
        done = {share for share in _begun(out) if (_folder(out, share) / METRICS).exists()}
        for share in sorted(done | set(wanted)):
            folder = _folder(out, share)
            if (folder / DATA).exists():
                require_same_inputs(folder, inputs)
        for share in wanted:
            emit({"kind": "share", "share": share})
            split = replace(base.split, train_share=share)
            train_run(
                base.model_copy(update={"split": split}),
                _folder(out, share),
                resume=True,
                device=device,
                on_event=on_event,
                judge_test=False,
            )
            done.add(share)
            curve = _collected(base, out, sorted(done))
            write_json_atomic(out / CURVE, curve)
            write_curve_page(out, curve)
    return curve


def _base(config: Config, shares: Sequence[float]) -> Config:
    if not shares or not all(1e-6 <= share <= 1 for share in shares):
        raise ConfigError(
            f"--shares {', '.join(map(str, shares)) or 'nothing'}: expected shares of the train "
            "rows above 0 and at most 1, for example 0.01,0.05,0.2,1"
        )
    if named := named_runs(config):
        raise ConfigError(
            f"{named[0][0]}: a curve shows what rows are worth, and the run that is named there "
            "has learned from all of them; leave the key out"
        )
    if config.split.train_share != 1:
        raise ConfigError(
            f"split.train_share = {config.split.train_share:g}: a curve sets it; leave it out"
        )
    if config.split.valid == 0 and config.split.valid_events is None:
        raise ConfigError("a learning curve is judged on validation; set split.valid")
    return config.model_copy(update={"train": replace(config.train, refit=False), "export": ()})


def _open(out: Path, base: Config, *, resume: bool) -> None:
    """Take a folder that is new, empty, or of this curve."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; expected a folder")
    stored = out / CONFIG
    if stored.exists():
        if (out / METRICS).exists():
            raise ConfigError(f"{out} is the folder of a run; choose another --out")
        if not resume:
            raise ConfigError(
                f"{out} holds a learning curve; add --resume to go on with it, or to add shares"
            )
        require_same_config(stored, base)
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no curve; choose an empty or new folder")
    require_writable(out)


def _folder(out: Path, share: float) -> Path:
    return out / f"share-{share:.10g}"


def _begun(out: Path) -> list[float]:
    """Shares that have a folder."""
    found = []
    for path in out.glob("share-*"):
        try:
            found.append(float(path.name.removeprefix("share-")))
        except ValueError:
            continue
    return found


def _collected(config: Config, out: Path, shares: Sequence[float]) -> dict[str, Any]:
    select, part = config.evaluate.select, config.evaluate.select_slice
    return {
        "select": select,
        "select_slice": part,
        "seed": config.split.seed,
        "sampling": SAMPLING,
        "shares": [_point(out, share, select, part) for share in shares],
    }


def _point(out: Path, share: float, select: str, part: str) -> dict[str, Any]:
    folder = _folder(out, share)
    metrics, counts = read_json(folder / METRICS), read_json(folder / DATA)["split"]["counts"]
    train, rest = counts["train"], counts.get("left_out", {"rows": 0})
    rankers = {}
    for name, parts in metrics["valid"].items():
        if part not in parts:
            continue
        rankers[name] = {"value": parts[part][select]}
        interval = metrics["intervals"]["valid"].get(name, {}).get(part, {}).get(select)
        if interval is not None:
            rankers[name] |= {"low": interval[0], "high": interval[1]}
    return {
        "share": share,
        "rows": train["rows"],
        "rows_share": train["rows"] / (train["rows"] + rest["rows"]),
        "users": train["users"],
        "items": train["items"],
        "judged_users": metrics["counts"]["valid"][part]["users"],
        "run": folder.name,
        "rankers": rankers,
    }
