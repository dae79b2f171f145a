"""Attention over packed rows against a float64 softmax written out with NumPy."""

import numpy as np
import pytest
import torch

from hf_ext.kernels.decoquant import encode, fit_allocated, fit_uniform
from hf_ext.kernels.packed_attention import PackedRows, packed_attention, packed_attention_reference
from hf_ext.testing import assert_close


def packed_rows(x, fit):
    """Pack ``[B, H, N, D]`` row by row."""
    formats = [fit(row) for row in x]
    encoded = [encode(row, fmt) for row, fmt in zip(x, formats, strict=True)]
    tensors = {name: torch.stack([getattr(f, name) for f in formats]) for name in formats[0].tensors()}
    codes, scales = (torch.stack(parts) for parts in zip(*encoded, strict=True))
    return PackedRows(codes, scales, **tensors, midrise=formats[0].midrise)


def case(batch=2, heads=2, rep=3, q=1, packed=300, recent=9, d=64, fit=None, dtype=torch.float32):
    fit = fit or (lambda x: fit_allocated(x, d // 2 - 1))
    rows = [packed_rows(torch.randn(batch, heads, packed, d) + torch.randn(d), fit) for _ in range(2)]
    return {
        "query": torch.randn(batch, heads * rep, q, d).to(dtype),
        "recent_keys": torch.randn(batch, heads, recent, d).to(dtype),
        "recent_values": torch.randn(batch, heads, recent, d).to(dtype),
        "recent_count": torch.randint(q, recent + 1, (batch,)),
        "keys": rows[0],
        "values": rows[1],
        "packed_count": torch.randint(0, packed + 1, (batch,)),
        "scaling": 0.3,
    }


def oracle(query, recent_keys, recent_values, recent_count, keys, values, packed_count, scaling):
    out = np.zeros(query.shape)
    rep, q_length, capacity = query.shape[1] // recent_keys.shape[1], query.shape[2], recent_keys.shape[2]
    for b in range(len(query)):
        n, f = int(packed_count[b]), int(recent_count[b])
        k = torch.cat([keys.rebuild(b, n, torch.float64), recent_keys[b, :, capacity - f :].double()], 1).numpy()
        v = torch.cat([values.rebuild(b, n, torch.float64), recent_values[b, :, capacity - f :].double()], 1).numpy()
        for h in range(query.shape[1]):
            for i in range(q_length):
                seen = max(n + f - q_length + i + 1, 0)
                if seen == 0:
                    continue
                s = k[h // rep, :seen] @ query[b, h, i].double().numpy() * scaling
                p = np.exp(s - s.max())
                out[b, h, i] = p @ v[h // rep, :seen] / p.sum()
    return torch.tensor(out)


@pytest.mark.parametrize("function", [packed_attention, packed_attention_reference])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q": 5, "rep": 2},
        {"batch": 1, "rep": 1, "packed": 1, "recent": 1},
        {"packed": 1000, "rep": 9, "heads": 1},
        {"d": 16, "fit": lambda x: fit_allocated(x, 7)},
        {"d": 32, "packed": 257, "fit": lambda x: fit_allocated(x, 3)},
        {"d": 128, "fit": lambda x: fit_allocated(x, 127)},
        {"d": 128, "fit": lambda x: fit_allocated(x, 47)},
        {"fit": lambda x: fit_uniform(x, 4)},
        {"fit": lambda x: fit_uniform(x, 2, 32), "q": 3},
        {"fit": lambda x: fit_uniform(x, 8, 64), "packed": 31},
    ],
)
def test_equals_a_softmax_written_out(function, options):
    arguments = case(**options)
    with torch.no_grad():
        assert_close("output", oracle(**arguments), function(**arguments).double(), 2e-5)


def test_bfloat16_differs_by_its_rounding_only():
    arguments = case(dtype=torch.bfloat16)
    with torch.no_grad():
        out = packed_attention(**arguments)
    assert out.dtype == torch.bfloat16
    assert_close("output", oracle(**arguments), out.double(), 2e-2)


def test_a_query_that_sees_nothing_gives_zeros():
    arguments = case(batch=1, q=3, recent=3)
    arguments["packed_count"][:], arguments["recent_count"][:] = 0, 2
    with torch.no_grad():
        for function in (packed_attention, packed_attention_reference):
            out = function(**arguments)
            assert (out[:, :, 0] == 0).all() and (out[:, :, 1] != 0).any()


def test_head_dimension_the_compiled_kernel_does_not_take():
    arguments = case(d=24, fit=lambda x: fit_allocated(x, 11))
    with torch.no_grad():
        assert_close("output", oracle(**arguments), packed_attention(**arguments).double(), 2e-5)


def test_garbage_beyond_the_counts_is_never_read():
    arguments = case()
    with torch.no_grad():
        expected = packed_attention(**arguments)
        for b in range(2):
            arguments["keys"].codes[b, :, int(arguments["packed_count"][b]) :] = 255
            unused = 9 - int(arguments["recent_count"][b])
            arguments["recent_keys"][b, :, :unused] = float("nan")
            arguments["recent_values"][b, :, :unused] = float("nan")
        assert torch.equal(packed_attention(**arguments), expected)
