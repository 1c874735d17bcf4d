import copy
import hashlib
import json

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.errors import StoreError
from recclr.export.manifest import Manifest, is_version, read_manifest

PARTS = {"items.parquet": {"sha256": "ff" * 32, "bytes": 17}}


def signed(value):
    """A manifest whose digest fits, made without the code under test."""
    rest = {key: entry for key, entry in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.fixture(scope="session")
def plain(make_bundle):
    bundle = make_bundle(num_items=3, num_users=2, dim=2)
    return json.loads(json.dumps(Manifest.of(bundle, PARTS).to_json()))


@pytest.mark.parametrize("kind", ["integer", "string"])
@pytest.mark.parametrize("num_users", [0, 37])
def test_json_brings_back_every_bit(make_bundle, kind, num_users):
    awkward = torch.tensor([1e-45, -0.0, 1 / 3, -1.2345678e-30, 3e5, 0.1])
    bundle = make_bundle(
        kind=kind, num_users=num_users, similarity="dot", unknown_user_vector=awkward
    )
    manifest = Manifest.of(bundle, PARTS)
    text = json.dumps(manifest.to_json(), allow_nan=False)
    again = Manifest.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.unknown_user_vector.numpy().tobytes() == awkward.numpy().tobytes()
    assert again.golden.scores.numpy().tobytes() == bundle.golden.scores.numpy().tobytes()
    assert again.golden.item_ids == bundle.golden.item_ids
    assert again.golden.user_ids.equals(bundle.golden.user_ids, check_dtypes=True)
    assert again.item_id_type == bundle.item_ids.dtype
    assert again.user_id_type == bundle.user_ids.dtype
    assert (again.facts, again.parts, again.version) == (bundle.facts, PARTS, bundle.version)
    assert (again.num_items, again.num_users, again.embedding_dim) == (60, num_users, 6)


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt8, pl.Int32, pl.UInt32, pl.UInt64])
def test_integer_types_keep_their_width(make_bundle, dtype):
    ids = pl.Series([3, 1, 2], dtype=dtype)
    bundle = make_bundle(item_vectors=torch.eye(3, 6), item_ids=ids, num_users=1)
    again = Manifest.from_json(Manifest.of(bundle, {}).to_json())
    assert again.item_id_type == dtype


def test_it_says_what_a_reader_without_recclr_needs(plain):
    assert plain["kind"] == "recclr embeddings"
    assert (plain["metric"], plain["dtype"], plain["similarity"]) == ("dot", "float32", "cosine")
    assert (plain["num_items"], plain["num_users"], plain["embedding_dim"]) == (3, 2, 2)
    assert plain["max_item_norm"] == pytest.approx(1.0)
    assert plain["model"]["train_cutoff"] == 1_700_000_000
    assert plain["golden"]["k"] == 3
    assert plain == signed(plain)


def paths(value, before=()):
    """Where everything stands that a manifest is made of."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*before, key)
        if isinstance(entry, dict | list):
            yield from paths(entry, (*before, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)


def planted(plain, path, value):
    damaged = copy.deepcopy(plain)
    place = damaged
    for key in path[:-1]:
        place = place[key]
    before = place[path[-1]]
    place[path[-1]] = value
    return damaged, json.dumps(before) != json.dumps(value)


@given(st.data())
def test_any_change_at_any_place_is_refused(plain, data):
    path = data.draw(st.sampled_from(list(paths(plain))))
    damaged, changed = planted(plain, path, data.draw(JSON))
    if changed:
        with pytest.raises(StoreError, match="no manifest of recclr"):
            Manifest.from_json(damaged)


@given(st.data())
def test_a_forged_one_is_read_or_refused_but_never_a_crash(plain, data):
    path = data.draw(st.sampled_from([path for path in paths(plain) if path != ("sha256",)]))
    damaged, _ = planted(plain, path, data.draw(JSON))
    try:
        manifest = Manifest.from_json(signed(damaged))
    except StoreError:
        return
    assert is_version(manifest.version)
    assert manifest.unknown_user_vector.shape == (manifest.embedding_dim,)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("num_items",), float("inf")),
        (("num_users",), float("nan")),
        (("golden", "scores"), [[{"a": 1}]]),
        (("golden", "scores"), [[1.0], [1.0, 2.0]]),
        (("golden", "user_ids"), [1, "a"]),
        (("golden",), None),
        (("unknown_user_vector",), {}),
        (("unknown_user_vector",), [1.0]),
        (("item_id_type",), "Float64"),
        (("parts",), 3),
        (("model",), {"created": "now", "colour": "red"}),
    ],
)
def test_forgeries_of_each_kind_are_refused(plain, path, value):
    damaged, changed = planted(plain, path, value)
    assert changed
    with pytest.raises(StoreError, match="no manifest of recclr"):
        Manifest.from_json(signed(damaged))


@pytest.mark.parametrize("key", ["kind", "version", "golden", "model", "parts", "sha256", "format"])
def test_what_is_missing_is_named(plain, key):
    rest = {name: value for name, value in plain.items() if name != key}
    with pytest.raises(StoreError, match=f"no '{key}'"):
        Manifest.from_json(rest if key == "sha256" else signed(rest))


@pytest.mark.parametrize("value", [None, [], 3, "text", {}, {"kind": "other"}, [{"kind": 1}]])
def test_other_json_is_refused(value):
    with pytest.raises(StoreError, match="no manifest of recclr"):
        Manifest.from_json(value)


def test_a_newer_format_asks_for_a_newer_recclr(plain):
    with pytest.raises(StoreError, match="format 2, this recclr reads up to 1; update recclr"):
        Manifest.from_json(plain | {"format": 2})


@pytest.mark.parametrize("version", ["../../etc/passwd", "", "abc", "ABCDEF0123456789", "0" * 17])
def test_a_version_never_leads_out_of_its_folder(plain, version):
    assert not is_version(version)
    with pytest.raises(StoreError, match=r"version .* is not one"):
        Manifest.from_json(signed(plain | {"version": version}))


def test_a_file_that_cannot_be_read_is_named_with_advice(tmp_path, plain):
    path = tmp_path / "m.json"
    with pytest.raises(StoreError, match=r"m\.json cannot be read: .*; do this$"):
        read_manifest(path, "do this")
    whole = json.dumps(plain).encode()
    for data in (b"", whole[:-1], whole[: len(whole) // 2], b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"m\.json cannot be read: .*; do this$"):
            read_manifest(path, "do this")
    path.write_bytes(whole.replace(b'"cosine"', b'"dot"'))
    with pytest.raises(StoreError, match=r"m\.json: .*SHA-256 is not that of its content; do this"):
        read_manifest(path, "do this")
    path.write_bytes(whole)
    assert read_manifest(path, "do this").to_json() == plain


def test_the_tolerance_follows_the_scores_a_query_can_have(make_bundle):
    items = torch.eye(4, 6)
    items[2] *= 3
    manifest = Manifest.of(make_bundle(item_vectors=items, similarity="dot"), {})
    queries = torch.tensor([1.0, 0.0, 50.0, 1e-30])[:, None] * torch.eye(4, 6)
    tolerance = manifest.score_tolerance(queries)
    assert tolerance.dtype == torch.float64
    one = float(tolerance[0])
    assert tolerance.tolist() == pytest.approx([one, 0, 50 * one, 1e-30 * one], rel=1e-6, abs=0)
    # Far above what one float32 rounding can do, far below what a reader would notice.
    assert 3 * torch.finfo(torch.float32).eps < one < 3 * 1e-5
    assert manifest.score_tolerance(torch.empty(0, 6)).shape == (0,)
