import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_ext.caches.surprisal import head_scale, surprisal, surprisal_of_logits
from hf_ext.testing import tiny_config


def reference(logits, ids):
    """-log softmax in float64 NumPy."""
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, np.asarray(ids)[..., None], -1)[..., 0]


@pytest.mark.parametrize("rows", [1, 3, 7, 256])
def test_it_equals_float64_however_it_is_chunked(rows):
    head = nn.Linear(16, 50, bias=False)
    nn.init.normal_(head.weight)
    hidden, ids = torch.randn(3, 7, 16), torch.randint(0, 50, (3, 7))
    expected = reference((hidden.double() @ head.weight.double().T).detach().numpy(), ids.numpy())
    assert np.abs(surprisal(head, hidden, ids, rows=rows).numpy() - expected).max() < 1e-5


def test_never_more_rows_of_logits_than_asked_for():
    seen = []

    class Head(nn.Linear):
        def forward(self, x):
            seen.append(x.shape[0])
            return super().forward(x)

    surprisal(Head(4, 9), torch.randn(2, 10, 4), torch.zeros(2, 10, dtype=torch.long), rows=8)
    assert seen == [8, 8, 4]


def test_by_hand():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]]).expand(3, 3)  # probabilities 1/8, 2/8, 5/8
    expected = torch.tensor([math.log(8), math.log(4), math.log(8 / 5)])
    assert torch.allclose(surprisal_of_logits(logits, torch.arange(3)), expected, atol=1e-6)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[3e4, -3e4, 0.0]])
    assert surprisal_of_logits(logits, torch.tensor([0])).item() == 0
    assert surprisal_of_logits(logits, torch.tensor([1])).item() == 6e4


def test_soft_cap_and_scale_come_from_the_config():
    scale = head_scale(tiny_config("gemma2"))
    assert scale == (1.0, 30.0)
    logits = torch.randn(4, 10) * 50
    capped = 30 * np.tanh(logits.double().numpy() / 30)
    ids = torch.arange(4)
    assert np.abs(surprisal_of_logits(logits, ids, scale).numpy() - reference(capped, ids.numpy())).max() < 1e-4
    assert head_scale(tiny_config("llama")) == (1.0, None)


def test_no_tokens_have_no_surprise():
    assert surprisal(nn.Linear(4, 9), torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)
