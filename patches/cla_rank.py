"""Measures, on a dense model, what each layer's keys and values are worth."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ext.cla.ranking import PairLoss, propose_map, within_bytes
from hf_ext.cla.shared import shared_layers
from hf_ext.evaluation import perplexity
from hf_ext.patches.cla_config import LayerKind, layer_kinds
from hf_ext.patches.cla_convert import collect_moments, probe


def rank_layers(
    model: Any,
    ids: Tensor,
    *,
    init: str = "copy",
    reach: int = 1,
    window: int = 512,
    known: Iterable[PairLoss] = (),
    done: Callable[[PairLoss], None] | None = None,
    progress: bool = False,
) -> list[PairLoss]:
    """The increase in loss when each layer alone reads an earlier layer of its kind, cheapest first.

    Args:
        model: the dense model.
        ids: token ids `[T]` of some text, a few thousand.
        init: ``copy`` or ``fit``, as in `convert_to_cla`; ``fit`` uses the same text.
        reach: how many of the nearest earlier layers of its kind each layer tries.
        window: tokens a forward.
        known: what an interrupted run has measured; not measured again.
        done: called after each measurement, to write it down.
        progress: show a progress bar.

    Raises:
        ValueError: ``init`` is unknown, ``reach`` is below 1, or the model's layers share already.
    """
    if shared_layers(model):
        raise ValueError("Only a dense model can be ranked, and the layers of this one share already.")
    if init not in ("copy", "fit"):
        raise ValueError(f"init must be copy or fit for a ranking, got {init!r}.")
    if reach < 1:
        raise ValueError(f"reach must be at least 1, got {reach}.")
    found = {(pair.layer, pair.source): pair for pair in known}
    kinds = layer_kinds(model.get_decoder().config)
    todo = [[pair for pair in candidates(kinds, back) if pair not in found] for back in range(1, reach + 1)]
    dense = perplexity(model, ids, window).nats if any(todo) else 0.0
    with tqdm(total=sum(map(len, todo)), unit="pair", disable=not progress) as bar:
        for pairs in todo:
            moments = collect_moments(model, dict(pairs), ids) if init == "fit" else {}
            for layer, source in pairs:
                sources = tuple(source if other == layer else other for other in range(len(kinds)))
                with probe(model, sources, {one: sums for one, sums in moments.items() if one == layer}):
                    found[layer, source] = PairLoss(layer, source, perplexity(model, ids, window).nats - dense)
                bar.update()
                if done is not None:
                    done(found[layer, source])
    return sorted(found.values(), key=lambda pair: pair.nats)


def candidates(kinds: list[LayerKind], back: int = 1) -> list[tuple[int, int]]:
    """Every layer with the ``back``-th nearest earlier layer of the same kind."""
    pairs = []
    for layer, kind in enumerate(kinds):
        earlier = [source for source in range(layer) if kinds[source] == kind]
        pairs.extend([(layer, earlier[-back])] if len(earlier) >= back else [])
    return pairs


def map_for_bytes(
    model: Any, losses: list[PairLoss], budget: int, *, dtype: torch.dtype | None = None, largest_group: int = 3
) -> tuple[int, ...]:
    """The proposed map whose keys and values take at most ``budget`` bytes a token.

    Raises:
        ValueError: no map of these pairs fits the budget.
    """
    kinds = layer_kinds(model.get_decoder().config)
    elements = [kind.kv_heads * kind.head_dim for kind in kinds]
    fits = within_bytes(budget, elements, (dtype or model.dtype).itemsize)
    return propose_map(losses, len(kinds), fits, largest_group)
