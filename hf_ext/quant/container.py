"""The stored parts of one matrix, and the dense weight they stand for.

``W = scale * P^-1[ D_phi( C[codes] ) ] + zero + S + L1 L2^T``: packed codes, codebook, decoder, scales, permutation,
sparse and low-rank term of ReALLM (arXiv 2405.13155). Parts are plain tensors by name, as in the file:

``qweight`` uint8, ``codebook`` ``[K, d]``, ``scales`` and ``zeros`` ``[out, groups]``, ``perm`` ``[in]``, ``decoder``
uint8 with ``decoder_steps``, ``lr_a`` ``[r, in]``, ``lr_b`` ``[out, r]`` and, for int8 factors, ``lr_scale`` ``[r]``;
``sparse_rows``, ``sparse_columns`` and ``sparse_values`` ``[n]``, the weights kept apart (`hf_ext.quant.outliers`).
Of a trellis ``qweight`` is the stream of all columns ``[bytes]``; its tables are computed and not stored.
"""

import torch
from torch import Tensor

from hf_ext.kernels import trellis
from hf_ext.kernels.codebook import CodebookWeight, decode, scale_groups, to_columns
from hf_ext.kernels.decoded_linear import LOW_RANK, SPARSE, add_sparse
from hf_ext.kernels.pack import packed_bytes, unpack
from hf_ext.kernels.trellis import TrellisWeight
from hf_ext.quant.decoder import (
    CONTEXT_HIDDEN,
    POINTWISE_HIDDEN,
    decode_context,
    decoder_shapes,
    restore,
    tabulate,
)
from hf_ext.quant.low_rank import restore_low_rank
from hf_ext.quant.outliers import index_type, sparse_parts
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.trellis import column_widths

Parts = dict[str, Tensor]
TERMS = (*LOW_RANK, *SPARSE)  # what kernels take last, in this order


def empty_parts(shape: MatrixShape, out_features: int, in_features: int, device: str | torch.device) -> Parts:
    """Uninitialised parts of the right types and sizes, for a checkpoint to be loaded into."""
    groups = shape.groups(in_features)
    scale_type = torch.float16 if shape.scale_bits == 16 else torch.float32
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": (shape.packed_size(out_features, in_features), torch.uint8),
        "scales": ((out_features, groups), scale_type),
    }
    if shape.affine:
        parts["zeros"] = ((out_features, groups), scale_type)
    if shape.decoder not in ("pointwise", "trellis"):
        learned = shape.codebook == "kmeans"
        parts["codebook"] = ((2**shape.code_bits, shape.vector_size), torch.float16 if learned else torch.float32)
    if shape.decoder not in ("identity", "trellis"):
        shapes = stored_decoder_shapes(shape)
        numbers = sum(torch.Size(tensor).numel() for tensor in shapes)
        parts["decoder"] = ((packed_bytes(numbers, shape.decoder_bits),), torch.uint8)
        parts["decoder_steps"] = ((len(shapes),), torch.float32)
    if shape.permute:
        parts["perm"] = ((in_features,), index_type(in_features))
    if shape.rank:
        factor_type = {8: torch.int8, 16: torch.float16, 32: torch.float32}[shape.low_rank_bits]
        parts["lr_a"] = ((shape.rank, in_features), factor_type)
        parts["lr_b"] = ((out_features, shape.rank), factor_type)
        if shape.low_rank_bits == 8:
            parts["lr_scale"] = ((shape.rank,), torch.float32)
    tensors = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in parts.items()}
    return tensors | (sparse_parts(shape.outliers, out_features, in_features, device) if shape.outliers else {})


