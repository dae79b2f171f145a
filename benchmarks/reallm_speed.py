"""Decoding and prefill speed of ReALLM layers against dense weights, NF4 and quanto, in one run, taken in turn.

    python benchmarks/reallm_speed.py [--repeats 5] [--decoders trellis identity] [--only "ReALLM 3 bits, trellis" ...]

The codes of the ReALLM layers are random: their values change neither what is read nor what is computed. Memory is
what the linear layers hold, run-time tables included, the output head aside. Quanto is found as benchmarks/_peers.py
says; its row is left out where it is not installed.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _quantizers import bytes_of, linear_layers, load_nf4, random_reallm
from _run import Report

PROMPT = 64


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in one measurement")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decoders", nargs="+", default=["trellis", "identity"], help="of the ReALLM layers")
    parser.add_argument("--only", nargs="*", help="rows to take; all by default")
    arguments = parser.parse_args()
    report = Report("reallm_speed", vars(arguments))
    models = {name: load() for name, load in _loaders(arguments).items()}
    models = {name: model for name, model in models.items() if model is not None}
    with torch.no_grad():  # quanto's tensors do not work in inference mode
        for model in models.values():
            _prefill(model, 16)  # tables are made, kernels compiled
        readers = {name: partial(_prefill, model, arguments.prefill) for name, model in models.items()}
        prefill = report.interleaved(readers, arguments.repeats, warmup=0)
        decoders = {name: _decoder(model, arguments.tokens) for name, model in models.items()}
        decode = report.interleaved(decoders, arguments.repeats, warmup=0)
    for name, model in models.items():
        linear, stored = bytes_of(linear_layers(model).values())
        report.row(
            layers=name,
            dtype=str(model.dtype).removeprefix("torch."),
            decode_tokens_per_s=round(arguments.tokens / decode[name], 1),
            prefill_tokens_per_s=round(arguments.prefill / prefill[name], 1),
            linear_mib=round(linear / 2**20, 2),
            of_stored=round(linear / stored, 3),
        )
    report.save()


def _loaders(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The rows by name, each as a function that makes its model; bfloat16 where the name says nothing."""
    half, single = torch.bfloat16, torch.float32
    loaders: dict[str, Callable[[], Any]] = {
        "dense float32": partial(_load, arguments.model, single),
        "dense bfloat16": partial(_load, arguments.model, half),
        "NF4 (bitsandbytes)": lambda: load_nf4(arguments.model, half)[0],
        "NF4 (bitsandbytes), float32": lambda: load_nf4(arguments.model, single)[0],
        "quanto int4": partial(_quanto, arguments.model, half),
        "quanto int4, float32": partial(_quanto, arguments.model, single),
    }
    for decoder in arguments.decoders:
        for bits in (3, 2):
            name = f"ReALLM {bits} bits, {'k-means' if decoder == 'identity' else decoder}"
            loaders[name] = partial(_reallm, arguments.model, half, bits, decoder)
            loaders[f"{name}, float32"] = partial(_reallm, arguments.model, single, bits, decoder)
    wanted = loaders if arguments.only is None else arguments.only
    unknown = [name for name in wanted if name not in loaders]
    if unknown:
        raise SystemExit(f"--only names {unknown[0]!r}; there are {', '.join(loaders)}.")
    return {name: loaders[name] for name in wanted}


def _load(name: str | None, dtype: torch.dtype) -> Any:
    from hf_ext.default_model import load_model

    return load_model(name, dtype=dtype)[0]


def _quanto(name: str | None, dtype: torch.dtype) -> Any:
    """The model with the int4 weights of optimum-quanto, or None where that is not installed."""
    try:
        from optimum.quanto import freeze, qint4, quantize
    except ImportError:
        return None
    model = _load(name, dtype)
    quantize(model, weights=qint4, exclude="lm_head")
    freeze(model)
    return model


def _reallm(name: str | None, dtype: torch.dtype, bits: float, decoder: str) -> Any:
    """The model with ReALLM layers of the default shape in place of its linear layers, filled at random."""
    from hf_ext import ReALLMConfig
    from hf_ext.quant.quantize import linear_names

    model, config = _load(name, dtype), ReALLMConfig(bits=bits, decoder=decoder)
    for layer in linear_names(model, config):
        old = model.get_submodule(layer)
        model.set_submodule(layer, random_reallm(config, old.out_features, old.in_features, old.bias))
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


if __name__ == "__main__":
    main()
