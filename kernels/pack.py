"""Bit packing: codes of 1 to 8 bits as a dense stream of bytes, exact for every length.

Code ``i`` takes the bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, and bit ``k`` is bit ``k % 8`` (counted
from the least significant) of byte ``k // 8``. So codes may straddle bytes, nothing is lost to padding but the rest of
the last byte, and the layout does not depend on the machine.
"""

from math import lcm

import torch
from torch import Tensor


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that ``n`` codes of ``bits`` bits take."""
    _check_bits(bits)
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes ``[..., n]`` into bytes ``[..., ceil(n * bits / 8)]``, each row on its own.

    Codes must lie in ``[0, 2**bits)``; bits above that are dropped, so that no code can spoil its neighbours.

    Raises:
        ValueError: ``bits`` is not one of 1 to 8, or ``codes`` holds no integers or has no dimension.
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dim() == 0:
        raise ValueError(f"codes must be an integer tensor [..., n], got {codes.dtype} {list(codes.shape)}.")
    n = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8, copy=True)
    group, width, word_type = _word(bits)
    padding = -n % group
    codes = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
    parts = codes.to(word_type).unflatten(-1, (-1, group)) & (2**bits - 1)
    word = parts[..., 0].clone()
    for i in range(1, group):
        word |= parts[..., i] << (bits * i)
    stream = torch.stack([((word >> (8 * j)) & 255).to(torch.uint8) for j in range(width)], dim=-1)
    return stream.flatten(-2)[..., : packed_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes of each row of ``packed`` ``[..., ceil(n * bits / 8)]``, as uint8 ``[..., n]``.

    Raises:
        ValueError: ``bits`` is not one of 1 to 8, or ``packed`` is not uint8 of that length.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != packed_bytes(n, bits):
        raise ValueError(
            f"packed must be uint8 [..., {packed_bytes(n, bits)}] for {n} codes of {bits} bits, got {packed.dtype} "
            f"{list(packed.shape)}."
        )
    if bits == 8:
        return packed.clone()
    group, width, word_type = _word(bits)
    padding = -packed.shape[-1] % width
    packed = torch.nn.functional.pad(packed, (0, padding)) if padding else packed
    parts = packed.unflatten(-1, (-1, width)).to(word_type)
    word = parts[..., 0].clone()
    for j in range(1, width):
        word |= parts[..., j] << (8 * j)
    mask = 2**bits - 1
    codes = torch.stack([((word >> (bits * i)) & mask).to(torch.uint8) for i in range(group)], dim=-1)
    return codes.flatten(-2)[..., :n].contiguous()


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The smallest whole word: how many codes and how many bytes it holds, and an integer type for it."""
    size = lcm(bits, 8)
    return size // bits, size // 8, torch.uint8 if size == 8 else torch.int32 if size < 32 else torch.int64


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 1 to 8, got {bits!r}.")
