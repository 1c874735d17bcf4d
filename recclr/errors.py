"""Typed errors. Each class fixes the exit code of the command line (DESIGN, "Commands").

A message says what was expected, what was found and what to do, and names the file, column or key.
"""

from __future__ import annotations


class RecclrError(Exception):
    """Base of every error that is the user's to mend; never shown with a traceback."""

    exit_code = 1


class ConfigError(RecclrError, ValueError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """An optional library is not installed; the message names the extra to install."""


class ShapeError(ConfigError):
    """A tensor argument has the wrong shape or dtype."""


class DataError(RecclrError, ValueError):
    """The data were read and refused (exit code 3)."""

    exit_code = 3


class CheckpointError(RecclrError, RuntimeError):
    """A checkpoint is missing, damaged or does not fit (exit code 4)."""

    exit_code = 4


class StoreError(RecclrError, RuntimeError):
    """A store refused a write or failed verification (exit code 5)."""

    exit_code = 5


class DivergedError(RecclrError, RuntimeError):
    """A non-finite loss or weight; the message names the step and the cause (exit code 6)."""

    exit_code = 6


class GateError(RecclrError, RuntimeError):
    """A quality gate was not met (exit code 7)."""

    exit_code = 7


class InterruptedTraining(RecclrError, RuntimeError):
    """A signal stopped training after a checkpoint was written; safe to retry (exit code 75)."""

    exit_code = 75


class RankError(RecclrError, RuntimeError):
    """Another process of the run was lost or late; safe to retry with --resume (exit code 75)."""

    exit_code = 75


class PeerError(RecclrError, RuntimeError):
    """Another process of the run failed, says why itself, and this one ends with its exit code."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def require(module: str, extra: str) -> object:
    """Import an optional library, or say which extra installs it.

    Raises:
        MissingExtraError: ``module`` cannot be imported.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs the optional library '{module}', which is not installed; "
            f"install it with: pip install 'recclr[{extra}]'"
        ) from error
