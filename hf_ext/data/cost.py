"""Floating-point operations of a training step of a decoder, by sequence length (see arXiv 2405.13226, Fig. 7).

A token costs ``6 N`` operations in the ``N`` weights it is multiplied with (output head included, embedding table
not), and ``12 n_layers d L`` in attention over a sequence of ``L`` tokens, ``d = heads * head_dim``: two products of
``2 L d`` forward, twice that backward. Kernels that skip the masked half do ``6 n_layers d L``.
"""

from collections.abc import Mapping
from typing import Any


def attention_width(config: Any) -> tuple[int, int]:
    """Layers, and query heads times head size, of a transformers config (its text part where it has several)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(text.num_hidden_layers), heads * int(head_dim)


def attention_flops(config: Any, tokens: float, length: float, causal: bool = False) -> float:
    """Operations, forward and backward, that ``tokens`` tokens in sequences of ``length`` spend in attention.

    Args:
        config: a transformers config.
        tokens: how many tokens.
        length: tokens of each sequence.
        causal: count only the unmasked half, as kernels that skip the other do.
    """
    layers, width = attention_width(config)
    return (6.0 if causal else 12.0) * layers * width * length * tokens


def matrix_parameters(model: Any) -> int:
    """Weights that every token is multiplied with: all but the embedding table, and the head even if it is tied."""
    total = sum(parameter.numel() for parameter in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and table is not None and head.weight is table.weight
    return int(total - (0 if table is None or tied else table.weight.numel()))


def training_flops(model: Any, tokens_by_length: Mapping[int, float], causal: bool = False) -> float:
    """Operations of training on so many tokens of each sequence length: weights, head and attention.

    Args:
        model: a transformers model.
        tokens_by_length: tokens in sequences of each length.
        causal: see `attention_flops`.
    """
    weights = 6.0 * matrix_parameters(model) * sum(tokens_by_length.values())
    attention = sum(attention_flops(model.config, n, length, causal) for length, n in tokens_by_length.items())
    return weights + attention
