"""Codebooks: the fixed ones of other methods, and weighted k-means for learned ones."""

import torch
from torch import Tensor

# The 16 levels of NF4: quantiles of a standard normal scaled to [-1, 1], with an exact zero (arXiv 2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SAMPLES_PER_CODEWORD = 64


def fixed_codebook(kind: str, code_bits: int) -> Tensor:
    """The table ``[K, 1]`` of a codebook that is not learned: NF4's levels, or the whole numbers from 0."""
    values = torch.tensor(NF4) if kind == "nf4" else torch.arange(2**code_bits, dtype=torch.float32)
    return values[:, None]


def kmeans(
    vectors: Tensor, weights: Tensor, codewords: int, seed: int, iterations: int, start: Tensor | None = None
) -> Tensor:
    """Codewords ``[K, d]`` of small weighted squared error to ``vectors`` ``[n, d]``, by Lloyd's iterations.

    Every coordinate of every vector has its own weight (``weights`` ``[n, d]``): the error is
    ``sum(weights * (vector - nearest codeword) ** 2)`` and the nearest codeword is the one nearest in that sense. A
    codeword that loses all its vectors moves to the vector that is served worst. The same seed gives the same result.

    Args:
        vectors: ``[n, d]`` float32; at most ``64 * codewords`` of them, drawn at random, are used.
        weights: ``[n, d]``, not negative.
        codewords: K.
        seed: of the draw and the start.
        iterations: Lloyd iterations.
        start: codewords ``[K, d]`` to start from, or None for random vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(vectors), generator=generator)[: SAMPLES_PER_CODEWORD * max(codewords, 64)]
    vectors, weights = vectors[chosen], weights[chosen]
    table = _start(vectors, codewords, generator) if start is None else start.clone()
    for _ in range(iterations):
        table = _lloyd(vectors, weights, table)
    return table


def nearest(vectors: Tensor, weights: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The codeword of each vector and the error it leaves, both ``[n]``."""
    cost = weights @ table.square().t() - 2 * (weights * vectors) @ table.t()
    least, codes = cost.min(dim=1)
    return codes, (least + (weights * vectors.square()).sum(1)).clamp_min(0)


def _lloyd(vectors: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    codes, error = nearest(vectors, weights, table)
    total = torch.zeros_like(table).index_add_(0, codes, weights)
    mean = torch.zeros_like(table).index_add_(0, codes, weights * vectors) / total.clamp_min(1e-30)
    updated = torch.where(total > 0, mean, table)
    empty = torch.bincount(codes, minlength=len(table)) == 0
    lost = int(empty.sum())
    if lost:
        worst = error.topk(min(lost, len(error))).indices
        updated[empty.nonzero()[: len(worst), 0]] = vectors[worst]
    return updated


def _start(vectors: Tensor, codewords: int, generator: torch.Generator) -> Tensor:
    """Random vectors (quantiles along one dimension), spread out to the density that optimal codewords have.

    For a density f in d dimensions that is ``f ** (d / (d + 2))``, for a normal its like with ``sqrt((d + 2) / d)``
    times the deviation; Lloyd's iterations alone take long to get there.
    """
    size = vectors.shape[1]
    if size == 1:
        start = vectors[:, 0].quantile((torch.arange(codewords) + 0.5) / codewords)[:, None]
    else:
        chosen = torch.randint(len(vectors), (codewords,), generator=generator)
        if len(vectors) >= codewords:
            chosen = torch.randperm(len(vectors), generator=generator)[:codewords]
        start = vectors[chosen]
    mean = vectors.mean(0)
    spread = mean + ((size + 2) / size) ** 0.5 * (start - mean)
    return spread.clamp(vectors.amin(0), vectors.amax(0))
