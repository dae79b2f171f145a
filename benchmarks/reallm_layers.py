"""What each ingredient of ReALLM buys on single matrices of a real model, as error on text that was not seen.

    python benchmarks/reallm_layers.py --calibration FOLDER --text FILE [--block 10]

Five matrices of one block are solved in many ways from the inputs that calibration text gives them. The error is that
of their outputs on the other text, relative to the outputs themselves (a variance ratio); ``cost`` weighs it by the
squared gradient of the loss there and sums it up: the nats per token that it is predicted to cost (see
`hf_ext.quant.calibration.output_gradients`). Bits count all stored parts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _run import Report

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
GRADIENT_WINDOWS = 2  # windows of 512 tokens for a backward pass
ROUNDING: dict[str, Any] = {"vector_size": 1, "codebook": "uniform", "affine": True, "group_size": 64}
NF4: dict[str, Any] = {"vector_size": 1, "code_bits": 4, "codebook": "nf4", "group_size": 64, "scale_bits": 32}
FACTORS: dict[str, Any] = {"rank": 4, "permute": True, "low_rank_bits": 8}
THREE: dict[str, Any] = {"vector_size": 1, "code_bits": 3, "decoder": "trellis", **FACTORS}
TWO: dict[str, Any] = {"vector_size": 1, "code_bits": 2, "decoder": "trellis", **FACTORS}
VECTORS_3: dict[str, Any] = {"vector_size": 2, "code_bits": 6, **FACTORS}
VECTORS_2: dict[str, Any] = {"vector_size": 4, "code_bits": 8, **FACTORS}


def _ways(bits: int, trellis: dict[str, Any], vectors: dict[str, Any]) -> dict[str, tuple[dict[str, Any], ...]]:
    """Name -> shape, effort, and what the solver is told: nothing, the text's inputs, its gradients too."""
    told, inputs, nothing = {"inputs": True, "rows": True}, {"inputs": True}, {}
    return {
        f"RTN {bits}": ({**ROUNDING, "code_bits": bits}, {}, nothing),
        f"GPTQ {bits}": ({**ROUNDING, "code_bits": bits}, {}, inputs),
        f"trellis {bits}": (trellis, {}, told),
        f"trellis {bits}, states of 10 bits": ({**trellis, "state_bits": 10}, {}, told),
        f"trellis {bits}, outliers among the codes": (trellis, {"outliers": 0}, told),
        f"trellis {bits}, all rows alike": (trellis, {}, inputs),
        f"trellis {bits}, all columns alike": (trellis, {"weighting": False}, told),
        f"trellis {bits}, no feedback": (trellis, {"feedback": False}, told),
        f"trellis {bits}, no permutation": ({**trellis, "permute": False}, {}, told),
        f"trellis {bits}, no low rank": ({**trellis, "rank": 0}, {}, told),
        f"trellis {bits}, rank 2": ({**trellis, "rank": 2}, {}, told),
        f"trellis {bits}, rank 8": ({**trellis, "rank": 8}, {}, told),
        f"trellis {bits}, three rounds": (trellis, {"rounds": 3}, told),
        f"trellis {bits}, damping 0.01": (trellis, {"damping": 0.01}, told),
        f"trellis {bits}, data-free": (trellis, {}, nothing),
        f"k-means {bits}": (vectors, {}, told),
        f"k-means {bits}, all rows alike": (vectors, {}, inputs),
        f"k-means {bits}, pointwise decoder": ({**vectors, "decoder": "pointwise"}, {}, told),
        f"k-means {bits}, context decoder": ({**vectors, "decoder": "context"}, {}, told),
    }


WAYS = {"NF4, groups of 64": (NF4, {}, {}), **_ways(2, TWO, VECTORS_2), **_ways(3, THREE, VECTORS_3)}


def main() -> None:
    """Solve, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--calibration", required=True, help="text file or folder to calibrate on")
    parser.add_argument("--text", required=True, help="text file to measure the error on")
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    arguments = parser.parse_args()
    from hf_ext.default_model import load_model
    from hf_ext.quant.container import dense
    from hf_ext.quant.shape import MatrixShape
    from hf_ext.quant.solve import Effort, relative_error, solve, squared_error

    settings = {**vars(arguments), "calibration": Path(arguments.calibration).name, "text": Path(arguments.text).name}
    report = Report("reallm_layers", settings)
    model, tokenizer = load_model(arguments.model)
    seen, rows = _statistics(model, tokenizer, arguments.calibration, arguments.block, arguments.windows)
    unseen, costs = _statistics(model, tokenizer, arguments.text, arguments.block, 4)
    weights = {name: model.get_submodule(name).weight.detach() for name in seen}
    total = sum(weight.numel() for weight in weights.values())
    for way, (shape, effort, told) in WAYS.items():
        errors, bits, cost = {}, 0.0, 0.0
        for name, weight in weights.items():
            hessian, gradients = seen[name] if told else None, rows[name] if "rows" in told else None
            found = solve(weight, MatrixShape(**shape), hessian, gradients, Effort(**{"rounds": 1, **effort}))
            stored = dense(found.parts, found.shape, weight.shape[1])
            errors[name.rpartition(".")[2]] = round(relative_error(weight, stored, unseen[name]), 5)
            cost += 0.5 * squared_error(weight - stored, unseen[name], costs[name])
            bits += 8 * sum(part.nbytes for part in found.parts.values())
        report.row(way=way, bits=round(bits / total, 3), cost=round(cost, 5), **errors)
        report.save()


def _statistics(
    model: Any, tokenizer: Any, text: str, index: int, windows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the matrices of one block see of a text, and how much their outputs count there."""
    from hf_ext.quant.calibration import calibration_windows, output_gradients

    hessians = _hessians(model, tokenizer, text, index, windows)
    few = calibration_windows(text, tokenizer, GRADIENT_WINDOWS, 512)
    return hessians, output_gradients(model, {name: model.get_submodule(name) for name in hessians}, few)


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
