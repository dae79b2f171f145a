"""Quantising a whole model in place, layer by layer; never is there a second copy of it.

With calibration text, which the model may write itself, blocks are treated in order. The inputs of a block are what
the quantised blocks before it produce, so that each block also corrects for the errors of the earlier ones; then all
matrices of the block are solved and its outputs computed anew. Only hidden states, one block's statistics and the
model itself are held.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from hf_ext.quant.calibration import (
    Moments,
    calibration_windows,
    capture_block_inputs,
    find_blocks,
    in_turn,
    output_gradients,
    sampled_windows,
)
from hf_ext.quant.config import ReALLMConfig
from hf_ext.quant.feedback import curvature
from hf_ext.quant.linear import ReALLMLinear
from hf_ext.quant.outliers import split_outliers
from hf_ext.quant.plan import MatrixProfile, make_plan
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.solve import Solution, outlier_threshold, solve

SURVEY_WINDOWS = 4  # windows from which a plan and the row weights are made
OWN_TEXT = "own_text.ids"  # beside the kept layers, under another suffix than theirs
SURVEY_LENGTH = 512  # tokens of each: a backward pass through the whole model costs memory


@dataclass
class Progress:
    """What quantising has done so far.

    Attributes:
        errors: layer name -> loss relative to storing nothing, as the layer's own solver measured it.
        folder: where solved layers are kept, so that an interrupted run can go on; None keeps nothing.
        show: draw a progress bar.
    """

    errors: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None
    show: bool = True


def quantize_model(
    model: Any, config: ReALLMConfig, names: list[str] | None = None, progress: Progress | None = None
) -> dict[str, float]:
    """Replace linear layers of ``model`` by `ReALLMLinear`, in place.

    Args:
        model: a transformers model in full precision.
        config: what to do; ``config.plan`` is filled in.
        names: the layers; None takes all that ``config`` does not exclude.
        progress: for a bar, and to go on after an interruption.

    Returns:
        The relative error of each layer.

    Raises:
        ValueError: the model has no linear layer to quantise, its weights are not finite, the calibration text is too
            short, or the budget too small. The model is as it was then, unless solving had begun.
    """
    progress = progress or Progress()
    names = linear_names(model, config) if names is None else names
    layers = {name: model.get_submodule(name) for name in names}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise.")
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"{name}.weight holds values that are not finite; there is nothing to quantise it to.")
    if not config.calibrated:
        for name in tqdm(names, desc="Quantising", disable=not progress.show):
            shape = config.shape_for(*layers[name].weight.shape)
            _put(model, name, _solution(name, layers[name], shape, None, None, config, progress), progress)
    else:
        _quantize_calibrated(model, layers, config, progress)
    config.record({name: model.get_submodule(name) for name in names})
    return progress.errors


def linear_names(model: Any, config: ReALLMConfig) -> list[str]:
    """The linear layers that ``config`` would quantise: all but the output head and those excluded by name.

    Raises:
        ValueError: an exclusion matches nothing.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    found = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for pattern in config.modules_to_not_convert or []:
        if all(should_convert_module(name, [pattern]) for name, _ in model.named_modules()):
            raise ValueError(f"modules_to_not_convert names {pattern!r}, which no module of the model matches.")
    excluded = [*get_keys_to_not_convert(model), *(config.modules_to_not_convert or [])]
    return [name for name in found if should_convert_module(name, excluded)]


def _quantize_calibrated(model: Any, layers: dict[str, Any], config: ReALLMConfig, progress: Progress) -> None:
    if model.device.type != "cpu":
        raise ValueError(f"Calibration runs on the CPU; this model is on {model.device}. Load it there, then move it.")
    windows = _windows(model, config, progress)
    path, blocks = find_blocks(model)
    shapes = {name: config.shape_for(*layer.weight.shape) for name, layer in layers.items()}
    rows: Mapping[str, Tensor] = {}
    few = windows[:SURVEY_WINDOWS, :SURVEY_LENGTH]
    if config.row_weights or config.budget is not None:
        rows = output_gradients(model, layers, few)
    if config.budget is not None:
        base = config.base_shape
        shapes = make_plan(_profiles(model, layers, rows, few, config), base, config.budget)
    weights = rows if config.row_weights else {}
    with torch.no_grad():
        stream = capture_block_inputs(model, blocks, windows)
        outside = [name for name in layers if not name.startswith(f"{path}.")]
        with tqdm(total=len(layers), desc="Quantising", disable=not progress.show) as bar:
            for name in outside:
                found = _solution(name, layers[name], shapes[name], None, None, config, progress)
                _put(model, name, found, progress)
                bar.update()
            for index, block in enumerate(blocks):
                inside = {name: layer for name, layer in layers.items() if name.startswith(f"{path}.{index}.")}
                moments = Moments()
                if not all(_is_kept(name, progress) for name in inside):
                    with moments.watching(inside):
                        stream.run(block, index, keep=False)

                def find(name: str, moments: Moments = moments) -> Solution:
                    statistics = moments.hessian(name), weights.get(name)
                    return _solution(name, layers[name], shapes[name], *statistics, config, progress)

                largest_first = sorted(inside, key=lambda name: -layers[name].weight.numel())
                for name, found in zip(largest_first, each_on_a_thread(find, largest_first), strict=True):
                    _put(model, name, found, progress)
                    bar.update()
                stream.run(block, index, keep=True)


