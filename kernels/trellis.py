"""Linear layers in trellis code: every weight is looked up by a window that slides over its column's bits.

The codes of column ``k``, ``widths[k]`` bits a weight, form one stream of bits along the outputs, most significant bit
first. The last ``state_bits`` bits up to and including a weight's own code, read as a binary number (zeros before the
start), are its state; its value is ``table[state]`` times the scale of its row. So neighbours share bits, one code has
many values to choose from, and any position still decodes on its own (the bit-shift trellis of QTIP, arXiv
2406.11235). The best codes come from the Viterbi algorithm.

Tables are computed, not stored: quantiles of a standard normal, in an order that spreads the values of the
``2 ** width`` states reached from one state evenly. QTIP draws them at random, which leaves more error.
`decode_reference` is the definition. On the CPU a compiled path decodes, multiplies and searches (`trellis_cpu`).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_ext.kernels.codebook import to_columns
from hf_ext.kernels.decoded_linear import add_sparse, add_sparse_product, decoded_linear, product_dtype
from hf_ext.kernels.trellis_cpu import decode_compiled, gemv_compiled, viterbi_compiled

MAX_WIDTH = 6  # bits a weight
STATE_BITS = range(8, 15)  # bits that one value may depend on

# For each width, the step between neighbouring states in units of all quantiles: the best found for a normal source
# among odd numbers of 4,096ths.
STEPS = (1801 / 4096, 1083 / 4096, 523 / 4096, 301 / 4096, 1663 / 4096, 619 / 4096)


@dataclass(frozen=True)
class TrellisWeight:
    """The stored form of a weight ``[out, in]`` and the low-rank and sparse terms added to it.

    Attributes:
        qweight: uint8, the bytes of all columns one after another, ``ceil(out * width / 8)`` for each.
        widths: uint8 ``[in]``, the bits a weight of each column, in the order of the stream.
        scales: ``[out, 1]``.
        state_bits: bits that a value depends on, 8 to 14.
        perm: integers ``[in]``, the column that each position stands for, or None for columns in their own order.
        lr_a: ``[r, in]``, float or int8, or None without a low-rank term.
        lr_b: ``[out, r]``; the term is ``lr_b @ lr_a``.
        lr_scale: ``[r]`` float32, between the two where they are int8, else None.
        sparse_rows, sparse_columns: integers ``[n]``, where single weights are added, or None without any.
        sparse_values: these weights, float16 ``[n]``.
    """

    qweight: Tensor
    widths: Tensor
    scales: Tensor
    state_bits: int
    perm: Tensor | None = None
    lr_a: Tensor | None = None
    lr_b: Tensor | None = None
    lr_scale: Tensor | None = None
    sparse_rows: Tensor | None = None
    sparse_columns: Tensor | None = None
    sparse_values: Tensor | None = None


@lru_cache
def trellis_tables(state_bits: int) -> Tensor:
    """The value of every state for every width, ``[6, 2 ** state_bits]`` float32 (exact in float16)."""
    states = torch.arange(2**state_bits, dtype=torch.float64)
    steps = torch.tensor([round(step * 2**state_bits) | 1 for step in STEPS], dtype=torch.float64)
    rank = (steps[:, None] * states).remainder(2**state_bits)
    return torch.special.ndtri((rank + 0.5) / 2**state_bits).half().float()


def column_bytes(out_features: int, width: int) -> int:
    """Bytes of one column's stream."""
    return -(-out_features * width // 8)


def pack_columns(codes: Tensor, width: int) -> Tensor:
    """The streams of columns of one width: codes ``[columns, out]`` to uint8 ``[columns, ceil(out * width / 8)]``."""
    bits = codes.long()[..., None] >> torch.arange(width - 1, -1, -1) & 1
    bits = torch.nn.functional.pad(bits.flatten(1), (0, -codes.shape[1] * width % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(7, -1, -1)).sum(-1).to(torch.uint8)


def states_of(codes: Tensor, width: int, state_bits: int) -> Tensor:
    """The state after every code: codes ``[columns, out]`` to int64 of the same size."""
    reach = -(-state_bits // width)
    padded = torch.nn.functional.pad(codes.long(), (reach, 0))
    states = torch.zeros_like(codes, dtype=torch.int64)
    for back in range(reach):
        states |= padded[:, reach - back : reach - back + codes.shape[1]] << (back * width)
    return states & (2**state_bits - 1)


def decode_reference(weight: TrellisWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight ``[out, in]`` without its low-rank term."""
    return add_sparse(to_columns(_decode_columns(weight).t(), weight.perm).to(dtype), weight)


def decode(weight: TrellisWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`decode_reference` on the fastest path that this device has."""
    columns = decode_compiled(weight, trellis_tables(weight.state_bits), dtype)
    return decode_reference(weight, dtype) if columns is None else add_sparse(columns.t(), weight)


def column_slices(weight: TrellisWeight, count: int) -> list[tuple[Tensor, TrellisWeight]]:
    """The codes alone, ``count`` columns of the stream at a time, and which columns these are."""
    out, columns = len(weight.scales), len(weight.widths)
    sizes = torch.tensor([0] + [column_bytes(out, width) for width in weight.widths.tolist()]).cumsum(0).tolist()
    perm = torch.arange(columns, device=weight.qweight.device) if weight.perm is None else weight.perm
    slices = []
    for begin in range(0, columns, count):
        end = min(begin + count, columns)
        stream = weight.qweight[sizes[begin] : sizes[end]]
        part = TrellisWeight(stream, weight.widths[begin:end], weight.scales, weight.state_bits)
        slices.append((perm[begin:end].to(torch.int32), part))
    return slices


def trellis_linear(x: Tensor, weight: TrellisWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ (Q + lr_b @ lr_a).T + bias`` for ``x`` ``[..., in]``, as `decoded_linear` computes it."""
    return decoded_linear(x, weight, bias, _gemv, _multiply, decode)


def viterbi(target: Tensor, weights: Tensor, width: int, state_bits: int) -> Tensor:
    """`viterbi_reference` on the fastest path that this machine has."""
    codes = viterbi_compiled(target, weights, width, trellis_tables(state_bits)[width - 1])
    return viterbi_reference(target, weights, width, state_bits) if codes is None else codes


def viterbi_reference(target: Tensor, weights: Tensor, width: int, state_bits: int) -> Tensor:
    """The codes ``[out]`` (uint8) of one column with the least ``sum(weights * (target - values) ** 2)``.

    Args:
        target: what the column's values should be, ``[out]``.
        weights: what an error of each costs, ``[out]``.
        width: bits of a code.
        state_bits: bits of a state.
    """
    values = trellis_tables(state_bits)[width - 1]
    cost = torch.full((2**state_bits,), 1e30)
    cost[0] = 0
    came_from = []
    for wanted, weight in zip(target, weights, strict=True):
        least = cost.view(2**width, -1).min(0)  # over the bits that leave the window
        came_from.append(least.indices)
        gap = values - wanted
        cost = least.values.repeat_interleave(2**width) + weight * gap * gap
    state = int(cost.argmin())
    codes = torch.empty(len(target), dtype=torch.uint8)
    for at in range(len(target) - 1, -1, -1):
        codes[at] = state & (2**width - 1)
        rest = state >> width
        state = rest | int(came_from[at][rest]) << (state_bits - width)
    return codes


def _decode_columns(weight: TrellisWeight) -> Tensor:
    """The dense weight ``[in, out]``, columns in the order of the stream, float32."""
    out, tables = len(weight.scales), trellis_tables(weight.state_bits).to(weight.qweight.device)
    columns = torch.empty(len(weight.widths), out, device=weight.qweight.device)
    begin = at = 0
    runs = weight.widths.unique_consecutive(return_counts=True)
    for width, count in zip(*(run.tolist() for run in runs), strict=True):
        size = column_bytes(out, width)
        packed = weight.qweight[begin : begin + count * size].view(count, size)
        states = states_of(_unpack_columns(packed, width, out), width, weight.state_bits)
        columns[at : at + count] = tables[width - 1][states]
        begin, at = begin + count * size, at + count
    return columns * weight.scales[:, 0].float()


def _unpack_columns(packed: Tensor, width: int, out: int) -> Tensor:
    """The codes ``[columns, out]`` of streams of one width."""
    bits = packed.long()[..., None] >> torch.arange(7, -1, -1, device=packed.device) & 1
    bits = bits.flatten(1)[:, : out * width].unflatten(1, (out, width))
    return (bits << torch.arange(width - 1, -1, -1, device=packed.device)).sum(-1)


def _gemv(x: Tensor, weight: TrellisWeight) -> Tensor | None:
    """The whole product of a few rows straight from the bits; None where this machine cannot."""
    return gemv_compiled(x, weight, trellis_tables(weight.state_bits))


def _multiply(x: Tensor, weight: TrellisWeight) -> Tensor:
    """``x @ Q.T`` in a type that this device multiplies in; the result has the type of ``x``.

    Where the weight is not decoded to its own columns, inputs are permuted instead: there are fewer of them.
    """
    dtype = product_dtype(x.dtype, x.device.type)
    columns = decode_compiled(weight, trellis_tables(weight.state_bits), dtype)
    if columns is not None:
        return (x.to(dtype) @ add_sparse(columns.t(), weight).t()).to(x.dtype)
    ordered = x if weight.perm is None else x.index_select(-1, weight.perm.to(torch.int32))
    return add_sparse_product((ordered.to(dtype) @ _decode_columns(weight).to(dtype)).to(x.dtype), x, weight)
