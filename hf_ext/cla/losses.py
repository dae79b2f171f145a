"""How far a converted model's hidden states are from its dense teacher's."""

from torch import Tensor


def hidden_error(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference of hidden states `[B, T, D]` over the teacher's variance, over counted tokens.

    Each coordinate is divided by its own variance, because a few coordinates of trained models are thousands of times
    larger than the rest and would be all that a plain mean sees.
    """
    student, teacher = student[counted].float(), teacher[counted].float()
    variance = teacher.var(dim=0, unbiased=False).clamp_min(1e-6)
    return ((student - teacher).square() / variance).mean()
