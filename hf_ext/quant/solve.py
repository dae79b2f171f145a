"""The solver: from one dense matrix to its stored parts, alternating the quantiser with the low-rank term.

Each round quantises ``W - L1 L2^T`` (k-means codebook weighted by what an error of each column costs, error feedback
across the columns, scales refitted) and then takes the best low-rank term of what is left. The round with the least
loss is kept; the first round that does not improve ends it, as in the authors' code. Rounds start without a low-rank
term: taken first, it spends its rank on what the codes can say as well (LoftQ's order, not LQ-LoRA's).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_ext.kernels import trellis
from hf_ext.kernels.codebook import scale_groups, to_columns
from hf_ext.kernels.pack import pack, unpack
from hf_ext.quant.codebook import fixed_codebook, kmeans
from hf_ext.quant.container import (
    Parts,
    codewords,
    context_values,
    stored_decoder_shapes,
    trellis_weight,
)
from hf_ext.quant.decoder import fit_context, fit_pointwise, restore, store, tabulate
from hf_ext.quant.feedback import Curvature, curvature, quantize_rows
from hf_ext.quant.low_rank import restore_low_rank, store_low_rank, whitened_low_rank
from hf_ext.quant.outliers import index_type, split_outliers
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.trellis import allocate, encode_columns

OUTLIERS = 4.0  # codes of a trellis end at 3.3; beyond 4 an outlier saves more than its 48 bits would as code
WEIGHT_CLAMP = 20.0  # a column counts at most this many times the mean in k-means: a few outlier channels else own it


@dataclass(frozen=True)
class Effort:
    """How hard the solver tries.

    Attributes:
        rounds: at most so many alternations of quantiser and low-rank term.
        kmeans_iterations: Lloyd iterations of the first round; later rounds take a quarter.
        feedback: push errors onto later columns (needs a Hessian).
        weighting: weight k-means by the Hessian.
        damping: part of the mean diagonal added to the Hessian. GPTQ takes 0.01; at 2 and 3 bits 0.1 leaves less error
            on text of another kind than the calibration text.
        outliers: weights beyond so many times the root mean square of their row are kept apart, 0 for none. None takes
            `OUTLIERS`, but none where a fixed codebook is scaled to the largest weight.
        seed: of everything random.
    """

    rounds: int = 2
    kmeans_iterations: int = 16
    feedback: bool = True
    weighting: bool = True
    damping: float = 0.1
    outliers: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Solution:
    """The parts of a matrix, the shape they have, and their loss relative to that of storing nothing at all."""

    parts: Parts
    shape: MatrixShape
    error: float


def solve(
    weight: Tensor,
    shape: MatrixShape,
    hessian: Tensor | None = None,
    rows: Tensor | None = None,
    effort: Effort | None = None,
) -> Solution:
    """Represent ``weight`` ``[out, in]`` in ``shape``.

    Args:
        weight: the matrix; it is not changed.
        shape: how it is stored.
        hessian: ``E[x x^T]`` of the layer's inputs ``[in, in]``, or None for data-free (the Frobenius norm).
        rows: how much an error of each output counts ``[out]``, or None for all alike.
        effort: how hard to try.

    Raises:
        ValueError: ``weight`` is no matrix, it or the statistics hold a value that is not finite, or its squares are
            not finite.
    """
    effort = effort or Effort()
    weight = weight.detach().float()
    _check(weight, hessian, rows)
    if rows is not None:  # rows that never count are divided by all the same
        rows = rows.clamp_min(1e-6 * float(rows.mean())) if rows.any() else None
    shape = replace(shape, rank=min(shape.rank, *weight.shape), permute=shape.permute and hessian is not None)
    perm = None
    if shape.permute and hessian is not None:
        perm = hessian.diagonal().argsort(descending=True, stable=True)
    bend = None if hessian is None else curvature(hessian, effort.damping, perm)
    if shape.decoder == "trellis" and not shape.rates:
        shape = replace(shape, rates=_rates(shape, weight.shape[1], bend, effort))
    seen = None if bend is None else bend.hessian
    sparse, rest = split_outliers(weight, outlier_threshold(shape, effort))
    shape = replace(shape, outliers=len(sparse.get("sparse_values", ())))
    ordered = rest if perm is None else rest[:, perm]
    best, least = None, float("inf")
    table: Tensor | None = None
    low_rank = torch.zeros_like(ordered)
    for number in range(effort.rounds):
        parts, table = _quantize(ordered - low_rank, shape, bend, rows, effort, table, number)
        residual = ordered - _stored_values(parts, shape, weight.shape[1])
        if shape.rank:
            factors = whitened_low_rank(residual, seen, rows, shape.rank)
            parts |= store_low_rank(*factors, shape.low_rank_bits)
            low_rank = _product(parts)
        loss = squared_error(residual - low_rank, seen, rows)
        if not loss < least:
            break
        best, least = parts, loss
        if not shape.rank:
            break  # without a low-rank term another round would only repeat this one
    if best is None:
        raise ValueError(f"The weight to quantise reaches {float(weight.abs().max()):.3g}, too far for float32 sums.")
    whole = squared_error(weight if perm is None else weight[:, perm], seen, rows)
    return Solution(_to_file_order(best, perm) | sparse, shape, least / max(whole, 1e-30))


def outlier_threshold(shape: MatrixShape, effort: Effort) -> float:
    """From how many times the root mean square of their row weights are kept apart; 0 for none."""
    if effort.outliers is not None:
        return effort.outliers
    return OUTLIERS if shape.codebook == "kmeans" else 0.0


def relative_error(weight: Tensor, stored: Tensor, hessian: Tensor | None, rows: Tensor | None = None) -> float:
    """``|F^(1/2) (W - stored) H^(1/2)|^2`` over the same of ``W`` itself; 0 is exact, 1 as bad as nothing."""
    gap = weight.float() - stored.float()
    return squared_error(gap, hessian, rows) / max(squared_error(weight.float(), hessian, rows), 1e-30)


def _quantize(
    target: Tensor,
    shape: MatrixShape,
    bend: Curvature | None,
    rows: Tensor | None,
    effort: Effort,
    start: Tensor | None,
    number: int,
) -> tuple[Parts, Tensor | None]:
    """One pass of the quantiser: the parts of ``target`` (columns in stored order) and its codebook, to go on from."""
    scales, zeros = _scales(target, shape)
    if shape.decoder == "trellis":
        return _quantize_trellis(target, shape, scales, bend, rows, effort), None
    fine_scales = _spread(scales, target, shape)
    fine_zeros = torch.zeros_like(target) if zeros is None else _spread(zeros, target, shape)
    if shape.codebook == "kmeans":
        iterations = effort.kmeans_iterations if start is None else max(1, effort.kmeans_iterations // 4)
        learned = _learn(
            (target - fine_zeros) / fine_scales, fine_scales, shape, bend, rows, effort, iterations, start
        )
        parts, table = _store_codebook(*learned, shape, effort.seed)
    else:
        table = fixed_codebook(shape.codebook, shape.code_bits)
        parts = {"codebook": table}
    factor = bend.factor if bend is not None and effort.feedback else None
    codes = quantize_rows(target, fine_scales, fine_zeros, table, factor)
    parts |= {"qweight": pack(codes, shape.code_bits), "scales": scales}
    if zeros is not None:
        parts["zeros"] = zeros
    if shape.decoder == "context":
        _add_context(parts, target, fine_scales, codes, shape, bend, effort.seed)
    if shape.codebook == "kmeans" and scales.shape[1] == 1 and zeros is None:
        parts["scales"] = _refit(target, _unscaled(parts, shape, target.shape[1]), scales, bend)
    return parts, table


def _quantize_trellis(
    target: Tensor,
    shape: MatrixShape,
    scales: Tensor,
    bend: Curvature | None,
    rows: Tensor | None,
    effort: Effort,
) -> Parts:
    factor = bend.factor if bend is not None and effort.feedback else None
    counts = torch.ones(len(target)) if rows is None else rows
    stream = encode_columns(target, scales, counts, shape.rates, shape.state_bits, factor)
    parts = {"qweight": stream, "scales": scales}
    parts["scales"] = _refit(target, _unscaled(parts, shape, target.shape[1]), scales, bend)
    return parts


def _rates(shape: MatrixShape, columns: int, bend: Curvature | None, effort: Effort) -> tuple[int, ...]:
    """Bits for every column by what its errors cost."""
    if bend is None or not effort.weighting:
        return shape.column_rates(columns)
    return allocate(bend.column_weights, shape.bits, shape.state_bits)


def _scales(target: Tensor, shape: MatrixShape) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every group, rounded to how they are stored; the scale is never zero."""
    dtype = torch.float16 if shape.scale_bits == 16 else torch.float32
    groups = shape.groups(target.shape[1])
    size = shape.group_size or target.shape[1]
    padding = groups * size - target.shape[1]
    blocks = torch.nn.functional.pad(target, (0, padding), value=float("nan")).unflatten(1, (groups, size))
    tiny = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny  # the least that is not zero
    zeros = None
    if shape.affine:
        low, high = _ignoring_padding(blocks, "amin"), _ignoring_padding(blocks, "amax")
        zeros, spread = low.to(dtype), (high - low) / (2**shape.code_bits - 1)
    elif shape.codebook == "kmeans":
        spread = blocks.square().nanmean(2).sqrt()
    else:
        top = 1.0 if shape.codebook == "nf4" else 2.0**shape.code_bits - 1
        spread = _ignoring_padding(blocks.abs(), "amax") / top
    return spread.clamp(tiny, torch.finfo(dtype).max).to(dtype), zeros


