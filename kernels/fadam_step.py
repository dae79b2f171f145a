"""One step of FAdam, Adam as natural gradient descent with a diagonal empirical Fisher (arXiv 2405.12807).

For a tensor ``x`` of ``n`` elements with gradient ``g``, all operations elementwise and ``RMS(y) = sqrt(mean(y^2))``
over the whole tensor, step ``t`` is

    b   = (beta2 - beta2^t) / (1 - beta2^t)             decay rate with the bias of the average corrected
    f  <- b f + (1 - b) g^2                             diagonal of the empirical Fisher information
    e   = stabiliser(RMS(g))                            see `EPS_MODES`
    a   = g / (f^p + e);  a <- a / max(1, RMS(a) / c)   natural gradient, clipped
    m  <- beta1 m + (1 - beta1) a                       its momentum
    w   = x / (f^p + e);  w <- w / max(1, RMS(w) / c)   weight decay on the same metric, clipped by itself
    x  <- x - lr (m + decay w)

`fadam_step_reference` is the definition. `fadam_step` updates many tensors and picks how: the fused kernel
(`hf_ext.kernels.fadam_step_cpu`), lists of tensors (`hf_ext.kernels.fadam_step_foreach`) or the definition in a loop.

Three choices beside the paper. A tensor whose Fisher is still zero everywhere (its gradient has always been exactly
zero: LoRA's first factor at step 1, an expert never chosen) gets no weight decay, which would otherwise hit it at full
strength. ``e`` never falls below `EPS_FLOOR`, so every step is finite. And ``e`` takes the exponent ``2 p`` in every
version, which keeps it in the unit of ``f^p``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Stabiliser before its exponent 2p, by version of the algorithm; where RMS(g) is 0, eps in all of them.
#   fixed     eps                        first version of the paper
#   min_eps2  min(eps, eps2 RMS(g))      second version, and the newest public implementation: the default
#   rms_min   eps min(1, RMS(g))         third version
#   rms_max   eps max(1, RMS(g))         a later change of a community port, not in the paper
EPS_MODES = ("fixed", "min_eps2", "rms_min", "rms_max")
EPS_FLOOR = 1e-30
RMS_CEILING = 1e38  # squares of larger float32 gradients overflow; 0 * inf must not become NaN

Scalar = float | Tensor  # a Python number, or a 0-dim tensor where reading it would stall the device or the compiler
Tensors = list[Tensor] | tuple[Tensor, ...]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FAdamOptions:
    """What the tensors of one call share.

    Attributes:
        lr: step size; a 0-dim tensor is read on CPU and used as it is elsewhere.
        beta1: decay rate of the momentum, in [0, 1).
        beta2: decay rate of the Fisher information before bias correction, in [0, 1).
        eps: the stabiliser, or its upper bound.
        eps2: factor of RMS(g) in the stabiliser ``min_eps2``.
        clip: bound ``c`` on the RMS of the natural gradient and of the decay; ``inf`` for none.
        p: power of the Fisher information; 0.5 is Adam's square root.
        weight_decay: factor of the preconditioned weights.
        eps_mode: one of `EPS_MODES`.
        decay_cap: bound on each element of the clipped decay; ``inf`` for none.
        maximize: ascend instead of descend.
        capturable: keep every number on the device, for CUDA graphs and `torch.compile`.
    """

    lr: Scalar = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps2: float = 0.01
    clip: float = 1.0
    p: float = 0.5
    weight_decay: float = 1e-3
    eps_mode: str = "min_eps2"
    decay_cap: float = math.inf
    maximize: bool = False
    capturable: bool = False


def fadam_step(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    fishers: Tensors,
    steps: Sequence[Scalar],
    options: FAdamOptions,
    *,
    path: str | None = None,
    totals: Sequence[int] | None = None,
    reduce: Reduce | None = None,
) -> None:
    """Update ``params``, ``momenta`` and ``fishers`` in place; all tensors of one device and one dtype each.

    Args:
        params: tensors of any shape, floating point.
        grads: their gradients, same shapes and dtype.
        momenta: ``m``, in the dtype of the arithmetic: float32, or float64 for float64 parameters.
        fishers: ``f``, likewise.
        steps: number ``t`` of this step for each tensor, from 1; 0-dim tensors if ``options.capturable``.
        options: what the tensors share.
        path: ``"fused"``, ``"foreach"``, ``"loop"``; None picks the fastest for the device: fused on CPU where its
            kernel can be built and takes the dtype, foreach on accelerators and for shards, else the loop.
        totals: where the tensors are shards, the number of elements of each whole tensor.
        reduce: where the tensors are shards, adds up a tensor of sums over them and returns it; called equally often
            by every process.

    Raises:
        ValueError: ``path`` is not one of the three.
        RuntimeError: the fused kernel was asked for and cannot be had.
    """
    from hf_ext.kernels.fadam_step_cpu import fadam_step_fused
    from hf_ext.kernels.fadam_step_foreach import fadam_step_foreach

    if not params:
        return
    if path is None:
        path = _fastest(params, momenta, fishers, options, sharded=reduce is not None)
    totals = [p.numel() for p in params] if totals is None else totals
    if path == "loop":
        for x, g, m, f, step, total in zip(params, grads, momenta, fishers, steps, totals, strict=True):
            fadam_step_reference(x, g, m, f, step, options, total=total, reduce=reduce)
    elif path in ("fused", "foreach"):
        run = fadam_step_fused if path == "fused" else fadam_step_foreach
        run(params, grads, momenta, fishers, steps, options, totals, reduce)
    else:
        raise ValueError(f"path must be 'fused', 'foreach', 'loop' or None, got {path!r}.")


def fadam_step_reference(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    fisher: Tensor,
    step: Scalar,
    options: FAdamOptions,
    *,
    total: int | None = None,
    reduce: Reduce | None = None,
) -> None:
    """Update one tensor in place: the definition, and the loop path. Arguments as in `fadam_step`."""
    numbers = not (options.capturable or torch.compiler.is_compiling()) and param.is_cpu
    grad = -grad if options.maximize else grad
    grad = grad if grad.dtype == fisher.dtype else grad.to(fisher.dtype)
    x = param if param.dtype == fisher.dtype else param.to(fisher.dtype)
    rms = functools.partial(_rms, total=total or max(1, param.numel()), reduce=reduce, numbers=numbers)

    update_fisher(fisher, grad, corrected_beta2(options.beta2, step))
    rms_grad = rms(grad)
    scale = fisher_power(fisher, options.p).add_(stabiliser(options, rms_grad))

    natural = grad / scale
    _add(momentum.mul_(options.beta1), natural, (1 - options.beta1) * shrink(rms(natural), options.clip))
    lr = options.lr.item() if isinstance(options.lr, Tensor) and numbers else options.lr
    if options.weight_decay:
        decay = torch.div(x, scale, out=scale)
        factor = options.weight_decay * shrink(rms(decay), options.clip) * _touched(rms_grad, fisher, reduce)
        if math.isfinite(options.decay_cap):
            bound = options.decay_cap * options.weight_decay
            decay, factor = decay.mul_(factor).clamp_(-bound, bound), 1.0
        _add(x, decay, -lr * factor)
    _add(x, momentum, -lr)
    if x is not param:
        param.copy_(x)


def corrected_beta2(beta2: float, step: Scalar) -> Scalar:
    """Decay rate of the Fisher average at step ``t``: 0 at the first step, then towards ``beta2``."""
    if isinstance(step, Tensor):
        step = step.double()
    return (beta2 - beta2**step) / (1 - beta2**step)


def update_fisher(fisher: Tensor, grad: Tensor, rate: Scalar) -> None:
    """``f <- b f + (1 - b) g^2`` in place."""
    if isinstance(rate, Tensor):
        rate = rate.to(device=fisher.device, dtype=fisher.dtype)
        fisher.mul_(rate).addcmul_(grad * (1 - rate), grad)
    else:
        fisher.mul_(rate).addcmul_(grad, grad, value=1 - rate)


def fisher_power(fisher: Tensor, p: float) -> Tensor:
    """``f^p`` as a new tensor."""
    return fisher.sqrt() if p == 0.5 else fisher.pow(p)


def stabiliser(options: FAdamOptions, rms_grad: Scalar) -> Scalar:
    """The adaptive epsilon for gradients of that RMS; also for a vector of them."""
    eps, mode = options.eps, options.eps_mode
    base: Scalar = eps
    if mode == "min_eps2":
        base = where(rms_grad > 0, at_most(options.eps2 * rms_grad, eps), eps)
    elif mode == "rms_min":
        base = where(rms_grad > 0, at_most(rms_grad, 1.0) * eps, eps)
    elif mode == "rms_max":
        base = where(rms_grad > 1, at_most(rms_grad, RMS_CEILING) * eps, eps)
    power: Scalar = base ** (2 * options.p)
    return power.clamp(min=EPS_FLOOR) if isinstance(power, Tensor) else max(power, EPS_FLOOR)


def shrink(rms: Scalar, clip: float) -> Scalar:
    """``1 / max(1, RMS / c)``: the factor that clips a tensor of that RMS; also for a vector of them."""
    return where(rms > clip, clip / rms if isinstance(rms, Tensor) or rms > 0 else 1.0, 1.0)


def where(condition: bool | Tensor, yes: Scalar, no: Scalar) -> Scalar:
    """``yes`` where ``condition`` holds, else ``no``, for numbers and for tensors."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def at_most(value: Scalar, bound: float) -> Scalar:
    """The smaller of the two, for numbers and for tensors."""
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)


