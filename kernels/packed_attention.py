"""Attention over keys and values of which most are packed DecoQuant rows (`kernels.decoquant`).

The packed tokens of a row of the batch come first in time, then the recent ones, kept as they are (attention sinks
may stand among the recent ones: order does not matter to a softmax). With ``key = mean_k + s (c - z) S_k`` and
``value = mean_v + s' (c' - z') S_v``:

    score  = s ((S_k q) . c - (S_k q) . z) + q . mean_k            # the query is folded once, keys stay codes
    output = (sum_t p s' (c' - z')) S_v + (sum_t p) mean_v          # the synthesis is applied once, to the sum

so every row of codes is read once and no key or value is ever rebuilt.
"""

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ext.kernels.decoquant import RowFormat, decode, scale_table
from hf_ext.kernels.native import load_native

MAX_NATIVE_QUERIES = 64  # query rows per head above which rebuilding one layer and a matrix product are faster


@dataclass
class PackedRows:
    """Packed keys or values of a batch; row ``b`` of the batch holds its own format.

    Attributes:
        codes: ``[B, H, N, row_bytes]`` uint8; slots beyond a row's count hold anything.
        scales: ``[B, H or 1, N]``, uint8 exponents or float16.
        widths: ``[B, D]`` uint8.
        synthesis: ``[B, g, g]`` float16.
        mean: ``[B, H, D]`` float16.
        weight: ``[B, D]`` float16.
        midrise: as in `RowFormat`.
    """

    codes: Tensor
    scales: Tensor
    widths: Tensor
    synthesis: Tensor
    mean: Tensor
    weight: Tensor
    midrise: bool

    def row_format(self, row: int) -> RowFormat:
        """The format of one row of the batch."""
        tensors = {name: getattr(self, name)[row] for name in ("widths", "synthesis", "mean", "weight")}
        return RowFormat(**tensors, row_bytes=self.codes.shape[-1], midrise=self.midrise)

    def rebuild(self, row: int, count: int, dtype: torch.dtype) -> Tensor:
        """The first ``count`` keys or values ``[H, count, D]`` of one row of the batch."""
        return decode(self.codes[row, :, :count], self.scales[row, :, :count], self.row_format(row), dtype)


def packed_attention(
    query: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    recent_count: Tensor,
    keys: PackedRows,
    values: PackedRows,
    packed_count: Tensor,
    scaling: float,
) -> Tensor:
    """Causal attention of the newest tokens over packed and recent ones.

    Args:
        query: ``[B, Hq, q, D]``, rotated; the ``q`` newest tokens, whose keys are the last ones among the recent.
        recent_keys: ``[B, H, F, D]``, the last ``recent_count[b]`` slots used.
        recent_values: the same for the values.
        recent_count: ``[B]`` int64.
        keys: the packed tokens' keys, the first ``packed_count[b]`` slots used.
        values: the same for the values.
        packed_count: ``[B]`` int64.
        scaling: factor of the scores.

    Returns:
        ``[B, Hq, q, D]`` of the query's dtype; zeros for a query that sees nothing (a pad).
    """
    native = load_native("decoquant_cpu") if _fits_native(query, recent_keys, keys, values) else None
    run = packed_attention_reference if native is None else functools.partial(_run_native, native)
    return run(query, recent_keys, recent_values, recent_count, keys, values, packed_count, scaling)


