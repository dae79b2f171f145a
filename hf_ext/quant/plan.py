"""The plan: which shape each matrix gets, by error per byte, under a budget of bits per weight.

ReALLM (arXiv 2405.13155) adapts the latent's shape to each matrix; how it chooses is not published. Here the loss of a
matrix in a shape is predicted from its curvature and from the shape's distortion on a standard normal (scaled weights
are nearly normal), and bytes go, one upgrade at a time, to where they buy most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hf_ext.quant import trellis
from hf_ext.quant.codebook import kmeans, nearest
from hf_ext.quant.shape import MatrixShape

# (vector size, code bits): every rate from 1.5 to 4 bits a weight that decodes fast
LATTICE = ((4, 6), (4, 7), (4, 8), (3, 7), (2, 5), (3, 8), (2, 6), (2, 7), (2, 8))
# quarters of a bit from 1.5 to 5, for a trellis
QUARTERS = tuple((4, quarters) for quarters in range(6, 21))
RANKS = (0, 2, 4, 8, 16)
# Predicted losses ask for no low-rank term beside a trellis, and with outliers apart the measured ones ask for little
# (docs/reallm.md). The least rank is what healing and adapters train.
TRELLIS_RANKS = (2, 4, 8, 16)


@dataclass(frozen=True)
class MatrixProfile:
    """What the plan has to know of a matrix.

    Attributes:
        out_features, in_features: its size.
        energy: ``sum_r F_r scale_r^2``: how much an error of the scaled weight costs, before columns are weighed.
        columns: what an error of each column costs after correction by later ones, descending, ``[in]``.
        outliers: weights that are kept apart whatever the shape.
    """

    out_features: int
    in_features: int
    energy: float
    columns: Tensor
    outliers: int = 0

    def loss(self, shape: MatrixShape) -> float:
        """Predicted loss: the columns that the low-rank term takes over are free, the others cost the distortion."""
        if shape.decoder != "trellis":
            left = distortion(shape.vector_size, shape.code_bits) * (self._before[-1] - self._before[shape.rank])
            return 0.5 * self.energy * left
        left, at = 0.0, 0
        for width in range(len(shape.rates), 0, -1):
            begin, at = max(at, shape.rank), at + shape.rates[width - 1]
            if at > begin:
                left += trellis.distortion(width, shape.state_bits) * (self._before[at] - self._before[begin])
        return 0.5 * self.energy * left

    @cached_property
    def _before(self) -> list[float]:
        """What all columns before each one cost together."""
        return [0.0, *self.columns.double().cumsum(0).tolist()]

    def nbytes(self, shape: MatrixShape) -> int:
        """Bytes of all parts."""
        return sum(shape.nbytes(self.out_features, self.in_features).values())


@lru_cache
def distortion(vector_size: int, code_bits: int) -> float:
    """Mean squared error per weight of a k-means codebook on standard normal vectors."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2**15, vector_size, generator=generator)
    ones = torch.ones_like(sample)
    table = kmeans(sample[: 2**14], ones[: 2**14], 2**code_bits, 0, 12)
    return float(nearest(sample[2**14 :], ones[2**14 :], table)[1].mean()) / vector_size


def candidates(base: MatrixShape, profile: MatrixProfile) -> list[MatrixShape]:
    """The shapes worth considering for a matrix, by bytes: the lower convex hull of predicted loss."""
    most = min(profile.out_features, profile.in_features)
    base = replace(base, outliers=profile.outliers)
    ranks: tuple[int, ...] = RANKS
    if base.decoder == "trellis":
        kinds = [replace(base, vector_size=size, code_bits=bits) for size, bits in QUARTERS]
        kinds = [replace(kind, rates=_rates(kind, profile)) for kind in kinds]
        ranks = TRELLIS_RANKS
    else:
        kinds = [
            replace(base, vector_size=size, code_bits=bits) for size, bits in LATTICE if base.group_size % size == 0
        ]
    fitting = [rank for rank in ranks if rank <= most] or [most]
    shapes = [replace(kind, rank=rank) for kind in kinds for rank in fitting]
    return _hull(sorted(shapes, key=lambda shape: (profile.nbytes(shape), profile.loss(shape))), profile)


def make_plan(profiles: Mapping[str, MatrixProfile], base: MatrixShape, budget: float) -> dict[str, MatrixShape]:
    """The shape of every matrix so that all parts together take at most ``budget`` bits per weight.

    Raises:
        ValueError: even the smallest shapes take more.
    """
    hulls = {name: candidates(base, profile) for name, profile in profiles.items()}
    allowed = budget * sum(profile.out_features * profile.in_features for profile in profiles.values()) / 8
    chosen = dict.fromkeys(profiles, 0)
    spent = sum(profile.nbytes(hulls[name][0]) for name, profile in profiles.items())
    if spent > allowed:
        least = budget * spent / allowed
        raise ValueError(f"A budget of {budget} bits per weight is too small; these layers take at least {least:.3f}.")
    upgrades = sorted(
        (_gain(profile, hulls[name][step], hulls[name][step + 1]), name, step)
        for name, profile in profiles.items()
        for step in range(len(hulls[name]) - 1)
    )
    for _, name, step in reversed(upgrades):  # along a convex hull gains fall, so steps come in their order
        extra = profiles[name].nbytes(hulls[name][step + 1]) - profiles[name].nbytes(hulls[name][step])
        if chosen[name] == step and spent + extra <= allowed:
            chosen[name], spent = step + 1, spent + extra
    return {name: hulls[name][step] for name, step in chosen.items()}


def _rates(shape: MatrixShape, profile: MatrixProfile) -> tuple[int, ...]:
    return trellis.allocate(profile.columns, shape.bits, shape.state_bits)


def _gain(profile: MatrixProfile, small: MatrixShape, large: MatrixShape) -> float:
    """Loss saved per byte added."""
    return (profile.loss(small) - profile.loss(large)) / (profile.nbytes(large) - profile.nbytes(small))


def _hull(shapes: Sequence[MatrixShape], profile: MatrixProfile) -> list[MatrixShape]:
    hull: list[MatrixShape] = []
    for shape in shapes:
        if hull and profile.loss(shape) >= profile.loss(hull[-1]):
            continue
        if hull and profile.nbytes(shape) == profile.nbytes(hull[-1]):
            hull.pop()
        while len(hull) > 1 and _gain(profile, hull[-2], hull[-1]) <= _gain(profile, hull[-1], shape):
            hull.pop()
        hull.append(shape)
    return hull
