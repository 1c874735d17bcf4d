"""The primitives between processes, and how processes end together."""

import socket

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from recclr import joining
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError, RankError
from recclr.kernels import native


def test_a_process_alone_exchanges_nothing(work, tmp_path):
    work.alone("exchanges", tmp_path)
    ALONE.agree({"a": "b"})
    ALONE.start("cpu", 1.0)
    assert ALONE.own_device("cuda:3") == "cuda:3"


@pytest.mark.parametrize("sockets", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_blocks_of_unequal_lengths_arrive_whole_with_their_gradients(
    spread, tmp_path, size, sockets
):
    ended = spread("exchanges", size, tmp_path, sockets=sockets)
    assert ended.codes == [0] * size, ended.texts
    assert len(list(tmp_path.glob("done-*"))) == size


@pytest.mark.parametrize("sockets", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_memory_gives_what_sockets_give(spread, tmp_path, size, sockets):
    memory = not sockets and native.library() is not None
    ended = spread("through", size, tmp_path, sockets=sockets, memory=memory)
    assert ended.codes == [0] * size, ended.texts
    sums = [load_file(tmp_path / f"sum-{rank}.safetensors")["sum"] for rank in range(size)]
    parts = [torch.randn(1000, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    assert all(torch.equal(sums[0], other) for other in sums[1:])
    torch.testing.assert_close(sums[0], torch.stack(parts).sum(0))


@pytest.mark.parametrize("sockets", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_messages_of_any_length_arrive_whole_where_ranks_share_memory(
    spread, tmp_path, size, sockets
):
    memory = not sockets and native.library() is not None
    ended = spread("messages", size, tmp_path, sockets=sockets, memory=memory)
    assert ended.codes == [0] * size, ended.texts


@pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
@pytest.mark.parametrize(
    ("size", "kind"),
    [(2, "adam"), (3, "adam"), (2, "rowwise_adam"), (3, "rowwise_adagrad"), (2, "sgd")],
)
def test_tables_that_ranks_share_move_to_the_bits_of_copies(spread, tmp_path, size, kind):
    ended = spread("host_tables", size, tmp_path, kind=kind, shares=True)
    assert ended.codes == [0] * size, ended.texts


@pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
def test_memory_that_cannot_grow_serves_what_fits(spread, tmp_path):
    ended = spread("growth_refused", 2, tmp_path)
    assert ended.codes == [0, 0], ended.texts


@pytest.mark.parametrize("sockets", [False, True])
def test_an_error_while_others_are_waited_for_is_ones_own(spread, tmp_path, sockets):
    ended = spread("meanwhile_fails", 2, tmp_path, sockets=sockets)
    assert ended.codes == [1, 1], ended.texts
    assert "RuntimeError: can't allocate memory: timeout" in ended.texts[1]
    assert ended.texts[0] == ""


@pytest.mark.parametrize("sockets", [False, True])
def test_dense_gradients_keep_their_precision(spread, tmp_path, sockets):
    ended = spread("wide_dense", 2, tmp_path, sockets=sockets)
    assert ended.codes == [0, 0], ended.texts


@pytest.mark.parametrize("options", [{"sockets": True}, {"refused": 0}, {"refused": 3}])
def test_tables_that_cannot_be_shared_are_copies(spread, tmp_path, options):
    ended = spread("host_tables", 2, tmp_path, kind="adam", shares=False, **options)
    assert ended.codes == [0] * 2, ended.texts


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_cover_every_row_once(size):
    for count in (0, 1, 2, 7, 100):
        shares = [Ranks(rank, size).part(count) for rank in range(size)]
        assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
        assert shares[-1][1] == count
        assert Ranks(0, size).counts(count) == [stop - start for start, stop in shares]
        assert max(Ranks(0, size).counts(count)) - min(Ranks(0, size).counts(count)) <= 1


@pytest.mark.parametrize("odd", [[1], pytest.param([1, 2], marks=pytest.mark.slow)])
def test_ranks_that_differ_are_refused_by_number(spread, tmp_path, odd):
    ended = spread("disagrees", 3, tmp_path, odd=odd)
    assert ended.codes == [2, 2, 2], ended.texts
    said = [text for text in ended.texts if text]
    assert len(said) == 1
    named = "rank 1 and" if odd == [1] else "ranks 1, 2 and"
    assert f"{named} rank 0 do not agree on shape" in said[0]


@pytest.mark.parametrize(
    ("error", "who", "where", "code"),
    [
        ("DataError", 1, "collective", 3),
        ("StoreError", 0, "collective", 5),
        ("CheckpointError", 1, "meeting", 4),
        pytest.param("DivergedError", 0, "meeting", 6, marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_rank_ends_all_with_its_code(spread, tmp_path, error, who, where, code):
    ended = spread("fails", 2, tmp_path, who=who, error=error, where=where)
    assert ended.codes == [code, code], ended.texts
    assert ended.texts[who] == f"error: rank {who}: the third row is odd\n"
    assert ended.texts[1 - who] == ""


def test_a_bug_on_one_rank_shows_its_traceback_and_ends_all(spread, tmp_path):
    ended = spread("fails", 2, tmp_path, who=1, error="none of ours", where="collective")
    assert ended.codes == [1, 1], ended.texts
    assert "ValueError: the third row is odd" in ended.texts[1]
    assert ended.texts[0] == ""


@pytest.mark.parametrize(
    ("where", "sockets"),
    [
        ("collective", False),
        ("collective", True),
        pytest.param("meeting", False, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_after_the_time_out(spread, tmp_path, where, sockets):
    ended = spread(
        "sleeps", 3, tmp_path, timeout_s=1.0, ends_s=5.0, sockets=sockets, who=1, where=where
    )
    assert ended.codes == [75, None, 75], ended.texts
    said = [text for text in (ended.texts[0], ended.texts[2]) if text]
    assert len(said) == 1, ended.texts
    name = "a sum" if where == "collective" else "a meeting"
    assert f"waited 1 s at '{name}' for rank 1" in said[0]
    # Where it hung.
    assert "in sleeps" in ended.texts[1]


@pytest.mark.parametrize("sockets", [False, True])
def test_a_hang_after_a_long_wait_shows_where_it_is(spread, tmp_path, sockets):
    ended = spread("hangs_after_a_wait", 2, tmp_path, timeout_s=1.0, ends_s=5.0, sockets=sockets)
    assert ended.codes == [None, 75], ended.texts
    assert "for rank 0" in ended.texts[1]
    assert "in hangs_after_a_wait" in ended.texts[0]


@pytest.mark.parametrize("sockets", [False, True])
def test_a_rank_that_was_killed_ends_the_others(spread, tmp_path, sockets):
    ended = spread("dies", 2, tmp_path, who=0, sockets=sockets)
    assert ended.codes[0] == -9
    assert ended.codes[1] == 75, ended.texts
    assert "lost during 'a sum'" in ended.texts[1]
    assert "--resume" in ended.texts[1]


@pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
def test_only_the_late_rank_is_named_though_another_came_late_too(spread, tmp_path):
    ended = spread("comes_late", 3, tmp_path, timeout_s=2.5, ends_s=8.0)
    assert ended.codes == [75, 75, None], ended.texts
    said = [text for text in ended.texts[:2] if text]
    assert said
    assert all("waited 2.5 s at 'a sum' for rank 2;" in text for text in said)


@pytest.mark.parametrize("refused", ["memfd_create", "posix_fallocate", "mmap"])
def test_a_machine_without_shared_memory_goes_through_sockets(spread, tmp_path, refused):
    ended = spread("cannot_share", 2, tmp_path, refused=refused)
    assert ended.codes == [0, 0], ended.texts


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    missing = "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"
    with pytest.raises(ConfigError, match=missing), joining.joined():
        pass


def test_a_rank_knows_how_many_are_on_its_machine(monkeypatch):
    place = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**place, "MASTER_ADDR": "somewhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    met = HashStore(), 5, 8
    monkeypatch.setattr(joining, "rendezvous", lambda *where, **limits: iter([met]))
    ranks = joining._join()
    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size) == (5, 8, 1, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert joining._join().local_size == 8
    assert ALONE.local_size == 1


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**place, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankError, match=f"127.0.0.1:{port}"), joining.joined():
            pass


def test_restarts_through_the_store_of_the_agent_are_told_of(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert joining.restarts_are_safe()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not joining.restarts_are_safe()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert joining.restarts_are_safe()
