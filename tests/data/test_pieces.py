"""Cutting documents: against an oracle that walks one document at a time, and the laws of the decomposition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.data.pieces import check_lengths, cut, round_up


def cut_one(length, min_length, max_length):
    """Greedy, largest first: the definition."""
    pieces, offset = [], 0
    while length - offset >= min_length:
        piece = max_length
        while piece > length - offset:
            piece //= 2
        pieces.append((offset, piece))
        offset += piece
    return pieces


bounds = st.tuples(st.integers(0, 6), st.integers(0, 4)).map(lambda pair: (2 ** pair[0], 2 ** (pair[0] + pair[1])))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3000), max_size=30), bounds)
def test_equals_the_greedy_cut_of_every_document(lengths, limits):
    pieces = cut(np.array(lengths, dtype=np.int64), *limits)
    found = [[] for _ in lengths]
    for document, offset, exponent in zip(*pieces, strict=True):
        found[document].append((offset, 1 << int(exponent)))
    assert found == [cut_one(length, *limits) for length in lengths]
    assert (np.diff(pieces.document) >= 0).all()


@settings(deadline=None)
@given(st.integers(0, 2**16), bounds)
def test_one_document(length, limits):
    low, high = limits
    pieces = cut(np.array([length]), low, high)
    sizes = 1 << pieces.exponent.astype(np.int64)
    ends = pieces.offset + sizes
    assert (pieces.offset[1:] == ends[:-1]).all()  # adjacent, in order
    tail = length - (ends[-1] if len(ends) else 0)
    assert 0 <= tail < low
    assert ((sizes >= low) & (sizes <= high)).all()
    if length < 2 * high:  # each exponent is a set bit of the length
        assert sorted(sizes) == [1 << k for k in range(20) if (length >> k) & 1 and (1 << k) >= low]


def test_known_lengths():
    def lengths_of(length):
        return [1 << int(k) for k in cut(np.array([length]), 256, 8192).exponent]

    assert lengths_of(255) == []
    assert lengths_of(256) == [256]
    assert lengths_of(257) == [256]
    assert lengths_of(769) == [512, 256]
    assert lengths_of(16384 + 300) == [8192, 8192, 256]


def test_no_documents():
    assert [len(array) for array in cut(np.array([], dtype=np.int64), 1, 8)] == [0, 0, 0]


def test_round_up():
    assert round_up(np.array([0, 1, 4, 5]), 4).tolist() == [0, 4, 4, 8]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (3, 8, "min_length must be a power of two, got 3"),
        (0, 8, "got 0"),
        (None, 8, "min_length must be a power of two, got None"),
        (4.0, 8, "got 4.0"),
        (2, 12, "max_length must be"),
        (16, 8, "16 and 8"),
    ],
)
def test_lengths_that_are_no_buckets(low, high, message):
    with pytest.raises(ValueError, match=message):
        check_lengths(low, high)
