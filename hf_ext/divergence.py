"""The Kullback-Leibler divergence that a model is healed with: to its teacher's next-token distribution."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**18}  # logits worked on at once: what stays in a processor's cache
OTHER_CHUNK = 2**26  # elsewhere: what bounds the temporary memory


def distillation_kl(
    student: Tensor, teacher: Tensor, counted: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """``T² · KL(teacher ‖ student)`` at temperature ``T``, the mean over counted tokens, in nats.

    Works on a few tokens at a time, with the gradient beside the value, so that beyond the logits it needs memory for
    that gradient only.

    Args:
        student: logits `[..., V]`.
        teacher: logits `[..., V]`; gets no gradient.
        counted: `[...]`, True where a token counts; None counts all.
        temperature: both distributions are ``softmax(logits / T)``; ``T²`` keeps the gradient's size.
    """
    if counted is None:
        counted = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
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
        total, count = torch.zeros((), device=student.device), counted.sum()
        for rows in counted.nonzero().split(chunk):
            at = tuple(rows.unbind(1))
            log_q = torch.log_softmax(student[at].float() / temperature, dim=-1)
            log_p = torch.log_softmax(teacher[at].float() / temperature, dim=-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            if wanted:
                gradient[at] = (log_q.exp_().sub_(p) * (temperature / count)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total * temperature**2 / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor, None, None, None]:
        """By the student's logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * by_value, None, None, None
