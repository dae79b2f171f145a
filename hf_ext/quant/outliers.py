"""Outliers: the few weights far beyond the rest of their row, kept apart in float16 with their place.

A code covers the bulk of a row: the tables of a trellis end at 3.3 times its root mean square, where single weights
of trained models reach 28 times that. Clipped, one of them costs as much as thousands of others, and feedback spreads
its error. ReALLM (arXiv 2405.13155) allows a sparse residual beside the low-rank one; taking weights apart by size
alone is the dense-and-sparse decomposition of SqueezeLLM (arXiv 2306.07629).
"""

import torch
from torch import Tensor

from hf_ext.kernels.decoded_linear import SPARSE

MOST = 2**-10  # of all weights: 0.05 bits a weight, 0.08 where places need int32
LARGEST = torch.finfo(torch.float16).max


def split_outliers(weight: Tensor, threshold: float) -> tuple[dict[str, Tensor], Tensor]:
    """Weights beyond ``threshold`` times the root mean square of their row, and the weight without them.

    Args:
        weight: ``[out, in]``, float32.
        threshold: 0 takes none apart.

    Returns:
        ``sparse_rows`` and ``sparse_columns`` (integers ``[n]``) with ``sparse_values`` (float16 ``[n]``), row by row,
        empty where there are none; and what is left, in which their places hold what float16 has rounded off.
    """
    if not threshold:
        return {}, weight
    size = weight.abs()
    part = size / size.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    times = part / part.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    beyond = times * (times > threshold) * (weight.half() != 0)  # not what float16 rounds to nothing
    count = min(int((beyond > 0).sum()), int(MOST * weight.numel()))
    if not count:
        return {}, weight
    places = beyond.flatten().topk(count).indices.sort().values
    kept = sparse_parts(count, weight.shape[0], weight.shape[1], weight.device)
    kept["sparse_rows"].copy_(places // weight.shape[1])
    kept["sparse_columns"].copy_(places % weight.shape[1])
    rest = weight.flatten().clone()
    kept["sparse_values"].copy_(rest[places].clamp(-LARGEST, LARGEST))
    rest[places] -= kept["sparse_values"].float()
    return kept, rest.view_as(weight)


def sparse_parts(count: int, out: int, columns: int, device: str | torch.device) -> dict[str, Tensor]:
    """Uninitialised parts for ``count`` outliers of a weight ``[out, columns]``."""
    place = index_type(max(out, columns))
    types = zip(SPARSE, (place, place, torch.float16), strict=True)
    return {name: torch.empty(count, dtype=dtype, device=device) for name, dtype in types}


def index_bytes(size: int) -> int:
    """Bytes of one index below ``size``: int16 where it fits, else int32."""
    return 2 if size <= 2**15 else 4


def index_type(size: int) -> torch.dtype:
    """The integer type of indices below ``size``."""
    return torch.int16 if index_bytes(size) == 2 else torch.int32
