import torch

from hf_ext.cla.fit import Moments, key_factor, turn_output, turn_queries, value_map
from hf_ext.testing import assert_close

HEADS, KV_HEADS, SIZE, HIDDEN = 4, 2, 8, 16


def rotate(states, angles):
    """Reference rotary embedding: coordinate i with i + D/2, `[B, H, T, D]` and `[T, D/2]`."""
    first, second = states.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def attention(query, keys, values):
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    return (query @ keys.mT).softmax(-1) @ values


def test_exact_relations_are_folded_exactly():
    """Where the consumer's keys and values are such functions of the source's, nothing changes at all."""
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    tokens, x = 40, torch.randn(1, 40, HIDDEN, **double)
    angles = torch.rand(tokens, SIZE // 2, **double) * 6
    keys, values = torch.randn(2, 1, KV_HEADS, tokens, SIZE, **double)
    factor = torch.randn(KV_HEADS, SIZE // 2, dtype=torch.complex128)
    mix = torch.randn(KV_HEADS, SIZE, SIZE, **double)
    first, second = keys.chunk(2, -1)
    turned = torch.complex(first, second) * factor[None, :, None]
    own_keys, own_values = torch.cat([turned.real, turned.imag], -1), values @ mix
    moments = Moments()
    for part in (slice(0, 25), slice(25, None)):
        moments.add(
            *(
                rotate(k, angles)[:, :, part] if k is not v else v[:, :, part]
                for k, v in ((own_keys, None), (own_values, own_values), (keys, None), (values, values))
            )
        )
    assert_close("a", torch.view_as_real(factor), torch.view_as_real(key_factor(moments)), 1e-9)
    assert_close("B", mix, value_map(moments), 0.02)  # the ridge pulls a little

    w_q, w_o = torch.randn(HEADS * SIZE, HIDDEN, **double), torch.randn(HIDDEN, HEADS * SIZE, **double)
    query = (x @ w_q.T).view(1, tokens, HEADS, SIZE).transpose(1, 2)
    query_turned = (x @ turn_queries(w_q, key_factor(moments)).T).view(1, tokens, HEADS, SIZE).transpose(1, 2)
    before = attention(rotate(query, angles), rotate(own_keys, angles), own_values)
    after = attention(rotate(query_turned, angles), rotate(keys, angles), values)
    out = before.transpose(1, 2).flatten(2) @ w_o.T
    assert_close("output", out, after.transpose(1, 2).flatten(2) @ turn_output(w_o, value_map(moments)).T, 0.02)
    bias = turn_queries(w_q[:, 0], key_factor(moments))
    assert_close("bias", turn_queries(w_q, key_factor(moments))[:, 0], bias, 1e-12)


def test_value_map_is_the_least_squares_solution():
    torch.manual_seed(0)
    source, own = torch.randn(2, 3, KV_HEADS, 50, SIZE)
    moments = Moments()
    moments.add(own, own, source, source)
    for head in range(KV_HEADS):
        x, y = source[:, head].flatten(0, 1).double(), own[:, head].flatten(0, 1).double()
        ridge = 1e-3 * x.square().sum(0).mean() * torch.eye(SIZE, dtype=torch.float64)
        expected = torch.linalg.inv(x.T @ x + ridge) @ x.T @ y
        assert_close(f"head {head}", expected, value_map(moments)[head], 1e-8)
