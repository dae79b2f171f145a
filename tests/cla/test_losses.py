import pytest
import torch

from hf_ext.cla.losses import hidden_error


def test_hidden_error_counts_every_coordinate_alike():
    """Off by one standard deviation everywhere is 1, whatever the scales."""
    teacher = torch.randn(1, 4000, 3) * torch.tensor([1.0, 1000.0, 0.01])
    student = teacher + teacher.std(1, correction=0)
    assert hidden_error(student, teacher, torch.ones(1, 4000, dtype=torch.bool)).item() == pytest.approx(1, rel=1e-2)
