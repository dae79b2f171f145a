"""The linear layers of a model alone: dense, NF4 and ReALLM, for one token and for a prompt; time per block.

    python benchmarks/reallm_block.py [--tokens 1 512] [--seconds 0.3]

benchmarks/reallm_speed.py measures whole models and needs a machine that does nothing else. This one takes seconds and
reports the least CPU time of many short calls on one thread, which other work on the machine disturbs least. Weights
are random. One token goes through the layers of all blocks, so that weights come from memory as in a model, not from
the cache; longer inputs through those of one.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _quantizers import bytes_of, linear_layers, random_reallm
from _run import Report

KINDS = ("dense", "NF4 (bitsandbytes)", "ReALLM 3 bits, trellis", "ReALLM 2 bits, trellis", "ReALLM 3 bits, k-means",
         "ReALLM 2 bits, k-means")  # fmt: skip
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU time that calls of one kind are repeated for")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("reallm_block", vars(arguments))
    sizes, number = _sizes(arguments.model)
    with torch.no_grad():
        for kind in KINDS:
            for name, dtype in TYPES.items():
                row: dict[str, Any] = {"layers": kind, "dtype": name}
                layers = [layer for _ in range(number) for layer in _block(kind, sizes, dtype)]
                for tokens in arguments.tokens:
                    used = layers if tokens == 1 else layers[: len(sizes)]
                    seconds = _fastest(_caller(used, tokens, dtype), arguments.seconds)
                    row[f"ms_{tokens}"] = round(1e3 * seconds * len(sizes) / len(used), 3)
                held, stored = bytes_of(layers)
                report.row(**row, held_mib=round(held / 2**20, 2), of_stored=round(held / stored, 3))
    report.save()


def _sizes(name: str | None) -> tuple[list[tuple[int, int]], int]:
    """``(out, in)`` of the linear layers of the first block, and the number of blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_ext.default_model import resolve_model

    config = AutoConfig.from_pretrained(resolve_model(name))
    number, config.num_hidden_layers = config.num_hidden_layers, 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [(layer.out_features, layer.in_features) for layer in linear_layers(model).values()], number


def _block(kind: str, sizes: list[tuple[int, int]], dtype: torch.dtype) -> list[nn.Module]:
    make: Callable[[int, int], Any]
    if kind == "dense":
        make = partial(_dense, dtype=dtype)
    elif kind.startswith("NF4"):
        make = partial(_nf4, dtype=dtype)
    else:
        from hf_ext import ReALLMConfig

        decoder = "identity" if kind.endswith("k-means") else "trellis"
        make = partial(random_reallm, ReALLMConfig(bits=int(kind.split()[1]), decoder=decoder))
    return [make(out, columns) for out, columns in sizes]


def _dense(out: int, columns: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(columns, out, bias=False, dtype=dtype)


def _nf4(out: int, columns: int, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(columns, out, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(out, columns, dtype=dtype)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    quantized: nn.Module = layer.to("cpu").eval()
    return quantized


def _caller(block: list[nn.Module], tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """Calls every layer once, layers of a size on the same input."""
    widths = {int(layer.in_features) for layer in block}  # type: ignore[arg-type]
    inputs = {width: torch.randn(1, tokens, width, dtype=dtype) for width in widths}

    def call() -> None:
        for layer in block:
            layer(inputs[int(layer.in_features)])  # type: ignore[arg-type]

    call()  # tables are made, kernels compiled
    return call


def _fastest(call: Callable[[], None], seconds: float) -> float:
    end, best = time.process_time() + seconds, float("inf")
    while True:
        begin = time.process_time()
        call()
        now = time.process_time()
        best = min(best, now - begin)
        if now >= end:
            return best


if __name__ == "__main__":
    main()
