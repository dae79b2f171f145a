import itertools
from statistics import NormalDist

import numpy as np
import pytest
import torch

from hf_ext.kernels import trellis
from hf_ext.kernels.decoded_linear import GEMV_ROWS
from hf_ext.kernels.trellis import (
    STEPS,
    TrellisWeight,
    column_slices,
    decode,
    decode_reference,
    pack_columns,
    states_of,
    trellis_linear,
    trellis_tables,
    viterbi,
    viterbi_reference,
)
from hf_ext.kernels.trellis_cpu import gemv_compiled
from hf_ext.testing import assert_close


def random_weight(out, widths, state_bits=8, perm=False, rank=0, int8=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    columns = len(widths)
    codes = [torch.randint(2**width, (1, out), generator=g) for width in widths]
    stream = torch.cat([pack_columns(code, width)[0] for code, width in zip(codes, widths, strict=True)])
    factors = [torch.randn(rank, columns, generator=g), torch.randn(out, rank, generator=g)] if rank else [None, None]
    if rank and int8:
        factors = [(factor * 40).clamp(-128, 127).to(torch.int8) for factor in factors]
        factors.append(torch.rand(rank, generator=g) / 1600)
    return TrellisWeight(
        stream,
        torch.tensor(widths, dtype=torch.uint8),
        (torch.rand(out, 1, generator=g) + 0.5).half(),
        state_bits,
        torch.randperm(columns, generator=g).to(torch.int16) if perm else None,
        *factors,
    )


def by_hand(weight):
    """Every element on its own, in float64, from the bits of the bytes as a string."""
    out, columns = len(weight.scales), len(weight.widths)
    dense, begin = np.zeros((out, columns)), 0
    for k, width in enumerate(weight.widths.tolist()):
        size = -(-out * width // 8)
        bits = "".join(f"{byte:08b}" for byte in weight.qweight[begin : begin + size].tolist())
        begin += size
        number, states = round(STEPS[width - 1] * 2**weight.state_bits) | 1, 2**weight.state_bits
        for row in range(out):
            state = int(("0" * weight.state_bits + bits[: (row + 1) * width])[-weight.state_bits :], 2)
            value = np.float16(NormalDist().inv_cdf((number * state % states + 0.5) / states))
            dense[row, k if weight.perm is None else int(weight.perm[k])] = float(value) * float(weight.scales[row, 0])
    return torch.from_numpy(dense)


@pytest.mark.parametrize("widths", [(2, 2, 2), (6, 5, 4, 3, 2, 1), (1, 3, 1, 4)])
@pytest.mark.parametrize("out", [1, 8, 37])
@pytest.mark.parametrize("state_bits", [8, 13, 14])
def test_decoding_equals_every_element_by_hand(widths, out, state_bits):
    weight = random_weight(out, widths, state_bits, perm=True)
    expected = by_hand(weight)
    torch.testing.assert_close(decode_reference(weight).double(), expected, atol=0, rtol=1e-6)
    assert torch.equal(decode(weight), decode_reference(weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
@pytest.mark.parametrize("rank, int8", [(0, False), (3, False), (3, True)])
def test_the_product_is_that_of_the_dense_weight(dtype, tolerance, rows, rank, int8):
    weight = random_weight(43, [6, 5] + [4] * 5 + [3] * 20 + [2] * 9 + [1] * 3, perm=True, rank=rank, int8=int8)
    x = torch.randn(rows, len(weight.widths), generator=torch.Generator().manual_seed(1)).to(dtype)
    dense = by_hand(weight)
    if rank:
        scale = 1 if weight.lr_scale is None else weight.lr_scale.double()
        dense = dense + (weight.lr_b.double() * scale) @ weight.lr_a.double()
    bias = torch.randn(43)
    expected = x.double() @ dense.T + bias.double()
    assert_close("product", expected, trellis_linear(x, weight, bias).double(), tolerance)


def test_slices_of_columns_add_up_and_gradients_flow():
    weight = random_weight(24, [4] * 3 + [3] * 10 + [1] * 6, perm=True)
    x = torch.randn(2, 19, requires_grad=True)
    whole = trellis_linear(x, weight)
    parts = [trellis_linear(x.index_select(-1, columns), part) for columns, part in column_slices(weight, 5)]
    torch.testing.assert_close(sum(parts), whole)
    whole.sum().backward()
    torch.testing.assert_close(x.grad, by_hand(weight).float().sum(0).expand(2, -1))


@pytest.mark.parametrize("width, n", [(1, 9), (2, 5), (3, 3), (5, 2)])
def test_viterbi_finds_the_best_of_all_paths(width, n):
    g = torch.Generator().manual_seed(width)
    target, weights = torch.randn(n, generator=g), torch.rand(n, generator=g) + 0.1
    every = torch.tensor(list(itertools.product(range(2**width), repeat=n)))
    values = trellis_tables(8)[width - 1][states_of(every, width, 8)]
    costs = (weights.double() * (values.double() - target.double()).square()).sum(1)
    for search in (viterbi, viterbi_reference):
        assert torch.equal(search(target, weights, width, 8).long(), every[costs.argmin()])


@pytest.mark.parametrize("width", range(1, 7))
@pytest.mark.parametrize("state_bits", [8, 9])
def test_the_compiled_search_is_the_reference(width, state_bits, monkeypatch):
    """Exactly, ties included, where float32 holds every sum exactly."""
    whole = torch.randint(-40, 40, (6, 2**state_bits), generator=torch.Generator().manual_seed(3)).float()
    monkeypatch.setattr(trellis, "trellis_tables", lambda bits: whole)
    g = torch.Generator().manual_seed(4)
    target = torch.randint(-40, 40, (61,), generator=g).float()
    weights = torch.randint(1, 4, (61,), generator=g).float()
    found = viterbi(target, weights, width, state_bits)
    assert torch.equal(found, viterbi_reference(target, weights, width, state_bits))


def test_two_bits_leave_less_error_than_any_scalar_or_short_vector_quantiser():
    source = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for width, most in ((1, 0.31), (2, 0.085), (3, 0.0235)):  # k-means in 4 dimensions leaves about 0.1 at 2 bits
        codes = viterbi(source, torch.ones(2000), width, 10)
        values = trellis_tables(10)[width - 1][states_of(codes[None], width, 10)[0]]
        assert (source - values).square().mean() < most
        assert (source - values).square().mean() > 4.0**-width * 0.9  # no code beats the rate-distortion bound


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("rank", [0, 2])
def test_single_weights_are_added_with_their_gradient(check_single_weights, rows, dtype, rank):
    weight = random_weight(19, [4] * 3 + [3] * 6 + [1] * 2, perm=True, rank=rank)
    check_single_weights(weight, by_hand(weight), trellis_linear, rows, dtype)


@pytest.mark.parametrize("part, value", [("sparse_rows", 19), ("sparse_columns", -1), ("perm", 11), ("perm", -3)])
def test_an_index_beyond_the_weight_is_refused(check_index_is_refused, part, value):
    check_index_is_refused(random_weight(19, [4] * 3 + [3] * 6 + [1] * 2, perm=True), trellis_linear, part, value)


def test_the_compiled_product_leaves_many_rows_to_others():
    weight = random_weight(19, [3] * 11)
    tables = trellis_tables(weight.state_bits)
    assert gemv_compiled(torch.randn(GEMV_ROWS + 1, 11), weight, tables) is None
