"""Optimizer states in 8 bits: bitsandbytes' blockwise dynamic quantisation, on CPU and GPU.

The momentum is stored as it is. Of the Fisher information the square root is stored: its range within a block is half
as many decades, so that far fewer entries fall below the smallest code; one that still would gets the smallest code,
because a Fisher of zero beside a weight that is not makes the preconditioned decay explode.
A state of ``n`` elements takes ``n + 4 ceil(n / 256)`` bytes, 1.016 a number.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

BLOCK = 256
KEYS = ("momentum_code", "momentum_absmax", "fisher_root_code", "fisher_root_absmax")


def bitsandbytes_functional() -> ModuleType:
    """The module with the quantisation functions.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ImportError('8-bit optimizer states need bitsandbytes: pip install "hf_ext[gpu]".') from error
    return bitsandbytes.functional


def quantize_states(momentum: Tensor, fisher: Tensor) -> dict[str, Tensor]:
    """The two float32 states as codes (uint8, the shape of the state) and block maxima (float32 ``[blocks]``)."""
    momentum_code, momentum_absmax = _quantize(momentum, signed=True)
    root = fisher.sqrt()
    root_code, root_absmax = _quantize(root, signed=False)
    smallest = _code_of_zero(signed=False) + 1
    root_code.clamp_(min=smallest).masked_fill_(root == 0, smallest - 1)
    return dict(zip(KEYS, (momentum_code, momentum_absmax, root_code, root_absmax), strict=True))


def dequantize_states(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Momentum and Fisher information in float32."""
    momentum = _dequantize(state["momentum_code"], state["momentum_absmax"], signed=True)
    root = _dequantize(state["fisher_root_code"], state["fisher_root_absmax"], signed=False)
    return momentum, root.square_()


def _quantize(tensor: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    functional = bitsandbytes_functional()
    code = _codebook(signed, tensor.device)
    codes, state = functional.quantize_blockwise(tensor.contiguous(), code=code, blocksize=BLOCK)
    # On CPU the function may give an exact zero the code beside: a row without gradient would drift.
    codes = codes.view(tensor.shape).masked_fill_(tensor == 0, _code_of_zero(signed))
    return codes, state.absmax


def _dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    functional = bitsandbytes_functional()
    code = _codebook(signed, codes.device)
    return functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=BLOCK).view(codes.shape)


@functools.cache
def _codebook(signed: bool, device: torch.device) -> Tensor:
    return bitsandbytes_functional().create_dynamic_map(signed=signed).to(device)


@functools.cache
def _code_of_zero(signed: bool) -> int:
    return int((_codebook(signed, torch.device("cpu")) == 0).nonzero()[0])
