"""The fused FAdam step on CPU: ``fadam_step_cpu.cpp``, compiled by `hf_ext.kernels.native` and called through ctypes.

The parameter, the gradient and the two states are read from memory once where a tensor fits the cache, and twice
where it does not; nothing is allocated. Sums are taken in float64 over blocks of fixed size, so a step does not depend
on the number of threads. float32, bfloat16 (states in float32) and float64.
"""

import ctypes
import functools
import os
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_ext.kernels.fadam_step import (
    EPS_FLOOR,
    EPS_MODES,
    FAdamOptions,
    Reduce,
    Scalar,
    Tensors,
    corrected_beta2,
    stabiliser,
)
from hf_ext.kernels.native import load_native

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
_STATES = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "eps", "eps2", "clip", "p", "weight_decay")),
        *((name, ctypes.c_double) for name in ("decay_cap", "eps_floor")),
        *((name, ctypes.c_int64) for name in ("eps_mode", "maximize", "threads")),
    )


class _Tensors(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("param", "grad", "momentum", "fisher", "size", "total", "beta2")),
    )


def why_not_fused(
    params: Tensors,
    momenta: Tensors,
    fishers: Tensors,
    options: FAdamOptions,
) -> str:
    """Why these tensors cannot take the fused step, in words; empty if they can."""
    if torch.compiler.is_compiling() or options.capturable:
        return "a captured or compiled step keeps to torch operations"
    param, state = params[0], fishers[0]
    if not param.is_cpu:
        return f"it runs on CPU, and the parameters are on {param.device}"
    if _STATES.get(param.dtype) != state.dtype:
        return f"it takes float32, bfloat16 and float64 parameters, not {param.dtype} with {state.dtype} states"
    for tensors in (params, momenta, fishers):
        if not all(tensor.is_contiguous() for tensor in tensors):
            return "it takes contiguous tensors"
    return "" if _library() else "its kernel could not be compiled"


def fadam_step_fused(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    fishers: Tensors,
    steps: Sequence[Scalar],
    options: FAdamOptions,
    totals: Sequence[int],
    reduce: Reduce | None = None,
) -> None:
    """Update all tensors in place; arguments as in `hf_ext.kernels.fadam_step.fadam_step`.

    Raises:
        RuntimeError: the tensors cannot take the fused step, or its kernel cannot be built here.
        ValueError: a gradient or a state has another size than its parameter.
    """
    obstacle = why_not_fused(params, momenta, fishers, options)
    if obstacle:
        raise RuntimeError(f"The fused FAdam step is not possible here: {obstacle}.")
    grads = [grad.to(params[0].dtype).contiguous() for grad in grads]
    sizes = [param.numel() for param in params]
    for tensors in (grads, momenta, fishers):
        if [tensor.numel() for tensor in tensors] != sizes:
            raise ValueError("Every gradient and state must have as many elements as its parameter.")
    columns: list[array] = [
        array("q", [tensor.data_ptr() for tensor in tensors]) for tensors in (params, grads, momenta, fishers)
    ]
    columns.append(array("q", sizes))
    columns.append(array("d", totals))
    rates = {step: corrected_beta2(options.beta2, step) for step in set(map(float, steps))}
    columns.append(array("d", [float(rates[float(step)]) for step in steps]))
    addresses = _Tensors(len(params), *(column.buffer_info()[0] for column in columns))
    call = _Call(_NAMES[params[0].dtype], addresses, options)
    if reduce is None:
        call("step")
    else:
        _step_shards(call, options, torch.tensor(totals, dtype=torch.float64), reduce)
    torch.autograd.graph.increment_version([*params, *momenta, *fishers])  # as torch's own in-place operations do


class _Call:
    """Calls the library's entry points for one set of tensors."""

    def __init__(self, dtype: str, tensors: _Tensors, options: FAdamOptions) -> None:
        self.dtype = dtype
        self.tensors = tensors
        numbers = (float(options.lr), options.beta1, options.eps, options.eps2, options.clip, options.p)
        mode = EPS_MODES.index(options.eps_mode)
        decay = (options.weight_decay, options.decay_cap, EPS_FLOOR)
        self.options = _Options(*numbers, *decay, mode, options.maximize, _threads())

    def __call__(self, name: str, *arguments: ctypes.c_void_p | ctypes.c_int64) -> None:
        function = getattr(_library(), f"fadam_{name}_{self.dtype}")
        function(ctypes.byref(self.tensors), ctypes.byref(self.options), *arguments)


def _step_shards(call: _Call, options: FAdamOptions, totals: Tensor, reduce: Reduce) -> None:
    """The step of sharded tensors: the sums over the shards are added up between the passes."""
    sums = torch.zeros(len(totals), 4, dtype=torch.float64)  # of g^2, a^2, w^2, f

    def run(name: str, *arguments: ctypes.c_int64) -> None:
        call(name, *arguments, ctypes.c_void_p(sums.data_ptr()))

    has_likely_eps = options.eps_mode in ("fixed", "min_eps2")
    if not has_likely_eps:
        run("measure")
        sums.copy_(reduce(sums))
    run("observe", ctypes.c_int64(1))
    sums.copy_(reduce(sums))
    eps = torch.as_tensor(stabiliser(options, (sums[:, 0] / totals).sqrt()))
    if has_likely_eps and bool((eps != torch.as_tensor(stabiliser(options, 0.0))).any()):
        run("observe", ctypes.c_int64(0))
        sums.copy_(reduce(sums))
    run("apply")


# OpenMP's threads do not survive a fork: a child that asked for them would wait for ever.
_forked = {"yes": False}


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_native("fadam_step_cpu")
    if library is not None and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(_forked.update, yes=True))
    return library


def _threads() -> int:
    return 1 if _forked["yes"] else torch.get_num_threads()
