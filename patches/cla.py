"""Cross-Layer Attention (arXiv 2405.12981) on stock models: the ``cla`` flag applied to a model's decoder."""

from typing import Any

import transformers
from torch import nn
from transformers import cache_utils

from hf_ext.cla.config import CLAConfig
from hf_ext.cla.plan import consumers, plan
from hf_ext.flags import HfExtConfig
from hf_ext.patches.architectures import Architecture, architecture_of
from hf_ext.patches.cla_config import layer_kinds
from hf_ext.patches.cla_layers import INPUTS, drop_keys_and_values, join_norm, separate_norm
from hf_ext.patches.cla_sharing import connect, disconnect
from hf_ext.patches.config_flag import get_flags, set_flags


def apply_flag(model: Any, cla: CLAConfig) -> None:
    """Make a model's layers share keys and values as the flag says. Applying the same flag again changes nothing.

    Raises:
        ValueError: the architecture is not supported, the map does not fit the model, or the model has been built
            with another map and has no projections for a layer that is to be a producer now.
    """
    check_host()
    decoder = model.get_decoder()
    architecture = architecture_of(decoder, "cla")
    sources = plan(cla, layer_kinds(decoder.config))
    share_layers(decoder, architecture, sources, cla.separate_kv_norm)
    if decoder.config is not model.config:
        _carry_to_text_config(decoder.config, cla)
    if architecture.keys_and_values and consumers(sources):
        # The dense model's weights for these are expected not to find a place; an adapter's are reported.
        layers, names = "|".join(map(str, consumers(sources))), "|".join(architecture.keys_and_values)
        pattern = rf"layers\.(?:{layers})\.{architecture.attention}\.(?:{names})\.(?!.*lora_)"
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}


def check_host() -> None:
    """Refuse a host whose caches do not know layers that store nothing.

    Raises:
        ImportError: transformers is older than 5.23.
    """
    if not hasattr(cache_utils, "KVSharingDict"):
        raise ImportError(f"The cla flag needs transformers 5.23 or newer, got {transformers.__version__}.")


def attentions_of(decoder: Any, architecture: Architecture) -> list[Any]:
    """The attention module of every layer."""
    return [layer.get_submodule(architecture.attention) for layer in decoder.layers]


def share_layers(decoder: Any, architecture: Architecture, sources: tuple[int, ...], separate: bool) -> None:
    """Structure and hooks for a map on a decoder; where the map shares nothing, nothing is attached."""
    attentions = attentions_of(decoder, architecture)
    for layer, source in enumerate(sources):
        if source == layer and not has_keys_and_values(attentions[layer], architecture):
            raise ValueError(
                f"Layer {layer} cannot make its own keys and values: this model was built with a map in which it "
                f"reads those of another layer. Use the model's own map, or one with more consumers."
            )
    if not separate and any(INPUTS["k_proj"] in attention._modules for attention in attentions):
        raise ValueError("This model has norms of their own for keys and values; keep separate_kv_norm=True.")
    for layer, source in enumerate(sources):
        if separate and source == layer:
            separate_norm(decoder.layers[layer], attentions[layer], architecture)
    for layer in consumers(sources):
        join_norm(decoder.layers[layer], attentions[layer], architecture)
        drop_keys_and_values(attentions[layer], architecture, decoder.config)
    disconnect(decoder, attentions)
    if consumers(sources):
        connect(decoder, attentions, sources, architecture.cache_argument)


def has_keys_and_values(attention: nn.Module, architecture: Architecture) -> bool:
    """Whether an attention module owns what makes keys and values."""
    name = architecture.fused.name if architecture.fused is not None else "k_proj"
    return name in attention._modules or INPUTS.get(name) in attention._modules


def _carry_to_text_config(config: Any, cla: CLAConfig) -> None:
    """A composite model's caches are built from its text config, so that one carries the flag too."""
    own = get_flags(config)
    set_flags(config, HfExtConfig(cla=cla, kv_cache=None if own is None else own.kv_cache))
