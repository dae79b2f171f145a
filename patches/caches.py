"""`make_cache`: a cache of hf_ext for a model, with the hooks it needs attached."""

from collections.abc import Mapping
from typing import Any

from hf_ext.caches.base import HfExtCache
from hf_ext.caches.config import CacheConfig, cache_configs
from hf_ext.caches.support import check_model_config
from hf_ext.patches.forward_context import attach, find_decoder
from hf_ext.patches.hidden_states import attach_gathering


def make_cache(model: Any, config: Any = None, **options: Any) -> HfExtCache:
    """A new, empty cache for ``model.generate(past_key_values=...)`` or ``model(past_key_values=...)``.

    Example:
        ```python
        cache = make_cache(model, "sirllm", memory_size=508)
        model.generate(**inputs, past_key_values=cache)
        cache.nbytes()
        ```

    Args:
        model: a causal language model of transformers, also one wrapped by PEFT.
        config: a cache config, a name, a dict with ``type`` and options, or a list of them, outermost first. None
            takes the model's ``kv_cache`` flag.
        options: options of the cache, together with a name or a dict.

    Raises:
        ValueError: the kind of cache or an option does not exist, or the cache cannot serve this model.
    """
    stack = _stack(model, config, options)
    check_flag(model, stack)
    attach(model)
    if getattr(stack[0], "gathers", False):
        attach_gathering(find_decoder(model))
    cache: HfExtCache = stack[0].build(model, stack[1:])
    return cache


def check_flag(model: Any, stack: tuple[CacheConfig, ...]) -> None:
    """Refuse a ``kv_cache`` flag that the model cannot have.

    Raises:
        ValueError: the cache cannot serve this kind of model.
    """
    for config in stack:
        check_model_config(model.config, config.type)
        config.check(model.config)


def _stack(model: Any, config: Any, options: dict[str, Any]) -> tuple[CacheConfig, ...]:
    if config is None:
        from hf_ext.patches.config_flag import find_flags

        flags = find_flags(model.config)
        if flags is None or flags.kv_cache is None:
            raise ValueError("make_cache needs a cache config: this model carries no kv_cache flag.")
        config = flags.kv_cache
    if options:
        if isinstance(config, str):
            config = {"type": config}
        if not isinstance(config, Mapping):
            raise ValueError(f"options go with a name or a dict, not with {config!r}.")
        config = {**config, **options}
    return cache_configs(config)
