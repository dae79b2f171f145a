"""How much attention a window of queries pays to each key, without ever holding the whole matrix of weights."""

import torch
from torch import Tensor

ROWS = 64  # query rows whose attention weights exist at the same time


def window_scores(
    query: Tensor,
    keys: Tensor,
    first: Tensor,
    scaling: float,
    row_weights: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """Sum over the window's queries of their attention weights on each key.

    Args:
        query: ``[B, Hq, W, D]``, the newest ``W`` tokens, whose keys are the last ``W`` of ``keys``.
        keys: ``[B, H, n, D]``.
        first: ``[B]`` slot of each row's first real key; keys and queries before it count nothing.
        scaling: factor of the scores.
        row_weights: ``[W]`` weight of each query, or None for equal ones.
        per_head: a score for each key-value head (the mean over its queries), not one for all.

    Returns:
        float32 ``[B, H, n]``, or ``[B, 1, n]``.
    """
    batch, query_heads, window, _ = query.shape
    heads, n = keys.shape[1:3]
    slot, group = torch.arange(n, device=keys.device), query_heads // heads
    k = keys.float().transpose(-1, -2)
    total = keys.new_zeros(batch, heads if per_head else 1, n, dtype=torch.float32)
    for begin in range(0, window, ROWS):
        rows = query[:, :, begin : begin + ROWS].float()
        end = n - window + begin + rows.shape[2]  # no query of this block sees a later key
        at = torch.arange(end - rows.shape[2], end, device=keys.device)
        visible = (slot[:end] <= at[:, None]) & (slot[:end] >= first[:, None, None])
        q = rows.unflatten(1, (heads, group)).flatten(2, 3) * scaling
        scores = (q @ k[..., :end]).unflatten(2, (group, rows.shape[2]))
        weights = scores.masked_fill_(~visible[:, None, None], float("-inf")).softmax(-1)
        counted = (at >= first[:, None]).float()
        if row_weights is not None:
            counted = counted * row_weights[begin : begin + ROWS].to(counted)
        weights = torch.nan_to_num(weights)
        drawn = torch.einsum("bhrwn,bw->bhn" if per_head else "bhrwn,bw->bn", weights, counted)
        total[..., :end] += drawn if per_head else drawn[:, None]
    return total / (group if per_head else query_heads)


def smooth(scores: Tensor, kernel: int, how: str = "avg") -> Tensor:
    """Pool scores ``[B, H, n]`` over ``kernel`` (odd) neighbouring keys, so that what stays comes in runs.

    Raises:
        ValueError: ``kernel`` is even or ``how`` is neither ``"avg"`` nor ``"max"``.
    """
    if kernel % 2 == 0 or how not in ("avg", "max"):
        raise ValueError(f'the kernel must be odd and pooling "avg" or "max", got {kernel} and {how!r}.')
    pool = torch.nn.functional.avg_pool1d if how == "avg" else torch.nn.functional.max_pool1d
    return pool(scores, kernel, stride=1, padding=kernel // 2)
