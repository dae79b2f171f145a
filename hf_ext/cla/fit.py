"""Closed-form initialisations for a consumer that is to read another layer's keys and values.

A consumer's queries and output projection were trained for its own keys and values. Both can be turned towards its
source's without new parameters:

* values: with ``v ≈ v_src B`` (ridge regression, one ``B`` for each KV head), ``(P v) W_O = (P v_src) (B W_O)``, so
  ``B`` goes into the output projection;
* keys: a rotary embedding turns each pair of coordinates, read as one complex number, by an angle of the position, so
  exactly the maps that commute with it are complex factors. With ``k ≈ a k_src``,
  ``Re(conj(q) k) = Re(conj(conj(a) q) k_src)``, so ``conj(a)`` goes into the query projection;
* heads: head 0 of one layer has nothing to do with head 0 of another. Each KV head of the consumer, with the query
  heads that read it, moves to the place of that head of the source which explains most of it, one for one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean square of the source's values


@dataclass
class Moments:
    """Sums over tokens of one consumer and its source, in float64; H heads of the consumer, S of the source.

    Attributes:
        value_own: ``Σ |v|²``, `[H]`.
        value_source: ``Σ v_srcᵀ v_src``, `[S, D, D]`.
        value_cross: ``Σ v_srcᵀ v`` of every two heads, `[H, S, D, D]`.
        key_own: ``Σ |k|²`` of each rotary pair, `[H, D/2]`.
        key_source: ``Σ |k_src|²``, `[S, D/2]`.
        key_cross: ``Σ conj(k_src) k`` of every two heads, complex `[H, S, D/2]`.
    """

    value_own: Tensor | float = 0.0
    value_source: Tensor | float = 0.0
    value_cross: Tensor | float = 0.0
    key_own: Tensor | float = 0.0
    key_source: Tensor | float = 0.0
    key_cross: Tensor | float = 0.0

    def add(self, keys: Tensor, values: Tensor, source_keys: Tensor, source_values: Tensor) -> None:
        """Count tokens: keys (rotated) and values `[B, H, T, D]` of the consumer and of its source."""
        own, other = (rows.double().transpose(0, 1).flatten(1, 2) for rows in (values, source_values))
        self.value_own = self.value_own + own.square().sum((1, 2))
        self.value_source = self.value_source + other.mT @ other
        self.value_cross = self.value_cross + other.mT @ own[:, None]
        mine, theirs = as_complex(keys.double()), as_complex(source_keys.double())
        self.key_own = self.key_own + mine.abs().square().sum((0, 2))
        self.key_source = self.key_source + theirs.abs().square().sum((0, 2))
        self.key_cross = self.key_cross + torch.einsum("bstd,bhtd->hsd", theirs.conj(), mine)


def as_complex(states: Tensor) -> Tensor:
    """Rotary pairs `[..., D]` as complex numbers `[..., D/2]`; coordinate ``i`` turns together with ``i + D/2``."""
    first, second = states.chunk(2, dim=-1)
    return torch.complex(first, second)


def match_heads(moments: Moments, turn_keys: bool = True) -> list[int]:
    """The source's head for each head of the consumer, every one used once, that leaves the least unexplained.

    Args:
        moments: of the two layers.
        turn_keys: whether the keys may be turned by `key_factor`, or are read as they are.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('Matching heads needs scipy: pip install "hf_ext[train]".') from error
    left = _values_left(moments) + _keys_left(moments, turn_keys)
    heads: list[int] = linear_sum_assignment(left.numpy())[1].tolist()
    return heads


def _values_left(moments: Moments) -> Tensor:
    """The share `[H, S]` of a head's values that no linear map of a source head's gives."""
    cross = torch.as_tensor(moments.value_cross)
    explained = (cross * torch.linalg.solve(_ridged(moments), cross)).sum((-1, -2))
    return 1 - explained / torch.as_tensor(moments.value_own).clamp_min(1e-30)[:, None]


def _keys_left(moments: Moments, turn: bool) -> Tensor:
    """The share `[H, S]` of a head's keys that a source head's do not give."""
    own, other, cross = (torch.as_tensor(x) for x in (moments.key_own, moments.key_source, moments.key_cross))
    explained = cross.abs().square() / other.clamp_min(1e-30) if turn else 2 * cross.real - other
    return 1 - explained.sum(-1) / own.sum(-1).clamp_min(1e-30)[:, None]


def _ridged(moments: Moments) -> Tensor:
    gram = torch.as_tensor(moments.value_source)
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    return gram + RIDGE * scale[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)


def value_map(moments: Moments, heads: Sequence[int]) -> Tensor:
    """``B`` `[H, D, D]` with the least ``Σ |v_src B - v|²`` and a slight pull to small values."""
    cross = torch.as_tensor(moments.value_cross)[range(len(heads)), heads]
    return torch.linalg.solve(_ridged(moments)[heads], cross)


def key_factor(moments: Moments, heads: Sequence[int]) -> Tensor:
    """The complex ``a`` `[H, D/2]` with the least ``Σ |a k_src - k|²``."""
    energy = torch.as_tensor(moments.key_source)[heads].clamp_min(1e-30)
    return torch.as_tensor(moments.key_cross)[range(len(heads)), heads] / energy


def turn_output(weight: Tensor, value_maps: Tensor, heads: Sequence[int]) -> Tensor:
    """An output projection `[hidden, heads · D]` for the source's values: each head's block times ``Bᵀ``, moved."""
    kv_heads, size, _ = value_maps.shape
    blocks = weight.double().unflatten(1, (kv_heads, -1, size))
    turned = torch.einsum("ogqd,ged->ogqe", blocks, value_maps)
    return turned[:, _places(heads)].flatten(1).to(weight.dtype)


def turn_queries(weight: Tensor, factors: Tensor, heads: Sequence[int]) -> Tensor:
    """A query projection `[heads · D, hidden]`, or its bias, for the source's keys: pairs times ``conj(a)``, moved."""
    kv_heads, half = factors.shape
    rows = weight.double().unflatten(0, (kv_heads, -1, 2, half))
    pairs = torch.complex(rows[:, :, 0], rows[:, :, 1])
    shape = (kv_heads, 1, half) + (1,) * (weight.ndim - 1)
    turned = (pairs * factors.conj().view(shape))[_places(heads)]
    return torch.stack([turned.real, turned.imag], dim=2).flatten(0, 3).to(weight.dtype)


def _places(heads: Sequence[int]) -> list[int]:
    """Which of the consumer's heads comes to each place, where head h goes to ``heads[h]``."""
    return sorted(range(len(heads)), key=heads.__getitem__)
