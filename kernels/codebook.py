"""Linear layers whose weight is looked up in a codebook: decoding, and the whole product in one call.

A weight ``[out, in]`` is stored as one code per ``d`` consecutive columns. Position ``k`` of the decoded row is column
``perm[k]`` of the weight; its value is ``scales[:, k // group] * table[code][k % d] + zeros[:, k // group]``.
`decode_reference` is the definition. On the CPU a compiled path decodes and multiplies in one go (`codebook_cpu`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ext.kernels.codebook_cpu import decode_compiled, gemv_compiled
from hf_ext.kernels.decoded_linear import add_sparse, decoded_linear, product_dtype
from hf_ext.kernels.pack import unpack


@dataclass(frozen=True)
class CodebookWeight:
    """The stored form of a weight ``[out, in]`` and the low-rank and sparse terms added to it.

    Attributes:
        qweight: packed codes, uint8 ``[out, ceil(ceil(in / d) * code_bits / 8)]``.
        table: codewords ``[2 ** code_bits, d]``, float32.
        scales: ``[out, groups]``; one group or groups of ``group`` columns, in the order of the codes.
        in_features: columns of the weight; the last codeword of a row may reach beyond and is cut.
        code_bits: bits per code, 1 to 8.
        group: columns per scale; a multiple of ``d`` unless there is one group.
        zeros: ``[out, groups]`` added after scaling, or None.
        perm: integers ``[in]``, the column that each position stands for, or None for columns in their own order.
        lr_a: ``[r, in]``, float or int8, or None without a low-rank term.
        lr_b: ``[out, r]``; the term is ``lr_b @ lr_a``.
        lr_scale: ``[r]`` float32, between the two where they are int8, else None.
        sparse_rows, sparse_columns: integers ``[n]``, where single weights are added, or None without any.
        sparse_values: these weights, float16 ``[n]``.
    """

    qweight: Tensor
    table: Tensor
    scales: Tensor
    in_features: int
    code_bits: int
    group: int
    zeros: Tensor | None = None
    perm: Tensor | None = None
    lr_a: Tensor | None = None
    lr_b: Tensor | None = None
    lr_scale: Tensor | None = None
    sparse_rows: Tensor | None = None
    sparse_columns: Tensor | None = None
    sparse_values: Tensor | None = None


def decode_reference(weight: CodebookWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight ``[out, in]`` without its low-rank term."""
    size = weight.table.shape[1]
    codes = unpack(weight.qweight, weight.code_bits, -(-weight.in_features // size))
    values = weight.table.float()[codes.long()].flatten(1)[:, : weight.in_features]
    values = scale_groups(values, weight.scales, weight.zeros, weight.group)
    return add_sparse(to_columns(values, weight.perm).to(dtype), weight)


def decode(weight: CodebookWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`decode_reference` on the fastest path that this device has."""
    dense = decode_compiled(weight, dtype)
    return decode_reference(weight, dtype) if dense is None else add_sparse(dense, weight)


def codebook_linear(x: Tensor, weight: CodebookWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ (Q + lr_b @ lr_a).T + bias`` for ``x`` ``[..., in]``, as `decoded_linear` computes it."""
    return decoded_linear(x, weight, bias, gemv_compiled, _multiply, decode)


def codebook_linear_reference(x: Tensor, weight: CodebookWeight, bias: Tensor | None = None) -> Tensor:
    """The same product from the dense weight, in float32."""
    dense = decode_reference(weight)
    if weight.lr_a is not None and weight.lr_b is not None:
        scale = 1 if weight.lr_scale is None else weight.lr_scale
        dense = dense + (weight.lr_b.float() * scale) @ weight.lr_a.float()
    return torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def scale_groups(values: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """``values`` ``[out, in]`` times the scale of their group, plus its zero point, in float32."""
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(group, dim=1)[:, : values.shape[1]]
        zeros = None if zeros is None else zeros.repeat_interleave(group, dim=1)[:, : values.shape[1]]
    values = values * scales.float()
    return values if zeros is None else values + zeros.float()


def to_columns(values: Tensor, perm: Tensor | None) -> Tensor:
    """Move position ``k`` of the last dimension to column ``perm[k]``."""
    if perm is None:
        return values
    return torch.empty_like(values).index_copy_(-1, perm.long(), values)


def _multiply(x: Tensor, weight: CodebookWeight) -> Tensor:
    """``x @ Q.T``, in a type that this device multiplies in; the result has the type of ``x``."""
    dtype = product_dtype(x.dtype, x.device.type)
    return torch.nn.functional.linear(x.to(dtype), decode(weight, dtype)).to(x.dtype)
