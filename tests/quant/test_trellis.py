import itertools

import pytest
import torch

from hf_ext.kernels.trellis import MAX_WIDTH, TrellisWeight, decode_reference
from hf_ext.quant.feedback import curvature
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.solve import Effort, solve
from hf_ext.quant.trellis import allocate, column_widths, distortion, encode_columns, even_rates


def hessian(columns=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=g) * torch.linspace(3, 0.1, columns)
    x = x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g) / columns**0.5)
    return x.T @ x / 300


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.75, 3, 6])
@pytest.mark.parametrize("columns", [1, 7, 64])
def test_rates_spend_their_bits_and_no_more(bits, columns):
    falling = torch.linspace(9, 0.1, columns)
    for rates in (even_rates(bits, columns), allocate(falling, bits, 8)):
        assert sum(rates) == columns == len(column_widths(rates))
        assert int(column_widths(rates).sum()) == int(bits * columns)
    assert sum(count > 0 for count in even_rates(bits, columns)) <= 2


def test_bits_go_where_they_save_most():
    weights = torch.tensor([30.0, 9.0, 2.0, 1.0, 0.2])
    for bits in (1.6, 2.0, 3.2):
        widths = itertools.product(range(1, MAX_WIDTH + 1), repeat=5)
        spend = int(bits * 5)
        costs = {w: sum(float(c) * distortion(k, 8) for c, k in zip(weights, w, strict=True)) for w in widths}
        best = min((w for w in costs if sum(w) == spend), key=costs.__getitem__)
        assert tuple(column_widths(allocate(weights, bits, 8)).tolist()) == best


def test_the_squares_of_corrected_errors_are_the_loss():
    """With feedback, ``sum_k (error_k / U_kk)^2`` over the columns as they then stand equals ``tr(E H E^T)``."""
    g = torch.Generator().manual_seed(0)
    target = torch.randn(24, 40, generator=g)
    bend = curvature(hessian(), 0.05, None)
    scales = target.square().mean(1, keepdim=True).sqrt()
    rates = even_rates(2.5, 40)
    stream = encode_columns(target, scales, torch.ones(24), rates, 8, bend.factor)
    dense = decode_reference(TrellisWeight(stream, column_widths(rates), scales, 8))
    gap = (target - dense).double()
    loss = ((gap @ bend.hessian.double()) * gap).sum()
    whitened = gap @ torch.linalg.inv(bend.factor.double())  # H = U^-1 U^-T
    torch.testing.assert_close(loss, whitened.square().sum(), rtol=1e-4, atol=0)
    plain = encode_columns(target, scales, torch.ones(24), rates, 8, None)
    worse = (target - decode_reference(TrellisWeight(plain, column_widths(rates), scales, 8))).double()
    assert loss < 0.9 * ((worse @ bend.hessian.double()) * worse).sum()


def test_rows_that_count_more_get_smaller_errors():
    g = torch.Generator().manual_seed(0)
    target, scales = torch.randn(64, 32, generator=g), torch.ones(64, 1)
    rows = torch.ones(64)
    rows[::4] = 30.0
    rates = even_rates(2, 32)
    errors = []
    for counts in (torch.ones(64), rows):
        stream = encode_columns(target, scales, counts, rates, 10, None)
        dense = decode_reference(TrellisWeight(stream, column_widths(rates), scales, 10))
        errors.append((target - dense).square().mean(1))
    assert errors[1][::4].mean() < 0.6 * errors[0][::4].mean()
    assert (rows * errors[1]).sum() < 0.8 * (rows * errors[0]).sum()


def test_a_trellis_beats_k_means_at_equal_bits():
    g = torch.Generator().manual_seed(0)
    weight, moments = torch.randn(768, 64, generator=g) * 0.05, hessian(64)
    effort = Effort(rounds=1)
    trellis = solve(weight, MatrixShape(1, 2, permute=True, decoder="trellis"), moments, effort=effort)
    vectors = solve(weight, MatrixShape(4, 8, permute=True), moments, effort=effort)
    assert sum(p.nbytes for p in trellis.parts.values()) < sum(p.nbytes for p in vectors.parts.values())
    assert trellis.error < 0.85 * vectors.error


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 64}, "one scale a row"),
        ({"code_bits": 7, "vector_size": 1}, "1 to 6 bits"),
        ({"rates": (1, 2)}, "6 counts"),
        ({"state_bits": 20}, "state_bits"),
        ({"decoder": "identity", "rates": (0, 4, 0, 0, 0, 0)}, "belong to decoder='trellis'"),
    ],
)
def test_shapes_no_trellis_can_have(options, message):
    with pytest.raises(ValueError, match=message):
        MatrixShape(**{"vector_size": 1, "code_bits": 2, "decoder": "trellis", **options})
