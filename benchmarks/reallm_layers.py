"""What each ingredient of ReALLM buys on single matrices of a real model, as error on text that was not seen.

    python benchmarks/reallm_layers.py --calibration FOLDER --text FILE [--block 10]

Four matrices of one block are solved in many ways from the inputs that calibration text gives them. The error is that
of their outputs on the other text, relative to the outputs themselves (a variance ratio); bits count all stored parts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _run import Report

MATRICES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
ROUNDING: dict[str, Any] = {"vector_size": 1, "codebook": "uniform", "affine": True, "group_size": 64}
NF4: dict[str, Any] = {"vector_size": 1, "code_bits": 4, "codebook": "nf4", "group_size": 64, "scale_bits": 32}
THREE: dict[str, Any] = {"vector_size": 2, "code_bits": 6, "rank": 4, "permute": True}
TWO: dict[str, Any] = {"vector_size": 4, "code_bits": 8, "rank": 4, "permute": True}

# name -> shape, effort, whether the solver sees the calibration text
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "NF4, groups of 64": (NF4, {}, False),
    "RTN 3": ({**ROUNDING, "code_bits": 3}, {}, False),
    "GPTQ 3": ({**ROUNDING, "code_bits": 3}, {}, True),
    "ReALLM 3": (THREE, {}, True),
    "ReALLM 3, int8 factors": ({**THREE, "low_rank_bits": 8}, {}, True),
    "ReALLM 3, no low rank": ({**THREE, "rank": 0}, {}, True),
    "ReALLM 3, no feedback": (THREE, {"feedback": False}, True),
    "ReALLM 3, no weighting": (THREE, {"weighting": False}, True),
    "ReALLM 3, no permutation": ({**THREE, "permute": False}, {}, True),
    "ReALLM 3, three rounds": (THREE, {"rounds": 3}, True),
    "ReALLM 3, damping 0.01": (THREE, {"damping": 0.01}, True),
    "ReALLM 3, pointwise decoder": ({**THREE, "decoder": "pointwise"}, {}, True),
    "ReALLM 3, context decoder": ({**THREE, "decoder": "context"}, {}, True),
    "ReALLM 3, data-free": (THREE, {}, False),
    "RTN 2": ({**ROUNDING, "code_bits": 2}, {}, False),
    "GPTQ 2": ({**ROUNDING, "code_bits": 2}, {}, True),
    "ReALLM 2": (TWO, {}, True),
    "ReALLM 2, no low rank": ({**TWO, "rank": 0}, {}, True),
    "ReALLM 2, no feedback": (TWO, {"feedback": False}, True),
    "ReALLM 2, three rounds": (TWO, {"rounds": 3}, True),
    "ReALLM 2, damping 0.01": (TWO, {"damping": 0.01}, True),
}  # fmt: skip


def main() -> None:
    """Solve, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--calibration", required=True, help="text file or folder to calibrate on")
    parser.add_argument("--text", required=True, help="text file to measure the error on")
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    arguments = parser.parse_args()
    from hf_ext.default_model import load_model
    from hf_ext.quant.container import dense
    from hf_ext.quant.shape import MatrixShape
    from hf_ext.quant.solve import Effort, relative_error, solve

    settings = {**vars(arguments), "calibration": Path(arguments.calibration).name, "text": Path(arguments.text).name}
    report = Report("reallm_layers", settings)
    model, tokenizer = load_model(arguments.model)
    seen = _hessians(model, tokenizer, arguments.calibration, arguments.block, arguments.windows)
    unseen = _hessians(model, tokenizer, arguments.text, arguments.block, 4)
    weights = {name: model.get_submodule(name).weight.detach() for name in seen}
    for way, (shape, effort, calibrated) in WAYS.items():
        errors, bits = {}, 0.0
        for name, weight in weights.items():
            hessian = seen[name] if calibrated else None
            found = solve(weight, MatrixShape(**shape), hessian, effort=Effort(**{"rounds": 1, **effort}))
            stored = dense(found.parts, found.shape, weight.shape[1])
            errors[name.rpartition(".")[2]] = round(relative_error(weight, stored, unseen[name]), 5)
            bits += 8 * sum(part.nbytes for part in found.parts.values())
        total = sum(weight.numel() for weight in weights.values())
        report.row(way=way, bits=round(bits / total, 3), **errors)
    report.save()


def _hessians(model: Any, tokenizer: Any, text: str, index: int, windows: int) -> dict[str, Tensor]:
    """``E[x x^T]`` of the inputs of the matrices of one block; the blocks after it are not run."""
    from hf_ext.quant.calibration import Moments, calibration_windows, capture_block_inputs, find_blocks

    path, blocks = find_blocks(model)
    names = [f"{path}.{index}.{matrix}" for matrix in MATRICES]
    moments = Moments()
    with torch.no_grad(), moments.watching({name: model.get_submodule(name) for name in names}):
        hidden = capture_block_inputs(model, blocks, calibration_windows(text, tokenizer, windows, 512))
        moments.sums.clear()
        moments.tokens.clear()
        for number in range(index + 1):
            hidden.run(blocks[number], number, keep=True)
    found = {name: moments.hessian(name) for name in names}
    return {name: hessian for name, hessian in found.items() if hessian is not None}


if __name__ == "__main__":
    main()
