"""FAdam over lists of tensors with torch's foreach operations: few launches, no reading back; for accelerators.

The numbers of all tensors (RMS, stabiliser, clip factor) are vectors ``[N]`` on the device. Equal to
`hf_ext.kernels.fadam_step.fadam_step_reference` up to rounding.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_ext.kernels.fadam_step import (
    FAdamOptions,
    Reduce,
    Scalar,
    Tensors,
    corrected_beta2,
    fisher_power,
    shrink,
    stabiliser,
)


def fadam_step_foreach(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    fishers: Tensors,
    steps: Sequence[Scalar],
    options: FAdamOptions,
    totals: Sequence[int],
    reduce: Reduce | None = None,
) -> None:
    """Update all tensors in place; arguments as in `hf_ext.kernels.fadam_step.fadam_step`."""
    dtype, device = fishers[0].dtype, fishers[0].device
    grads = [grad.to(dtype) for grad in grads]
    if options.maximize:
        grads = list(torch._foreach_neg(grads))
    xs = [param.to(dtype) for param in params]
    roots = [math.sqrt(max(1, total)) for total in totals]

    def rms(tensors: Tensors) -> Tensor:
        norms = torch._foreach_norm(tensors, 2)
        if reduce is not None:
            norms = reduce(torch.stack(norms).square()).sqrt().unbind()
        return torch.stack(torch._foreach_div(norms, roots))

    _update_fishers(fishers, grads, [corrected_beta2(options.beta2, step) for step in steps])
    rms_grad = rms(grads)
    eps = stabiliser(options, rms_grad)
    scales = [fisher_power(fisher, options.p) for fisher in fishers]
    torch._foreach_add_(scales, eps.unbind() if isinstance(eps, Tensor) else eps)

    natural = torch._foreach_div(grads, scales)
    torch._foreach_mul_(natural, _shrink(rms(natural), options.clip).unbind())
    torch._foreach_mul_(momenta, options.beta1)
    torch._foreach_add_(momenta, natural, alpha=1 - options.beta1)
    update: Tensors = momenta
    if options.weight_decay:
        update = torch._foreach_add(_decay(xs, scales, fishers, rms_grad, rms, options, reduce), momenta)
    if isinstance(options.lr, Tensor):
        torch._foreach_sub_(xs, torch._foreach_mul(update, options.lr.to(device=device, dtype=dtype)))
    else:
        torch._foreach_add_(xs, update, alpha=-options.lr)
    if xs[0] is not params[0]:
        torch._foreach_copy_(params, xs)


def _update_fishers(fishers: Tensors, grads: Tensors, rates: list[Scalar]) -> None:
    numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
    if not numbers:
        like = fishers[0]
        vector = torch.stack([rate for rate in rates if isinstance(rate, Tensor)]).to(like.device, like.dtype)
        torch._foreach_mul_(fishers, vector.unbind())
        weighted = torch._foreach_mul(grads, (1 - vector).unbind())
        torch._foreach_addcmul_(fishers, weighted, grads)
    else:
        torch._foreach_mul_(fishers, numbers)
        torch._foreach_addcmul_(fishers, grads, grads, [1 - rate for rate in numbers])


def _shrink(rms: Tensor, clip: float) -> Tensor:
    factors = shrink(rms, clip)
    assert isinstance(factors, Tensor)
    return factors


def _decay(
    xs: Tensors,
    scales: Tensors,
    fishers: Tensors,
    rms_grad: Tensor,
    rms: Callable[[Tensors], Tensor],
    options: FAdamOptions,
    reduce: Reduce | None,
) -> Tensors:
    """The clipped, preconditioned weights times the decay factor; zero for tensors that never had a gradient."""
    decay = torch._foreach_div(xs, scales)
    sums = torch.stack([fisher.sum() for fisher in fishers])
    sums = sums if reduce is None else reduce(sums)
    touched = ((rms_grad != 0) | (sums != 0)).to(rms_grad.dtype)
    factors = options.weight_decay * _shrink(rms(decay), options.clip) * touched
    torch._foreach_mul_(decay, factors.unbind())
    if math.isfinite(options.decay_cap):
        bound = options.decay_cap * options.weight_decay
        torch._foreach_clamp_max_(decay, bound)
        torch._foreach_clamp_min_(decay, -bound)
    return decay
