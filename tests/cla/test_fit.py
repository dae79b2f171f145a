from itertools import permutations

import pytest
import torch

from hf_ext.cla.fit import Moments, key_factor, match_heads, turn_output, turn_queries, value_map
from hf_ext.testing import assert_close

HEADS, KV_HEADS, SIZE, HIDDEN = 4, 2, 8, 16


def rotate(states, angles):
    """Reference rotary embedding: coordinate i with i + D/2, `[B, H, T, D]` and `[T, D/2]`."""
    first, second = states.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def attention(query, keys, values):
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    return (query @ keys.mT).softmax(-1) @ values


@pytest.mark.parametrize("heads", [[0, 1], [1, 0]])
def test_exact_relations_are_folded_exactly(heads):
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
    own_keys, own_values = (x[:, heads] for x in (torch.cat([turned.real, turned.imag], -1), values @ mix))
    factor, mix = factor[heads], mix[heads]
    moments = Moments()
    for part in (slice(0, 25), slice(25, None)):
        moments.add(
            *(
                rotate(k, angles)[:, :, part] if k is not v else v[:, :, part]
                for k, v in ((own_keys, None), (own_values, own_values), (keys, None), (values, values))
            )
        )
    assert match_heads(moments) == heads
    assert_close("a", torch.view_as_real(factor), torch.view_as_real(key_factor(moments, heads)), 1e-9)
    assert_close("B", mix, value_map(moments, heads), 0.02)  # the ridge pulls a little

    w_q, w_o = torch.randn(HEADS * SIZE, HIDDEN, **double), torch.randn(HIDDEN, HEADS * SIZE, **double)
    query = (x @ w_q.T).view(1, tokens, HEADS, SIZE).transpose(1, 2)
    query_turned = (
        (x @ turn_queries(w_q, key_factor(moments, heads), heads).T).view(1, tokens, HEADS, SIZE).transpose(1, 2)
    )
    before = attention(rotate(query, angles), rotate(own_keys, angles), own_values)
    after = attention(rotate(query_turned, angles), rotate(keys, angles), values)
    out = before.transpose(1, 2).flatten(2) @ w_o.T
    assert_close(
        "output", out, after.transpose(1, 2).flatten(2) @ turn_output(w_o, value_map(moments, heads), heads).T, 0.02
    )
    bias = turn_queries(w_q[:, 0], key_factor(moments, heads), heads)
    assert_close("bias", turn_queries(w_q, key_factor(moments, heads), heads)[:, 0], bias, 1e-12)


@pytest.mark.parametrize("turn_keys", [True, False])
def test_matched_heads_leave_the_least_unexplained(turn_keys):
    """Against the residuals themselves, for every way of matching three heads."""
    torch.manual_seed(1)
    keys, values, source_keys, source_values = torch.randn(4, 2, 3, 20, SIZE, dtype=torch.float64)
    values = values + source_values.roll(1, dims=1)  # so that one matching is the best by far
    moments = Moments()
    moments.add(keys, values, source_keys, source_values)

    def left(own, other, linear):
        if not linear:
            return (own - other).square().sum() / own.square().sum()
        residual = own - other @ torch.linalg.lstsq(other, own).solution
        return residual.square().sum() / own.square().sum()

    def cost(heads):
        total = 0.0
        for own, source in enumerate(heads):
            total += left(values[:, own].flatten(0, 1), source_values[:, source].flatten(0, 1), True)
            for i in range(SIZE // 2):
                k, s = (x.flatten(0, 1)[:, [i, i + SIZE // 2]] for x in (keys[:, own], source_keys[:, source]))
                columns = torch.stack([s.flatten(), torch.stack([-s[:, 1], s[:, 0]], 1).flatten()], 1)
                share = k.square().sum() / keys[:, own].square().sum()
                total += share * left(k.flatten()[:, None], columns if turn_keys else s.flatten()[:, None], turn_keys)
        return total

    best = min(permutations(range(3)), key=cost)
    assert match_heads(moments, turn_keys) == list(best) == [2, 0, 1]


def test_value_map_is_the_least_squares_solution():
    torch.manual_seed(0)
    heads = [1, 0]
    source, own = torch.randn(2, 3, KV_HEADS, 50, SIZE)
    moments = Moments()
    moments.add(own, own, source, source)
    for head in range(KV_HEADS):
        x, y = source[:, heads[head]].flatten(0, 1).double(), own[:, head].flatten(0, 1).double()
        ridge = 1e-3 * x.square().sum(0).mean() * torch.eye(SIZE, dtype=torch.float64)
        expected = torch.linalg.inv(x.T @ x + ridge) @ x.T @ y
        assert_close(f"head {head}", expected, value_map(moments, heads)[head], 1e-8)
