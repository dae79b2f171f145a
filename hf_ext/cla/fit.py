"""Closed-form initialisations for a consumer that is to read another layer's keys and values.

A consumer's queries and output projection were trained for its own keys and values. Both can be turned towards its
source's without new parameters:

* values: with ``v ≈ v_src B`` (ridge regression, one ``B`` for each KV head), ``(P v) W_O = (P v_src) (B W_O)``, so
  ``B`` goes into the output projection;
* keys: a rotary embedding turns each pair of coordinates, read as one complex number, by an angle of the position, so
  exactly the maps that commute with it are complex factors. With ``k ≈ a k_src``,
  ``Re(conj(q) k) = Re(conj(conj(a) q) k_src)``, so ``conj(a)`` goes into the query projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean square of the source's values


@dataclass
class Moments:
    """Sums over tokens of one consumer and its source, in float64.

    Attributes:
        value_source: ``Σ v_srcᵀ v_src``, `[H, D, D]`.
        value_cross: ``Σ v_srcᵀ v``, `[H, D, D]`.
        key_source: ``Σ |k_src|²`` of each rotary pair, `[H, D/2]`.
        key_cross: ``Σ conj(k_src) k``, complex `[H, D/2]`.
    """

    value_source: Tensor | float = 0.0
    value_cross: Tensor | float = 0.0
    key_source: Tensor | float = 0.0
    key_cross: Tensor | float = 0.0

    def add(self, keys: Tensor, values: Tensor, source_keys: Tensor, source_values: Tensor) -> None:
        """Count tokens: keys (rotated) and values `[B, H, T, D]` of the consumer and of its source."""
        own, other = (rows.double().transpose(0, 1).flatten(1, 2) for rows in (values, source_values))
        self.value_source = self.value_source + other.mT @ other
        self.value_cross = self.value_cross + other.mT @ own
        mine, theirs = as_complex(keys.double()), as_complex(source_keys.double())
        self.key_source = self.key_source + theirs.abs().square().sum((0, 2))
        self.key_cross = self.key_cross + (theirs.conj() * mine).sum((0, 2))


def as_complex(states: Tensor) -> Tensor:
    """Rotary pairs `[..., D]` as complex numbers `[..., D/2]`; coordinate ``i`` turns together with ``i + D/2``."""
    first, second = states.chunk(2, dim=-1)
    return torch.complex(first, second)


def value_map(moments: Moments) -> Tensor:
    """``B`` `[H, D, D]` with the least ``Σ |v_src B - v|²`` and a slight pull to small values."""
    gram, cross = torch.as_tensor(moments.value_source), torch.as_tensor(moments.value_cross)
    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    ridge = RIDGE * scale[:, None, None] * torch.eye(size, dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, cross)


def key_factor(moments: Moments) -> Tensor:
    """The complex ``a`` `[H, D/2]` with the least ``Σ |a k_src - k|²``."""
    energy = torch.as_tensor(moments.key_source).clamp_min(1e-30)
    return torch.as_tensor(moments.key_cross) / energy


def turn_output(weight: Tensor, value_maps: Tensor) -> Tensor:
    """An output projection `[hidden, heads · D]` for the source's values: each head's block times ``Bᵀ``."""
    kv_heads, size, _ = value_maps.shape
    blocks = weight.double().unflatten(1, (kv_heads, -1, size))
    return torch.einsum("ogqd,ged->ogqe", blocks, value_maps).flatten(1).to(weight.dtype)


def turn_queries(weight: Tensor, factors: Tensor) -> Tensor:
    """A query projection `[heads · D, hidden]`, or its bias, for the source's keys: rotary pairs times ``conj(a)``."""
    kv_heads, half = factors.shape
    rows = weight.double().unflatten(0, (kv_heads, -1, 2, half))
    pairs = torch.complex(rows[:, :, 0], rows[:, :, 1])
    shape = (kv_heads, 1, half) + (1,) * (weight.ndim - 1)
    turned = pairs * factors.conj().view(shape)
    return torch.stack([turned.real, turned.imag], dim=2).flatten(0, 3).to(weight.dtype)
