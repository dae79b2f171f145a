"""The compiled CPU path of `hf_ext.kernels.trellis`: ``trellis_cpu.cpp``, through `hf_ext.kernels.native`.

Where it cannot be compiled, every function here returns None and the PyTorch reference does the work.
"""

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ext.kernels.decoded_linear import GEMV_ROWS, SPARSE
from hf_ext.kernels.native import load_native
from hf_ext.kernels.native_weight import (
    FACTOR_TYPES,
    TYPES,
    NativeWeight,
    index_bytes,
    native_factors,
    native_index,
    native_sparse,
)

if TYPE_CHECKING:
    from hf_ext.kernels.trellis import TrellisWeight

_POINTERS = ("stream", "widths", "tables", "scales", "perm", "lr_a", "lr_b", "lr_scale", *SPARSE)


class _Weight(NativeWeight):
    """``struct Weight`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("bytes", "out", "inputs", "rank", "sparse")),
        *((name, ctypes.c_int32) for name in ("state_bits", "scale_type", "perm_bytes", "lr_type", "place_bytes")),
    )


def decode_compiled(weight: "TrellisWeight", tables: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The dense weight transposed, ``[in, out]``, of the codes alone; None where this path cannot."""
    library = _library()
    if library is None or dtype not in TYPES or weight.qweight.device.type != "cpu":
        return None
    dense = torch.empty(len(weight.widths), len(weight.scales), dtype=dtype)
    library.decode(prepare(weight, tables), dense.data_ptr(), TYPES[dtype], torch.get_num_threads())
    return dense


def gemv_compiled(x: Tensor, weight: "TrellisWeight", tables: Tensor) -> Tensor | None:
    """``x`` ``[..., in]`` times the whole weight, all terms included; None where this path cannot."""
    library = _library()
    if library is None or x.dtype not in TYPES or x.device.type != "cpu" or weight.qweight.device.type != "cpu":
        return None
    x = x.contiguous()
    out = len(weight.scales)
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype)
    rows = y.numel() // out
    if rows > GEMV_ROWS:
        return None
    prepared = prepare(weight, tables)
    library.gemv(prepared, x.data_ptr(), y.data_ptr(), rows, TYPES[x.dtype], torch.get_num_threads())
    return y


def viterbi_compiled(target: Tensor, weights: Tensor, width: int, values: Tensor) -> Tensor | None:
    """The best codes ``[out]`` of one column; None where this path cannot."""
    library = _library()
    if library is None or target.device.type != "cpu":
        return None
    target, weights, values = target.float().contiguous(), weights.float().contiguous(), values.contiguous()
    codes = torch.empty(len(target), dtype=torch.uint8)
    pointers = (tensor.data_ptr() for tensor in (target, weights, values, codes))
    library.viterbi(*pointers, len(target), width, len(values).bit_length() - 1)
    return codes


def prepare(weight: "TrellisWeight", tables: Tensor) -> Any:
    """The weight as the compiled functions take it; made once and kept on the weight."""
    known = vars(weight).get("_prepared")
    if known is not None:
        return known
    factors = native_factors(weight.lr_a, weight.lr_b)
    perm = native_index("perm", weight.perm, len(weight.widths))
    sparse = native_sparse(weight, len(weight.scales), len(weight.widths))
    held = [weight.qweight, weight.widths, tables, weight.scales, perm, *factors, weight.lr_scale, *sparse]
    reference = _Weight.pointing_to(
        held,
        weight.qweight.numel(),
        len(weight.scales),
        len(weight.widths),
        0 if weight.lr_a is None else len(weight.lr_a),
        0 if sparse[0] is None else len(sparse[0]),
        weight.state_bits,
        TYPES[weight.scales.dtype],
        index_bytes(perm),
        0 if factors[0] is None else FACTOR_TYPES[factors[0].dtype],
        index_bytes(sparse[0]),
    )
    vars(weight)["_prepared"] = reference
    return reference


@cache
def _library() -> Any:
    """The compiled library, or None where it cannot be had."""
    library = load_native("trellis_cpu")
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        library.gemv.argtypes = (pointer, pointer, pointer, ctypes.c_int64, number, number)
        library.decode.argtypes = (pointer, pointer, number, number)
        library.viterbi.argtypes = (*(pointer,) * 4, ctypes.c_int64, number, number)
        library.gemv.restype = library.decode.restype = library.viterbi.restype = None
    return library
