"""Rows read ahead: in order, two at most, errors where they are asked for, no thread left."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.windows as windows
from recclr.data.log import EncodedLog
from recclr.order import permuted
from recclr.windows import Ahead, permuted_rows, window_length


class Recorder:
    """A slow function of a number that remembers what it was asked, and how often at once."""

    def __init__(self, *, fails=()):
        self.asked, self.fails, self.threads = [], set(fails), set()

    def __call__(self, number):
        self.asked.append(number)
        self.threads.add(threading.current_thread())
        if number in self.fails:
            self.fails.remove(number)
            raise OSError(f"number {number}")
        return number * number


def settled(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def ahead():
    """Makes an ``Ahead`` of a function; closed at the end, which must leave no thread."""
    before, made = threading.active_count(), []

    def make(read):
        made.append(Ahead(read))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert threading.active_count() == before


@given(numbers=st.lists(st.integers(0, 6), max_size=12))
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_the_function_in_whatever_order_they_are_asked(numbers):
    made = Ahead(lambda number: (number, number * number))
    try:
        assert [made.get(n) for n in numbers] == [(n, n * n) for n in numbers]
    finally:
        made.close()


def test_nothing_is_read_before_it_is_asked_for(ahead):
    read = Recorder()
    ahead(read)
    assert read.asked == []


def test_in_turn_each_is_read_once_by_one_other_thread(ahead):
    read = Recorder()
    made = ahead(read)
    assert [made.get(n) for n in (3, 3, 4, 5, 5, 6)] == [9, 9, 16, 25, 25, 36]
    assert settled(lambda: read.asked == [3, 4, 5, 6, 7])
    assert len(read.threads) == 1
    assert threading.current_thread() not in read.threads


def test_one_is_read_ahead_and_no_more(ahead):
    read = Recorder()
    made = ahead(read)
    made.get(0)
    assert settled(lambda: read.asked == [0, 1])
    # A thread that went on would be through a hundred by now.
    time.sleep(0.05)
    assert read.asked == [0, 1]
    made.get(1)
    assert settled(lambda: read.asked == [0, 1, 2])
    time.sleep(0.05)
    assert read.asked == [0, 1, 2]


def test_the_next_is_read_while_the_last_is_used(ahead):
    going, reached = threading.Event(), threading.Event()

    def read(number):
        if number == 1:
            reached.set()
            assert going.wait(10)
        return number

    made = ahead(read)
    assert made.get(0) == 0
    # The reader is within number 1 and this thread is not.
    assert reached.wait(10)
    going.set()
    assert made.get(1) == 1


def test_reading_starts_again_anywhere(ahead):
    read = Recorder()
    made = ahead(read)
    assert [made.get(n) for n in (8, 2, 3, 0)] == [64, 4, 9, 0]
    assert settled(lambda: read.asked[-1] == 1)


def test_an_error_is_raised_where_its_number_is_asked_for_and_may_pass(ahead):
    read = Recorder(fails=[2])
    made = ahead(read)
    assert [made.get(0), made.get(1)] == [0, 1]
    assert settled(lambda: 2 in read.asked)
    # It was met by now, and does not matter yet.
    assert made.get(1) == 1
    with pytest.raises(OSError, match="number 2"):
        made.get(2)
    assert made.get(2) == 4
    assert made.get(3) == 9


def test_an_error_of_the_first_number(ahead):
    made = ahead(Recorder(fails=[5]))
    with pytest.raises(OSError, match="number 5"):
        made.get(5)


def test_closing_waits_for_what_is_being_read(ahead):
    within, going = threading.Event(), threading.Event()
    ended = []

    def read(number):
        if number == 1:
            within.set()
            assert going.wait(10)
            ended.append(number)
        return number

    made = ahead(read)
    made.get(0)
    assert within.wait(10)
    threading.Timer(0.02, going.set).start()
    made.close()
    assert ended == [1]


def test_a_program_that_closes_nothing_still_ends():
    made = Ahead(lambda number: number)
    made.get(0)
    assert made._thread._thread.daemon
    made.close()


# --- rows -----------------------------------------------------------------------------------------


@given(
    num_rows=st.integers(1, 300),
    start=st.floats(0, 1),
    length=st.integers(1, 300),
    keys=st.tuples(st.integers(0, 99), st.integers(0, 9)),
)
@settings(max_examples=100, deadline=None)
def test_rows_of_a_window_are_those_of_the_permutation(num_rows, start, length, keys):
    rows = torch.arange(num_rows)
    log = EncodedLog(
        (3 * rows).int(), (5 * rows).int(), 900, 1500, timestamp=rows * rows, weight=rows + 0.5
    )
    first = min(int(start * num_rows), num_rows - 1)
    stop = min(first + length, num_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_SERIAL", 7)
        found = permuted_rows(log, first, stop, *keys)
    expected = permuted(torch.arange(num_rows), num_rows, *keys)[first:stop]
    for name, column in log.columns():
        taken = getattr(found, name)
        assert taken.dtype == column.dtype
        assert torch.equal(taken, column[expected]), name
    assert (found.num_users, found.num_items) == (900, 1500)


def test_a_window_without_time_and_weights():
    rows = torch.arange(9).int()
    found = permuted_rows(EncodedLog(rows, rows, 9, 9), 2, 5, 1)
    assert found.timestamp is None
    assert found.weight is None
    assert len(found) == 3


@given(num_rows=st.integers(1, 1 << 40), batch_size=st.integers(1, 1 << 24))
@settings(max_examples=200, deadline=None)
def test_windows_are_whole_batches_within_bounds(num_rows, batch_size):
    length = window_length(num_rows, batch_size)
    assert length >= 1
    assert length % batch_size == 0
    assert length <= max(windows._MOST_ROWS, batch_size)
    # Sixty-four of them to an epoch, where the bounds allow it.
    if windows._LEAST_ROWS < num_rows // 64 < windows._MOST_ROWS and batch_size <= 1 << 17:
        assert 64 <= num_rows / length <= 64 * 3
