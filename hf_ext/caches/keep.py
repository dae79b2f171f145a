"""Which tokens a bounded memory keeps: sinks, the most surprising, and the most recent to fill the rest."""

import torch
from torch import Tensor


def keep_slots(
    real: Tensor, keep: Tensor, sinks: int, entropy: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The slots that stay, as ``[B, K]`` indices in the order of the text, and which of them hold a kept token.

    Row b keeps, of its tokens, the first ``sinks``; the ``memory[b]`` of highest entropy (the earlier one on a tie,
    sinks counted among them); and the most recent ones until it has ``keep[b]``. What a row keeps does not depend on
    the other rows: K is the largest number of tokens any row keeps, and rows with fewer have dead slots in front.

    Args:
        real: ``[B, P]``, False for padding.
        keep: ``[B]`` tokens to keep, at least ``sinks``.
        sinks: first tokens that always stay.
        entropy: ``[B, P]`` in nats; None where nothing is remembered for its entropy.
        memory: ``[B]`` how many tokens the entropy chooses, at most ``keep - sinks``.
    """
    width = real.shape[1]
    slots = torch.arange(width, device=real.device).expand_as(real)
    chosen = real & (real.cumsum(-1) <= sinks)
    if entropy is not None and memory is not None:
        rank = _rank(entropy.masked_fill(~real, -torch.inf), slots)
        chosen = chosen | (real & (rank < memory[:, None]))
    priority = slots + width * (real.long() + chosen.long())
    count = torch.minimum(keep, real.sum(-1))
    best = priority.topk(int(count.max()), dim=-1).indices
    alive = torch.arange(best.shape[1], device=real.device) < count[:, None]
    order = (best + width * alive.long()).argsort(-1)
    return best.gather(-1, order), alive.gather(-1, order)


def _rank(entropy: Tensor, slots: Tensor) -> Tensor:
    order = entropy.sort(dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, slots)
