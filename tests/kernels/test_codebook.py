import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.kernels.codebook import (
    CodebookWeight,
    codebook_linear,
    codebook_linear_reference,
    decode,
    decode_reference,
)
from hf_ext.kernels.pack import pack
from hf_ext.testing import assert_close


def random_weight(out, columns, size, code_bits, group=0, zeros=False, perm=False, rank=0, seed=0, int8=False):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**code_bits, (out, -(-columns // size)), generator=g)
    groups = -(-columns // group) if group else 1
    factors = [torch.randn(rank, columns, generator=g), torch.randn(out, rank, generator=g)] if rank else [None, None]
    if rank and int8:
        factors = [(factor * 40).clamp(-128, 127).to(torch.int8) for factor in factors]
        factors.append(torch.rand(rank, generator=g) / 1600)
    return CodebookWeight(
        pack(codes, code_bits),
        torch.randn(2**code_bits, size, generator=g).half().float(),
        (torch.rand(out, groups, generator=g) + 0.5).half(),
        columns,
        code_bits,
        group or columns,
        torch.randn(out, groups, generator=g).half() if zeros else None,
        torch.randperm(columns, generator=g).to(torch.int16) if perm else None,
        *factors,
    )


def by_hand(weight):
    """Every element on its own, in float64, from the bits of the packed bytes."""
    out, columns, bits, size = len(weight.qweight), weight.in_features, weight.code_bits, weight.table.shape[1]
    dense = np.zeros((out, columns))
    stream = np.unpackbits(weight.qweight.numpy(), axis=1, bitorder="little")
    for row in range(out):
        for k in range(columns):
            number = k // size
            code = sum(int(stream[row, number * bits + i]) << i for i in range(bits))
            value = float(weight.table[code, k % size]) * float(weight.scales[row, k // weight.group])
            value += 0.0 if weight.zeros is None else float(weight.zeros[row, k // weight.group])
            dense[row, k if weight.perm is None else int(weight.perm[k])] = value
    return torch.from_numpy(dense)


FORMATS = [(1, 3), (1, 4), (2, 4), (2, 5), (2, 6), (2, 7), (2, 8), (3, 7), (3, 8), (4, 6), (4, 7), (4, 8), (8, 8)]


@pytest.mark.parametrize("size, code_bits", FORMATS)
@pytest.mark.parametrize("columns", [64, 37])
@pytest.mark.parametrize("perm", [False, True])
def test_decoding_equals_every_element_by_hand(size, code_bits, columns, perm):
    weight = random_weight(5, columns, size, code_bits, perm=perm)
    assert_close("reference", by_hand(weight), decode_reference(weight), 1e-6)
    assert torch.equal(decode(weight), decode_reference(weight))
    assert torch.equal(decode(weight, torch.bfloat16), decode_reference(weight, torch.bfloat16))


@settings(deadline=None, max_examples=30)
@given(
    out=st.integers(1, 9),
    columns=st.integers(1, 70),
    form=st.sampled_from(FORMATS),
    groups=st.integers(0, 3),
    zeros=st.booleans(),
    perm=st.booleans(),
    rank=st.integers(0, 2),
    int8=st.booleans(),
    rows=st.integers(1, 6),
)
def test_the_product_equals_the_dense_one(out, columns, form, groups, zeros, perm, rank, int8, rows):
    group = form[0] * 8 * groups
    weight = random_weight(out, columns, *form, group=group, zeros=zeros, perm=perm, rank=rank, int8=int8)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, out)
    dense = by_hand(weight)
    if weight.lr_a is not None:
        scale = torch.ones(rank) if weight.lr_scale is None else weight.lr_scale
        dense = dense + weight.lr_b.double() @ torch.diag(scale.double()) @ weight.lr_a.double()
    expected = x.double() @ dense.T + bias.double()
    assert_close("reference", expected, codebook_linear_reference(x, weight, bias), 1e-5)
    assert_close("product", expected, codebook_linear(x, weight, bias), 1e-5)


@pytest.mark.parametrize("size, code_bits", FORMATS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("int8", [False, True])
def test_one_token_in_every_type(size, code_bits, dtype, tolerance, int8):
    weight = random_weight(192, 576, size, code_bits, perm=True, rank=4, int8=int8)
    x = torch.randn(1, 1, 576, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = codebook_linear(x, weight)
    assert y.dtype == dtype and y.shape == (1, 1, 192)
    assert_close("token", codebook_linear_reference(x.double().float(), weight), y.float(), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_many_tokens_and_their_gradient_in_half_precision(dtype, tolerance):
    weight = random_weight(96, 160, 2, 6, perm=True, rank=4)
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    y = codebook_linear(x, weight)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    wide = x.detach().float().requires_grad_()
    expected = codebook_linear_reference(wide, weight)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)
    assert y.dtype == gradient.dtype == dtype
    assert_close("product", expected, y.float(), tolerance)
    assert_close("gradient", expected_gradient, gradient.float(), tolerance)


@pytest.mark.parametrize("size, code_bits", [(1, 4), (2, 6), (3, 7), (4, 8)])
def test_decoding_groups_with_shifts(size, code_bits):
    weight = random_weight(5, 100, size, code_bits, group=24, zeros=True, perm=True)
    assert_close("decoded", by_hand(weight), decode(weight), 1e-6)
    assert_close("reference", by_hand(weight), decode_reference(weight), 1e-6)


def test_no_rows_in_none_out():
    assert codebook_linear(torch.zeros(0, 36), random_weight(24, 36, 2, 6)).shape == (0, 24)


def test_strided_input_and_three_dimensions():
    weight = random_weight(24, 36, 2, 6, perm=True)
    x = torch.randn(36, 3, 2).permute(2, 1, 0)
    assert_close("strided", x @ decode_reference(weight).T, codebook_linear(x, weight), 1e-5)


def test_the_gradient_is_that_of_the_dense_product():
    weight = random_weight(12, 20, 4, 8, perm=True, rank=2)
    x = torch.randn(3, 20, requires_grad=True)
    y = torch.randn(3, 12)
    (actual,) = torch.autograd.grad((codebook_linear(x, weight) * y).sum(), x)
    (expected,) = torch.autograd.grad((codebook_linear_reference(x, weight) * y).sum(), x)
    assert_close("gradient", expected, actual, 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("rank", [0, 2])
def test_single_weights_are_added_with_their_gradient(check_single_weights, rows, dtype, rank):
    weight = random_weight(19, 11, 2, 6, perm=True, rank=rank)
    check_single_weights(weight, by_hand(weight), codebook_linear, rows, dtype)


@pytest.mark.parametrize("part, value", [("sparse_rows", 19), ("sparse_columns", -1), ("perm", 11), ("perm", -3)])
def test_an_index_beyond_the_weight_is_refused(check_index_is_refused, part, value):
    check_index_is_refused(random_weight(19, 11, 2, 6, perm=True), codebook_linear, part, value)
