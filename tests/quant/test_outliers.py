import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.quant.linear import ReALLMLinear
from hf_ext.quant.outliers import MOST, split_outliers
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.solve import Effort, solve


def heavy(out=64, columns=96, seed=0):
    """A normal matrix with eight weights of 12 to 30 times their row's size."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=g)
    places = torch.randperm(out * columns, generator=g)[:8]
    weight.view(-1)[places] = torch.linspace(12, 30, 8) * torch.tensor([1, -1] * 4)
    return weight * 0.02


def by_hand(weight, threshold):
    """Places and values of outliers in float64, the farthest first to be taken."""
    array = weight.double().numpy()
    sizes = np.sqrt((array**2).mean(1))
    found = [
        (abs(array[r, c]) / sizes[r], r, c)
        for r in range(array.shape[0])
        for c in range(array.shape[1])
        if abs(array[r, c]) > threshold * sizes[r]
    ]
    kept = sorted(found, reverse=True)[: int(MOST * array.size)]
    return sorted((r, c) for _, r, c in kept)


@settings(deadline=None, max_examples=30)
@given(st.integers(12, 70), st.integers(90, 120), st.sampled_from([2.0, 3.0, 4.0]), st.integers(0, 9))
def test_the_farthest_weights_are_kept_and_nothing_is_lost(out, columns, threshold, seed):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) ** 3
    parts, rest = split_outliers(weight, threshold)
    places = by_hand(weight, threshold)
    if not places:
        assert parts == {} and torch.equal(rest, weight)
        return
    assert list(zip(parts["sparse_rows"].tolist(), parts["sparse_columns"].tolist(), strict=True)) == places
    assert torch.equal(parts["sparse_values"], torch.stack([weight[place] for place in places]).half())
    whole = rest.clone()
    whole[parts["sparse_rows"].long(), parts["sparse_columns"].long()] += parts["sparse_values"].float()
    torch.testing.assert_close(whole, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight", [torch.zeros(40, 50), torch.full((40, 50), 2.0), torch.ones(1, 1)])
def test_a_matrix_without_any_is_left_alone(weight):
    parts, rest = split_outliers(weight, 4.0)
    assert parts == {} and rest is weight
    assert split_outliers(heavy(), 0.0)[0] == {}


def test_places_in_a_wide_matrix_have_wider_numbers():
    weight = torch.zeros(2, 2**15 + 1)
    weight[1, -1] = 1.0
    parts, _ = split_outliers(weight, 4.0)
    assert parts["sparse_columns"].dtype == torch.int32 and parts["sparse_columns"].tolist() == [2**15]


def test_values_beyond_float16_are_left_to_the_codes():
    weight = torch.ones(40, 50)
    weight[3, 7] = 1e6
    parts, rest = split_outliers(weight, 4.0)
    assert parts["sparse_values"].tolist() == [65504.0] and rest[3, 7] == 1e6 - 65504


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-25, 1e-9])
def test_a_row_of_next_to_nothing_takes_no_place(size):
    weight = heavy()
    weight[0] = size * torch.randn(96, generator=torch.Generator().manual_seed(2))
    parts, _ = split_outliers(weight, 4.0)
    assert 0 not in parts["sparse_rows"] and (parts["sparse_values"] != 0).all()


def test_a_shape_that_names_other_outliers_is_corrected():
    weight = torch.ones(64, 96)
    solution = solve(weight, MatrixShape(2, 6, outliers=5))
    assert solution.shape.outliers == 0
    with pytest.raises(ValueError, match=r"is stored in .*sparse_rows.*, got codebook, qweight, scales\."):
        ReALLMLinear.from_parts(solution.parts, MatrixShape(2, 6, outliers=5), 96)


@pytest.mark.parametrize("decoder", ["trellis", "identity", "pointwise", "context"])
@pytest.mark.parametrize("hessian", [None, torch.eye(96)])
def test_a_solved_matrix_has_its_outliers_exactly_and_loses_less(decoder, hessian):
    weight, shape = heavy(), MatrixShape(2, 6, decoder=decoder, permute=True)
    solution = solve(weight, shape, hessian)
    assert solution.shape.outliers == len(solution.parts["sparse_values"]) == 6  # the most for 6,144 weights
    layer = ReALLMLinear.from_parts(solution.parts, solution.shape, 96)
    clipped = solve(weight, shape, hessian, effort=Effort(outliers=0))
    assert clipped.shape.outliers == 0 and "sparse_values" not in clipped.parts
    assert solution.error < (0.5 if decoder == "trellis" else 0.9) * clipped.error  # k-means learns some of them
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    wanted = torch.zeros(1, 96).add_(layer.weight.sum(0))
    for mode in ["once"] if decoder == "context" else ["on_the_fly", "once", "low_memory"]:
        layer.decode_mode = mode
        torch.testing.assert_close(layer(x), x @ layer.weight.T, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(layer(x.half()).float(), x @ layer.weight.T, atol=2e-2, rtol=2e-2)
        gradient = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)[0]
        torch.testing.assert_close(gradient, wanted.expand(2, -1), atol=2e-5, rtol=1e-4)
        x = x.detach()


def test_a_gain_reaches_the_outliers_of_its_row():
    solution = solve(heavy(), MatrixShape(2, 6, scale_bits=32))
    layer = ReALLMLinear.from_parts(solution.parts, solution.shape, 96)
    gain = torch.linspace(0.5, 2, 64)
    expected = layer.weight * gain[:, None]
    layer.scale_rows(gain)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-3, atol=1e-6)
    layer.get_buffer("sparse_values")[0] = 65504
    layer.scale_rows(gain + 1)
    assert layer.get_buffer("sparse_values")[0] == 65504  # not infinite


def test_fixed_codebooks_keep_none_unless_told_to():
    shape = MatrixShape(1, 4, codebook="nf4", group_size=32)
    assert solve(heavy(), shape).shape.outliers == 0
    told = solve(heavy(), shape, effort=Effort(outliers=4.0))
    assert told.shape.outliers == 6 and told.error < solve(heavy(), shape).error
