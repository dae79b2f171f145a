"""The high-precision term ``L1 L2^T`` of ReALLM: the best of its rank for the residual, as the layer's outputs see it.

Minimises ``|F^(1/2) (R - L1 L2^T) H^(1/2)|`` for the residual ``R = W - Q``, with ``H = E[x x^T]`` and row weights F.
By Eckart-Young the answer is a projection of R onto the leading left singular vectors of ``F^(1/2) R H^(1/2)``, so
nothing has to be inverted but F. A plain SVD of the residual of a quantiser catches hardly any of its energy (its
errors are nearly white); weighted by the inputs, a few channels carry most of it.
"""

import torch
from torch import Tensor

from hf_ext.kernels.decoded_linear import float_factors


def whitened_low_rank(
    residual: Tensor, hessian: Tensor | None, rows: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Balanced factors ``lr_a`` ``[rank, in]`` and ``lr_b`` ``[out, rank]`` of what comes nearest to ``residual``.

    Args:
        residual: what is left to represent, ``[out, in]``.
        hessian: ``[in, in]``, or None for the identity (the plain SVD).
        rows: weights of the rows ``[out]``, or None for ones.
        rank: at most ``min(out, in)``.
    """
    scale = torch.ones(len(residual)) if rows is None else rows.sqrt()
    weighted = residual * scale[:, None]
    u = _leading_left(weighted, hessian, rank)
    b, a = u / scale[:, None], u.t() @ weighted
    balance = (a.norm(dim=1) / b.norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    sign = torch.where(a.gather(1, a.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)  # eigenvectors have no sign
    return a / balance[:, None] * sign, b * balance * sign[:, 0]


def _leading_left(matrix: Tensor, hessian: Tensor | None, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors ``[out, rank]`` of ``matrix @ hessian^(1/2)``, by its smaller side."""
    if matrix.shape[0] <= matrix.shape[1]:
        gram = (matrix if hessian is None else matrix @ hessian) @ matrix.t()
        return _leading(gram, rank)
    root = matrix if hessian is None else matrix @ torch.linalg.cholesky(hessian)
    return torch.linalg.qr(root @ _leading(root.t() @ root, rank)).Q


def _leading(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh((gram + gram.t()) / 2).eigenvectors[:, -rank:].flip(1)


def store_low_rank(lr_a: Tensor, lr_b: Tensor, bits: int) -> dict[str, Tensor]:
    """The factors as they are kept: as floats, or as int8 with one float32 step per component of the product."""
    if bits > 8:
        dtype = torch.float16 if bits == 16 else torch.float32
        return {"lr_a": lr_a.to(dtype), "lr_b": lr_b.to(dtype)}
    steps_a = (lr_a.abs().amax(1) / 127).clamp_min(1e-30)
    steps_b = (lr_b.abs().amax(0) / 127).clamp_min(1e-30)
    return {
        "lr_a": (lr_a / steps_a[:, None]).round().to(torch.int8),
        "lr_b": (lr_b / steps_b).round().to(torch.int8),
        "lr_scale": steps_a * steps_b,
    }


def restore_low_rank(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The float32 factors that the stored parts stand for, or None where there are none."""
    if "lr_a" not in parts:
        return None
    return float_factors(parts["lr_a"].float(), parts["lr_b"].float(), parts.get("lr_scale"))