def _fastest(params: Tensors, momenta: Tensors, fishers: Tensors, options: FAdamOptions, sharded: bool) -> str:
    """The path for the device; for shards one that does not depend on what this process holds."""
    from hf_ext.kernels.fadam_step_cpu import why_not_fused

    if sharded or not params[0].is_cpu:
        return "foreach"
    return "loop" if why_not_fused(params, momenta, fishers, options) else "fused"


def _rms(tensor: Tensor, total: int, reduce: Reduce | None, numbers: bool) -> Scalar:
    if numbers:
        flat = tensor.flatten()
        squares = torch.dot(flat, flat)  # faster than a norm on CPU, and closer
    else:
        squares = torch.linalg.vector_norm(tensor).square()
    if reduce is not None:
        squares = reduce(squares)
    return math.sqrt(squares.item() / total) if numbers else (squares / total).sqrt()


def _touched(rms_grad: Scalar, fisher: Tensor, reduce: Reduce | None) -> Scalar:
    """1, or 0 for a tensor whose gradient has always been exactly zero."""
    if reduce is None and not isinstance(rms_grad, Tensor) and rms_grad != 0:
        return 1.0
    total = fisher.sum()
    total = reduce(total) if reduce is not None else total
    if isinstance(rms_grad, Tensor):
        return ((rms_grad != 0) | (total != 0)).to(fisher.dtype)
    return float(rms_grad != 0 or total.item() != 0)


def _add(to: Tensor, tensor: Tensor, factor: Scalar) -> None:
    if isinstance(factor, Tensor):
        to.addcmul_(tensor, factor.to(device=to.device, dtype=to.dtype))
    else:
        to.add_(tensor, alpha=factor)
