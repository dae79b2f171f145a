"""Other projects' quantizers on the default model, and what a weight takes in the bytes that they store.

Every function here returns the model and the bits per weight of its linear layers, the output head aside. Scales and
shifts count two bytes each where a library lets the user choose their type (HQQ, quanto).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import _peers  # noqa: F401  (first of all: it extends the path)
import torch

OUTLIERS = 2600  # one of so many weights of the default model is kept apart
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers that all of them quantise, by name."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in LINEAR}


def bytes_of(layers: Iterable[Any]) -> tuple[int, int]:
    """Bytes that layers hold in memory, and bytes that they would take in a file."""
    stored: dict[int, torch.Tensor] = {}
    held: dict[int, torch.Tensor] = {}  # by address: a table that layers share counts once
    for layer in layers:
        parts, tables = _tensors(layer)
        stored |= {part.data_ptr(): part for part in parts}
        held |= {part.data_ptr(): part for part in (*parts, *tables)}
    return sum(part.nbytes for part in held.values()), sum(part.nbytes for part in stored.values())


def _tensors(layer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a layer stores, and what it makes of that once it has computed."""
    from hf_ext import ReALLMLinear

    if isinstance(layer, ReALLMLinear):
        prepared = getattr(vars(layer.kernel()).get("_prepared"), "_obj", None)
        return list(layer.parts.values()), [
            tensor for tensor in getattr(prepared, "tensors", ()) if tensor is not None
        ]
    weight = layer.weight
    if hasattr(weight, "_shift"):  # quanto: packed values, a scale and a shift for each group
        return [weight._data._data, weight._scale, weight._shift], []
    if hasattr(weight, "quant_state"):  # bitsandbytes
        return [weight.data, weight.quant_state.absmax], []
    return [weight.data], []


def random_reallm(config: Any, out_features: int, in_features: int, bias: Any = None) -> Any:
    """A `ReALLMLinear` of the shape that ``config`` gives it, filled at random: as fast and large as a solved one."""
    from hf_ext import ReALLMLinear
    from hf_ext.quant.container import empty_parts

    shape = replace(config.shape_for(out_features, in_features), outliers=out_features * in_features // OUTLIERS)
    parts = empty_parts(shape, out_features, in_features, "cpu")
    for part in parts.values():
        part.normal_(0, 0.05) if part.is_floating_point() else part.random_()
    if "perm" in parts:
        parts["perm"] = torch.randperm(in_features).to(parts["perm"].dtype)
    parts["sparse_rows"].random_(out_features)
    parts["sparse_columns"].random_(in_features)
    return ReALLMLinear.from_parts(parts, shape, in_features, bias)


def load_nf4(name: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, float]:
    """NF4 of bitsandbytes, blocks of 64 with float32 scales, in its own layers."""
    from transformers import BitsAndBytesConfig

    from hf_ext.default_model import load_model

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model, _ = load_model(name, dtype=dtype, quantization_config=config)
    states = [(layer.weight, layer.weight.quant_state) for layer in linear_layers(model).values()]
    stored = sum(weight.nbytes + state.absmax.nbytes for weight, state in states)
    return model, 8 * stored / sum(state.shape.numel() for _, state in states)


def load_hqq(name: str | None, width: int) -> tuple[Any, float]:
    """HQQ in groups of 64 along the inputs; its weights are put back as float32, which gives the same products."""
    from hqq.core.quantize import Quantizer

    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        options = {"group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        packed, found = Quantizer.quantize(weight, nbits=width, **options)
        for part in ("scale", "zero"):
            found[part] = found[part].half().float()
        stored = packed.nbytes + 2 * (found["scale"].numel() + found["zero"].numel())
        return Quantizer.dequantize(packed, found).view_as(weight), stored

    return _in_place(name, quantize)


def load_quanto(name: str | None, width: int) -> tuple[Any, float]:
    """optimum-quanto's integers in its own choice of groups; put back as float32 too."""
    from optimum.quanto import freeze, qint2, qint4, quantize

    def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        holder = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        holder[0].weight.data = weight
        quantize(holder, weights={2: qint2, 4: qint4}[width])
        freeze(holder)
        found = holder[0].weight
        stored = found._data._data.nbytes + 2 * (found._scale.numel() + found._shift.numel())
        return found.dequantize().detach(), stored

    return _in_place(name, rounded)


def _in_place(name: str | None, quantize: Any) -> tuple[Any, float]:
    from hf_ext.default_model import load_model

    model, _ = load_model(name)
    stored = weights = 0
    for layer in linear_layers(model).values():
        layer.weight.data, nbytes = quantize(layer.weight.detach())
        stored, weights = stored + nbytes, weights + layer.weight.numel()
    return model, 8 * stored / weights
