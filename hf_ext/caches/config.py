"""What the configs of all caches have in common, and how one is read from a name, a dict or a list."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_ext.options import Options
from hf_ext.registry import CACHES, look_up


@dataclass(frozen=True)
class CacheConfig(Options):
    """Options of one kind of cache; ``type`` is the name users write for it."""

    type: ClassVar[str]

    def check(self, model_config: Any) -> None:
        """Raise `ValueError` for a model that this cache cannot serve, beyond those that no cache can."""

    def build(self, model: Any, inner: "tuple[CacheConfig, ...]") -> Any:
        """A new `HfExtCache` for ``model``; ``inner`` are the caches it is to be wrapped around, outermost first.

        Raises:
            ValueError: this cache cannot be wrapped around those.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its cache.")

    def refuse_inner(self, inner: "tuple[CacheConfig, ...]") -> None:
        """Raise `ValueError` unless ``inner`` is empty, for caches that wrap no other."""
        if inner:
            names = ", ".join(config.type for config in inner)
            raise ValueError(f"the {self.type} cache cannot be wrapped around another, got {names}.")

    def to_dict(self) -> dict[str, Any]:
        """Every option and the ``type``, as plain JSON values."""
        return {"type": self.type, **super().to_dict()}


def cache_config(value: CacheConfig | Mapping[str, Any] | str) -> CacheConfig:
    """One cache config from a config, a name such as ``"sirllm"``, or a dict with ``type`` and options.

    Raises:
        ValueError: the type or an option does not exist, or ``value`` is none of these.
    """
    if isinstance(value, CacheConfig):
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping) or "type" not in value:
        raise ValueError(f"kv_cache must be a cache config, a name or a dict with a 'type', got {value!r}.")
    options = {name: option for name, option in value.items() if name != "type"}
    config: CacheConfig = look_up(CACHES, value["type"], "kind of cache").from_dict(options)
    return config


def cache_configs(value: Any) -> tuple[CacheConfig, ...]:
    """The stack of cache configs, outermost first, that ``value`` describes.

    Raises:
        ValueError: the stack is empty or one of its members is no cache config.
    """
    stack = value if isinstance(value, list | tuple) else [value]
    if not stack:
        raise ValueError("kv_cache must name at least one cache, got an empty list.")
    return tuple(cache_config(member) for member in stack)


def check_sizes(config: CacheConfig, *names: str, least: int) -> None:
    """Raise `ValueError` unless these options are whole numbers of at least ``least``."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_numbers(config: CacheConfig, *names: str) -> None:
    """Raise `ValueError` unless these options are finite numbers; ranges are for the caller to check."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number, got {value!r}.")
