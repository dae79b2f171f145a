"""`HfExtConfig`: everything ``from_pretrained(..., hf_ext=...)`` accepts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_ext.caches.config import CacheConfig, cache_configs
from hf_ext.cla.config import CLAConfig
from hf_ext.options import Options


@dataclass(frozen=True)
class HfExtConfig(Options):
    """The flags a model can carry. They are saved in its config.json and applied again when it is loaded.

    Example:
        ```python
        model = AutoModelForCausalLM.from_pretrained(name, hf_ext=HfExtConfig(kv_cache=SirLLMConfig(memory_size=508)))
        model = AutoModelForCausalLM.from_pretrained(name, hf_ext={"kv_cache": {"type": "sirllm"}})  # the same kind
        model = AutoModelForCausalLM.from_pretrained(saved, hf_ext=None)                             # flags dropped
        ```

    Attributes:
        cla: Cross-Layer Attention, as a `CLAConfig` or a dict of its options. Changes the model's structure.
        kv_cache: the cache that ``generate`` uses: a cache config, its name, a dict with ``type`` and options, or a
            list of them, outermost first.
    """

    cla: CLAConfig | Mapping[str, Any] | None = None
    kv_cache: CacheConfig | Mapping[str, Any] | str | list[Any] | tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cla, Mapping):
            object.__setattr__(self, "cla", CLAConfig.from_dict(self.cla))
        elif not isinstance(self.cla, CLAConfig | None):
            raise ValueError(f"cla must be a CLAConfig or a dict of its options, got {self.cla!r}.")
        if self.kv_cache is not None:
            object.__setattr__(self, "kv_cache", cache_configs(self.kv_cache))

    def to_dict(self) -> dict[str, Any]:
        """The flags that are set, as plain JSON values."""
        flags: dict[str, Any] = {}
        if isinstance(self.cla, CLAConfig):
            flags["cla"] = self.cla.to_dict()
        if isinstance(self.kv_cache, tuple):
            flags["kv_cache"] = [config.to_dict() for config in self.kv_cache]
        return flags


def parse_flags(value: Any) -> HfExtConfig:
    """An `HfExtConfig` from what a user gave.

    Raises:
        ValueError: ``value`` is neither an `HfExtConfig` nor a dict, or names a flag that does not exist.
    """
    if isinstance(value, HfExtConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"hf_ext must be an HfExtConfig, a dict of flags or None, got {value!r}.")
    return HfExtConfig.from_dict(value)
