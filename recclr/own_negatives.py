"""Negatives that a row has for itself: mined for its user, or shown to them and not taken.

Shape letters: B rows, C candidates, M negatives drawn for a row, W kept for a user.

One sum stands for the full softmax. The items mined for a user are a stratum of their own: the row
finds none of them among the shared candidates (``KnownPositives.mask``), and the m that are drawn
of W count W / m times each. The draw is systematic (one number for each row, places W / m apart;
Madow 1949), so that each item is drawn with probability m / W, whatever the order of the list; as
a mined list is in order of rank, each draw comes from another band of hardness. The sum over shared
candidates and draws thus has the expectation of the sum over all items but known positives, and
less variance where the mined items are most of it.

Explicit negatives are no stratum: the items of a user's list count once as all others do, and
``weight`` times more since the user refused them; in expectation, whatever is drawn of how many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.data.log import Csr, EncodedLog
from recclr.errors import ConfigError, ShapeError
from recclr.settings import NegativesSettings


@dataclass(frozen=True)
class OwnDraws:
    """What was drawn for the rows of a batch.

    Attributes:
        item_idx: int64 [B, M]; the row's positive where there was nothing to draw.
        log_weights: float32 [B, M]; -inf there.
    """

    item_idx: Tensor
    log_weights: Tensor


class OwnNegatives:
    """Draws for each row from the lists of its user.

    Args:
        log: train rows. log_q_strength: 1 for the full correction of what is not drawn, 0 for none.
        explicit: items of each user that are negatives, known positives left out, ``num_users``
            rows; needed where ``negatives.explicit`` is set, and used nowhere else.

    Attributes:
        mined: int32 [num_users, W], best first, -1 after the last; all -1 until ``refill``. None
            without ``negatives.mined``.

    Raises:
        ConfigError: ``explicit`` is missing. ShapeError: it has another number of rows.
    """

    def __init__(
        self,
        log: EncodedLog,
        settings: NegativesSettings,
        *,
        log_q_strength: float = 1.0,
        explicit: Csr | None = None,
    ) -> None:
        self.settings, self.strength = settings, log_q_strength
        self.mined: Tensor | None = None
        if settings.mined is not None:
            size = (log.num_users, settings.mined.width)
            self.mined = torch.full(size, -1, dtype=torch.int32, device=log.device)
        self.explicit: Csr | None = None
        if settings.explicit is not None:
            self.explicit = _require_lists(explicit, log)

    def __bool__(self) -> bool:
        return self.mined is not None or self.explicit is not None

    def state(self) -> dict[str, Tensor]:
        """What a resumed training must find again."""
        return {} if self.mined is None else {"mined": self.mined}

    def refill(self, table: Tensor) -> None:
        """Go on with other mined items, int32 as ``mined``."""
        if self.mined is None or table.shape != self.mined.shape:
            expected = None if self.mined is None else tuple(self.mined.shape)
            raise ShapeError(f"expected mined items {expected}, found {tuple(table.shape)}")
        self.mined.copy_(table)

    def draw(
        self, user_idx: Tensor, positives: Tensor, generator: torch.Generator
    ) -> OwnDraws | None:
        """Draws for all rows of a batch; None where neither kind is configured.

        Args:
            user_idx, positives: int64 [B]. generator: on the device of the log.
        """
        parts = []
        if self.mined is not None and self.settings.mined is not None:
            lists = self.mined.index_select(0, user_idx)
            lengths = (lists >= 0).sum(1)
            places, log_weights = self._places(lengths, self.settings.mined.count, generator)
            parts.append((lists.gather(1, places).long(), log_weights))
        if self.explicit is not None and self.settings.explicit is not None:
            starts = self.explicit.offsets[user_idx]
            lengths = self.explicit.offsets[user_idx + 1] - starts
            places, log_weights = self._places(lengths, self.settings.explicit.count, generator)
            places = torch.where(log_weights > -torch.inf, starts.unsqueeze(1) + places, 0)
            items = self.explicit.values[places].long()
            parts.append((items, log_weights + torch.tensor(self.settings.explicit.weight).log()))
        if not parts:
            return None
        items, log_weights = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        here = log_weights > -torch.inf
        return OwnDraws(torch.where(here, items, positives.unsqueeze(1)), log_weights)

    def _places(
        self, lengths: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Places in lists of given lengths [B], 0 for none, and log weights; both [B, count]."""
        device, lengths = lengths.device, lengths.unsqueeze(1)
        numbers = torch.arange(count, device=device)
        # 24 bits of a float32 leave a float64 room for the product: no place comes twice.
        start = torch.rand(lengths.shape, generator=generator, device=device).double()
        spread = ((start + numbers) * lengths / count).long()
        here = numbers < lengths
        places = torch.where(lengths > count, spread, numbers)
        log_weights = self.strength * (lengths / lengths.clamp(max=count)).log()
        return torch.where(here, places, 0), torch.where(here, log_weights, -torch.inf).float()


def _require_lists(explicit: Csr | None, log: EncodedLog) -> Csr:
    if explicit is None:
        raise ConfigError(
            "negatives.explicit needs the items that each user was shown or refused, found none; "
            "read the log with recclr.read(..., explicit=[...]), or hand the trainer its lists"
        )
    if explicit.num_rows != log.num_users:
        raise ShapeError(f"expected {log.num_users} rows of explicit, found {explicit.num_rows}")
    explicit = explicit.to(log.device)
    # One more value, since a place is looked up where nobody has any.
    return Csr(explicit.offsets, torch.cat([explicit.values, explicit.values.new_zeros(1)]))