def _ignoring_padding(blocks: Tensor, what: str) -> Tensor:
    fill = float("inf") if what == "amin" else float("-inf")
    return getattr(blocks.nan_to_num(nan=fill, posinf=None, neginf=None), what)(2)


def _spread(values: Tensor, target: Tensor, shape: MatrixShape) -> Tensor:
    """One value per column ``[out, in]`` from one per group."""
    if values.shape[1] == 1:
        return values.float().expand_as(target)
    return values.float().repeat_interleave(shape.group_size, 1)[:, : target.shape[1]]


def _learn(
    values: Tensor,
    scales: Tensor,
    shape: MatrixShape,
    bend: Curvature | None,
    rows: Tensor | None,
    effort: Effort,
    iterations: int,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A k-means codebook of the scaled weight, and the vectors it was learned from."""
    padding = -values.shape[1] % shape.vector_size
    weights = scales.square()
    if rows is not None:
        weights = weights * rows[:, None]
    if bend is not None and effort.weighting:
        columns = bend.column_weights
        weights = weights * columns.clamp_max(WEIGHT_CLAMP * columns.mean())
    weights = weights / weights.mean().clamp_min(1e-30)
    vectors = torch.nn.functional.pad(values, (0, padding)).reshape(-1, shape.vector_size)
    weights = torch.nn.functional.pad(weights, (0, padding)).reshape(-1, shape.vector_size)
    table = kmeans(vectors, weights, 2**shape.code_bits, effort.seed, iterations, start)
    return table, vectors


def _store_codebook(table: Tensor, vectors: Tensor, shape: MatrixShape, seed: int) -> tuple[Parts, Tensor]:
    """The codebook as it is kept, and the table it then stands for."""
    if shape.decoder != "pointwise":
        kept = table.half()
        return {"codebook": kept}, kept.float()
    sample = vectors[:: max(1, len(vectors) // 2**14)]
    counts = torch.bincount((table.square().sum(1) - 2 * sample @ table.t()).argmin(1), minlength=len(table))
    stored, steps = store(fit_pointwise(table, counts + 1.0, shape.decoder_bits, seed), shape.decoder_bits)
    tensors = restore(stored, steps, stored_decoder_shapes(shape), shape.decoder_bits)
    return {"decoder": stored, "decoder_steps": steps}, tabulate(tensors)


def _add_context(
    parts: Parts,
    target: Tensor,
    scales: Tensor,
    codes: Tensor,
    shape: MatrixShape,
    bend: Curvature | None,
    seed: int,
) -> None:
    padding = codes.shape[1] * shape.vector_size - target.shape[1]
    wanted = torch.nn.functional.pad(target / scales, (0, padding)).unflatten(1, (-1, shape.vector_size))
    weight = torch.ones(target.shape[1]) if bend is None else bend.column_weights
    weight = torch.nn.functional.pad(weight.clamp_max(WEIGHT_CLAMP * weight.mean()), (0, padding))
    values = parts["codebook"].float()[codes.long()]
    layers = fit_context(values, wanted, weight.view(-1, shape.vector_size), shape.decoder_bits, seed)
    parts["decoder"], parts["decoder_steps"] = store(layers, shape.decoder_bits)


def _refit(target: Tensor, values: Tensor, scales: Tensor, bend: Curvature | None) -> Tensor:
    """The row scales of least loss for the codes chosen: ``s = <w, q>_H / <q, q>_H``, where that is well defined."""
    seen = values if bend is None else values @ bend.hessian
    fitted = (target * seen).sum(1, keepdim=True) / (values * seen).sum(1, keepdim=True).clamp_min(1e-30)
    usable = torch.isfinite(fitted) & (fitted > 0.5 * scales.float()) & (fitted < 2 * scales.float())
    return torch.where(usable, fitted, scales.float()).to(scales.dtype)


def _unscaled(parts: Parts, shape: MatrixShape, in_features: int) -> Tensor:
    """Decoded values in stored order, before scaling."""
    if shape.decoder == "context":
        return context_values(parts, shape, in_features)[:, :in_features]
    if shape.decoder == "trellis":
        weight = trellis_weight(parts, shape, in_features)
        return trellis.decode(replace(weight, scales=torch.ones(len(parts["scales"]), 1)))
    codes = unpack(parts["qweight"], shape.code_bits, -(-in_features // shape.vector_size))
    return codewords(parts, shape)[codes.long()].flatten(1)[:, :in_features]


def _stored_values(parts: Parts, shape: MatrixShape, in_features: int) -> Tensor:
    """The quantised weight in stored order, as it will be read back."""
    values = _unscaled(parts, shape, in_features)
    return scale_groups(values, parts["scales"], parts.get("zeros"), shape.group_size or in_features)


def _product(parts: Parts) -> Tensor:
    factors = restore_low_rank(parts)
    assert factors is not None
    return factors[1] @ factors[0]


def squared_error(gap: Tensor, hessian: Tensor | None, rows: Tensor | None) -> float:
    """``sum_r rows_r gap_r H gap_r^T`` for a gap between two weights ``[out, in]``."""
    per_row = ((gap if hessian is None else gap @ hessian) * gap).sum(1)
    return float((per_row if rows is None else per_row * rows).double().sum())


def _to_file_order(parts: Parts, perm: Tensor | None) -> Parts:
    """The permutation beside the codes, and the low-rank term over the columns' own order."""
    if perm is None:
        return parts
    parts = dict(parts, perm=perm.to(index_type(len(perm))))
    if "lr_a" in parts:
        parts["lr_a"] = to_columns(parts["lr_a"], perm)
    return parts


def _check(weight: Tensor, hessian: Tensor | None, rows: Tensor | None) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"A weight to quantise must be a matrix [out, in], got shape {list(weight.shape)}.")
    for name, tensor in (("weight", weight), ("hessian", hessian), ("rows", rows)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                f"The {name} to quantise holds {int((~torch.isfinite(tensor)).sum())} values that are not finite."
            )
