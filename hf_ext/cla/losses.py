"""What a converted model is healed with: its dense teacher's next-token distribution and hidden states."""

from torch import Tensor
from torch.nn import functional


def distillation_kl(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """``T² · KL(teacher ‖ student)`` at temperature ``T``, the mean over counted tokens, in nats.

    Args:
        student: logits `[B, T, V]`.
        teacher: logits `[B, T, V]`.
        counted: `[B, T]`, True where a token counts.
        temperature: both distributions are ``softmax(logits / T)``; ``T²`` keeps the gradient's size.
    """
    log_student = functional.log_softmax(student[counted].float() / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher[counted].float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def hidden_error(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference of hidden states `[B, T, D]` over the teacher's variance, over counted tokens.

    Each coordinate is divided by its own variance, because a few coordinates of trained models are thousands of times
    larger than the rest and would be all that a plain mean sees.
    """
    student, teacher = student[counted].float(), teacher[counted].float()
    variance = teacher.var(dim=0, unbiased=False).clamp_min(1e-6)
    return ((student - teacher).square() / variance).mean()