def _windows(model: Any, config: ReALLMConfig, progress: Progress) -> Tensor:
    """What to calibrate on: text, text of the model's own, or both in turn."""
    kinds = []
    if config.calibration is not None:
        tokenizer = config.tokenizer
        if tokenizer is None and not isinstance(config.calibration, Tensor):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        kinds.append(
            calibration_windows(config.calibration, tokenizer, config.calibration_windows, config.window_length)
        )
    if config.own_windows:
        kinds.append(_own_windows(model, config, progress))
    return in_turn(*kinds) if len(kinds) == 2 else kinds[0]


def _own_windows(model: Any, config: ReALLMConfig, progress: Progress) -> Tensor:
    """Text of the model's own, written once even if the run is interrupted later."""
    kept = None if progress.folder is None else progress.folder / OWN_TEXT
    if kept is not None and kept.exists():
        return load_file(kept)["ids"]
    ids = sampled_windows(model, config.own_windows, config.window_length, config.own_start, config.seed)
    if kept is not None:
        _write(kept, {"ids": ids})
    return ids


def _profiles(
    model: Any, layers: Mapping[str, Any], rows: Mapping[str, Tensor], windows: Tensor, config: ReALLMConfig
) -> dict[str, MatrixProfile]:
    """What a plan needs to know of every matrix, from one pass over a few windows, block by block."""
    path, blocks = find_blocks(model)
    stream = capture_block_inputs(model, blocks, windows)
    profiles: dict[str, MatrixProfile] = {}
    threshold = outlier_threshold(config.base_shape, config.effort())
    for name, hessian in _hessians(layers, path, blocks, stream):
        sparse, weight = split_outliers(layers[name].weight.detach().float(), threshold)
        importance = rows.get(name, torch.ones(len(weight)))
        energy = _energy(importance * weight.square().mean(1), config)
        perm = hessian.diagonal().argsort(descending=True)
        columns = curvature(hessian, config.damping, perm).column_weights.sort(descending=True).values
        outliers = len(sparse.get("sparse_values", ()))
        profiles[name] = MatrixProfile(weight.shape[0], weight.shape[1], energy, columns, outliers)
    return {name: profiles[name] for name in layers}


def _energy(rows: Tensor, config: ReALLMConfig) -> float:
    """What an error of all scaled weights costs, where one of each row costs ``rows``.

    A trellis whose search knows these moves its errors to where they cost little: then rows count by their geometric
    mean, which is what reverse water-filling over them would reach.
    """
    if config.row_weights and config.base_shape.decoder == "trellis":
        return len(rows) * float(rows.clamp_min(1e-6 * rows.mean()).log().mean().exp())
    return float(rows.sum())


def _hessians(
    layers: Mapping[str, Any], path: str, blocks: nn.ModuleList, stream: Any
) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        if not name.startswith(f"{path}."):
            yield name, torch.eye(layer.in_features)
    for index, block in enumerate(blocks):
        inside = {name: layer for name, layer in layers.items() if name.startswith(f"{path}.{index}.")}
        moments = Moments()
        with torch.no_grad(), moments.watching(inside):
            stream.run(block, index, keep=True)
        for name, layer in inside.items():
            hessian = moments.hessian(name)
            yield name, torch.eye(layer.in_features) if hessian is None else hessian


def each_on_a_thread(function: Callable[[str], Solution], names: list[str]) -> Iterator[Solution]:
    """``function`` of every name in their order, computed on as many threads as torch uses, each on one.

    Most of solving is the search along single columns, which does not spread over threads by itself.
    """
    threads = min(torch.get_num_threads(), len(names))
    if threads < 2:
        yield from map(function, names)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    before = torch.get_num_threads()
    try:
        yield from pool.map(function, names)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _solution(
    name: str,
    layer: Any,
    shape: MatrixShape,
    hessian: Tensor | None,
    rows: Tensor | None,
    config: ReALLMConfig,
    progress: Progress,
) -> Solution:
    """Solve one layer, or take what an earlier run has kept of it."""
    kept = _kept_file(name, progress)
    if kept is not None and kept.exists():
        parts = load_file(kept)
        return Solution(parts, _kept_shape(kept), float(parts.pop("error")))
    solution = solve(layer.weight.cpu(), shape, hessian, rows, config.effort())
    if kept is not None:
        _keep(kept, solution)
    return solution


def _put(model: Any, name: str, solution: Solution, progress: Progress) -> None:
    """The quantised layer in place of the plain one."""
    layer = model.get_submodule(name)
    progress.errors[name] = solution.error
    parts = {part: tensor.to(layer.weight.device) for part, tensor in solution.parts.items()}
    model.set_submodule(name, ReALLMLinear.from_parts(parts, solution.shape, layer.in_features, layer.bias))


def _keep(file: Path, solution: Solution) -> None:
    tensors = {name: part.contiguous() for name, part in solution.parts.items()}
    shape = {"shape": json.dumps(solution.shape.to_dict())}
    _write(file, {**tensors, "error": torch.tensor(solution.error)}, shape)


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Keep tensors; nobody sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    save_file(tensors, unfinished, metadata)
    unfinished.replace(file)


def _kept_shape(file: Path) -> MatrixShape:
    with safe_open(file, "pt") as opened:
        return MatrixShape.from_dict(json.loads((opened.metadata() or {})["shape"]))


def _kept_file(name: str, progress: Progress) -> Path | None:
    return None if progress.folder is None else progress.folder / f"{name}.safetensors"


def _is_kept(name: str, progress: Progress) -> bool:
    kept = _kept_file(name, progress)
    return kept is not None and kept.exists()
