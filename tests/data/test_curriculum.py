"""Odds and orders: against Algorithm 1 of the paper drawn one bucket a step, and the laws of an epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.data.curriculum import curriculum_odds, epoch_order
from hf_ext.data.mixture import mixture_batches

LENGTHS = [256, 512, 1024, 2048, 4096, 8192]


def algorithm_1(batches, odds, rng):
    """One cycle of the paper's Algorithm 1: draw a bucket among those that still have sequences."""
    left, order = list(batches), []
    while any(left):
        live = np.where(np.array(left) > 0, odds, 0)
        bucket = rng.choice(len(left), p=live / live.sum())
        left[bucket] -= 1
        order.append(bucket)
    return order


def test_odds_of_the_paper():
    assert curriculum_odds("uniform", LENGTHS).tolist() == [1] * 6
    assert curriculum_odds("grow-linear", LENGTHS).tolist() == [6, 5, 4, 3, 2, 1]
    assert curriculum_odds("grow-p2", LENGTHS).tolist() == [32, 16, 8, 4, 2, 1]
    assert curriculum_odds("grow-p100", LENGTHS).tolist() == [1e10, 1e8, 1e6, 1e4, 100, 1]
    assert curriculum_odds("shrink-p100", LENGTHS).tolist() == [1, 100, 1e4, 1e6, 1e8, 1e10]
    assert curriculum_odds("shrink-linear", LENGTHS).tolist() == [1, 2, 3, 4, 5, 6]
    assert curriculum_odds("grow-p1.5", [8, 16]).tolist() == [1.5, 1]
    assert curriculum_odds({16: 2, 8: 1}, [8, 16]).tolist() == [1, 2]


def test_distribution_of_the_order_is_that_of_algorithm_1():
    batches, odds, draws = np.array([3, 2, 2]), np.array([4.0, 2.0, 1.0]), 4000
    seen = [np.zeros((7, 3)), np.zeros((7, 3))]
    rng = np.random.default_rng(0)
    for _ in range(draws):
        seen[0][range(7), algorithm_1(batches, odds, rng)] += 1
        seen[1][range(7), epoch_order(batches, odds, 1, rng, "paper")] += 1
    # every step's share of every bucket, and with it the joint first draws, within five standard errors
    assert np.abs(seen[0] - seen[1]).max() / draws < 5 * np.sqrt(2 * 0.25 / draws)


def test_first_draw_follows_the_odds():
    odds = curriculum_odds("grow-p2", LENGTHS)
    batches = np.full(6, 50)
    draws = 3000
    first = np.bincount(
        [epoch_order(batches, odds, 1, np.random.default_rng(seed), "paper")[0] for seed in range(draws)], minlength=6
    )
    expected = draws * odds / odds.sum()
    assert ((first - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("curriculum", "expected"),  # mean place of each bucket within a cycle, equally many batches each
    [
        ("uniform", [0.5] * 6),
        ("grow-linear", [0.28, 0.35, 0.40, 0.56, 0.64, 0.77]),
        ("grow-p2", [0.17, 0.29, 0.42, 0.53, 0.73, 0.85]),
        ("grow-p100", [0.08, 0.25, 0.42, 0.58, 0.75, 0.92]),
        ("shrink-p100", [0.92, 0.75, 0.58, 0.42, 0.25, 0.08]),
    ],
)
def test_mean_places(curriculum, expected):
    odds, batches = curriculum_odds(curriculum, LENGTHS), np.full(6, 200)
    places = np.zeros(6)
    for seed in range(20):
        order = epoch_order(batches, odds, 1, np.random.default_rng(seed), "paper")
        places += [np.flatnonzero(order == bucket).mean() / len(order) / 20 for bucket in range(6)]
    assert np.abs(places - expected).max() < 0.06


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(["paper", "token-weighted"]),
)
def test_every_batch_once_and_cycles_alike(counts, cycles, mode):
    batches = np.array(counts)
    order = epoch_order(
        batches, curriculum_odds("grow-p2", LENGTHS[: len(counts)]), cycles, np.random.default_rng(1), mode
    )
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    ends = np.cumsum([sum(n * (c + 1) // cycles - n * c // cycles for n in counts) for c in range(cycles)])
    shares = np.array([np.bincount(part, minlength=len(counts)) for part in np.split(order, ends[:-1])])
    assert (np.ptp(shares, axis=0) <= 1).all()


def test_token_weighted_odds_keep_a_small_bucket_to_its_pace():
    batches, odds = np.array([10, 1000]), np.array([1.0, 1.0])
    last = {
        mode: np.flatnonzero(epoch_order(batches, odds, 1, np.random.default_rng(0), mode) == 0).max()
        for mode in ("paper", "token-weighted")
    }
    assert last["paper"] < 60 and last["token-weighted"] > 600


def test_mixtures():
    sequences = np.array([100, 40, 3])  # of 4, 8, 16 tokens: 25, 20 and 3 batches of 16
    lengths = [4, 8, 16]
    assert mixture_batches("natural", lengths, sequences, 16).tolist() == [25, 20, 3]
    assert mixture_batches("equal", lengths, sequences, 16).tolist() == [3, 3, 3]
    assert mixture_batches({8: 1}, lengths, sequences, 16).tolist() == [0, 20, 0]
    assert mixture_batches({4: 2, 16: 1}, lengths, sequences, 16).tolist() == [6, 0, 3]
    assert mixture_batches({4: 0.1, 8: 0.3}, lengths, sequences, 16).tolist() == [6, 20, 0]
    assert mixture_batches("equal", lengths, np.array([100, 40, 0]), 16).tolist() == [20, 20, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curriculum_odds("grow-p", LENGTHS), "'grow-p' is no curriculum; allowed: uniform, grow-linear"),
        (lambda: curriculum_odds("grow-p0", LENGTHS), "is no curriculum"),
        (lambda: curriculum_odds({4: 1, 8: 1}, [4], [8]), "names the length 8, but that bucket has no full batch"),
        (lambda: curriculum_odds({4: 1, 8: 1}, [4]), "names the length 8, but there is no such bucket"),
        (lambda: curriculum_odds({4: 1}, [4, 8]), r"got none for \[8\]"),
        (lambda: curriculum_odds({4: 0}, [4]), "odds of length 4 must be positive, got 0.0"),
        (
            lambda: epoch_order(np.array([1]), np.array([1.0]), 0, None, "paper"),
            "cycles must be a positive integer, got 0",
        ),
        (lambda: epoch_order(np.array([1]), np.array([1.0]), 1, None, "even"), "odds_mode must be one of"),
        (lambda: mixture_batches("even", [4], np.array([9]), 4), "'even' is no mixture; allowed: natural, equal"),
        (lambda: mixture_batches({8: 1}, [4], np.array([9]), 4), r"names the lengths \[8\], which no sequence has"),
        (lambda: mixture_batches({4: -1}, [4], np.array([9]), 4), "weight of length 4 must be positive"),
        (
            lambda: mixture_batches({4: 1}, [4], np.array([1]), 8),
            r"names the lengths \[4\], which do not fill one batch",
        ),
        (lambda: mixture_batches("natural", [4], np.array([1]), 8), "No bucket fills one batch of 8 tokens"),
        (lambda: mixture_batches("natural", [4, 8], np.array([9, 9]), 12), "multiple of every length in use, got 12"),
    ],
)
def test_bad_input_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
