import numpy as np
import pytest
import torch

from hf_ext.quant.feedback import curvature, quantize_rows


def problem(out=6, columns=21, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(out, columns, generator=g), x.T @ x / 200


def gptq_by_hand(weight, hessian, table, scale):
    """Codeword by codeword in float64, with the explicit inverse of what is left of the Hessian."""
    size, columns = table.shape[1], weight.shape[1]
    w, codes = weight.double().numpy().copy(), []
    left = np.arange(columns)
    while len(left):
        g, rest = left[:size], left[size:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        n = len(g)
        metric = np.linalg.inv(inverse[:n, :n])
        words = table[:, :n] * scale
        gaps = w[:, None, g] - words[None]
        code = np.einsum("rki,ij,rkj->rk", gaps, metric, gaps).argmin(1)
        error = w[:, g] - words[code]
        w[:, g] = words[code]
        w[:, rest] -= error @ metric @ inverse[:n, n:]
        codes.append(code)
        left = rest
    return np.stack(codes, 1), w


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_codes_equal_gptq_by_hand(size):
    weight, hessian = problem()
    bend = curvature(hessian, 0.01, None)
    table = torch.randn(16, size, generator=torch.Generator().manual_seed(5))
    scales, zeros = torch.full_like(weight, 0.7), torch.zeros_like(weight)
    codes = quantize_rows(weight, scales, zeros, table, bend.factor)
    expected, _ = gptq_by_hand(weight, bend.hessian.double().numpy(), table.double().numpy(), 0.7)
    np.testing.assert_array_equal(codes.numpy(), expected)


def test_columns_beyond_one_block_are_corrected_too():
    weight, hessian = problem(3, 300)
    bend = curvature(hessian, 0.05, None)
    table = torch.linspace(-2, 2, 8)[:, None]
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    codes = quantize_rows(weight, ones, zeros, table, bend.factor)
    expected, _ = gptq_by_hand(weight, bend.hessian.double().numpy(), table.double().numpy(), 1.0)
    assert (codes.numpy() == expected).mean() > 0.99  # float32 may fall on the other side of a tie


def test_feedback_beats_the_nearest_codeword_where_it_counts():
    weight, hessian = problem(16, 40)
    bend = curvature(hessian, 0.01, hessian.diagonal().argsort(descending=True))
    table = torch.linspace(-2, 2, 4)[:, None]
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)

    def loss(factor):
        gap = weight - table[quantize_rows(weight, ones, zeros, table, factor).long(), 0]
        return float(((gap @ bend.hessian) * gap).sum())

    assert loss(bend.factor) < 0.5 * loss(None)


def test_without_curvature_every_codeword_is_the_nearest():
    weight, _ = problem(5, 11)
    table = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    scales, zeros = torch.full_like(weight, 0.5), torch.full_like(weight, 0.1)
    codes = quantize_rows(weight, scales, zeros, table, None)
    for row in range(5):
        for number in range(3):
            part = weight[row, 4 * number : 4 * number + 4]
            gaps = (part - 0.5 * table[:, : len(part)] - 0.1).square().sum(1)
            assert int(codes[row, number]) == int(gaps.argmin())


def test_the_factor_is_the_inverse_of_the_damped_permuted_hessian():
    _, hessian = problem()
    perm = torch.randperm(21)
    bend = curvature(hessian, 0.1, perm)
    expected = hessian[perm][:, perm] + 0.1 * hessian.diagonal().mean() * torch.eye(21)
    torch.testing.assert_close(bend.hessian, expected)
    torch.testing.assert_close(bend.factor.T @ bend.factor @ expected, torch.eye(21), atol=1e-3, rtol=0)
    assert torch.equal(bend.factor, bend.factor.triu())
