"""`convert_to_cla`: a trained dense model as a Cross-Layer Attention model, to be healed by some more training."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_ext.cla.config import CLAConfig
from hf_ext.cla.fit import Moments, key_factor, match_heads, turn_output, turn_queries, value_map
from hf_ext.cla.plan import consumers, plan
from hf_ext.cla.shared import shared_layers
from hf_ext.flags import HfExtConfig
from hf_ext.patches.architectures import Architecture, architecture_of
from hf_ext.patches.cla import apply_flag, attentions_of, has_keys_and_values
from hf_ext.patches.cla_config import layer_kinds
from hf_ext.patches.cla_layers import Slot, query_rows
from hf_ext.patches.cla_sharing import connect, disconnect
from hf_ext.patches.config_flag import find_flags

Init = Literal["copy", "mean", "fit"]
WINDOW = 512  # tokens a calibration forward


def convert_to_cla(
    model: Any,
    config: CLAConfig | Mapping[str, Any],
    init: Init = "copy",
    calibration: Tensor | None = None,
    *,
    inplace: bool = False,
) -> Any:
    """A Cross-Layer Attention model from a trained one, to be healed by some training (see `CLADistillTrainer`).

    A model that shares already can be converted on to a map with more consumers. Converting again with the same
    config changes nothing.

    Args:
        model: a causal language model of a supported architecture, without adapters.
        config: which layers share.
        init: where a group's keys and values come from. ``copy`` takes the producer's, ``mean`` the mean of all the
            group's weights, ``fit`` the producer's, with each consumer's queries and outputs turned towards them by
            least squares on the calibration text (no new parameters).
        calibration: token ids `[T]` for ``fit``; a few thousand are enough.
        inplace: change ``model`` itself. Otherwise it stays as it is and a copy with the same dtype and devices is
            returned.

    Raises:
        ValueError: the map does not fit the model, ``init`` is unknown or cannot be used with this model.
    """
    config = config if isinstance(config, CLAConfig) else CLAConfig.from_dict(config)
    decoder = model.get_decoder()
    architecture = architecture_of(decoder, "convert_to_cla")
    sources = plan(config, layer_kinds(decoder.config))
    _check(model, architecture, init, calibration)
    new = model if inplace else copy.deepcopy(model)
    attentions = attentions_of(new.get_decoder(), architecture)
    if init == "mean":
        _average_groups(attentions, architecture, sources, decoder.config)
    if init == "fit" and calibration is not None:
        known = shared_layers(model)
        pairs = {layer: sources[layer] for layer in consumers(sources) if known.get(layer) != sources[layer]}
        for layer, moments in collect_moments(model, pairs, calibration).items():
            turn_consumer(attentions[layer], moments)
    flags = find_flags(new.config)
    new.config.hf_ext = replace(flags, cla=config) if flags is not None else HfExtConfig(cla=config)
    apply_flag(new, config)
    return new


@contextmanager
def probe(model: Any, sources: tuple[int, ...], moments: Mapping[int, Moments] | None = None) -> Iterator[None]:
    """Inside the block a model shares as the map says, with all its weights; outside it is as before.

    Example:
        ```python
        with probe(model, (0, 0, 2, 3)):     # layer 1 reads layer 0, as after convert_to_cla(init="copy")
            model(ids)
        model(ids)                           # as before, also when the block raised
        ```

    Args:
        model: a dense model, or one that shares already, as far as the map goes on sharing what it shares.
        sources: the map.
        moments: from `collect_moments`, to measure ``init="fit"``.

    Raises:
        ValueError: a layer that has no keys and values is to be a producer, or the architecture is not supported.
    """
    decoder = model.get_decoder()
    architecture = architecture_of(decoder, "probe")
    attentions = attentions_of(decoder, architecture)
    before = shared_layers(model)
    if gone := [layer for layer in before if sources[layer] == layer]:
        raise ValueError(
            f"Layers {gone} of this model read other layers' keys and values and have none to probe with."
        )
    kept = {layer: copy.deepcopy(attentions[layer].state_dict()) for layer in moments or ()}
    try:
        for layer, found in (moments or {}).items():
            turn_consumer(attentions[layer], found)
        disconnect(decoder, attentions)
        connect(decoder, attentions, sources, architecture.cache_argument)
        yield
    finally:
        disconnect(decoder, attentions)
        if before:
            connect(decoder, attentions, as_map(before, len(attentions)), architecture.cache_argument)
        for layer, state in kept.items():
            attentions[layer].load_state_dict(state)


def as_map(shared: Mapping[int, int], layers: int) -> tuple[int, ...]:
    """The map of sources from `shared_layers`."""
    return tuple(shared.get(layer, layer) for layer in range(layers))


def collect_moments(model: Any, pairs: Mapping[int, int], ids: Tensor) -> dict[int, Moments]:
    """Sums over a calibration text of the keys and values of every new consumer and its source, ``pairs``."""
    moments = {layer: Moments() for layer in pairs}
    for cache in remembered(model, ids):
        for layer, found in moments.items():
            add_tokens(found, cache, layer, pairs[layer])
    return moments


def remembered(model: Any, ids: Tensor) -> Iterator[Any]:
    """A cache with the keys and values of all layers for each window of a calibration text `[T]`."""
    from transformers import DynamicCache

    training = model.training
    model.eval()
    try:
        for window in ids.reshape(1, -1).split(WINDOW, dim=1):
            kept = DynamicCache()  # without a config every layer keeps every token, sliding windows too
            with torch.no_grad():
                model.get_decoder()(input_ids=window.to(model.device), past_key_values=kept, use_cache=True)
            yield kept
    finally:
        model.train(training)


def add_tokens(moments: Moments, cache: Any, layer: int, source: int) -> None:
    """Count a cache's tokens for one consumer and its source."""
    own, other = cache.layers[layer], cache.layers[source]
    moments.add(own.keys.cpu(), own.values.cpu(), other.keys.cpu(), other.values.cpu())


