import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext import PyramidInferConfig, PyramidKVConfig
from hf_ext.caches.budgets import (
    PyramidSchedule,
    check_budget,
    generation_keep,
    linear_budgets,
    parse_bytes,
    solve_decay,
)

# Lengths of 30 layers, p = 0.9, 1024 tokens, computed once from the released formulas.
RELEASED = [1024, 1024, 1023, 1022, 1020, 1016, 1010, 1002, 991, 977, 961, 942, 920, 895, 867]
RELEASED += [837, 805, 771, 736, 701, 666, 631, 597, 564, 532, 502, 474, 448, 424, 402]


def test_lengths_are_those_of_the_released_formulas():
    assert PyramidSchedule().lengths(1024, 30) == RELEASED


@pytest.mark.parametrize(("preset", "layers", "share"), [("7b", 32, 0.76), ("13b", 40, 0.72), ("70b", 80, 0.78)])
def test_released_settings_keep_what_the_formulas_say(preset, layers, share):
    assert PyramidInferConfig.preset(preset).schedule(2048, layers).kept(2048, layers) == pytest.approx(
        share, abs=0.01
    )


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 48), st.floats(0, 1), st.floats(0, 0.9), st.integers(0, 128))
def test_lengths_only_fall_and_keep_window_and_context(length, layers, decay, recent, least):
    schedule = PyramidSchedule(decay, recent, least)
    lengths = schedule.lengths(length, layers)
    assert lengths[0] == length
    assert all(a >= b for a, b in itertools.pairwise(lengths))
    assert lengths[-1] >= min(length, schedule.window(length) + min(least, length - schedule.window(length)))


@settings(deadline=None)
@given(st.one_of(st.floats(0.55, 0.95), st.just(1.0)), st.integers(512, 4096))
def test_the_solved_decay_meets_the_target(target, length):
    assert solve_decay(target, length, 30).kept(length, 30) == pytest.approx(target, abs=0.03)


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="cannot be reached for 512 tokens"):
        solve_decay(0.1, 512, 30)


def test_generated_blocks_keep_14_of_16_in_the_first_layer_and_1_in_the_last():
    kept = [generation_keep(layer, 30) for layer in range(30)]
    assert (kept[0], kept[-1]) == (14, 1)
    assert sum(kept) / 30 == pytest.approx(7.7, abs=0.05)


@given(st.integers(20, 5000), st.integers(1, 80))
def test_linear_budgets_fall_and_add_up(average, layers):
    budgets = linear_budgets(average, layers)
    assert sum(budgets) == pytest.approx(average * layers, abs=layers)
    assert all(a >= b for a, b in itertools.pairwise(budgets))


@pytest.mark.parametrize(("ratio", "first", "last"), [(0.45, 0.8775, 0.0225), (0.75, 1.0, 0.5), (1.0, 1.0, 1.0)])
def test_no_layer_of_pyramid_kv_is_given_more_than_there_is(ratio, first, last):
    shares = PyramidKVConfig(budget=ratio).shares(30)
    assert shares[0] * ratio == pytest.approx(first, abs=1e-4)
    assert shares[-1] * ratio == pytest.approx(last, abs=1e-4)
    assert sum(shares) == pytest.approx(30, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 64 << 20), ("1.5 GB", 1_500_000_000), ("10kb", 10_000), ("7B", 7)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, True, None, "many", "64MiX"])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=r"budget|size"):
        check_budget(budget)