def check_indices(name: str, parts: Parts, out_features: int, in_features: int) -> None:
    """Refuse places that are none: what is looked up or added there would lie outside the weight of layer ``name``.

    Raises:
        ValueError: ``perm`` is no permutation, or an outlier has no place of its own.
    """
    perm = parts.get("perm")
    if perm is not None and not torch.equal(perm.long().sort().values, torch.arange(in_features, device=perm.device)):
        raise ValueError(f"{name}.perm is no permutation of {in_features} columns; the checkpoint is damaged.")
    if "sparse_values" in parts:
        rows, columns = parts["sparse_rows"].long(), parts["sparse_columns"].long()
        inside = (rows >= 0) & (rows < out_features) & (columns >= 0) & (columns < in_features)
        if not inside.all() or len((rows * in_features + columns).unique()) < len(rows):
            raise ValueError(f"{name} has outliers outside it or twice in a place; the checkpoint is damaged.")


def stored_decoder_shapes(shape: MatrixShape) -> list[tuple[int, ...]]:
    """Shapes of the tensors in the stored decoder of a matrix."""
    hidden = POINTWISE_HIDDEN if shape.decoder == "pointwise" else CONTEXT_HIDDEN
    return decoder_shapes(shape.decoder, shape.vector_size, 2**shape.code_bits, hidden)


def codewords(parts: Parts, shape: MatrixShape) -> Tensor:
    """The table ``[K, d]`` that codes look up, a pointwise decoder applied."""
    if shape.decoder != "pointwise":
        return parts["codebook"].float()
    shapes = stored_decoder_shapes(shape)
    return tabulate(restore(parts["decoder"], parts["decoder_steps"], shapes, shape.decoder_bits))


def codebook_weight(parts: Parts, shape: MatrixShape, in_features: int, table: Tensor | None = None) -> CodebookWeight:
    """The parts as the kernels take them; ``table`` saves tabulating again."""
    return CodebookWeight(
        parts["qweight"],
        codewords(parts, shape) if table is None else table,
        parts["scales"],
        in_features,
        shape.code_bits,
        shape.group_size or in_features,
        parts.get("zeros"),
        parts.get("perm"),
        *(parts.get(name) for name in TERMS),
    )


def trellis_weight(parts: Parts, shape: MatrixShape, in_features: int) -> TrellisWeight:
    """The parts of a trellis as the kernels take them."""
    widths = column_widths(shape.column_rates(in_features)).to(parts["qweight"].device)
    return TrellisWeight(
        parts["qweight"],
        widths,
        parts["scales"],
        shape.state_bits,
        parts.get("perm"),
        *(parts.get(name) for name in TERMS),
    )


def dense_quantized(parts: Parts, shape: MatrixShape, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[out, in]`` without the low-rank term."""
    if shape.decoder == "trellis":
        return trellis.decode(trellis_weight(parts, shape, in_features), dtype)
    if shape.decoder != "context":
        return decode(codebook_weight(parts, shape, in_features), dtype)
    values = context_values(parts, shape, in_features)[:, :in_features]
    values = scale_groups(values, parts["scales"], parts.get("zeros"), shape.group_size or in_features)
    return add_sparse(to_columns(values, parts.get("perm")).to(dtype), codebook_weight(parts, shape, in_features))


def context_values(parts: Parts, shape: MatrixShape, in_features: int) -> Tensor:
    """Decoded values in stored order, before scaling, ``[out, in rounded up to whole codewords]``."""
    codes = unpack(parts["qweight"], shape.code_bits, -(-in_features // shape.vector_size)).long()
    layers = restore(parts["decoder"], parts["decoder_steps"], stored_decoder_shapes(shape), shape.decoder_bits)
    values = [decode_context(parts["codebook"].float()[rows], layers, shape.vector_size) for rows in codes.split(256)]
    return torch.cat(values).flatten(1)


def dense(parts: Parts, shape: MatrixShape, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole dense weight ``[out, in]``."""
    weight = dense_quantized(parts, shape, in_features, torch.float32)
    factors = restore_low_rank(parts)
    return (weight if factors is None else weight + factors[1] @ factors[0]).to(dtype)
