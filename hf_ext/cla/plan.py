"""From a `CLAConfig` and a model's layers to the map of sources, and what the map costs in bytes.

A map is a tuple ``sources`` with ``sources[layer] == layer`` for a producer and an earlier producer for a consumer.
"""

from collections.abc import Callable, Hashable, Sequence

from hf_ext.cla.config import CLAConfig, check_map


def plan(config: CLAConfig, layer_kinds: Sequence[Hashable]) -> tuple[int, ...]:
    """The map for a model with these layers.

    Args:
        config: what the user asked for.
        layer_kinds: for every layer what must be equal for two layers to share: attention type, KV heads, head size,
            rotary embedding. A pattern is laid over the layers of each kind separately.

    Raises:
        ValueError: the map has another length than the model, mixes kinds, or the factor exceeds the layers.
    """
    if config.kv_source_layers is not None:
        return _check_against(check_map(config.kv_source_layers), layer_kinds)
    factor = config.sharing_factor or 1
    if factor > len(layer_kinds):
        raise ValueError(f"sharing_factor must be at most the number of layers, {len(layer_kinds)}, got {factor}.")
    sources = list(range(len(layer_kinds)))
    for kind in dict.fromkeys(layer_kinds):
        layers = [layer for layer, other in enumerate(layer_kinds) if other == kind]
        local = _PATTERNS[config.pattern](len(layers), factor, config.remainder)
        for layer, source in zip(layers, local, strict=True):
            sources[layer] = layers[source]
    return tuple(sources)


def consumers(sources: Sequence[int]) -> list[int]:
    """The layers that read another layer's keys and values."""
    return [layer for layer, source in enumerate(sources) if source != layer]


def kv_bytes_per_token(sources: Sequence[int], elements: Sequence[int], element_size: int) -> int:
    """Bytes of keys and values that one token adds to a cache: the sum over producers of ``2 · heads · head size``.

    Args:
        sources: the map.
        elements: for every layer the elements of one token's keys, KV heads times head size.
        element_size: bytes of one element.
    """
    return sum(2 * elements[layer] * element_size for layer, source in enumerate(sources) if layer == source)


def _check_against(sources: tuple[int, ...], layer_kinds: Sequence[Hashable]) -> tuple[int, ...]:
    if len(sources) != len(layer_kinds):
        raise ValueError(
            f"kv_source_layers must have one entry for each of the model's {len(layer_kinds)} layers, "
            f"got {len(sources)}."
        )
    for layer, source in enumerate(sources):
        if layer_kinds[layer] != layer_kinds[source]:
            raise ValueError(
                f"kv_source_layers[{layer}] is {source}, but layer {layer} ({layer_kinds[layer]}) cannot read the "
                f"keys of layer {source} ({layer_kinds[source]}): layers that share must have one attention type, "
                f"number of KV heads, head size and rotary embedding."
            )
    return sources


def _uniform(layers: int, factor: int, remainder: str) -> list[int]:
    """Groups of ``factor`` adjacent layers; the producer is the lowest of each (the paper's figure 2)."""
    short = layers % factor if remainder == "front" else 0
    return [0 if layer < short else layer - (layer - short) % factor for layer in range(layers)]


def _keep_ends(layers: int, factor: int, remainder: str) -> list[int]:
    """The first and the last layer alone, uniform groups between them."""
    if layers < 3:
        return list(range(layers))
    return [0, *(1 + source for source in _uniform(layers - 2, factor, remainder)), layers - 1]


def _dense_front(layers: int, factor: int, remainder: str) -> list[int]:
    """``ceil(layers / factor)`` producers, then a run that reads the last of them, then one producer."""
    dense = -(-layers // factor)
    return [layer if layer < dense or layer == layers - 1 else dense - 1 for layer in range(layers)]


def _dense_back(layers: int, factor: int, remainder: str) -> list[int]:
    """Layers 0 and 1, a run that reads layer 1, then producers.

    The paper's text counts a run of 10 beside 2 and 9 producers in 20 layers; its table's 11 KV layers mean 9, which
    is what this does.
    """
    run = max(0, layers - -(-layers // factor) - 1)
    return [1 if 2 <= layer < 2 + run else layer for layer in range(layers)]


def _tail(layers: int, factor: int, remainder: str) -> list[int]:
    """``ceil(layers / factor)`` producers; every later layer reads the last of them."""
    dense = -(-layers // factor)
    return [min(layer, dense - 1) for layer in range(layers)]


_PATTERNS: dict[str, Callable[[int, int, str], list[int]]] = {
    "uniform": _uniform,
    "keep_ends": _keep_ends,
    "dense_front": _dense_front,
    "dense_back": _dense_back,
    "tail": _tail,
}
