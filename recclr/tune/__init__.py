"""``recclr tune``: settings searched by successive halving, judged on validation only."""

from recclr.tune.study import tune

__all__ = ["tune"]
