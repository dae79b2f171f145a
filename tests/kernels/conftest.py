"""Checks that linear layers in any code share."""

from dataclasses import replace

import pytest
import torch

from hf_ext.testing import assert_close


def with_single_weights(weight, dtype=torch.int16):
    """A stored weight ``[19, 11]`` with three single weights, two of them in one column and two in one row."""
    rows, columns = torch.tensor([[0, 2, 2], [1, 1, 5]], dtype=dtype)
    values = torch.tensor([3.0, -7.0, 0.5]).half()
    return replace(weight, sparse_rows=rows, sparse_columns=columns, sparse_values=values)


@pytest.fixture
def check_single_weights():
    """The product and its gradient, with single weights added to the codes' own ``dense`` weight (float64)."""

    def check(weight, dense, linear, rows, dtype):
        weight = with_single_weights(weight, dtype)
        x = torch.randn(2, rows, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        dense[0, 1] += 3
        dense[2, 1] -= 7
        dense[2, 5] += 0.5
        if weight.lr_a is not None:
            dense = dense + weight.lr_b.double() @ weight.lr_a.double()
        for part in (x, x[0], x[0, 0]):
            assert_close("product", part @ dense.T, linear(part.float(), weight).double(), 1e-5)
        wanted = x.float().requires_grad_()
        linear(wanted, weight).sum().backward()
        assert_close("gradient", dense.sum(0).expand(2, rows, -1), wanted.grad.double(), 1e-5)

    return check


@pytest.fixture
def check_index_is_refused():
    """A place beyond the weight ends in a sentence that names its part."""

    def check(weight, linear, part, value):
        weight = with_single_weights(weight)
        getattr(weight, part)[0] = value
        with pytest.raises(ValueError, match=f"{part} must be from 0 to"):
            linear(torch.randn(1, 11), weight)

    return check
