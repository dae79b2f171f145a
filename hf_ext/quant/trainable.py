"""What healing may train without a bit more in the file: low-rank factors, scales of the rows, and norms.

Codes stay as they are. Factors and scales, with the outliers of their rows, are rounded to their stored types again at
the end, and norms, which a quantised model keeps in full precision anyway, to that of the model.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ext.kernels.decoded_linear import low_rank_product
from hf_ext.quant.linear import ReALLMLinear
from hf_ext.quant.low_rank import store_low_rank

KINDS = ("low_rank", "scales", "norms")


@dataclass(frozen=True)
class Trainable:
    """One float32 parameter that stands for a stored tensor while it is trained.

    Attributes:
        parameter: its values.
        size: what it multiplies by at the start, in parts of which scales and norms are trained; None for factors.
    """

    parameter: nn.Parameter
    size: float | None = None


@contextmanager
def trainable_parts(
    model: nn.Module, layers: Mapping[str, ReALLMLinear], kinds: tuple[str, ...]
) -> Iterator[dict[str, Trainable]]:
    """Everything of these ``kinds`` as parameters by name, in force within the block and stored at its end.

    A block that ends in an exception stores nothing: the model is as it was.

    Names are ``layer.lr_a``, ``layer.lr_b``, ``layer.gain`` (a factor for each row of the decoded weight) and
    ``norm.weight``. All else is frozen meanwhile, and codes are decoded once.
    """
    found: dict[str, Trainable] = {}
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        for name, layer in layers.items():
            mine = _parts_of(layer, kinds)
            if mine:
                stack.enter_context(_in_force(layer, mine))
                found |= {
                    f"{name}.{part}": Trainable(value, 1.0 if part == "gain" else None) for part, value in mine.items()
                }
        for name, norm in norms(model).items() if "norms" in kinds else ():
            weight = nn.Parameter(norm.get_parameter("weight").detach().float().clone())
            size = _norm_size(norm)
            stack.enter_context(_norm_in_force(norm, weight))
            found[f"{name}.weight"] = Trainable(weight, size)
        yield found


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose weight is a vector: the normalisations of a model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module._parameters.get("weight"), nn.Parameter) and module.get_parameter("weight").dim() == 1
    }


def _parts_of(layer: ReALLMLinear, kinds: tuple[str, ...]) -> dict[str, nn.Parameter]:
    parts: dict[str, nn.Parameter] = {}
    low_rank = layer.low_rank() if "low_rank" in kinds else None
    if low_rank is not None:
        parts |= {name: nn.Parameter(part.clone()) for name, part in zip(("lr_a", "lr_b"), low_rank, strict=True)}
    if "scales" in kinds:
        parts["gain"] = nn.Parameter(torch.ones(layer.out_features, device=layer.get_buffer("qweight").device))
    return parts


@torch.no_grad()
def _norm_size(norm: nn.Module) -> float:
    """What a norm multiplies by, as root mean square; its weight may be that number or the number less one."""
    like = norm.get_parameter("weight")
    probe = torch.randn(1, len(like), generator=torch.Generator().manual_seed(0)).to(like)
    return float((norm(probe) - norm(torch.zeros_like(probe))).float().square().mean().sqrt())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _in_force(layer: ReALLMLinear, parts: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The layer with these parts in place of its own; in the end they become its own."""
    mode, bits, kept = layer.decode_mode, layer.shape.low_rank_bits, layer.low_rank_parts()
    fixed = layer.low_rank() or (None, None)
    lr_a, lr_b = parts.get("lr_a", fixed[0]), parts.get("lr_b", fixed[1])
    gain = parts.get("gain")
    if kept:
        layer.set_low_rank(None, None)  # rows are scaled without it
    layer.decode_mode = "once"

    def add(module: ReALLMLinear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if gain is not None:
            output = _scaled(output, gain, module.bias)
        return output if lr_a is None or lr_b is None else output + low_rank_product(inputs[0], lr_a, lr_b)

    hook = layer.register_forward_hook(add)
    try:
        yield
        if gain is not None:
            layer.scale_rows(gain.detach())
        if "lr_a" in parts:
            kept = store_low_rank(parts["lr_a"].detach(), parts["lr_b"].detach(), bits)
    finally:
        hook.remove()
        layer.decode_mode = mode
        if kept:
            layer.set_low_rank_parts(kept, bits)


def _scaled(output: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    gain = gain.to(output.dtype)
    if bias is None:
        return output * gain
    bias = bias.to(output.dtype)
    return (output - bias) * gain + bias


@contextmanager
def _norm_in_force(norm: nn.Module, weight: nn.Parameter) -> Iterator[None]:
    """The norm with ``weight`` for its own, cast to its type for every call, so that small steps are not lost."""
    own = norm._parameters.pop("weight")
    assert own is not None

    def put(module: nn.Module, inputs: object) -> None:
        module.weight = weight.clone().to(own.dtype)

    hook = norm.register_forward_pre_hook(put)
    try:
        yield
        with torch.no_grad():
            own.copy_(weight)
    finally:
        hook.remove()
        norm.__dict__.pop("weight", None)
        norm.register_parameter("weight", own)
