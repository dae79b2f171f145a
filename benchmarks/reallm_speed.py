"""Decoding and prefill speed of ReALLM layers against bfloat16, NF4 and quanto, in one run, taken in turn.

    python benchmarks/reallm_speed.py [--repeats 5]

The model is the default one in bfloat16. The codes of its ReALLM layers are random: their values change neither what
is read nor what is computed. Memory is what the linear layers hold, run-time tables included.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _run import Report

PROMPT = 64


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in one measurement")
    parser.add_argument("--prefill", type=int, default=512)
    arguments = parser.parse_args()
    from hf_ext.quant.shape import MatrixShape

    report = Report("reallm_speed", vars(arguments))
    models: dict[str, Any] = {
        "bfloat16": _load(arguments.model),
        "NF4 (bitsandbytes)": _load(arguments.model, nf4=True),
        "quanto int4": _quanto(_load(arguments.model)),
        "ReALLM 3 bits": _random_codes(_load(arguments.model), MatrixShape(2, 6, rank=4, permute=True)),
        "ReALLM 2 bits": _random_codes(_load(arguments.model), MatrixShape(4, 8, rank=4, permute=True)),
    }
    models = {name: model for name, model in models.items() if model is not None}
    with torch.no_grad():  # quanto's tensors do not work in inference mode
        readers = {name: partial(_prefill, model, arguments.prefill) for name, model in models.items()}
        prefill = report.interleaved(readers, arguments.repeats)
        decoders = {name: _decoder(model, arguments.tokens) for name, model in models.items()}
        decode = report.interleaved(decoders, arguments.repeats)
    for name, model in models.items():
        linear, stored = _linear_bytes(model)
        report.row(
            layers=name,
            decode_tokens_per_s=round(arguments.tokens / decode[name], 1),
            prefill_tokens_per_s=round(arguments.prefill / prefill[name], 1),
            linear_mib=round(linear / 2**20, 2),
            of_stored=round(linear / stored, 3),
        )
    report.save()


def _load(name: str | None, nf4: bool = False) -> Any:
    from transformers import BitsAndBytesConfig

    from hf_ext.default_model import load_model

    options = {}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return load_model(name, dtype=torch.bfloat16, **options)[0]


def _quanto(model: Any) -> Any:
    """The model with the int4 weights of optimum-quanto, or None where that is not installed."""
    try:
        from optimum.quanto import freeze, qint4, quantize
    except ImportError:
        return None
    quantize(model, weights=qint4, exclude="lm_head")
    freeze(model)
    return model


def _random_codes(model: Any, shape: Any) -> Any:
    """The model with ReALLM layers of that shape in place of its linear layers, filled at random."""
    from hf_ext import ReALLMConfig, ReALLMLinear
    from hf_ext.quant.container import empty_parts
    from hf_ext.quant.quantize import linear_names

    for name in linear_names(model, ReALLMConfig()):
        old = model.get_submodule(name)
        parts = empty_parts(shape, old.out_features, old.in_features, "cpu")
        for part in parts.values():
            part.normal_(0, 0.05) if part.is_floating_point() else part.random_(0, 256)
        parts["perm"] = torch.randperm(old.in_features).to(parts["perm"].dtype)
        model.set_submodule(name, ReALLMLinear.from_parts(parts, shape, old.in_features, old.bias))
    return model


def _prefill(model: Any, tokens: int) -> None:
    model(input_ids=torch.arange(tokens)[None] + 100, use_cache=True, logits_to_keep=1)


def _decoder(model: Any, tokens: int) -> Callable[[], None]:
    """Decodes ``tokens`` tokens after a prompt that is read beforehand."""
    prompt = torch.arange(PROMPT)[None] + 100

    def decode() -> None:
        for _ in range(tokens):
            model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-tokens)

    cache = model(input_ids=prompt, use_cache=True).past_key_values
    return decode


def _linear_bytes(model: Any) -> tuple[int, int]:
    """Bytes that the linear layers hold, the head aside, and bytes that they would take in a file."""
    from hf_ext import ReALLMLinear

    held = stored = 0
    for name, module in model.named_modules():
        if isinstance(module, ReALLMLinear):
            parts = {part.data_ptr(): part for part in module.parts.values()}
            stored += sum(part.nbytes for part in parts.values())
            extra = getattr(vars(module.kernel()).get("_prepared"), "_obj", None)
            parts |= {tensor.data_ptr(): tensor for tensor in getattr(extra, "tensors", ()) if tensor is not None}
            held += sum(part.nbytes for part in parts.values())
        elif isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            state = getattr(module.weight, "quant_state", None)
            size = module.weight.nbytes + (0 if state is None else state.absmax.nbytes)
            if hasattr(module.weight, "_shift"):  # quanto: packed values, a scale and a shift for each group
                packed = module.weight._data._data
                size = packed.nbytes + module.weight._scale.nbytes + module.weight._shift.nbytes
            stored, held = stored + size, held + size
    return held, stored


if __name__ == "__main__":
    main()
