import numpy as np
import pytest
import torch

from hf_ext.kernels.window_scores import smooth, window_scores
from hf_ext.testing import assert_close


def oracle(query, keys, first, scaling, row_weights, per_head):
    q, k = query.double().numpy(), keys.double().numpy()
    (batch, query_heads, window, _), (heads, n) = q.shape, k.shape[1:3]
    rep = query_heads // heads
    out = np.zeros((batch, heads, n))
    for b in range(batch):
        for h in range(query_heads):
            for w in range(window):
                at, begin = n - window + w, int(first[b])
                if at < begin:
                    continue
                s = k[b, h // rep, begin : at + 1] @ q[b, h, w] * scaling
                p = np.exp(s - s.max())
                weight = 1.0 if row_weights is None else float(row_weights[w])
                out[b, h // rep, begin : at + 1] += weight * p / p.sum() / rep
    return torch.tensor(out if per_head else out.mean(1, keepdims=True))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(("window", "n"), [(1, 1), (5, 20), (70, 90), (20, 20)])
def test_equals_attention_written_out(per_head, window, n):
    query, keys = torch.randn(2, 6, window, 8), torch.randn(2, 2, n, 8)
    first, weights = torch.tensor([0, min(7, n - 1)]), torch.linspace(1, 1.2, window)
    for row_weights in (None, weights):
        got = window_scores(query, keys, first, 0.4, row_weights, per_head)
        assert_close("scores", oracle(query, keys, first, 0.4, row_weights, per_head), got.double(), 1e-5)


def test_all_attention_is_shared_out():
    scores = window_scores(torch.randn(1, 4, 9, 8), torch.randn(1, 2, 30, 8), torch.tensor([3]), 1.0)
    assert scores.sum().item() == pytest.approx(9, rel=1e-5)
    assert (scores[..., :3] == 0).all()


def test_smoothing_keeps_the_length_and_refuses_even_kernels():
    assert smooth(torch.eye(9)[None], 5, "max").sum() == 39
    with pytest.raises(ValueError, match="odd"):
        smooth(torch.zeros(1, 1, 9), 4)
