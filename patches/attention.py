"""Lets a layer of our caches see the queries, and answer for the attention over keys it has packed.

``AttentionInterface.get_interface`` is where every model of transformers 5 asks for its attention function. Once a
cache that needs it exists, the function it gets looks whether the keys were marked by one of our layers
(`hf_ext.caches.observed`); all other keys go straight to the function that was asked for.
"""

from functools import wraps
from types import ModuleType
from typing import Any

from hf_ext.patches.patch import Patch


def watch_attention(host: ModuleType, patch: Patch) -> None:
    """Wrap ``AttentionInterface.get_interface``."""
    from hf_ext.caches.observed import SEAM

    original = host.AttentionInterface.get_interface

    @wraps(original)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = original(self, *args, **kwargs)
        return _watched(function) if SEAM.used else function

    patch.set(host.AttentionInterface, "get_interface", get_interface)
    patch.set(SEAM, "open", True)


def _watched(inner: Any) -> Any:
    from hf_ext.caches.observed import MARK

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        layer = getattr(key, MARK, None)
        if layer is None:
            return inner(module, query, key, value, attention_mask, *args, **kwargs)
        return layer.attend(inner, module, query, key, value, attention_mask, *args, **kwargs)

    return attention
