"""The caches that benchmarks/caches.py compares: ours, KIVI's groups (simulated) and the host's quantised caches."""

from collections.abc import Callable
from typing import Any

import _peers  # noqa: F401  (first of all: it extends the path)
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from hf_ext import make_cache
from hf_ext.caches.base import HfExtCache
from hf_ext.caches.pyramid_infer import PRESETS

Make = Callable[[], Any]

DECO4, DECO2 = {"type": "decoquant", "bits": 4}, {"type": "decoquant", "bits": 2}
DECO2_PRE = {**DECO2, "pre_rope": True}


def pyramid(ratio: float, kind: str = "pyramid_infer", **options: Any) -> dict[str, Any]:
    """PyramidInfer that keeps ``ratio`` of all keys and values of a prompt, as the others do, and all that follows."""
    return {"type": kind, "target_ratio": ratio, "recent_ratio": 0.1, "generation_block": 0, **options}


def flat(ratio: float, kind: str = "pyramid_infer") -> dict[str, Any]:
    """The same with our own schedule and votes."""
    return pyramid(ratio, kind, **{**PRESETS["flat"], "target_ratio": ratio})


def ours() -> dict[str, Any]:
    """Options of our caches by the name they have in the tables."""
    table: dict[str, Any] = {
        "decoquant-8": {"type": "decoquant", "bits": 8},
        "decoquant-4": DECO4,
        "decoquant-4 +0.125 bit": {**DECO4, "extra_bits": 0.125},
        "decoquant-4 +0.5 bit": {**DECO4, "extra_bits": 0.5},
        "decoquant-4 pre-RoPE": {**DECO4, "pre_rope": True},
        "decoquant-4 uniform (released)": {**DECO4, "method": "uniform"},
        "decoquant-2": DECO2,
        "decoquant-2 pre-RoPE": DECO2_PRE,
        "decoquant-2 +0 bit pre-RoPE": {**DECO2_PRE, "extra_bits": 0.0},
        "sink_window 0.45": {"type": "sink_window", "window_size": int(0.45 * 1024) - 4},
        "pyramid_infer released 7b": {"type": "pyramid_infer", "generation_block": 0},
        "flat 0.75 + decoquant-4": [flat(0.75), DECO4],
        "flat 0.75 + decoquant-2": [flat(0.75), DECO2],
        "flat (cache) 0.75 + decoquant-4": [flat(0.75, "pyramid_infer_cache"), DECO4],
        "flat (cache) 0.75 + decoquant-2": [flat(0.75, "pyramid_infer_cache"), DECO2],
        "flat (cache) 0.73 + decoquant-2 pre-RoPE": [flat(0.73, "pyramid_infer_cache"), DECO2_PRE],
        "flat (cache) 0.6 + decoquant 3 bits pre-RoPE": [
            flat(0.6, "pyramid_infer_cache"),
            {**DECO2_PRE, "extra_bits": 1.0},
        ],
        "flat (cache) 0.52 + decoquant 3.5 bits pre-RoPE": [
            flat(0.52, "pyramid_infer_cache"),
            {**DECO2_PRE, "extra_bits": 1.5},
        ],
        "flat 0.65 + decoquant-2": [flat(0.65), DECO2],
        "flat 0.55 + decoquant 3 bits": [flat(0.55), {**DECO2, "extra_bits": 1.0}],
        "flat 0.42 + decoquant-4": [flat(0.42), DECO4],
        "snapkv 0.42 + decoquant-4": [{"type": "snapkv", "budget": 0.42}, DECO4],
        "snapkv 0.65 + decoquant-2": [{"type": "snapkv", "budget": 0.65}, DECO2],
        "h2o 0.75 + decoquant-2": [{"type": "h2o", "budget": 0.75}, DECO2],
    }
    for ratio in (0.75, 0.45):
        table[f"pyramid_infer {ratio}"] = pyramid(ratio)
        table[f"pyramid_infer flat {ratio}"] = flat(ratio)
        table[f"pyramid_infer_cache flat {ratio}"] = flat(ratio, "pyramid_infer_cache")
        for kind in ("snapkv", "pyramid_kv", "h2o", "tova", "knorm"):
            table[f"{kind} {ratio}"] = {"type": kind, "budget": ratio}
    return table


