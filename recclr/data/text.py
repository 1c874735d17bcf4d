"""Texts as sets of hashed n-grams, the same on every machine and in every version.

Terms of a text: its words, its pairs of neighbouring words, and the 3-grams of characters of each
word with one boundary mark at either end. Only distinct words are hashed one by one; everything
else is arithmetic on arrays.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recclr.data.ids import hash_ids, mix
from recclr.data.log import Csr
from recclr.data.vocabulary import Vocabulary

# Rows handled at once, to bound the memory for some 50 terms of 8 bytes each per row.
_CHUNK_ROWS = 1 << 17

# Keep a pair of words and a 3-gram from meeting the word of the same bits.
_PAIR = np.uint64(0x7061697273)
_GRAM = np.uint64(0x6772616D73)


def hash_buckets(values: pl.Series, num_buckets: int) -> NDArray[np.int64]:
    """Bucket of each string, int64 [n] in [0, num_buckets); nulls are not allowed."""
    return _bucket(hash_ids(values, 0), num_buckets)


def text_buckets(texts: pl.Series, num_buckets: int) -> Csr:
    """Hash the terms of each text into buckets.

    Args:
        texts: String [n]; compared in lower case and Unicode form NFKC. A word is a run of
            letters, digits, marks and underscores.
        num_buckets: at least 1.

    Returns:
        Csr of n rows, buckets ascending within a row, each once; empty for null or wordless texts.
    """
    parts = [
        _rows_of(texts.slice(start, _CHUNK_ROWS), num_buckets)
        for start in range(0, len(texts), _CHUNK_ROWS)
    ]
    return join_rows(parts)


def distinct_in_rows(
    rows: NDArray[np.int64], values: NDArray[np.int64], *, num_rows: int, cardinality: int
) -> Csr:
    """Group ``values`` [nnz] in [0, cardinality) by row, ascending and each once per row."""
    keys = np.sort(rows * cardinality + values)
    keys = keys[np.diff(keys, prepend=-1) != 0]
    offsets = np.searchsorted(keys, np.arange(num_rows + 1, dtype=np.int64) * cardinality)
    kept = (keys % cardinality).astype(np.int32)
    return Csr(torch.from_numpy(offsets.astype(np.int64)), torch.from_numpy(kept))


def kept_values(csr: Csr, keep: NDArray[np.bool_]) -> Csr:
    """The values of each row that ``keep``, by value, says."""
    kept = torch.from_numpy(keep)[csr.values.long()]
    ends = torch.zeros(len(kept) + 1, dtype=torch.int64)
    torch.cumsum(kept, 0, out=ends[1:])
    return Csr(ends[csr.offsets], csr.values[kept])


def join_rows(parts: list[Csr]) -> Csr:
    """The rows of all parts below one another; no rows for no parts."""
    offsets, total = [torch.zeros(1, dtype=torch.int64)], 0
    for part in parts:
        offsets.append(part.offsets[1:] + total)
        total += len(part.values)
    values = [torch.zeros(0, dtype=torch.int32), *(part.values for part in parts)]
    return Csr(torch.cat(offsets), torch.cat(values))


def _rows_of(texts: pl.Series, num_buckets: int) -> Csr:
    words = texts.str.normalize("NFKC").str.to_lowercase().str.extract_all(r"\w+")
    lengths = words.list.len().fill_null(0).to_numpy()
    flat = words.filter(pl.Series(lengths > 0)).explode()
    rows = np.repeat(np.arange(len(texts), dtype=np.int64), lengths)
    distinct = flat.unique()
    codes = Vocabulary(distinct).encode(flat)
    hashes = hash_ids(distinct, 0)[codes]
    neighbours = rows[1:] == rows[:-1]
    pairs = mix(mix(hashes[:-1][neighbours] ^ _PAIR) ^ hashes[1:][neighbours])
    grams = _grams_of_words(distinct, num_buckets).take(torch.from_numpy(codes))
    return distinct_in_rows(
        np.concatenate([rows, rows[1:][neighbours], rows[grams.row_numbers().numpy()]]),
        np.concatenate(
            [_bucket(hashes, num_buckets), _bucket(pairs, num_buckets), grams.values.numpy()]
        ),
        num_rows=len(texts),
        cardinality=num_buckets,
    )


def _grams_of_words(words: pl.Series, num_buckets: int) -> Csr:
    """Buckets of the 3-grams of each word; a word of n characters has n of them."""
    joined = "\0" + "".join(word + "\0" for word in words)
    points = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    # A character of Unicode has 21 bits, so that three of them in 63 bits never collide.
    left, middle, right = points[:-2], points[1:-1], points[2:]
    inside = middle != 0
    packed = (left << np.uint64(42)) | (middle << np.uint64(21)) | right
    buckets = _bucket(mix(mix(packed[inside]) ^ _GRAM), num_buckets)
    offsets = np.zeros(len(words) + 1, dtype=np.int64)
    np.cumsum(words.str.len_chars().to_numpy(), out=offsets[1:])
    return Csr(torch.from_numpy(offsets), torch.from_numpy(buckets.astype(np.int32)))


def _bucket(hashes: NDArray[np.uint64], num_buckets: int) -> NDArray[np.int64]:
    return (hashes % np.uint64(num_buckets)).astype(np.int64)
