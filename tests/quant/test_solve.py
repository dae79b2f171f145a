import itertools

import pytest
import torch

from hf_ext.kernels.pack import unpack
from hf_ext.quant.container import dense
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.solve import Effort, relative_error, solve


def matrix(out=48, columns=96, seed=0):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments(columns=96, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, columns, generator=g) * torch.linspace(0.1, 3, columns)
    x = x @ (torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=g) / columns**0.5)
    return x.T @ x / 400


NF4_SHAPE = MatrixShape(1, 4, codebook="nf4", group_size=64, scale_bits=32)


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = matrix(24, 192)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    solution = solve(weight, NF4_SHAPE)
    assert torch.equal(solution.parts["scales"].flatten(), state.absmax)
    codes = unpack(solution.parts["qweight"], 4, 192).flatten()
    theirs = packed.flatten()
    assert torch.equal(codes, torch.stack([theirs >> 4, theirs & 15], 1).flatten())
    assert torch.equal(dense(solution.parts, solution.shape, 192), functional.dequantize_4bit(packed, state))


def test_round_to_nearest_is_the_formula():
    weight = matrix(8, 100)  # the last group of 32 holds 4 columns
    solution = solve(weight, MatrixShape(1, 3, codebook="uniform", affine=True, group_size=32, scale_bits=32))
    for begin in range(0, 100, 32):
        part = weight[:, begin : begin + 32]
        low, high = part.amin(1, True), part.amax(1, True)
        step = (high - low) / 7
        expected = ((part - low) / step).round() * step + low
        actual = dense(solution.parts, solution.shape, 100)[:, begin : begin + 32]
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_loftq_is_its_alternation(rounds):
    weight = matrix(32, 64)
    product = torch.zeros_like(weight)
    for _ in range(rounds):  # LoftQ (arXiv 2310.08659), algorithm 1
        target = weight - product
        plain = solve(target, NF4_SHAPE)
        quantised = dense(plain.parts, plain.shape, 64)
        u, s, v = torch.linalg.svd(weight - quantised)
        product = u[:, :4] * s[:4] @ v[:4]
    shape = MatrixShape(**{**NF4_SHAPE.to_dict(), "rank": 4, "low_rank_bits": 32})
    ours = solve(weight, shape, effort=Effort(rounds=rounds))
    torch.testing.assert_close(dense(ours.parts, ours.shape, 64), quantised + product, atol=1e-4, rtol=0)


def test_plain_vector_quantisation_takes_the_nearest_codeword_of_its_book():
    weight = matrix()
    solution = solve(weight, MatrixShape(2, 5))
    scale = solution.parts["scales"].float()
    book = solution.parts["codebook"].float()
    vectors = weight.view(48, 48, 2)
    codes = unpack(solution.parts["qweight"], 5, 48)
    rms = weight.square().mean(1).sqrt().half().float()[:, None, None]  # codes are chosen before scales are refitted
    gaps = (vectors[:, :, None] / rms[..., None] - book).square().sum(-1)
    chosen = gaps.gather(-1, codes[..., None].long())[..., 0]
    torch.testing.assert_close(chosen, gaps.amin(-1), atol=1e-5, rtol=1e-4)
    assert (scale > 0).all()


@pytest.mark.parametrize("decoder", ["identity", "pointwise", "context", "trellis"])
@pytest.mark.parametrize("out, columns", [(48, 96), (7, 33)])
@pytest.mark.parametrize("data", [False, True])
def test_the_error_told_is_that_of_what_is_stored(decoder, out, columns, data):
    weight = matrix(out, columns)
    hessian = moments(columns) if data else None
    shape = MatrixShape(4, 6, rank=2, permute=True, decoder=decoder)
    solution = solve(weight, shape, hessian, effort=Effort(damping=1e-6))
    stored = dense(solution.parts, solution.shape, columns)
    assert solution.error == pytest.approx(relative_error(weight, stored, hessian), rel=2e-2)
    assert solution.error < 0.4
    assert solution.shape.permute == data and ("perm" in solution.parts) == data


def test_each_ingredient_lowers_the_loss():
    weight, hessian = matrix(96, 96), moments()
    base = MatrixShape(2, 4, permute=True)

    def error(shape=base, **effort):
        solution = solve(weight, shape, hessian, effort=Effort(**effort))
        return relative_error(weight, dense(solution.parts, solution.shape, 96), hessian)

    full = error()
    assert full < 0.8 * error(feedback=False)
    assert error(MatrixShape(2, 4, rank=4, permute=True)) < full
    assert error(MatrixShape(2, 6, permute=True)) < 0.5 * full


