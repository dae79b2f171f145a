"""Positive integers of any type that stands for one, and a sentence for all else."""

import math

import numpy as np
import pytest

from hf_ext.options import positive_integer


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3)])
def test_whole_numbers_are_taken(value):
    assert positive_integer("windows", value) == 3
    assert type(positive_integer("windows", value)) is int


@pytest.mark.parametrize("value", [0, -1, 2.5, math.inf, math.nan, True, None, "3", 1 + 0j])
def test_all_else_is_refused(value):
    with pytest.raises(ValueError, match="windows must be a positive integer, got "):
        positive_integer("windows", value)
