"""Takes away what a consumer layer does not need, and gives a producer the normalisation the paper trains.

A module whose input or output has to change is put one level deeper, into a `Slot` that stands in its old place. Its
own name stays the last part of its path, so that adapters that target ``q_proj`` or ``qkv_proj`` find it.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ext.patches.architectures import Architecture, FusedProjection

QUERY_ONLY = "query_only"
KV_NORM = "kv_norm"
INPUTS = {"q_proj": "query_input", "k_proj": "key_input", "v_proj": "value_input"}


class Slot(nn.Module):
    """Stands where a module stood and holds it under its own name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.held = name
        self.add_module(name, module)

    def module(self) -> nn.Module:
        """The module that stood here, or what an adapter has put in its place."""
        return self.get_submodule(self.held)


class QueryOnly(Slot):
    """A fused projection that makes queries only, and zeros where its output has keys and values.

    Attributes:
        blocks: blocks of query rows: one for each head, or one for all.
        padding: zeros behind each block.
    """

    def __init__(self, name: str, module: nn.Module, blocks: int, padding: int) -> None:
        super().__init__(name, module)
        self.blocks = blocks
        self.padding = padding

    def forward(self, hidden: Tensor) -> Tensor:
        """From `[B, T, hidden]` to the fused projection's `[B, T, rows]`."""
        query = self.module()(hidden)
        return F.pad(query.unflatten(-1, (self.blocks, -1)), (0, self.padding)).flatten(-2)


class HalfInput(Slot):
    """A projection that reads one half of its input: the queries' normalised states or the keys' and values'."""

    def __init__(self, name: str, module: nn.Module, side: int) -> None:
        super().__init__(name, module)
        self.side = side

    def forward(self, hidden: Tensor) -> Tensor:
        """From `[B, T, 2 hidden]` to the projection's output."""
        return self.module()(hidden.chunk(2, dim=-1)[self.side])


def drop_keys_and_values(attention: Any, architecture: Architecture, config: Any) -> None:
    """Leave a consumer its queries and its output projection only. Doing it again changes nothing."""
    if architecture.fused is not None:
        if architecture.fused.name in attention._modules:
            _keep_queries(attention, architecture.fused, config)
        return
    for name in architecture.keys_and_values:
        if name in attention._modules:
            delattr(attention, name)
            vars(attention)[name] = (
                partial(one_zero_head, head_dim=attention.head_dim) if "proj" in name else unchanged
            )


def one_zero_head(hidden: Tensor, *, head_dim: int) -> Tensor:
    """In the place of a consumer's key and value projections: zeros `[B, T, D]` without memory, which nobody reads."""
    return hidden.new_zeros(()).expand(*hidden.shape[:-1], head_dim)


def unchanged(states: Tensor) -> Tensor:
    """In the place of a consumer's key normalisation."""
    return states


def query_rows(fused: FusedProjection, config: Any) -> tuple[Tensor, int, int]:
    """The rows of a fused projection that make queries, the blocks they form, and the rows behind each block."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not fused.per_head:
        return torch.arange(heads * head_dim), 1, 2 * kv_heads * head_dim
    rows = torch.arange(3 * heads * head_dim).view(heads, 3, head_dim)[:, 0].flatten()
    return rows, heads, 2 * head_dim


def _keep_queries(attention: nn.Module, fused: FusedProjection, config: Any) -> None:
    whole: Any = attention.get_submodule(fused.name)
    rows, blocks, padding = query_rows(fused, config)
    query = nn.Linear(whole.in_features, len(rows), whole.bias is not None, device="meta")  # draws no random numbers
    for name, parameter in whole.named_parameters():
        kept = nn.Parameter(parameter.detach()[rows.to(parameter.device)].clone(), parameter.requires_grad)
        _mark_like(parameter, kept)
        setattr(query, name, kept)
    _mark_like(whole, query)
    _put(attention, fused.name, QUERY_ONLY, QueryOnly(fused.name, query, blocks, padding))


def _mark_like(old: Any, new: Any) -> None:
    """What the host has initialised already it does not initialise again."""
    if hasattr(old, "_is_hf_initialized"):
        new._is_hf_initialized = old._is_hf_initialized


def separate_norm(layer: nn.Module, attention: nn.Module, architecture: Architecture) -> None:
    """Give a producer's keys and values a normalisation weight of their own, equal to the queries' at first.

    The layer's norm then returns both normalised states side by side, `[B, T, 2 hidden]`, and each projection reads
    its half. Doing it again changes nothing.

    Raises:
        ValueError: the architecture has no norm that feeds only the attention, or makes q, k and v in one projection.
    """
    if architecture.input_norm is None:
        raise ValueError(
            "separate_kv_norm=True needs an RMSNorm in front of separate query, key and value projections, which this "
            "model does not have; leave it False."
        )
    norm = layer.get_submodule(architecture.input_norm)
    if hasattr(norm, KV_NORM):
        return
    norm.add_module(KV_NORM, copy.deepcopy(norm))
    norm.register_forward_hook(append_kv_input)
    for name, slot in INPUTS.items():
        _put(attention, name, slot, HalfInput(name, attention.get_submodule(name), side=0 if name == "q_proj" else 1))


def join_norm(layer: nn.Module, attention: nn.Module, architecture: Architecture) -> None:
    """Undo `separate_norm` on a producer that becomes a consumer; its queries keep their norm."""
    norm = None if architecture.input_norm is None else layer.get_submodule(architecture.input_norm)
    if norm is None or KV_NORM not in norm._modules:
        return
    delattr(norm, KV_NORM)
    for key in [key for key, hook in norm._forward_hooks.items() if hook is append_kv_input]:
        del norm._forward_hooks[key]
    for name, slot in INPUTS.items():
        held = vars(attention).pop(name).module()
        delattr(attention, slot)
        attention.add_module(name, held)


def append_kv_input(norm: nn.Module, args: tuple[Tensor, ...], normed: Tensor) -> Tensor:
    """Forward hook of a producer's norm: the queries' input and the keys' and values' input, side by side."""
    return torch.cat([normed, norm.get_submodule(KV_NORM)(args[0])], dim=-1)


def _put(attention: nn.Module, name: str, slot: str, module: Slot) -> None:
    if name in attention._modules:
        delattr(attention, name)
    attention.add_module(slot, module)
    vars(attention)[name] = module  # found before any submodule, and not counted as one
