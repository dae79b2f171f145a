"""The divergence by hand, and its gradient against autograd in float64."""

import math

import pytest
import torch

from hf_ext import divergence
from hf_ext.divergence import distillation_kl


def test_kl_by_hand():
    """Teacher (3/4, 1/4) from logits (ln 3, 0); student uniform: KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081."""
    teacher = torch.tensor([[[math.log(3), 0.0], [50.0, 0.0]]])
    student = torch.zeros(1, 2, 2)
    counted = torch.tensor([[True, False]])
    assert distillation_kl(student, teacher, counted, 1.0).item() == pytest.approx(0.130812, abs=1e-6)
    assert distillation_kl(2 * student, 2 * teacher, counted, 2.0).item() == pytest.approx(4 * 0.130812, abs=1e-5)


def test_kl_is_zero_only_for_equal_distributions():
    logits, counted = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    assert distillation_kl(logits + 3, logits, counted, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert distillation_kl(logits.flip(-1), logits, counted, 2.0).item() > 0.1


@pytest.mark.parametrize("chunk", [1, 30, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_and_its_gradient_in_chunks(monkeypatch, dtype, chunk):
    """Against autograd through the formula in float64, whatever is worked on at once."""
    monkeypatch.setitem(divergence.CHUNK, "cpu", chunk)
    student, teacher = 3 * torch.randn(2, 2, 3, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    counted = torch.tensor([[True, False, True], [False, True, True]])
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    own = student.detach().double().requires_grad_()
    log_p, log_q = (torch.log_softmax(logits[counted] / 1.7, dim=-1) for logits in (teacher.detach().double(), own))
    expected = 1.7**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (3 * expected).backward()
    loss = distillation_kl(student, teacher, counted, 1.7)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.grad.dtype == dtype and teacher.grad is None
    assert torch.equal(student.grad[~counted], torch.zeros(2, 11, dtype=dtype))
    close = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (student.grad.double() - own.grad).abs().max() < close * own.grad.abs().max()


def test_every_token_counts_unless_told_otherwise():
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(4, dtype=torch.bool)
    assert distillation_kl(student, teacher).item() == distillation_kl(student, teacher, counted, 1.0).item()
