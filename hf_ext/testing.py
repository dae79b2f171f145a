"""Tiny random models, ragged batches and named comparisons, for tests and for authors of new features."""

from typing import Any

import torch
from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2")

# For every kind of cache: options so small that 40 tokens meet them, and options under which nothing may be lost.
SMALL: dict[str, dict[str, Any]] = {
    "decoquant": {"bits": 8, "first_block": 8, "block_size": 3, "sink_size": 2},
    "h2o": {"budget": 12, "recent_size": 4},
    "knorm": {"budget": 12, "recent_size": 4},
    "pyramid_infer": {"decay": 0.5, "min_context": 2, "sink_size": 2, "generation_block": 4, "voters": 3},
    "pyramid_infer_cache": {"decay": 0.5, "min_context": 2, "sink_size": 2, "generation_block": 4, "voters": 3},
    "pyramid_kv": {"budget": 12, "recent_size": 4},
    "snapkv": {"budget": 12, "recent_size": 4},
    "tova": {"budget": 12},
    "sink_window": {"sink_size": 2, "window_size": 14, "block_size": 4},
    "sirllm": {"sink_size": 2, "memory_size": 8, "recent_size": 6, "block_size": 4},
}
LOSSLESS: dict[str, dict[str, Any]] = {
    "decoquant": {"first_block": 1000},
    "h2o": {"budget": 200},
    "knorm": {"budget": 200},
    "pyramid_infer": {"decay": 1.0, "generation_block": 0},
    "pyramid_infer_cache": {"decay": 1.0, "generation_block": 0},
    "pyramid_kv": {"budget": 1.0, "layer_budgets": [1, 1, 1, 1]},
    "snapkv": {"budget": 200},
    "tova": {"budget": 200},
    "sink_window": {"window_size": 200},
    "sirllm": {"memory_size": 100, "recent_size": 100},
}


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """A config of 4 layers, 4 query heads, 2 KV heads and hidden size 64, with a vocabulary of 128 tokens.

    Mistral and Gemma keep their sliding window (8 tokens); Qwen, Phi-3 and the others have none.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gpt_neox":
        del options["num_key_value_heads"], options["head_dim"]
    if family in ("mistral", "gemma2", "gemma3_text"):
        options["sliding_window"] = 8
    return AutoConfig.for_model(family, **{**options, **overrides})


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A random causal language model of that family in eval mode; the same seed gives the same weights."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    return model.eval()


def ragged_batch(lengths: list[int], vocab_size: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded random prompts of the given lengths: ``input_ids`` and ``attention_mask``, both ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, vocab_size, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_close(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> None:
    """Compare by the largest absolute difference relative to the expected root mean square (or 1 if that is 0).

    Raises:
        AssertionError: shapes differ, a value is not finite, or the error is above ``tolerance``.
    """
    assert expected.shape == actual.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    scale = expected.double().square().mean().sqrt().item() or 1.0
    error = (expected.double() - actual.double()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: relative error {error:.3g} above {tolerance:.3g}"
