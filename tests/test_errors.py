"""Errors have the exit codes of DESIGN, and a missing library is named with its extra."""

import inspect

import pytest

from recclr import errors


def test_exit_codes_are_those_of_the_contract():
    classes = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.RecclrError)
    }
    assert classes == {
        "RecclrError": 1,
        "ConfigError": 2,
        "MissingExtraError": 2,
        "ShapeError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "StoreError": 5,
        "DivergedError": 6,
        "GateError": 7,
        "InterruptedTraining": 75,
        "RankError": 75,
        # Until it is made with that of the process that failed first.
        "PeerError": 1,
    }


def test_a_library_that_is_there_is_handed_out():
    assert errors.require("json", "none") is __import__("json")


def test_a_library_that_is_missing_names_its_extra(monkeypatch):
    with pytest.raises(errors.MissingExtraError) as caught:
        errors.require("no_such_library", "lancedb")
    assert "'no_such_library'" in str(caught.value)
    assert "pip install 'recclr[lancedb]'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)
