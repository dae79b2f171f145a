"""Trellis-coded columns: how many bits each column gets, and the search for its codes under error feedback.

Every column of a weight is one sequence along the outputs, found by the Viterbi algorithm (`hf_ext.kernels.trellis`).
All its entries share the column's place in the feedback (`hf_ext.quant.feedback`), so squared error is the exact loss;
rows that count more weigh more, and the search then moves its errors to rows that count less. Columns may have
different widths: bits go, one by one, to where they save most (reverse water-filling).
"""

from functools import lru_cache

import torch
from torch import Tensor

from hf_ext.kernels.trellis import MAX_WIDTH, pack_columns, states_of, trellis_tables, viterbi
from hf_ext.quant.feedback import BLOCK

Rates = tuple[int, ...]  # columns of 1, 2, ... MAX_WIDTH bits


def even_rates(bits: float, columns: int) -> Rates:
    """Rates of ``bits`` a weight on average, rounded down to whole columns, all widths as alike as can be."""
    total = int(bits * columns)
    width, more = divmod(total, columns)
    counts = [0] * (MAX_WIDTH + 1)
    counts[width - 1] = columns - more
    counts[width] = more
    return tuple(counts[:MAX_WIDTH])


def allocate(weights: Tensor, bits: float, state_bits: int) -> Rates:
    """Rates of ``bits`` a weight on average that lose least where an error of column ``k`` costs ``weights[k]``.

    A column never gets more bits than one before it; so the counts say everything.
    """
    columns = len(weights)
    falling = weights.double().clamp_min(1e-30).cummin(0).values
    saved = torch.tensor([distortion(w, state_bits) - distortion(w + 1, state_bits) for w in range(1, MAX_WIDTH)])
    gains = saved[:, None].double() * falling  # of the bits after the first, falling along both sides
    extra = int(bits * columns) - columns
    chosen = gains.flatten().argsort(descending=True, stable=True)[:extra] % columns
    widths = 1 + torch.bincount(chosen, minlength=columns)
    return tuple(torch.bincount(widths - 1, minlength=MAX_WIDTH).tolist())


def column_widths(rates: Rates) -> Tensor:
    """The width of every column in the order of the stream, widest first, uint8 ``[in]``."""
    widths = torch.arange(MAX_WIDTH, 0, -1, dtype=torch.uint8)
    return widths.repeat_interleave(torch.tensor(rates[::-1]))


@lru_cache
def distortion(width: int, state_bits: int) -> float:
    """Mean squared error per weight on a standard normal source."""
    source = torch.randn(2**12, generator=torch.Generator().manual_seed(0))
    codes = viterbi(source, torch.ones_like(source), width, state_bits)
    values = trellis_tables(state_bits)[width - 1][states_of(codes[None], width, state_bits)[0]]
    return float((source - values).square().mean())


def encode_columns(
    target: Tensor, scales: Tensor, rows: Tensor, rates: Rates, state_bits: int, factor: Tensor | None
) -> Tensor:
    """The stream (uint8) of ``target`` ``[out, in]``, columns in stored order.

    Args:
        target: the weight to represent.
        scales: ``[out, 1]``, positive.
        rows: what an error of each row costs, ``[out]``.
        rates: columns of each width, of which the widest come first.
        state_bits: bits that a value depends on.
        factor: U of `hf_ext.quant.feedback.Curvature`, or None for no correction of later columns.
    """
    work, scale = target.t().contiguous(), scales[:, 0].float()  # a column is a row of `work`
    weights = rows * scale.square()
    weights = weights / weights.mean().clamp_min(1e-30)
    widths = column_widths(rates).tolist()
    tables = trellis_tables(state_bits)
    codes = torch.empty(work.shape, dtype=torch.uint8)
    for begin in range(0, len(work), BLOCK):
        end = min(begin + BLOCK, len(work))
        errors = torch.zeros(end - begin, work.shape[1])
        for at in range(begin, end):
            width = widths[at]
            codes[at] = viterbi(work[at] / scale, weights, width, state_bits)
            if factor is None:
                continue
            values = tables[width - 1][states_of(codes[at : at + 1], width, state_bits)[0]]
            errors[at - begin] = (work[at] - values * scale) / factor[at, at]
            work[at + 1 : end] -= factor[at, at + 1 : end, None] * errors[at - begin]
        if factor is not None:
            work[end:] -= factor[begin:end, end:].t() @ errors
    packed, at = [], 0
    for width in range(MAX_WIDTH, 0, -1):
        packed.append(pack_columns(codes[at : at + rates[width - 1]], width).flatten())
        at += rates[width - 1]
    return torch.cat(packed)
