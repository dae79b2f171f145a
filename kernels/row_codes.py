"""Rows of codes whose widths differ: coefficient ``i`` of every row takes ``widths[i]`` bits, 0 to 8.

Code ``i`` lies at bit ``sum(widths[:i])`` of its row, least significant bit first, and each row begins at a byte. So
a row can be read, moved or dropped on its own, whatever its neighbours are. `kernels.pack` packs codes of one
width without row boundaries; attention needs single rows and mixed widths.
"""

import torch
from torch import Tensor

# Uniform mid-rise quantiser of a unit Gaussian with 2**b levels: best step and its mean squared error, b = 0 to 8
# (Max, 1960). With 0 bits nothing is stored and the value reads as the mean.
GAUSSIAN_STEP = (1.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
GAUSSIAN_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.000304, 0.0000877)
MAX_WIDTH = 8


def allocate_widths(variance: Tensor, budget: int) -> Tensor:
    """Bits for each Gaussian coefficient so that the summed squared error is least.

    Each further bit goes where it removes most error, which is optimal because the gains of a coefficient's first,
    second, ... bit only fall.

    Args:
        variance: ``[..., d]``, non-negative.
        budget: bits of a row, at most ``8 * d``.

    Returns:
        Widths ``[..., d]``, int64, that sum to ``budget``.

    Raises:
        ValueError: the budget is negative or more than 8 bits a coefficient.
    """
    d = variance.shape[-1]
    if not 0 <= budget <= MAX_WIDTH * d:
        raise ValueError(f"budget must be 0 to {MAX_WIDTH * d} bits for {d} coefficients, got {budget}.")
    error = torch.tensor(GAUSSIAN_ERROR, dtype=torch.float64, device=variance.device)
    # The small ramp breaks ties (all-zero variances) towards equal widths, without reordering any real gain.
    gain = (variance.double()[..., None] + 1e-30) * (error[:-1] - error[1:])
    chosen = torch.zeros_like(gain.flatten(-2))
    chosen.scatter_(-1, gain.flatten(-2).topk(budget, dim=-1).indices, 1.0)
    return chosen.unflatten(-1, (d, MAX_WIDTH)).sum(-1).long()


def pack_rows(codes: Tensor, widths: Tensor, row_bytes: int) -> Tensor:
    """Pack codes ``[B, ..., d]``, each within its width ``[B, d]``, into bytes ``[B, ..., row_bytes]``."""
    offsets = widths.cumsum(-1) - widths
    bit = torch.arange(row_bytes * 8, device=codes.device)
    owner = (bit[None, :, None] >= offsets[:, None, :]).sum(-1) - 1  # [B, bits]: the last code that begins by here
    owner = _skip_empty(owner, widths)
    place = bit[None] - offsets.gather(-1, owner)
    used = place < widths.gather(-1, owner)
    lead = (codes.shape[0], *[1] * (codes.dim() - 2), row_bytes * 8)
    index = owner.view(lead).expand(*codes.shape[:-1], -1)
    bits = (codes.long().gather(-1, index) >> place.view(lead)) & used.view(lead).long()
    powers = 2 ** torch.arange(8, device=codes.device)
    return (bits.unflatten(-1, (row_bytes, 8)) * powers).sum(-1).to(torch.uint8)


def unpack_rows(packed: Tensor, widths: Tensor) -> Tensor:
    """The codes ``[B, ..., d]``, int64, of rows ``[B, ..., row_bytes]`` that `pack_rows` made."""
    offsets = widths.cumsum(-1) - widths
    lead = (packed.shape[0], *[1] * (packed.dim() - 2), widths.shape[-1])
    last = packed.shape[-1] - 1
    first = (offsets // 8).clamp(max=last).view(lead).expand(*packed.shape[:-1], -1)
    second = (offsets // 8 + 1).clamp(max=last).view(lead).expand(*packed.shape[:-1], -1)
    word = packed.gather(-1, first).long() | packed.gather(-1, second).long() << 8
    return (word >> (offsets % 8).view(lead)) & ((1 << widths) - 1).view(lead)


def _skip_empty(owner: Tensor, widths: Tensor) -> Tensor:
    """For each bit, the last code at or before ``owner`` that has any bits (0 where there is none)."""
    index = torch.arange(widths.shape[-1], device=widths.device).expand_as(widths)
    last = torch.where(widths > 0, index, torch.zeros_like(index)).cummax(-1).values
    return last.gather(-1, owner)
