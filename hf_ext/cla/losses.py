"""What a converted model is healed with: its dense teacher's next-token distribution and hidden states."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**18}  # logits worked on at once: what stays in a processor's cache
OTHER_CHUNK = 2**26  # elsewhere: what bounds the temporary memory


def distillation_kl(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """``T² · KL(teacher ‖ student)`` at temperature ``T``, the mean over counted tokens, in nats.

    Works on a few tokens at a time, with the gradient beside the value, so that beyond the logits it needs memory for
    that gradient only.

    Args:
        student: logits `[B, T, V]`.
        teacher: logits `[B, T, V]`; gets no gradient.
        counted: `[B, T]`, True where a token counts.
        temperature: both distributions are ``softmax(logits / T)``; ``T²`` keeps the gradient's size.
    """
    found: Tensor = _DistillationKL.apply(student, teacher, counted, temperature)
    return found


class _DistillationKL(torch.autograd.Function):
    """``KL = Σ p (log p - log q)``, ``p = softmax(teacher / T)``, ``q = softmax(student / T)``; by the student's
    logits its gradient is ``(q - p) / T``.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
        """The value; the gradient is kept where one is asked for."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if wanted else student.new_empty(0)
        chunk = max(1, CHUNK.get(student.device.type, OTHER_CHUNK) // student.shape[-1])
        total = torch.zeros((), device=student.device)
        for rows in counted.nonzero().split(chunk):
            at = tuple(rows.unbind(1))
            log_q = torch.log_softmax(student[at].float() / temperature, dim=-1)
            log_p = torch.log_softmax(teacher[at].float() / temperature, dim=-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            if wanted:
                gradient[at] = (log_q.exp_().sub_(p) * (temperature / counted.sum())).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total * temperature**2 / counted.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor, None, None, None]:
        """By the student's logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * by_value, None, None, None


def hidden_error(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference of hidden states `[B, T, D]` over the teacher's variance, over counted tokens.

    Each coordinate is divided by its own variance, because a few coordinates of trained models are thousands of times
    larger than the rest and would be all that a plain mean sees.
    """
    student, teacher = student[counted].float(), teacher[counted].float()
    variance = teacher.var(dim=0, unbiased=False).clamp_min(1e-6)
    return ((student - teacher).square() / variance).mean()