def test_weighted_k_means_serves_the_columns_that_count():
    weight = matrix(96, 96)
    weight[:, :24] *= 3  # no other columns reach so far out
    hessian = torch.diag(torch.cat([torch.full((24,), 15.0), torch.ones(72)]))
    errors = [
        solve(weight, MatrixShape(2, 5), hessian, effort=Effort(feedback=False, weighting=weighting)).error
        for weighting in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_more_rounds_are_never_worse():
    weight, hessian = matrix(), moments()
    shape = MatrixShape(2, 4, rank=4, permute=True)
    errors = [solve(weight, shape, hessian, effort=Effort(rounds=n)).error for n in (1, 2, 4)]
    assert errors[0] >= errors[1] >= errors[2]


def test_row_weights_move_the_low_rank_term_to_the_rows_that_count():
    weight, rows = matrix(), torch.ones(48)
    rows[:4] = 1000
    shape = MatrixShape(2, 4, rank=4)
    plain, weighed = solve(weight, shape), solve(weight, shape, rows=rows)
    gaps = [(weight - dense(found.parts, found.shape, 96))[:4].square().sum() for found in (plain, weighed)]
    assert gaps[1] < 0.5 * gaps[0]


def test_the_same_seed_gives_the_same_bytes_and_leaves_its_inputs():
    weight, hessian = matrix(), moments()
    kept = weight.clone(), hessian.clone()
    shape = MatrixShape(4, 8, rank=2, permute=True)
    first, second = (solve(weight, shape, hessian).parts for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


@pytest.mark.parametrize("shape", [MatrixShape(4, 8, rank=2), MatrixShape(1, 4, codebook="nf4", group_size=32)])
def test_zero_and_constant_rows_survive(shape):
    weight = matrix()
    weight[3], weight[5] = 0, 0.25
    stored = dense(*(lambda s: (s.parts, s.shape))(solve(weight, shape)), 96)
    assert torch.isfinite(stored).all()
    assert stored[3].abs().max() < 0.02
    assert (stored[5] - 0.25).abs().mean() < 0.1


def test_a_dead_input_channel_does_no_harm():
    hessian = moments()
    hessian[:, 7] = hessian[7] = 0
    solution = solve(matrix(), MatrixShape(2, 6, rank=2, permute=True), hessian)
    assert torch.isfinite(dense(solution.parts, solution.shape, 96)).all() and solution.error < 0.1


def test_what_cannot_be_represented_is_refused():
    weight = matrix()
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight to quantise holds 1 values that are not finite"):
        solve(weight, MatrixShape())
    with pytest.raises(ValueError, match="must be a matrix"):
        solve(torch.zeros(3), MatrixShape())


def test_more_bits_a_weight_leave_less_error_up_to_the_last():
    weight = matrix(64, 96)
    errors = [solve(weight, MatrixShape(1, bits)).error for bits in range(1, 9)]
    assert all(more < 0.5 * less for less, more in itertools.pairwise(errors))


@pytest.mark.parametrize(
    "shape", [MatrixShape(2, 6, rank=2, permute=True), MatrixShape(2, 6, rank=2, decoder="trellis")]
)
@pytest.mark.parametrize("counting", [0, 1, 46])
def test_rows_that_never_count_are_stored_all_the_same(shape, counting):
    rows = torch.zeros(48)
    rows[:counting] = 1.0
    solution = solve(matrix(), shape, moments(), rows)
    stored = dense(solution.parts, solution.shape, 96)
    assert solution.error < 0.1 and torch.isfinite(stored).all()
    assert relative_error(matrix(), stored, None) < 0.5


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e3])
def test_the_size_of_a_matrix_does_not_matter(size):
    shape = MatrixShape(2, 6, decoder="trellis")
    assert solve(matrix() * size, shape).error == pytest.approx(solve(matrix(), shape).error, rel=0.2)


def test_a_matrix_too_large_for_sums_is_refused():
    with pytest.raises(ValueError, match=r"reaches 2.05e\+20, too far for float32 sums"):
        solve(matrix() * 1e21, MatrixShape(2, 6, decoder="trellis"))
