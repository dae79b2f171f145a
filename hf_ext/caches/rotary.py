"""Moves rotated keys to other positions: a rotation by the difference, in float32, for half-split RoPE."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

POSITION_DEPENDENT = ("dynamic", "longrope")  # frequencies that change with the length of the text


def move_keys(keys: Tensor, shift: Tensor, frequencies: Tensor) -> Tensor:
    """Turn keys at positions ``p`` into the same keys at positions ``p + shift``.

    RoPE multiplies the pair ``(x_i, x_{i + d/2})`` of a key at position ``p`` by the rotation ``R(p f_i)``, so the
    key at ``p + shift`` is ``R(shift f_i)`` times it. Scalings of cos and sin (YaRN) are part of the keys already.

    Args:
        keys: ``[B, H, P, D]``; rotated in their first ``2 len(frequencies)`` channels, the others stay.
        shift: ``[B, P]`` or ``[B, 1]``, in tokens.
        frequencies: ``[d / 2]`` in radians per token.
    """
    half = frequencies.numel()
    angle = shift[:, None, :, None].float() * frequencies.float().to(keys.device)
    cos, sin = angle.cos(), angle.sin()
    first, second = keys[..., :half].float(), keys[..., half : 2 * half].float()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
    return turned if 2 * half == keys.shape[-1] else torch.cat([turned, keys[..., 2 * half :]], dim=-1)


def frequencies(decoder: nn.Module, layer_type: str) -> Tensor:
    """The RoPE frequencies ``[d / 2]`` that layers of this type use."""
    rotary: Any = decoder.rotary_emb
    found = getattr(rotary, f"{layer_type}_inv_freq", None)
    return rotary.inv_freq if found is None else found


def unrotated_moment(moment: Tensor, length: int, frequencies: Tensor, samples: int = 32) -> Tensor:
    """The second moment ``[D, D]`` that queries show to a key before its rotation, averaged over its positions.

    A key ``k`` at position ``p`` meets a rotated query ``q`` as ``q . R(p) k = (R(-p) q) . k``, so the moment
    ``E[q q^T]`` becomes the mean over ``p < length`` of ``R(-p) E[q q^T] R(p)``, here of ``samples`` of them.
    """
    shift = -torch.linspace(0, max(length - 1, 0), samples, device=moment.device).round()[:, None]
    one_side = move_keys(moment.float().expand(samples, 1, -1, -1), shift, frequencies)
    return move_keys(one_side.transpose(-1, -2), shift, frequencies).mean((0, 1))


def check_movable(decoder: nn.Module, layer_types: list[str], cache: str, advice: str = "") -> None:
    """Refuse models whose keys `move_keys` would not move as the model itself places them; tried on random keys.

    Raises:
        ValueError: the model has no RoPE, one whose frequencies depend on the text's length, or not a half-split one.
    """
    name = type(decoder).__name__
    advice = advice or f'use positions="original" with the {cache} cache'
    rotary = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        raise ValueError(f"{name} has no rotary positions that stored keys could be moved by; {advice}.")
    for layer_type in sorted(set(layer_types) - {"dummy"}):
        kind = rotary.rope_type[layer_type] if isinstance(rotary.rope_type, dict) else rotary.rope_type
        if kind in POSITION_DEPENDENT:
            raise ValueError(
                f"{name} has {kind!r} rotary positions, whose frequencies depend on the text's length, so stored keys "
                f"cannot be moved; {advice}."
            )
        if not _moves_alike(rotary, apply, frequencies(decoder, layer_type), layer_type):
            raise ValueError(f"{name} rotates its keys in a way that moving stored keys does not follow; {advice}.")


def _moves_alike(rotary: Any, apply: Any, frequency: Tensor, layer_type: str) -> bool:
    if frequency.device.type == "meta":
        return True
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 2, 2 * frequency.numel(), generator=generator).to(frequency.device)
    placed = []
    for start in (3, 11):
        position_ids = torch.tensor([[start, start + 2]], device=frequency.device)
        arguments = (layer_type,) if isinstance(rotary.rope_type, dict) else ()
        placed.append(apply(key, key, *rotary(key, position_ids, *arguments))[1])
    moved = move_keys(placed[0], torch.tensor([[8, 8]], device=frequency.device), frequency)
    return bool(torch.allclose(moved, placed[1], atol=1e-4, rtol=1e-3))