@torch.no_grad()
def turn_consumer(attention: nn.Module, moments: Moments) -> None:
    """Turn a consumer's queries and outputs towards its source's keys and values, head by matching head."""
    norm: Any = getattr(attention, "q_norm", None)
    heads = match_heads(moments, turn_keys=norm is None)
    output: Any = attention.get_submodule("o_proj")
    output.weight.copy_(turn_output(output.weight, value_map(moments, heads).to(output.weight.device), heads))
    query: Any = projection(attention, "q_proj")
    factors = key_factor(moments, heads).to(query.weight.device)
    turned = list(query.parameters())
    if norm is not None:  # a normalisation between projection and rotation undoes a factor, so heads only move
        factors = torch.ones_like(factors)
        turned += [weight for weight in norm.parameters() if len(weight) == len(query.weight)]  # one over all heads
    for parameter in turned:
        parameter.copy_(turn_queries(parameter, factors, heads))


def projection(attention: nn.Module, name: str) -> nn.Module:
    """A projection of an attention module, also when it stands in a `Slot`."""
    found: nn.Module = getattr(attention, name)
    return found.module() if isinstance(found, Slot) else found


def _check(model: Any, architecture: Architecture, init: str, calibration: Tensor | None) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError("convert_to_cla needs a model without adapters; call merge_and_unload() first.")
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {init!r}.")
    if init != "copy" and getattr(model, "is_quantized", False):
        raise ValueError(f"init={init!r} changes weights, which a quantised model keeps packed; use init='copy'.")
    if init != "fit":
        return
    if architecture.fused is not None:
        raise ValueError("init='fit' needs separate query and output projections, which this model does not have.")
    if calibration is None or calibration.numel() < 2:
        raise ValueError("init='fit' needs calibration=token ids of some text, a few thousand.")


@torch.no_grad()
def _average_groups(attentions: list[Any], architecture: Architecture, sources: tuple[int, ...], config: Any) -> None:
    """Give every producer the mean of what the layers of its group have for making keys and values."""
    for source in set(sources):
        group = [a for layer, a in enumerate(attentions) if sources[layer] == source]
        group = [attention for attention in group if has_keys_and_values(attention, architecture)]
        names = architecture.keys_and_values if architecture.fused is None else (architecture.fused.name,)
        for name in names:
            modules = [projection(attention, name) for attention in group]
            for parameters in zip(*(list(module.parameters()) for module in modules), strict=True):
                mean = torch.stack([parameter.double().cpu() for parameter in parameters]).mean(0)
                target = parameters[0]
                rows = torch.ones(len(target), dtype=torch.bool)
                if architecture.fused is not None:
                    rows[query_rows(architecture.fused, config)[0]] = False
                target[rows.to(target.device)] = mean[rows].to(target)
