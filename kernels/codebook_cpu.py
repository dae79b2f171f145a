"""The compiled CPU path of `hf_ext.kernels.codebook`: ``codebook_cpu.cpp``, through `hf_ext.kernels.native`.

Where it cannot be compiled, every function here returns None and the PyTorch reference does the work.
"""

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ext.kernels.decoded_linear import SPARSE
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
    from hf_ext.kernels.codebook import CodebookWeight


_POINTERS = ("packed", "table", "scales", "zeros", "perm", "lr_a", "lr_b", "lr_scale", *SPARSE)


class _Weight(NativeWeight):
    """``struct Weight`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("out", "inputs", "row_bytes", "group", "groups", "rank", "sparse")),
        *(
            (name, ctypes.c_int32)
            for name in ("bits", "size", "width", "scale_type", "perm_bytes", "lr_type", "place_bytes")
        ),
    )


def decode_compiled(weight: "CodebookWeight", dtype: torch.dtype) -> Tensor | None:
    """The dense weight ``[out, in]`` of the codes alone; None where this path cannot."""
    library = _library()
    if library is None or dtype not in TYPES or not _on_cpu(weight):
        return None
    dense = torch.empty(len(weight.qweight), weight.in_features, dtype=dtype)
    library.decode(prepare(weight), dense.data_ptr(), TYPES[dtype], torch.get_num_threads())
    return dense


def gemv_compiled(x: Tensor, weight: "CodebookWeight") -> Tensor | None:
    """``x`` ``[..., in]`` times the whole weight, all terms included; None where this path cannot."""
    library = _library()
    if library is None or x.dtype not in TYPES or x.device.type != "cpu" or not _on_cpu(weight):
        return None
    x = x.contiguous()
    out = len(weight.qweight)
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype)
    rows = y.numel() // out
    library.gemv(prepare(weight), x.data_ptr(), y.data_ptr(), rows, TYPES[x.dtype], torch.get_num_threads())
    return y


def prepare(weight: "CodebookWeight") -> Any:
    """The weight as the compiled functions take it; made once and kept on the weight."""
    known = vars(weight).get("_prepared")
    if known is not None:
        return known
    size = weight.table.shape[1]
    width = next(width for width in (1, 2, 4, 8) if width >= size)
    rows = max(0, 16 - len(weight.table)) if width == 1 else 0  # two registers are read whole
    table = torch.nn.functional.pad(weight.table.float(), (0, width - size, 0, rows)).contiguous()
    factors = native_factors(weight.lr_a, weight.lr_b)
    perm = native_index("perm", weight.perm, weight.in_features)
    sparse = native_sparse(weight, len(weight.qweight), weight.in_features)
    held = [weight.qweight, table, weight.scales, weight.zeros, perm, *factors, weight.lr_scale, *sparse]
    reference = _Weight.pointing_to(
        held,
        len(weight.qweight),
        weight.in_features,
        weight.qweight.shape[1],
        weight.group,
        weight.scales.shape[1],
        0 if weight.lr_a is None else len(weight.lr_a),
        0 if sparse[0] is None else len(sparse[0]),
        weight.code_bits,
        size,
        width,
        TYPES[weight.scales.dtype],
        index_bytes(perm),
        0 if factors[0] is None else FACTOR_TYPES[factors[0].dtype],
        index_bytes(sparse[0]),
    )
    vars(weight)["_prepared"] = reference
    return reference


def _on_cpu(weight: "CodebookWeight") -> bool:
    return weight.qweight.device.type == "cpu"


@cache
def _library() -> Any:
    """The compiled library, or None where it cannot be had."""
    library = load_native("codebook_cpu")
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        library.gemv.argtypes = (pointer, pointer, pointer, ctypes.c_int64, number, number)
        library.decode.argtypes = (pointer, pointer, number, number)
        library.gemv.restype = library.decode.restype = None
    return library