def methods(model: Any, peers: bool = True) -> dict[str, Make]:
    """Every cache of the comparison; the dense one first."""
    made: dict[str, Make] = {"dense": lambda: DynamicCache(config=model.config)}
    made |= {name: lambda config=config: make_cache(model, config) for name, config in ours().items()}
    for bits, group in ((4, 32), (4, 64), (2, 32), (2, 64)):
        made[f"KIVI groups {bits}-bit/{group}"] = lambda bits=bits, group=group: KIVICache(model.config, bits, group)
        made[f"basis + groups {bits}-bit/{group}"] = lambda bits=bits, group=group: BasisGroupsCache(
            model.config, bits, group
        )
    return made | (host_backends(model) if peers else {})


def host_backends(model: Any) -> dict[str, Make]:
    """The host's quantised caches that can be had here."""
    made: dict[str, Make] = {}
    wanted = {"host fp8": {"backend": "fp8"}}
    for bits in (4, 2):
        wanted[f"host quanto-{bits}"] = {"backend": "quanto", "nbits": bits}
        wanted[f"host quanto-{bits} axis -1"] = {"backend": "quanto", "nbits": bits, "axis_key": -1, "axis_value": -1}
        wanted[f"host hqq-{bits}"] = {"backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1}
    for name, options in wanted.items():
        try:
            QuantizedCache(config=model.config, **options)
        except ImportError as error:
            print(f"caches: {name} is left out: {str(error).splitlines()[0]}")
            continue
        made[name] = lambda options=options: QuantizedCache(config=model.config, **options)
    return made


def grouped(states: Tensor, bits: int) -> Tensor:
    """Asymmetric round-to-nearest over the last dimension, rebuilt."""
    low, high = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    return ((states - low) / step).round() * step + low


class KIVICache(DynamicCache):
    """KIVI's groups (arXiv 2402.02750), simulated: rebuilt numbers are stored, ``bits_per_number`` is what they cost.

    Keys in groups of ``group`` tokens of one channel, values in groups of channels of one token, float16 scale and
    offset each; the last ``group`` tokens stay as they are. The prompt is quantised after it ran, as in KIVI.
    """

    def __init__(self, config: Any, bits: int, group: int) -> None:
        super().__init__(config=config)
        self.bits, self.group = bits, group
        self.bits_per_number = bits + 32 / group

    def quantise(self) -> None:
        """Quantise everything but the last group."""
        for layer in self.layers:
            end = max(layer.keys.shape[2] // self.group - 1, 0) * self.group
            layer.keys[:, :, :end] = self.over_tokens(layer.keys[:, :, :end])
            layer.values[:, :, :end] = self.over_channels(layer.values[:, :, :end])

    def over_tokens(self, states: Tensor) -> Tensor:
        """Quantise groups of tokens of one channel."""
        by_channel = states.transpose(2, 3).unflatten(-1, (-1, self.group))
        return grouped(by_channel, self.bits).flatten(-2).transpose(2, 3)

    def over_channels(self, states: Tensor) -> Tensor:
        """Quantise groups of channels of one token."""
        by_token = states.unflatten(-1, (-1, min(self.group, states.shape[-1])))
        return grouped(by_token, self.bits).flatten(-2)

    def nbytes(self) -> int:
        """What KIVI would store: packed groups, and one group in float16."""
        total = 0.0
        for layer in self.layers:
            per_token = 2 * layer.keys[:, :, 0].numel()
            end = max(layer.keys.shape[2] // self.group - 1, 0) * self.group
            total += per_token * (end * self.bits_per_number / 8 + (layer.keys.shape[2] - end) * 2)
        return int(total)


class BasisGroupsCache(KIVICache):
    """DecoQuant's basis with asymmetric groups: each coefficient in groups of tokens, keys and values alike."""

    def over_tokens(self, states: Tensor) -> Tensor:
        """Quantise the coefficients of ``states [1, H, T, D]`` in the basis of their principal directions."""
        rows = states.double().flatten(0, 2)
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors.to(states.dtype)
        return super().over_tokens(states @ basis) @ basis.T

    over_channels = over_tokens

    def nbytes(self) -> int:
        """Groups, and two bases in float16 a layer."""
        return super().nbytes() + sum(2 * 2 * layer.keys.shape[-1] ** 2 for layer in self.layers)


def cache_bytes(cache: Any) -> int:
    """Bytes of what a cache holds, codes, scales and everything else."""
    if isinstance(cache, HfExtCache | KIVICache):
        return cache.nbytes()
    return sum(tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in a value, whatever a backend wraps them in."""
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    inner = [getattr(value, name, None) for name in ("_data", "_scale", "_shift")]
    if any(isinstance(part, Tensor) for part in inner):
        return sum(map(tensor_bytes, inner))
    return value.numel() * value.element_size()
