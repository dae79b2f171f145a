"""In which order an epoch visits its buckets: the odds and cycles of Dataset Decomposition (arXiv 2405.13226, Alg. 1).

The paper draws one bucket a step, with odds among the buckets that still have sequences. That is a race of
exponential clocks: give the n-th batch of bucket ``i`` the time ``E_1 + ... + E_n`` with ``E`` exponential of rate
``odds_i`` and visit all batches by time. The two have the same distribution (clocks have no memory, and a bucket that
is used up rings no more), and the race is one sort instead of one draw a step.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_ext.data.pieces import Integers
from hf_ext.options import positive_integer

CURRICULA = ("uniform", "grow-linear", "grow-p2", "grow-p100", "shrink-linear", "shrink-p2", "shrink-p100")
ODDS_MODES = ("token-weighted", "paper")
Curriculum = str | Mapping[int, float]

_POWER = re.compile(r"(grow|shrink)-p(\d+(?:\.\d+)?)")


def curriculum_odds(curriculum: Curriculum, lengths: Sequence[int], empty: Sequence[int] = ()) -> NDArray[np.float64]:
    """Odds ``[N]`` of the buckets of these lengths, shortest first.

    Args:
        curriculum: ``"uniform"``, ``"grow-linear"`` (N ... 1), ``"grow-p2"`` or any ``"grow-p<x>"`` (x^(N-1) ... 1),
            the same with ``shrink`` for the reverse, or a mapping from length to odds.
        lengths: the buckets that have batches, in tokens, ascending.
        empty: lengths that exist but have no batch, for a better sentence.

    Raises:
        ValueError: no such curriculum, or a mapping names another set of buckets or odds that are not positive.
    """
    count = len(lengths)
    rank = np.arange(count, dtype=np.float64)
    if isinstance(curriculum, Mapping):
        return _named_odds(curriculum, lengths, empty)
    if curriculum == "uniform":
        return np.ones(count)
    if curriculum in ("grow-linear", "shrink-linear"):
        return count - rank if curriculum.startswith("grow") else rank + 1
    power = _POWER.fullmatch(str(curriculum))
    if power is None or float(power[2]) <= 0:
        raise ValueError(
            f"{curriculum!r} is no curriculum; allowed: {', '.join(CURRICULA)}, grow-p<x>, shrink-p<x> or a mapping "
            "from length to odds."
        )
    return float(power[2]) ** (count - 1 - rank if power[1] == "grow" else rank)


def _named_odds(odds: Mapping[int, float], lengths: Sequence[int], empty: Sequence[int]) -> NDArray[np.float64]:
    named = {int(length): float(value) for length, value in odds.items()}
    for length, value in named.items():
        if length not in lengths:
            why = "that bucket has no full batch" if length in empty else "there is no such bucket"
            raise ValueError(
                f"The curriculum names the length {length}, but {why}; buckets with batches: {list(lengths)}."
            )
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"The odds of length {length} must be positive, got {value!r}.")
    if missing := [length for length in lengths if length not in named]:
        raise ValueError(f"The curriculum must give odds for every bucket with batches, got none for {missing}.")
    return np.array([named[length] for length in lengths])


def epoch_order(
    batches: Integers, odds: NDArray[np.float64], cycles: int, rng: np.random.Generator, odds_mode: str
) -> NDArray[np.int8]:
    """The bucket of every step of one epoch ``[steps]``, as an index into ``batches``.

    Every cycle takes the same share of each bucket, give or take one batch (so that no batch is lost where the
    number of cycles does not divide; the paper, whose buckets are large, does not say).

    Args:
        batches: full batches in each bucket ``[N]``.
        odds: see `curriculum_odds`.
        cycles: passes through the curriculum.
        rng: source of the draws.
        odds_mode: ``"paper"`` takes the odds as they are, as Algorithm 1 does; ``"token-weighted"`` multiplies them
            with the bucket's share, as the authors' released script does, so that buckets of unequal size are used
            up at the pace the odds say. The two agree when all buckets hold equally many tokens.

    Raises:
        ValueError: ``odds_mode`` is neither, or ``cycles`` is no positive integer.
    """
    positive_integer("cycles", cycles)
    if odds_mode not in ODDS_MODES:
        raise ValueError(f"odds_mode must be one of {', '.join(ODDS_MODES)}, got {odds_mode!r}.")
    rates = odds * batches if odds_mode == "token-weighted" else odds
    order = []
    for cycle in range(cycles):
        counts = batches * (cycle + 1) // cycles - batches * cycle // cycles
        times = [np.cumsum(rng.standard_exponential(n)) / r for n, r in zip(counts, rates, strict=True) if n]
        bucket = np.repeat(np.arange(len(batches), dtype=np.int8), counts)
        order.append(bucket[np.argsort(np.concatenate(times), kind="stable")] if times else bucket)
    return np.concatenate(order)
