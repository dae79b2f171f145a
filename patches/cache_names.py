"""Lets ``generate`` build our caches: by name (``cache_implementation="sirllm"``) and from the ``kv_cache`` flag."""

from functools import wraps
from types import ModuleType
from typing import Any

from hf_ext.patches.config_flag import find_flags
from hf_ext.patches.patch import Patch
from hf_ext.registry import CACHES


def allow_names(host: ModuleType, patch: Patch) -> None:
    """Add our cache names to those ``GenerationConfig.validate`` accepts."""
    patch.set(host, "ALL_CACHE_IMPLEMENTATIONS", (*host.ALL_CACHE_IMPLEMENTATIONS, *CACHES))


def build_named_caches(host: ModuleType, patch: Patch) -> None:
    """Wrap ``GenerationMixin._prepare_cache_for_generation``: where it would make a cache, make the one asked for."""
    original = host.GenerationMixin._prepare_cache_for_generation

    @wraps(original)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        request = _requested(self, generation_config)
        if request is None or model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return original(self, generation_config, model_kwargs, *args, **kwargs)
        from hf_ext.patches.caches import make_cache

        cache = model_kwargs["past_key_values"] = make_cache(self, request)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None

    patch.set(host.GenerationMixin, "_prepare_cache_for_generation", prepare)


def _requested(model: Any, generation_config: Any) -> Any:
    """What describes the cache: the name given to this call, else the model's flag, else None for the host's own."""
    name = generation_config.cache_implementation
    if name in CACHES:
        return {"type": name, **(generation_config.cache_config or {})}
    flags = find_flags(model.config) if name is None else None
    return None if flags is None else flags.kv_cache
