"""Quantising a row from left to right, each error pushed onto the columns still to come (GPTQ, arXiv 2210.17323).

For whole codewords as in GPTVQ (arXiv 2402.15319): with ``H^-1 = U^T U``, U upper triangular, the loss that an error
``e`` of the columns g leaves after the best correction of all later columns is ``|e U_gg^-1|^2``, and that correction
is ``- e U_gg^-1 U_g,later``. So the codeword is chosen in that metric, and the sum of the squares is the exact loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # columns whose corrections are applied at once to everything after them


@dataclass(frozen=True)
class Curvature:
    """The Hessian of a layer's squared output error in the forms that quantisation needs, columns in stored order.

    Attributes:
        hessian: damped ``E[x x^T]``, ``[in, in]``.
        factor: upper triangular U with ``H^-1 = U^T U``.
    """

    hessian: Tensor
    factor: Tensor

    @property
    def column_weights(self) -> Tensor:
        """What an error of each column costs once later columns have corrected for it, ``[in]``."""
        return self.factor.diagonal().square().reciprocal()


def curvature(hessian: Tensor, damping: float, perm: Tensor | None) -> Curvature:
    """Damp, permute and factor ``E[x x^T]``.

    ``damping`` times the mean of the diagonal is added to it, so that channels without input stay invertible.
    """
    if perm is not None:
        hessian = hessian[perm][:, perm]
    mean = hessian.diagonal().mean().clamp_min(1e-12)
    hessian = hessian + damping * mean * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return Curvature(hessian, torch.linalg.cholesky(inverse, upper=True).float())


def quantize_rows(target: Tensor, scales: Tensor, zeros: Tensor, table: Tensor, factor: Tensor | None) -> Tensor:
    """Codes ``[out, ceil(in / d)]`` (uint8) of ``target`` ``[out, in]``.

    Args:
        target: the weight to represent, in stored order.
        scales: ``[out, in]``, positive, one value per codeword along a row.
        zeros: ``[out, in]``, added after scaling.
        table: codewords ``[K, d]``.
        factor: U of `Curvature`, or None to take the nearest codeword without any correction.
    """
    size = table.shape[1]
    columns = target.shape[1]
    padding = -columns % size
    if factor is None:
        target, scales, zeros = _pad(target, padding), _pad(scales, padding, 1.0), _pad(zeros, padding)
        return _nearest_rows(target, scales, zeros, table, columns)
    work, scales, zeros = _pad(target.clone(), padding), _pad(scales, padding, 1.0), _pad(zeros, padding)
    factor = _pad_factor(factor, padding)
    codes = torch.empty(len(target), work.shape[1] // size, dtype=torch.uint8)
    step = BLOCK // size * size
    for begin in range(0, work.shape[1], step):
        end = min(begin + step, work.shape[1])
        errors = torch.empty(len(target), end - begin)
        for at in range(begin, end, size):
            g = slice(at, at + size)
            code, error = _choose(work[:, g], scales[:, g], zeros[:, g], table, factor[g, g])
            codes[:, at // size] = code
            errors[:, at - begin : at - begin + size] = error
            work[:, at + size : end] -= error @ factor[g, at + size : end]
        work[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _choose(w: Tensor, scale: Tensor, zero: Tensor, table: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The best code of each row for one group of columns, and its error in the metric, ``[out, d]``."""
    metric = torch.linalg.solve_triangular(factor, torch.eye(len(factor)), upper=True)
    scale = scale[:, :1]
    wanted, words = ((w - zero) / scale) @ metric, table @ metric
    code = (words.square().sum(1) - 2 * wanted @ words.t()).argmin(1)
    return code, (wanted - words[code]) * scale


def _nearest_rows(target: Tensor, scales: Tensor, zeros: Tensor, table: Tensor, columns: int) -> Tensor:
    size = table.shape[1]
    wanted = (target - zeros) / scales.clamp_min(1e-30)
    if size == 1:
        levels, order = table[:, 0].sort()  # k-means leaves them in any order
        return order[torch.bucketize(wanted, (levels[1:] + levels[:-1]) / 2)].to(torch.uint8)
    vectors = wanted.unflatten(1, (-1, size))
    codes = torch.stack([_nearest_in_row(row, table) for row in vectors])
    tail = columns % size
    if tail:  # what lies beyond the last column is cut off and must not decide
        codes[:, -1] = _nearest_in_row(vectors[:, -1, :tail], table[:, :tail])
    return codes.to(torch.uint8)


def _nearest_in_row(vectors: Tensor, table: Tensor) -> Tensor:
    return (table.square().sum(1) - 2 * vectors @ table.t()).argmin(1)


def _pad(tensor: Tensor, columns: int, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, columns), value=value) if columns else tensor


def _pad_factor(factor: Tensor, columns: int) -> Tensor:
    """Columns beyond the last cost next to nothing and share no correction with the others."""
    if not columns:
        return factor
    padded = torch.nn.functional.pad(factor, (0, columns, 0, columns))
    padded.diagonal()[-columns:] = 1e3 * factor.diagonal().max()
    return padded
