"""Token entropy, how surprising each token was in nats: from hidden states and the output head, in chunks of rows."""

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 256  # rows of logits that exist at once


def head_scale(text_config: Any) -> tuple[float, float | None]:
    """What the model does to its head's output: a factor, and the bound of a tanh soft cap or None."""
    factor = getattr(text_config, "logit_scale", None) or 1.0
    divisor = getattr(text_config, "logits_scaling", None) or 1.0
    return float(factor) / float(divisor), getattr(text_config, "final_logit_softcapping", None)


def surprisal_of_logits(logits: Tensor, ids: Tensor, scale: tuple[float, float | None] = (1.0, None)) -> Tensor:
    """``-log softmax(logits)[ids]`` in nats, float32: ``[N, V], [N] -> [N]``."""
    factor, cap = scale
    scaled = logits.float() * factor
    if cap is not None:
        scaled = torch.tanh(scaled / cap) * cap
    return scaled.logsumexp(-1) - scaled.gather(-1, ids[:, None].to(scaled.device))[:, 0]


@torch.no_grad()
def surprisal(
    head: nn.Module, hidden: Tensor, ids: Tensor, scale: tuple[float, float | None] = (1.0, None), rows: int = ROWS
) -> Tensor:
    """How surprising ``ids`` are after ``hidden``: ``[B, q, hidden], [B, q] -> [B, q]`` nats, float32.

    The logits of ``rows`` positions exist at a time, never those of all.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    parts = [
        surprisal_of_logits(head(flat[start : start + rows]), wanted[start : start + rows], scale)
        for start in range(0, flat.shape[0], rows)
    ]
    return torch.cat(parts).view(ids.shape) if parts else hidden.new_zeros(ids.shape, dtype=torch.float32)
