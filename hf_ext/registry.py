"""Names that users write, and the class each stands for, as ``module:attribute`` so that nothing loads before use."""

import importlib
from collections.abc import Mapping
from typing import Any

CACHES: dict[str, str] = {
    "decoquant": "hf_ext.caches.decoquant:DecoQuantConfig",
    "h2o": "hf_ext.caches.h2o:H2OConfig",
    "knorm": "hf_ext.caches.knorm:KnormConfig",
    "pyramid_infer": "hf_ext.caches.pyramid_infer:PyramidInferConfig",
    "pyramid_infer_cache": "hf_ext.caches.pyramid_infer:PyramidInferCacheConfig",
    "pyramid_kv": "hf_ext.caches.pyramid_kv:PyramidKVConfig",
    "snapkv": "hf_ext.caches.snapkv:SnapKVConfig",
    "tova": "hf_ext.caches.tova:TOVAConfig",
    "sink_window": "hf_ext.caches.sink_window:SinkWindowConfig",
    "sirllm": "hf_ext.caches.sirllm:SirLLMConfig",
}


def load(reference: str) -> Any:
    """Import the object that a ``module:attribute`` reference names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def look_up(table: Mapping[str, str], name: str, kind: str) -> Any:
    """The object registered under ``name``.

    Raises:
        ValueError: nothing is registered under ``name``; ``kind`` says in words what was looked for.
    """
    if name not in table:
        raise ValueError(f"{name!r} is no {kind}; allowed: {', '.join(sorted(table))}.")
    return load(table[name])
