"""Which models a cache can serve, decided from their config alone."""

from typing import Any

SERVED = ("full_attention", "sliding_attention", "chunked_attention", "dummy")


def check_model_config(config: Any, cache: str) -> None:
    """Refuse models whose keys and values no cache of hf_ext can hold.

    Raises:
        ValueError: the model is an encoder-decoder, has layers without keys and values, or only sliding-window layers.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"the {cache} cache serves decoder-only models; {config.model_type!r} is an encoder-decoder.")
    types = layer_types(config)
    strange = sorted(set(types) - set(SERVED))
    if strange:
        raise ValueError(
            f"the {cache} cache does not serve {config.model_type!r}: it has layers of type {', '.join(strange)}; "
            f"served are {', '.join(SERVED)}."
        )
    if "full_attention" not in types:
        raise ValueError(
            f"the {cache} cache has nothing to do for {config.model_type!r}: none of its {len(types)} layers has full "
            f"attention ({', '.join(sorted(set(types)))}), so its cache is bounded already."
        )


def layer_types(config: Any) -> list[str]:
    """The type of each layer of the text decoder, as the host's own cache would have it."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return list(types)
