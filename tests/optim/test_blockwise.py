import sys

import pytest
import torch
from torch import nn

from hf_ext import FAdam
from hf_ext.optim.blockwise import BLOCK, KEYS, dequantize_states, quantize_states
from hf_ext.testing import assert_close

pytest.importorskip("bitsandbytes")


def noise(n, seed, scale=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def test_round_trip_error_and_exact_zeros():
    momentum, fisher = noise(5000, 0), noise(5000, 1).square()
    momentum[:10] = fisher[:10] = 0
    back_momentum, back_fisher = dequantize_states(quantize_states(momentum, fisher))
    assert_close("momentum", momentum, back_momentum, 0.04)
    assert_close("fisher root", fisher.sqrt(), back_fisher.sqrt(), 0.04)
    assert torch.equal(back_momentum[:10], torch.zeros(10))
    assert torch.equal(back_fisher[:10], torch.zeros(10))


def test_fisher_that_is_not_zero_stays_so_beside_a_huge_one():
    fisher = torch.full((BLOCK,), 1e-20)
    fisher[0] = 1.0
    _, back = dequantize_states(quantize_states(torch.zeros(BLOCK), fisher))
    assert (back > 0).all()


def test_state_is_a_quarter():
    param = nn.Parameter(noise(1 << 16, 0).view(256, 256))
    small = nn.Parameter(noise(100, 1))
    optimizer = FAdam([param, small], optim_bits=8)
    param.grad, small.grad = torch.ones_like(param), torch.ones_like(small)
    optimizer.step()
    assert set(optimizer.state[param]) == {"step", *KEYS}
    assert set(optimizer.state[small]) == {"step", "momentum", "fisher"}
    nbytes = sum(value.nbytes for value in optimizer.state[param].values() if value.dim())
    assert nbytes == 2 * param.numel() * (1 + 4 / BLOCK)
    assert nbytes / (8 * param.numel()) < 0.255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_the_32_bit_states(dtype):
    results = []
    for bits in (32, 8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 1))
        inputs, targets = noise(64 * 32, 1).view(64, 32), noise(64, 2)
        model = model.to(dtype)
        optimizer = FAdam(model.parameters(), lr=3e-3, optim_bits=bits)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (model(inputs.to(dtype)).squeeze(1).float() - targets).square().mean()
            loss.backward()
            optimizer.step()
        results.append(loss.item())
    assert results[1] == pytest.approx(results[0], abs=0.05)
    assert results[1] < 0.6


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {}])
def test_rows_without_gradient_do_not_disturb(path):
    param = nn.Parameter(noise(64 * 128, 0, 0.02).view(64, 128))
    optimizer = FAdam([param], lr=0.01, optim_bits=8, **path)
    for t in range(20):
        param.grad = noise(64 * 128, t + 1, 1e-3).view(64, 128)
        param.grad[::2] = 0
        optimizer.step()
        assert param.isfinite().all()
    momentum, fisher = dequantize_states(optimizer.state[param])
    assert momentum[::2].abs().max() == fisher[::2].max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical(dtype, tmp_path):
    def train(optimizer, param, steps):
        for t in steps:
            param.grad = noise(param.numel(), t, 1e-2).view_as(param).to(dtype)
            optimizer.step()

    param = nn.Parameter(noise(8192, 0, 0.1).view(64, 128).to(dtype))
    optimizer = FAdam([param], optim_bits=8)
    train(optimizer, param, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copied = nn.Parameter(param.detach().clone())
    resumed = FAdam([copied])  # the saved groups bring optim_bits back
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.state[copied]["momentum_code"].dtype == torch.uint8
    assert resumed.state[copied]["momentum_absmax"].dtype == torch.float32
    train(optimizer, param, range(3, 9))
    train(resumed, copied, range(3, 9))
    assert torch.equal(param, copied)


def test_float64_parameters_are_refused_by_name():
    param = nn.Parameter(torch.zeros(5000, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="optim_bits=8 is not possible for a float64 parameter"):
        FAdam([param], optim_bits=8).step()


def test_missing_bitsandbytes_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(ImportError, match=r'pip install "hf_ext\[gpu\]"'):
        FAdam([nn.Parameter(torch.zeros(3))], optim_bits=8)
