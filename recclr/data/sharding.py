"""Whether the rows to train on stay in memory, and what is done when they do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from recclr.data.grouping import GROUPS
from recclr.data.log import EncodedLog
from recclr.data.shards import open_shards, write_shards
from recclr.distributed import ALONE, LONG_S, Ranks
from recclr.files import require_space
from recclr.memory import available_bytes
from recclr.settings import LossSettings, NegativesSettings, TowerSettings

# What training takes for a row at its most, while known pairs are sorted; measured 67, ids only.
_RESIDENT_BYTES = 70
# Share of the free memory that it may take: tables, their moments and a step need some as well.
_SHARE = 0.5
# ``files.is_leftover`` knows the name: what a killed run leaves is removed when it is resumed.
_NAME = ".shards.tmp-"


def stays_resident(num_rows: int, device: str, resident: bool | Literal["auto"] = "auto") -> bool:
    """Whether a log of so many rows is trained on from memory.

    Args:
        device: where the model lives, and a resident log with it.
        resident: ``auto``: unless it would take more than half of what is free there.
    """
    if isinstance(resident, bool):
        return resident
    if device.startswith("cuda"):
        free: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_bytes()
    return free is None or num_rows * _RESIDENT_BYTES <= _SHARE * free


def fits_in_memory(num_rows: int) -> bool:
    """Whether a log of so many rows can be in memory at all, with what is made of it there."""
    free = available_bytes()
    return free is None or num_rows * _RESIDENT_BYTES <= free


def wanted_groups(
    log: EncodedLog,
    *,
    user: TowerSettings,
    item: TowerSettings,
    loss: LossSettings,
    negatives: NegativesSettings,
) -> set[str]:
    """What training with these settings asks of the log by entity, of ``grouping.GROUPS``."""
    asked = {
        "known": loss.mask_known_positives
        or negatives.mined is not None
        or any(tower.id.propagation is not None for tower in (user, item)),
        "user_items": user.history is not None,
        "user_times": log.timestamp is not None and (user.history is not None or _in_time(user)),
        "item_times": log.timestamp is not None and _in_time(item),
    }
    return {name for name in GROUPS if asked[name]}


@contextmanager
def rows_for_training(
    log: EncodedLog,
    folder: Path,
    *,
    device: str,
    resident: bool | Literal["auto"] = "auto",
    groups: Collection[str] = GROUPS,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[EncodedLog]:
    """The log, or the same rows from memory-mapped files, which are removed when the block ends.

    Args:
        log: in memory, or on the disk since it was read, where it stays.
        folder: where a hidden folder for the files is made; shared by all ranks.
        device, resident: see ``stays_resident``; the first rank decides for all.
        groups: of those files, see ``wanted_groups``.
        say: is told when there are files, and how large they are.

    Raises:
        StoreError: no space for the files. ConfigError: no permission.
    """
    # Rows that did not stay in memory when they were read are not brought there.
    on_disk = log.mapped_for is not None
    stays = ranks.first and not on_disk and stays_resident(len(log), device, resident)
    if ranks.from_first(stays, "whether the log stays in memory"):
        yield log
        return
    path = folder / f"{_NAME}train"
    try:
        if ranks.first:
            # A run without a lock on its folder may have left them.
            shutil.rmtree(path, ignore_errors=True)
            require_space(folder, _file_bytes(log, groups))
            write_shards(path, log.stretches(), groups=groups)
        ranks.meet("writing the shards", LONG_S)
        # This run wrote them a moment ago.
        mapped = open_shards(path, verify=False)
        ranks.meet("opening the shards", LONG_S)
        num_bytes = sum(file.stat().st_size for file in path.iterdir()) if ranks.first else 0
        say(f"training reads its rows from files ({num_bytes / 1e6:,.0f} MB for now, in {folder})")
        yield mapped
    finally:
        if ranks.first:
            # Those who mapped the files keep them until they end.
            shutil.rmtree(path, ignore_errors=True)


def _in_time(tower: TowerSettings) -> bool:
    """Whether a tower asks how an entity stood at a moment."""
    statistics = any(feature.kind == "statistics" for feature in tower.features.values())
    return statistics or tower.id.as_of


def _file_bytes(log: EncodedLog, groups: Collection[str]) -> int:
    """Size of the files, at most."""
    row_bytes = {"known": 8, "user_items": 4, "user_times": 8, "item_times": 8}
    columns = sum(column.element_size() for _, column in log.columns())
    ends = 8 * (2 * log.num_users + log.num_items + 3)
    return len(log) * (columns + sum(row_bytes[name] for name in groups)) + ends
