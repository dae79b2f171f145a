"""A prompt that many caches read: the model runs over it once, and each cache is handed the same keys and values."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from _cache_methods import KIVICache
from torch import Tensor

from hf_ext import make_cache
from hf_ext.caches.base import HfExtCache
from hf_ext.caches.evicting import EvictConfig
from hf_ext.caches.evicting_layer import Evicts
from hf_ext.caches.forward import Forward
from hf_ext.caches.observed import MARK


@dataclass(frozen=True)
class RecordConfig(EvictConfig):
    """A policy that drops nothing and keeps what attention was given."""

    type: ClassVar[str] = "record"
    accumulates: ClassVar[bool] = True  # so that it is shown every forward

    budget: int | float | str = 1.0

    def score(self, layer: Evicts, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
        """Remember queries, keys and values."""
        layer.recorded = (query, keys.clone(), values.clone())  # type: ignore[attr-defined]


class Prompt:
    """A prompt and, once a cache asked for them, its rotated queries, its keys and its values in every layer.

    Every cache here but PyramidInfer compresses a prompt after attention read it whole, so all are given the same
    numbers, which the model computes once. PyramidInfer changes what deeper layers compute: it runs the model.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.recorded: list[tuple[Tensor, Tensor, Tensor]] = []
        self.logits: Tensor | None = None

    def read(self, cache: Any) -> Tensor:
        """Give the cache this prompt, which it compresses; return logits ``[1, V]`` after it."""
        if getattr(getattr(cache, "config", None), "gathers", False):
            return prefill(self.model, self.ids, cache)
        if self.logits is None:
            recorder = make_cache(self.model, RecordConfig())
            self.logits = prefill(self.model, self.ids, recorder)
            self.recorded = [layer.recorded for layer in recorder.own_layers]  # type: ignore[attr-defined]
        self.replay(cache)
        if isinstance(cache, KIVICache):
            cache.quantise()
        return self.logits

    @torch.no_grad()
    def replay(self, cache: Any) -> None:
        """Do to the cache what a forward over the prompt would do."""
        ours = isinstance(cache, HfExtCache)
        ids, decoder = self.ids[None], self.model.get_decoder()
        forward = Forward(decoder, self.model.lm_head, ids, None, None, 1, len(self.ids), ids.device)
        if ours:
            cache.begin_forward(forward)
        for index, (query, keys, values) in enumerate(self.recorded):
            keys, values = cache.update(keys.clone(), values.clone(), index)
            layer = getattr(keys, MARK, None)
            if layer is not None:
                layer.attend(lambda *_, **__: None, None, query, keys, values, None)
        if ours:
            cache.end_forward(forward, query)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits ``[1, V]`` after the prompt ``ids [T]``, which the model reads into the cache."""
    logits: Tensor = model(ids[None], past_key_values=cache, logits_to_keep=1).logits[0]
    return logits
