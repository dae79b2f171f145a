"""Chooses which layers share by converting step by step and measuring each step against the dense model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ext.cla.fit import Moments
from hf_ext.cla.ranking import PairLoss, within_bytes
from hf_ext.cla.search import Map, search_pairs
from hf_ext.divergence import distillation_kl
from hf_ext.patches.architectures import architecture_of
from hf_ext.patches.cla import attentions_of
from hf_ext.patches.cla_config import layer_kinds
from hf_ext.patches.cla_convert import add_tokens, convert_to_cla, probe, remembered, turn_consumer


class _Search:
    """The model as far as it is converted, and the dense model's distributions that it is measured against."""

    def __init__(self, model: Any, ids: Tensor, window: int) -> None:
        self.student = copy.deepcopy(model).eval()
        self.attentions = attentions_of(
            self.student.get_decoder(), architecture_of(self.student.get_decoder(), "search_map")
        )
        self.windows = ids.reshape(1, -1).to(model.device).split(window, dim=1)
        self.dense = [self.logits(window).half() for window in self.windows]  # half the memory; far below 1e-3 nats
        self.caches = list(remembered(self.student, ids))

    @torch.no_grad()
    def logits(self, window: Tensor) -> Tensor:
        """`[1, T, V]` of the model as it is now."""
        return self.student(window, use_cache=False).logits

    def moments(self, sources: Map, layer: int) -> Moments:
        """Of ``layer`` and what it is to read, for ``init="fit"``."""
        found = Moments()
        for cache in self.caches:
            add_tokens(found, cache, layer, sources[layer])
        return found

    def measure(self, sources: Map, layer: int) -> float:
        """KL(dense ‖ converted) in nats a token when ``layer`` shares too, fitted."""
        total = 0.0
        with probe(self.student, sources, {layer: self.moments(sources, layer)}):
            for window, dense in zip(self.windows, self.dense, strict=True):
                counted = torch.ones_like(window, dtype=torch.bool)
                total += window.numel() * distillation_kl(self.logits(window), dense, counted, 1.0).item()
        return total / sum(window.numel() for window in self.windows)

    def accept(self, sources: Map, layer: int) -> None:
        """Convert ``layer`` for good; what later layers are fitted to is what this leaves."""
        turn_consumer(self.attentions[layer], self.moments(sources, layer))
        convert_to_cla(self.student, {"kv_source_layers": sources}, inplace=True)
        self.caches = list(remembered(self.student, torch.cat(self.windows, dim=1)))


def search_map(
    model: Any,
    ids: Tensor,
    budget: int,
    ranked: Sequence[PairLoss],
    *,
    largest_group: int = 3,
    window: int = 512,
    known: Mapping[Map, float] | None = None,
    done: Callable[[Map, float], None] | None = None,
    progress: bool = False,
) -> Map:
    """The map found by sharing one layer after another, each time the one that costs least beside all earlier ones.

    Every step is measured on the model as converted so far, with ``init="fit"``, as KL(dense ‖ converted) on ``ids``;
    see `search_pairs` for which pairs are measured.

    Args:
        model: the dense model; left as it is.
        ids: token ids `[T]` of some text, one or two thousand. Its logits are kept in half precision, `2 T V` bytes.
        budget: most bytes of keys and values a token.
        ranked: from `rank_layers`, which pairs there are and what they cost alone.
        largest_group: most layers that may use one layer's keys and values.
        window: tokens a forward.
        known: what an interrupted search has measured, from ``done``.
        done: called with each measured map and its nats a token, to write them down.
        progress: show a progress bar.

    Raises:
        ValueError: no map of the ranked pairs fits the budget, or the model cannot be fitted.
    """
    kinds = layer_kinds(model.get_decoder().config)
    fits = within_bytes(budget, [kind.kv_heads * kind.head_dim for kind in kinds], model.dtype.itemsize)
    search, known = _Search(model, ids, window), known or {}
    with tqdm(unit="map", disable=not progress) as bar:

        def measure(sources: Map, layer: int) -> float:
            if sources in known:
                return known[sources]
            nats = search.measure(sources, layer)
            bar.update()
            if done is not None:
                done(sources, nats)
            return nats

        return search_pairs(ranked, len(kinds), fits, measure, search.accept, largest_group)
