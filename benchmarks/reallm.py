"""ReALLM against other quantizers on a real model: perplexity at measured bits per weight, time and memory.

    python benchmarks/reallm.py --calibration FOLDER --text wiki.test.raw [--only reallm-3 reallm-2 ...]

Every method runs in a process of its own, which also measures its peak memory, and its row is kept in ``--work``: an
interrupted run goes on where it stopped. Perplexity is taken on non-overlapping windows of the text, tokenised once.
The default model's weights already lie on a 4-bit grid of groups of 32 columns, so 4-bit rows say little about other
models, and no row uses that grouping. Calibration text must not be related to the text measured. HQQ and quanto are
imported from wherever they are installed; ``pip install --no-deps hqq optimum-quanto einops termcolor`` is enough.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _run import Report

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUNDING = {"codebook": "uniform", "affine": True, "group_size": 64, "permute": False, "rank": 0}

# method -> options of ReALLMConfig; "calibrated" is replaced by the calibration text
METHODS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "reallm-3": {"budget": 3.25, "rounds": 3, "calibrated": True},
    "reallm-2": {"budget": 2.45, "rounds": 3, "calibrated": True},
    "reallm-3 one shape": {"bits": 3, "rank": 10, "damping": 0.01, "calibrated": True},
    "reallm-2 one shape": {"bits": 2, "rank": 16, "damping": 0.01, "calibrated": True},
    "reallm-3 one shape, quality": {"bits": 3, "rank": 10, "rounds": 3, "calibrated": True},
    "reallm-2 one shape, quality": {"bits": 2, "rank": 16, "rounds": 3, "calibrated": True},
    "reallm-4": {"bits": 4, "rank": 2, "calibrated": True},
    "reallm-3 data-free": {"bits": 3, "rank": 4},
    "GPTQ-3": {"bits": 3, **ROUNDING, "calibrated": True},
    "RTN-3": {"bits": 3, **ROUNDING},
    "RTN-2": {"bits": 2, **ROUNDING},
    "NF4 (bitsandbytes)": None,
    "HQQ-4": None,
    "HQQ-3": None,
    "HQQ-2": None,
    "quanto int4": None,
    "quanto int2": None,
    # what each ingredient buys, at 3 bits and one shape
    "3 bits: no low rank": {"bits": 3, "rank": 0, "calibrated": True},
    "3 bits: no feedback": {"bits": 3, "rank": 4, "feedback": False, "calibrated": True},
    "3 bits: no weighting": {"bits": 3, "rank": 4, "weighting": False, "calibrated": True},
    "3 bits: no permutation": {"bits": 3, "rank": 4, "permute": False, "calibrated": True},
    "3 bits: two rounds": {"bits": 3, "rank": 4, "rounds": 2, "calibrated": True},
    "3 bits: row weights": {"bits": 3, "rank": 4, "row_weights": True, "calibrated": True},
    "3 bits: pointwise decoder": {"bits": 3, "rank": 4, "decoder": "pointwise", "calibrated": True},
    "3 bits: context decoder": {"bits": 3, "rank": 4, "decoder": "context", "calibrated": True},
}


def main() -> None:
    """Run what was asked for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--calibration", required=True, help="text file or folder to calibrate on")
    parser.add_argument("--text", required=True, help="text file to measure perplexity on")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--work", default="out/reallm", help="where finished rows and ReALLM models are kept")
    parser.add_argument("--one", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    settings = {name: value for name, value in vars(arguments).items() if name not in ("one", "only", "work")}
    settings["calibration"], settings["text"] = Path(arguments.calibration).name, Path(arguments.text).name
    report = Report("reallm", settings)
    for method in METHODS:
        row = _row(method, arguments)
        if row is not None:
            report.row(**row)
    report.save()


def _row(method: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The row of a method, from an earlier run or from a process of its own; None if it was not asked for."""
    kept = _place(method, arguments).with_suffix(f".{arguments.window}x{arguments.windows}.json")
    if not kept.exists():
        if method not in arguments.only:
            return None
        command = [sys.executable, __file__, *sys.argv[1:], "--one", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout.strip().splitlines()[-1], encoding="utf-8")
    row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return row


def _place(method: str, arguments: argparse.Namespace) -> Path:
    return Path(arguments.work, method.replace(" ", "_").replace(":", ""))


def measure(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantise by one method and measure."""
    from hf_ext.default_model import load_model
    from hf_ext.evaluation import perplexity, tokenize

    before = time.perf_counter()
    if method.startswith("NF4"):
        model, tokenizer, bits = _nf4(arguments)
    elif method.startswith(("HQQ", "quanto")):
        model, tokenizer, bits = _peer(method, arguments)
    elif METHODS[method] is None:
        (model, tokenizer), bits = load_model(arguments.model), {"linear": 32.0}
    else:
        model, tokenizer, bits = _reallm(METHODS[method] or {}, arguments, _place(method, arguments))
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    ids = tokenize(tokenizer, Path(arguments.text).read_text(encoding="utf-8"))
    found = perplexity(model, ids, arguments.window, max_windows=arguments.windows)
    return {
        "method": method,
        "bits_linear": round(bits["linear"], 3),
        "bits_file": round(bits.get("whole_file", float("nan")), 3) if "whole_file" in bits else None,
        "perplexity": round(found.perplexity, 2),
        "tokens": found.tokens,
        "load_and_quantise_s": round(seconds, 1),
        "peak_mib": round(peak),
    }


def _reallm(options: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> tuple[Any, Any, dict[str, float]]:
    from hf_ext import ReALLMConfig
    from hf_ext.default_model import load_model
    from hf_ext.quant.integrity import bits_on_disk
    from hf_ext.quant.linear import set_decode_mode

    options = dict(options)
    if options.pop("calibrated", False):
        options |= {"calibration": arguments.calibration, "windows": arguments.calibration_windows}
    model, tokenizer = load_model(arguments.model, quantization_config=ReALLMConfig(**options))
    model.save_pretrained(folder)
    bits = bits_on_disk(folder)
    set_decode_mode(model, "once")
    return model, tokenizer, bits


def _nf4(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, float]]:
    from transformers import BitsAndBytesConfig

    from hf_ext.default_model import load_model

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, tokenizer = load_model(arguments.model, quantization_config=config)
    stored = weights = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            state = module.weight.quant_state
            stored += module.weight.numel() + 4 * state.absmax.numel()
            weights += state.shape.numel()
    return model, tokenizer, {"linear": 8 * stored / weights}


def _peer(method: str, arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, float]]:
    """HQQ in groups of 64 and optimum-quanto in its own groups, with 16 bits for each scale and shift as they keep."""
    from hf_ext.default_model import load_model

    model, tokenizer = load_model(arguments.model)
    stored = weights = 0.0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            width = int(method[-1])
            quantize = _hqq if method.startswith("HQQ") else _quanto
            dense, groups = quantize(module.weight.detach(), width)
            module.weight.data = dense
            stored += width * dense.numel() + 2 * 16 * groups
            weights += dense.numel()
    return model, tokenizer, {"linear": stored / weights}


def _hqq(weight: torch.Tensor, width: int) -> tuple[torch.Tensor, int]:
    from hqq.core.quantize import Quantizer

    options = {"group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    packed, found = Quantizer.quantize(weight, nbits=width, **options)
    return Quantizer.dequantize(packed, found).view_as(weight), found["scale"].numel()


def _quanto(weight: torch.Tensor, width: int) -> tuple[torch.Tensor, int]:
    from optimum.quanto import freeze, qint2, qint4, quantize

    holder = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight.data = weight
    quantize(holder, weights={2: qint2, 4: qint4}[width])
    freeze(holder)
    return holder[0].weight.dequantize().detach(), holder[0].weight._scale.numel()


if __name__ == "__main__":
    main()
