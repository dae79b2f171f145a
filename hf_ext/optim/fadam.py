"""`FAdam`: Adam as natural gradient descent with a diagonal empirical Fisher (arXiv 2405.12807).

The update itself is `hf_ext.kernels.fadam_step`; this file holds the states, the groups and what a host may ask of an
optimizer.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_ext.kernels.fadam_step import EPS_MODES, FAdamOptions, fadam_step
from hf_ext.optim import blockwise
from hf_ext.optim.sharding import check_whole, local_grad, local_part, sharding_of, sum_over_shards

STATES = ("momentum", "fisher")
SWITCHES: dict[str, tuple[bool | None, ...]] = {
    "maximize": (False, True),
    "capturable": (False, True),
    "foreach": (False, True, None),
    "fused": (False, True, None),
}
STRONG_DECAY = 0.02  # above this a weight decay is taken for one that was chosen for AdamW


class FAdam(Optimizer):
    """Drop-in for `torch.optim.AdamW` that clips its own steps.

    Beside AdamW: the momentum averages preconditioned gradients; every tensor's update is bounded to an RMS of
    ``lr * clip``; weight decay is preconditioned too, so its step has an RMS of ``lr * weight_decay * clip`` whatever
    the size of the weights. An AdamW decay of 0.1 is therefore about two orders too strong here.

    States: ``step`` (0-dim float32), ``momentum`` and ``fisher`` (float32, or float64 for float64 parameters), in the
    parameter's shape; they keep their dtype through `load_state_dict`. With ``optim_bits=8`` see
    `hf_ext.optim.blockwise`.

    Example:
        ```python
        optimizer = FAdam(model.parameters(), lr=3e-4)
        trainer = Trainer(model, args, optimizer_cls_and_kwargs=fadam_optimizer(args))     # the host's Trainer
        trainer = Trainer(model, TrainingArguments(..., optim="fadam"))                    # the same
        ```

    Args:
        params: parameters, (name, parameter) pairs or groups of them.
        lr: step size, a number or a 1-element tensor; 0 leaves the parameters as they are.
        betas: decay rates of the momentum and of the Fisher information, in [0, 1).
        eps: upper bound of the stabiliser (``eps_mode="min_eps2"``).
        weight_decay: factor of the preconditioned weights.
        eps2: factor of RMS(gradient) in the stabiliser.
        clip: bound on the RMS of the natural gradient and of the decay; None for none, which needs ``decay_cap`` or no
            decay.
        p: power of the Fisher information; 0.5 is Adam's square root.
        eps_mode: version of the stabiliser: "fixed" (first version of the paper), "min_eps2" (second, and the newest
            public implementation), "rms_min" (third), "rms_max" (a community port).
        decay_cap: bound on each element of the clipped decay. Rows of an embedding that are seen rarely have a small
            Fisher, so they take up to sqrt(rows / rare rows) times the others' decay; 10 or less spares them. None for
            no bound.
        optim_bits: 32, or 8 for states in 8 bits through bitsandbytes.
        min_8bit_size: tensors of fewer elements keep 32-bit states.
        maximize: ascend instead of descend.
        foreach: use lists of tensors (the default on accelerators; on CPU it is slower than the loop).
        fused: use the compiled CPU step (the default on CPU where it can be built).
        capturable: keep the step count and all numbers on the device, for CUDA graphs and `torch.compile`.

    Raises:
        ValueError: an option is out of its range, or a parameter is complex or not floating point.
        ImportError: ``optim_bits=8`` without bitsandbytes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-3,
        *,
        eps2: float = 0.01,
        clip: float | None = 1.0,
        p: float = 0.5,
        eps_mode: str = "min_eps2",
        decay_cap: float | None = None,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        _check(defaults)
        self._given: set[int] = set()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, checked like the optimizer's.

        Raises:
            ValueError: as for `FAdam`.
        """
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"FAdam updates real floating-point parameters, got {param.dtype}.")
        self._given.update(map(id, self.param_groups[-1]["params"]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._given = set(map(id, chain.from_iterable(group["params"] for group in self.param_groups)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, in the dtype it was saved in, whichever path or device it came from.

        Raises:
            ValueError: the states are not those of FAdam, or the groups do not match.
        """
        final: dict[str, Any] = {}

        def check_and_keep(_: Optimizer, loaded: dict[str, Any]) -> None:
            ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            for key, param in zip(ids, params, strict=False):  # the base class compares the numbers of them
                _check_state(key, loaded["state"].get(key), param)
            final.update(loaded)

        hook = self.register_load_state_dict_pre_hook(check_and_keep)  # the last: sees what other hooks have changed
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        ids = chain.from_iterable(group["params"] for group in final["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=True):
            # The base class has cast every float to the dtype of the parameter: bfloat16 would lose the states.
            for name, value in final["state"].get(key, {}).items():
                if name != "step":
                    self.state[param][name] = value.to(param.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient is sparse; nothing has been updated then.
            RuntimeError: FSDP1 or DeepSpeed has replaced the parameters by pieces, or ``fused=True`` is not possible.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            fishers: list[Tensor] = []
            steps: list[Tensor] = []
            eight_bit = self._init_group(group, params, grads, momenta, fishers, steps)
            work.append((group, eight_bit, (params, grads, momenta, fishers, steps)))
        for group, eight_bit, columns in work:
            _update_group(group, *columns)
            for param in eight_bit:
                self._update_8bit(group, param)
        return loss

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
        fishers: list[Tensor],
        steps: list[Tensor],
    ) -> list[Tensor]:
        """Fill the lists with what has a gradient, making missing states; returns the parameters with 8-bit states.

        The name and the lists are torch's own convention: its compiler runs this method outside the graph.
        """
        eight_bit = []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise ValueError(
                    f"FAdam needs dense gradients, because it clips by the root mean square of the whole tensor; got "
                    f"{grad.layout} for a parameter of shape {list(param.shape)}. Use sparse=False."
                )
            state = self.state[param]
            if not state:
                check_whole(param, id(param) in self._given)
                state.update(_new_state(group, param))
            if "momentum" in state:
                params.append(param)
                grads.append(grad)
                momenta.append(state["momentum"])
                fishers.append(state["fisher"])
                steps.append(state["step"])
            else:
                eight_bit.append(param)
        return eight_bit

    def _update_8bit(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        momentum, fisher = blockwise.dequantize_states(state)
        assert param.grad is not None
        _update_group(group, [param], [param.grad], [momentum], [fisher], [state["step"]])
        state.update(blockwise.quantize_states(momentum, fisher))


def _new_state(group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
    dtype = torch.promote_types(param.dtype, torch.float32)
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")}
    if group["optim_bits"] == 32 or param.numel() < group["min_8bit_size"]:
        return {**state, **{name: torch.zeros_like(param, dtype=dtype) for name in STATES}}
    if dtype != torch.float32 or sharding_of(param) is not None:
        kind = "a sharded DTensor" if dtype == torch.float32 else "a float64 parameter"
        raise ValueError(f"optim_bits=8 is not possible for {kind} of shape {list(param.shape)}; use optim_bits=32.")
    zeros = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
    return {**state, **blockwise.quantize_states(zeros, zeros)}


def _update_group(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    fishers: list[Tensor],
    steps: list[Tensor],
) -> None:
    """One step of the tensors of a group, those of one device, dtype and sharding at a time."""
    batches: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        batches.setdefault((param.device, param.dtype, sharding_of(param)), []).append(index)
    options = _options(group)
    on_device = options.capturable or torch.compiler.is_compiling()
    for (_, _, sharding), batch in batches.items():
        xs, gs, ms, fs = ([column[index] for index in batch] for column in (params, grads, momenta, fishers))
        totals, reduce = None, None
        if sharding is not None:
            totals = [x.numel() for x in xs]
            reduce = sum_over_shards(sharding)
            gs = [local_grad(x, g) for x, g in zip(xs, gs, strict=True)]
            xs, ms, fs = ([local_part(tensor) for tensor in column] for column in (xs, ms, fs))
        counts = [steps[index] for index in batch]
        numbers: list[Any] = [count + 1 if on_device else count.item() + 1 for count in counts]
        fadam_step(xs, gs, ms, fs, numbers, options, path=_path(group), totals=totals, reduce=reduce)
        torch._foreach_add_(counts, 1)


def _options(group: dict[str, Any]) -> FAdamOptions:
    beta1, beta2 = group["betas"]
    return FAdamOptions(
        lr=group["lr"],
        beta1=float(beta1),
        beta2=float(beta2),
        clip=math.inf if group["clip"] is None else group["clip"],
        decay_cap=math.inf if group["decay_cap"] is None else group["decay_cap"],
        **{name: group[name] for name in ("eps", "eps2", "p", "weight_decay", "eps_mode", "maximize", "capturable")},
    )


def _path(group: dict[str, Any]) -> str | None:
    if group["fused"]:
        return "fused"
    if group["foreach"]:
        return "foreach"
    return None if group["fused"] is None and group["foreach"] is None else "loop"


def _check(options: dict[str, Any]) -> None:
    """Raise `ValueError` for the first option out of its range; warn of a decay that was meant for AdamW."""
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got shape {list(lr.shape)}.")
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(_within(beta, 0, 1) for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}.")
    for name in ("lr", "eps", "eps2", "weight_decay"):
        if not _within(options[name], 0, math.inf):
            raise ValueError(f"{name} must be a number of at least 0, got {options[name]!r}.")
    for name in ("clip", "decay_cap", "p"):
        value, optional = options[name], name != "p"
        if not ((value is None and optional) or (_within(value, 0, math.inf) and value > 0)):
            raise ValueError(f"{name} must be above 0{' or None' if optional else ''}, got {value!r}.")
    for name, allowed in SWITCHES.items():
        if not any(options[name] is choice for choice in allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {options[name]!r}.")
    if options["clip"] is None and options["decay_cap"] is None and options["weight_decay"]:
        raise ValueError(
            "clip=None leaves the preconditioned decay without a bound: where no gradient has been seen it is the "
            "weight divided by eps. Set decay_cap, or weight_decay=0."
        )
    if options["eps_mode"] not in EPS_MODES:
        raise ValueError(f"eps_mode must be one of {', '.join(EPS_MODES)}, got {options['eps_mode']!r}.")
    if options["optim_bits"] not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, got {options['optim_bits']!r}.")
    if not isinstance(options["min_8bit_size"], Integral) or options["min_8bit_size"] < 0:
        raise ValueError(f"min_8bit_size must be an integer of at least 0, got {options['min_8bit_size']!r}.")
    if options["optim_bits"] == 8:
        blockwise.bitsandbytes_functional()
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused cannot both be True.")
    if options["fused"] and options["capturable"]:
        raise ValueError("fused=True runs on CPU and reads its numbers there; capturable=True forbids that.")
    if options["weight_decay"] > STRONG_DECAY:
        warnings.warn(
            f"weight_decay={options['weight_decay']} is strong for FAdam: its decay step has an RMS of lr * "
            f"weight_decay * clip whatever the size of the weights, about fifty times AdamW's. 0.001 is the default.",
            stacklevel=4,
        )


def _within(value: Any, low: float, high: float) -> bool:
    """Whether ``value`` is a number, or a tensor of one, in [low, high)."""
    is_number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    return is_number and low <= float(value) < high


def _check_state(key: Any, state: dict[str, Any] | None, param: Tensor) -> None:
    """Raise `ValueError` for a saved state that is not FAdam's or not of that parameter."""
    if not state:
        return
    if set(state) not in ({"step", *STATES}, {"step", *blockwise.KEYS}):
        raise ValueError(
            f"The state of parameter {key!r} holds {', '.join(map(str, state))}; FAdam's holds step, momentum and "
            f"fisher (or their 8-bit codes), so this checkpoint is another optimizer's."
        )
    for name, value in state.items():
        if name in (*STATES, "momentum_code", "fisher_root_code") and value.shape != param.shape:
            raise ValueError(
                f"The saved {name} of parameter {key!r} has shape {list(value.shape)}, the parameter "
                f"{list(param.shape)}."
            )
