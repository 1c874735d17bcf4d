"""What the model has to beat: each baseline is a ``Ranker``, tuned on validation as it is."""

from recclr.baselines.choose import BaselineChoice, build_baselines, refit_baseline

__all__ = ["BaselineChoice", "build_baselines", "refit_baseline"]
