import math

import pytest
import torch

from hf_ext.cla.losses import distillation_kl, hidden_error


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


def test_hidden_error_counts_every_coordinate_alike():
    """Off by one standard deviation everywhere is 1, whatever the scales."""
    teacher = torch.randn(1, 4000, 3) * torch.tensor([1.0, 1000.0, 0.01])
    student = teacher + teacher.std(1, correction=0)
    assert hidden_error(student, teacher, torch.ones(1, 4000, dtype=torch.bool)).item() == pytest.approx(1, rel=1e-2)
