"""Which tokens a bounded memory keeps: sinks, the most surprising, and the most recent to fill the rest."""

import torch
from torch import Tensor


def keep_slots(real: Tensor, keep: int, sinks: int, entropy: Tensor | None = None, memory: int = 0) -> Tensor:
    """The slots that stay, ascending: ``[B, P] -> [B, keep]``.

    In each row: the first ``sinks`` tokens; the ``memory`` tokens of highest entropy (the earlier one on a tie, sinks
    counted among them); then the most recent ones until ``keep`` slots are full. Padding stays only in a row that
    has fewer tokens than that.

    Args:
        real: ``[B, P]``, False for padding.
        keep: slots to keep in every row, at most P.
        sinks: first tokens that always stay.
        entropy: ``[B, P]`` in nats; None with ``memory=0``.
        memory: how many tokens the entropy chooses.
    """
    slots = torch.arange(real.shape[1], device=real.device).expand_as(real)
    chosen = real & (real.cumsum(-1) <= sinks)
    if entropy is not None and memory > 0:
        order = entropy.masked_fill(~real, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(-1, order, slots)
        chosen = chosen | (real & (rank < memory))
    priority = slots + real.shape[1] * (real.long() + chosen.long())
    return priority.topk(keep, dim=-1).indices.sort(-1).values
