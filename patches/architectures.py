"""What the attention layers of each supported model look like, as one table."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FusedProjection:
    """One projection that makes queries, keys and values at once.

    Attributes:
        name: its attribute on the attention module.
        per_head: True when each head's output rows are its query, key and value rows in turn (GPT-NeoX); False when
            all query rows come first, then all key rows, then all value rows (Phi-3).
    """

    name: str
    per_head: bool


@dataclass(frozen=True)
class Architecture:
    """Names on a decoder layer and on its attention module.

    Attributes:
        attention: the attention module on the decoder layer.
        cache_argument: the keyword by which the attention module receives its cache.
        keys_and_values: what only keys and values need: projections and key normalisation.
        fused: the fused projection, for models that have one instead.
        input_norm: the RMSNorm on the decoder layer whose output feeds nothing but the attention; None when there is
            none (OLMo-2 normalises after attention, GPT-NeoX has a LayerNorm).
    """

    attention: str = "self_attn"
    cache_argument: str = "past_key_values"
    keys_and_values: tuple[str, ...] = ("k_proj", "v_proj")
    fused: FusedProjection | None = None
    input_norm: str | None = "input_layernorm"


_STANDARD = Architecture()
_WITH_KEY_NORM = Architecture(keys_and_values=("k_proj", "v_proj", "k_norm"))

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _STANDARD,
    "mistral": _STANDARD,
    "qwen2": _STANDARD,
    "qwen3": _WITH_KEY_NORM,
    "gemma": _STANDARD,
    "gemma2": _STANDARD,
    "gemma3_text": _WITH_KEY_NORM,
    "olmo2": Architecture(keys_and_values=("k_proj", "v_proj", "k_norm"), input_norm=None),
    "phi3": Architecture(keys_and_values=(), fused=FusedProjection("qkv_proj", per_head=False), input_norm=None),
    "gpt_neox": Architecture(
        attention="attention",
        cache_argument="layer_past",
        keys_and_values=(),
        fused=FusedProjection("query_key_value", per_head=True),
        input_norm=None,
    ),
}


def architecture_of(decoder: Any, feature: str) -> Architecture:
    """The table's entry for a decoder.

    Raises:
        ValueError: the model type is not in the table; ``feature`` names what was asked of it.
    """
    model_type = decoder.config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{feature} does not support {type(decoder).__name__} (model type {model_type!r}); supported model types: "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model_type]