def packed_attention_reference(
    query: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    recent_count: Tensor,
    keys: PackedRows,
    values: PackedRows,
    packed_count: Tensor,
    scaling: float,
) -> Tensor:
    """The definition: rebuild one row of the batch after the other and attend to it."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, capacity, q_length = *recent_keys.shape[1:3], query.shape[2]
    out = torch.zeros_like(query)
    for row in range(len(query)):
        recent, packed = int(recent_count[row]), int(packed_count[row])
        k = torch.cat([keys.rebuild(row, packed, dtype), recent_keys[row, :, capacity - recent :].to(dtype)], 1)
        v = torch.cat([values.rebuild(row, packed, dtype), recent_values[row, :, capacity - recent :].to(dtype)], 1)
        q = query[row].to(dtype).unflatten(0, (heads, -1)) * scaling
        last = packed + recent - q_length + torch.arange(q_length, device=query.device)
        visible = torch.arange(packed + recent, device=query.device) <= last[:, None]
        scores = (q @ k[:, None].transpose(-1, -2)).masked_fill(~visible, float("-inf"))
        weights = torch.nan_to_num(scores.softmax(-1))  # a query that sees nothing gets 0 / 0
        out[row] = (weights @ v[:, None]).flatten(0, 1).to(query.dtype)
    return out


class _Packed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "widths", "synthesis", "mean")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch_stride", "head_stride", "scale_batch_stride", "scale_head_stride")
        ),
        *((name, ctypes.c_int64) for name in ("row_bytes", "group", "scale_is_half", "midrise")),
    )


class _Attend(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "recent_keys", "recent_values")),
        *((name, ctypes.c_void_p) for name in ("packed_count", "recent_count", "scale_table")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rep", "q", "d", "recent_capacity")),
        *((name, ctypes.c_int64) for name in ("recent_is_bf16", "threads")),
        ("scaling", ctypes.c_double),
        ("keys", _Packed),
        ("values", _Packed),
    )


def _fits_native(query: Tensor, recent_keys: Tensor, keys: PackedRows, values: PackedRows) -> bool:
    d, rows = query.shape[-1], query.shape[1] // recent_keys.shape[1] * query.shape[2]
    return (
        query.is_cpu
        and query.dtype in (torch.float32, torch.bfloat16)
        and recent_keys.dtype == query.dtype
        and d % 16 == 0
        and d <= 128
        and rows <= MAX_NATIVE_QUERIES
        and all(2 <= rows_of.codes.shape[-1] <= 128 for rows_of in (keys, values))
        and not torch.is_grad_enabled()
    )


@functools.cache
def _scale_table() -> Tensor:
    return scale_table()


def _run_native(
    native: ctypes.CDLL,
    query: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    recent_count: Tensor,
    keys: PackedRows,
    values: PackedRows,
    packed_count: Tensor,
    scaling: float,
) -> Tensor:
    batch, query_heads, q_length, d = query.shape
    heads, capacity = recent_keys.shape[1:3]
    held = [query.float().contiguous(), recent_keys.contiguous(), recent_values.contiguous()]
    out = torch.empty_like(held[0])
    arguments = _Attend(
        query=held[0].data_ptr(),
        out=out.data_ptr(),
        recent_keys=held[1].data_ptr(),
        recent_values=held[2].data_ptr(),
        packed_count=packed_count.data_ptr(),
        recent_count=recent_count.data_ptr(),
        scale_table=_scale_table().data_ptr(),
        batch=batch,
        heads=heads,
        rep=query_heads // heads,
        q=q_length,
        d=d,
        recent_capacity=capacity,
        recent_is_bf16=int(query.dtype == torch.bfloat16),
        threads=torch.get_num_threads(),
        scaling=scaling,
        keys=_packed_arguments(keys, held),
        values=_packed_arguments(values, held),
    )
    native.hf_ext_attend(ctypes.byref(arguments))
    return out.to(query.dtype)


def _packed_arguments(rows: PackedRows, held: list[Tensor]) -> _Packed:
    """Pointers into one side's tensors; copies made on the way are appended to ``held`` and must outlive the call."""
    codes = rows.codes if rows.codes[0, 0].is_contiguous() else rows.codes.contiguous()
    scales = rows.scales if rows.scales.stride(-1) == 1 else rows.scales.contiguous()
    plain = [tensor.contiguous() for tensor in (rows.widths, rows.synthesis, rows.mean)]
    held += [codes, scales, *plain]
    return _Packed(
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        widths=plain[0].data_ptr(),
        synthesis=plain[1].data_ptr(),
        mean=plain[2].data_ptr(),
        batch_stride=codes.stride(0),
        head_stride=codes.stride(1),
        scale_batch_stride=scales.stride(0),
        scale_head_stride=0 if scales.shape[1] == 1 else scales.stride(1),
        row_bytes=codes.shape[-1],
        group=rows.synthesis.shape[-1],
        scale_is_half=int(scales.dtype == torch.float16),
        midrise=int(rows.midrise),
    )
