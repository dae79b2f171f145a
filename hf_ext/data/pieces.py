"""Cutting documents at the set bits of their lengths: the arithmetic of Dataset Decomposition (arXiv 2405.13226, 2.1).

A document of ``l`` tokens is cut, largest piece first, into adjacent pieces whose lengths are powers of two: as many
of ``max_length`` as fit, then one for every set bit of what is left, down to ``min_length``. What remains is a tail
of fewer than ``min_length`` tokens.
"""

from numbers import Integral
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Pieces(NamedTuple):
    """Pieces of many documents, in the order of the documents and, within one, of its text; all arrays are ``[N]``.

    Attributes:
        document: index of the document that a piece is cut from.
        offset: tokens of that document before the piece.
        exponent: log2 of the piece's length, int8.
    """

    document: Integers
    offset: Integers
    exponent: NDArray[np.int8]


def check_lengths(min_length: int, max_length: int) -> tuple[int, int]:
    """The exponents of the shortest and the longest bucket.

    Raises:
        ValueError: a length is no power of two, or the shortest is longer than the longest.
    """
    for name, length in (("min_length", min_length), ("max_length", max_length)):
        if isinstance(length, bool) or not isinstance(length, Integral) or length < 1 or length & (length - 1):
            raise ValueError(f"{name} must be a power of two, got {length!r}.")
    if min_length > max_length:
        raise ValueError(f"min_length must not be above max_length, got {min_length} and {max_length}.")
    return int(min_length).bit_length() - 1, int(max_length).bit_length() - 1


def cut(lengths: Integers, min_length: int, max_length: int) -> Pieces:
    """Cut documents of these lengths ``[D]`` (tokens).

    The piece of bit ``k`` starts where the document's length has its bits up to ``k`` cleared, because everything
    before it is made of larger pieces; so all documents are cut at once, one pass for every bucket.

    Raises:
        ValueError: see `check_lengths`.
    """
    low, high = check_lengths(min_length, max_length)
    lengths = np.asarray(lengths, dtype=np.int64)
    repeats = lengths >> high
    has_bit = {k: (lengths >> k) & 1 for k in range(high - 1, low - 1, -1)}
    counts = repeats + sum(has_bit.values())
    first = np.cumsum(counts) - counts
    total = int(counts.sum())
    document = np.repeat(np.arange(len(lengths)), counts)
    offset = np.empty(total, dtype=np.int64)
    exponent = np.full(total, high, dtype=np.int8)
    rank = np.arange(total) - np.repeat(first, counts)
    offset[:] = rank << high  # right for pieces of the longest bucket; the others are overwritten below
    place = first + repeats
    for k, bit in has_bit.items():
        chosen = bit.astype(bool)
        offset[place[chosen]] = (lengths[chosen] >> (k + 1)) << (k + 1)
        exponent[place[chosen]] = k
        place = place + bit
    return Pieces(document, offset, exponent)


def round_up(lengths: Integers, min_length: int) -> Integers:
    """Lengths ``[D]`` with the tail padded to a whole ``min_length``, so that cutting them leaves no tail."""
    return -(-np.asarray(lengths, dtype=np.int64) // min_length) * min_length
