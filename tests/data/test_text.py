import hashlib
import itertools
import random
import re
import unicodedata

import polars as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.data.log import Csr
from recclr.data.text import distinct_in_rows, hash_buckets, join_rows, text_buckets

MASK = (1 << 64) - 1


def slow_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return slow_mix(int.from_bytes(digest, "little") ^ slow_mix(0))


def slow_buckets(text: str | None, num_buckets: int) -> list[int]:
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text or "").lower())
    hashes = [slow_hash(word) for word in words]
    terms = list(hashes)
    for first, second in itertools.pairwise(hashes):
        terms.append(slow_mix(slow_mix(first ^ 0x7061697273) ^ second))
    for word in words:
        padded = f"\0{word}\0"
        for start in range(len(word)):
            a, b, c = (ord(char) for char in padded[start : start + 3])
            terms.append(slow_mix(slow_mix((a << 42) | (b << 21) | c) ^ 0x6772616D73))
    return sorted({term % num_buckets for term in terms})


def rows_of(csr: Csr) -> list[list[int]]:
    return [csr.row(index).tolist() for index in range(csr.num_rows)]


# Marks are letters of a word for Rust and not for Python, hence alphabets without any.
ALPHABET = "abcXYZ012_ -'.,éßĀΣωЖя漢字ｆﬁ😀"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(ALPHABET, max_size=25)), max_size=9))
def test_terms_equal_a_slow_loop(texts: list[str | None]) -> None:
    found = text_buckets(pl.Series(texts, dtype=pl.String), 997)
    assert rows_of(found) == [slow_buckets(text, 997) for text in texts]


GOLDEN = [116, 1094, 1180, 2551, 3195, 3314, 4137, 4176, 5030, 5490, 6669, 8731, 9760]


def test_buckets_never_change() -> None:
    # Saved models depend on these numbers.
    assert hash_buckets(pl.Series(["Action", "", "Fantômas"]), 1_000_003).tolist() == [
        slow_hash(word) % 1_000_003 for word in ("Action", "", "Fantômas")
    ]
    found = hash_buckets(pl.Series(["Action", "", "Fantômas"]), 1_000_003)
    assert found.tolist() == [251496, 375591, 146237]
    assert rows_of(text_buckets(pl.Series(["Die Hard 2"]), 10_007)) == [GOLDEN]


def test_case_and_unicode_forms_do_not_matter_but_order_does() -> None:
    forms = text_buckets(pl.Series(["Cafe\u0301 NOIR", "caf\u00e9 noir", "noir café"]), 50_021)
    first, second, swapped = rows_of(forms)
    assert first == second
    # The two words and their 3-grams are shared; only the pair differs.
    assert len(set(first) ^ set(swapped)) == 2


def test_a_text_without_words_has_no_terms() -> None:
    csr = text_buckets(pl.Series([None, "", " -- !", "a"]), 64)
    assert csr.lengths().tolist() == [0, 0, 0, len(slow_buckets("a", 64))]
    assert text_buckets(pl.Series([], dtype=pl.String), 64).num_rows == 0


def test_chunks_change_nothing(monkeypatch) -> None:
    rng = random.Random(3)
    words = ["alpha", "beta", "gamma", "Δ", "x1"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(4))) for _ in range(23)]
    whole = text_buckets(pl.Series(texts), 301)
    monkeypatch.setattr("recclr.data.text._CHUNK_ROWS", 5)
    parts = text_buckets(pl.Series(texts), 301)
    assert rows_of(parts) == rows_of(whole) == [slow_buckets(text, 301) for text in texts]
    assert parts.values.dtype == torch.int32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 10)), max_size=40))
def test_distinct_in_rows_equals_sets(pairs: list[tuple[int, int]]) -> None:
    rows = pl.Series([row for row, _ in pairs], dtype=pl.Int64).to_numpy()
    values = pl.Series([value for _, value in pairs], dtype=pl.Int64).to_numpy()
    csr = distinct_in_rows(rows, values, num_rows=7, cardinality=11)
    expected = [sorted({value for of, value in pairs if of == row}) for row in range(7)]
    assert rows_of(csr) == expected


def test_join_rows_of_nothing() -> None:
    assert join_rows([]).num_rows == 0
