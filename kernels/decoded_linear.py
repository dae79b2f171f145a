"""What linear layers in any code share: when to multiply straight from the codes, the gradient, what is added."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

GEMV_ROWS = 4  # up to this many input rows a fused product beats decoding once and multiplying

# the parts of the terms beside the codes, by the names that they are stored under
LOW_RANK = ("lr_a", "lr_b", "lr_scale")
SPARSE = ("sparse_rows", "sparse_columns", "sparse_values")

Multiply = Callable[[Tensor, Any], Tensor]  # x [..., in] and the stored weight -> x @ Q.T
Decode = Callable[[Any, torch.dtype], Tensor]  # the stored weight -> Q [out, in]


def decoded_linear(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    gemv: Callable[[Tensor, Any], Tensor | None],
    multiply: Multiply,
    decode: Decode,
) -> Tensor:
    """``x @ (Q + lr_b @ lr_a).T + bias`` for ``x`` ``[..., in]``, without keeping ``Q`` dense.

    The gradient with respect to ``x`` decodes again; the stored weight gets none. Results come in the type of ``x``.

    Args:
        x: the inputs.
        weight: the stored weight, with ``lr_a``, ``lr_b`` and ``lr_scale`` or None in their place.
        bias: ``[out]``, or None.
        gemv: the whole product of a few rows, all terms included, or None where it cannot.
        multiply: ``x @ Q.T`` for any number of rows.
        decode: ``Q`` in a type.
    """
    differentiable = torch.is_grad_enabled() and x.requires_grad
    y = None if differentiable or not 0 < x.shape[:-1].numel() <= GEMV_ROWS else gemv(x, weight)
    if y is None:
        y = _DecodedProduct.apply(x, weight, multiply, decode) if differentiable else multiply(x, weight)
        if weight.lr_a is not None and weight.lr_b is not None:
            y = y + low_rank_product(x, weight.lr_a, weight.lr_b, weight.lr_scale)
    return y if bias is None else y + bias.to(y.dtype)


def low_rank_product(x: Tensor, lr_a: Tensor, lr_b: Tensor, lr_scale: Tensor | None = None) -> Tensor:
    """``x @ lr_a.T @ lr_b.T`` in the type of ``x``: the same operations, in the same order, as a LoRA adapter's."""
    lr_a, lr_b = float_factors(lr_a, lr_b, lr_scale)
    dtype = product_dtype(x.dtype, x.device.type)
    low = torch.nn.functional.linear(x.to(dtype), lr_a.to(dtype))
    return torch.nn.functional.linear(low, lr_b.to(dtype)).to(x.dtype)


def add_sparse(dense: Tensor, weight: Any) -> Tensor:
    """Add the single weights of a stored weight to ``dense`` ``[out, in]``, in place."""
    if weight.sparse_values is not None:
        places = weight.sparse_rows.long(), weight.sparse_columns.long()
        dense.index_put_(places, weight.sparse_values.to(dense.dtype), accumulate=True)
    return dense


def add_sparse_product(y: Tensor, x: Tensor, weight: Any) -> Tensor:
    """``y + x @ S.T``, where S holds the single weights of a stored weight; ``y`` itself where there are none."""
    if weight.sparse_values is None:
        return y
    each = x.index_select(-1, weight.sparse_columns.to(torch.int32)) * weight.sparse_values.to(x.dtype)
    return y.index_add(-1, weight.sparse_rows.to(torch.int32), each)


def float_factors(lr_a: Tensor, lr_b: Tensor, lr_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of the low-rank term without ``lr_scale``, which both share alike.

    So neither overflows in float16, and both are of a size that one learning rate suits.
    """
    if lr_scale is None:
        return lr_a, lr_b
    root = lr_scale.sqrt()
    return lr_a * root[:, None], lr_b * root


@cache
def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type to multiply matrices in: float32 for half types on a CPU without instructions for them.

    There torch takes five to ten times as long for the same product in half precision as in float32.
    """
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    mkldnn = torch.ops.mkldnn
    known = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return dtype if known() else torch.float32


class _DecodedProduct(torch.autograd.Function):
    """``x @ Q.T``: decoded for this call only, and once more for the gradient."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Any, multiply: Multiply, decode: Decode
    ) -> Tensor:
        ctx.weight, ctx.decode = weight, decode  # type: ignore[attr-defined]
        return multiply(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dtype = product_dtype(grad.dtype, grad.device.type)
        dense = ctx.decode(ctx.weight, dtype)  # type: ignore[attr-defined]
        return (grad.to(dtype) @ dense).to(grad.dtype), None, None, None
