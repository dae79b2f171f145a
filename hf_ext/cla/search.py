"""A map by measuring: after each pair that shares, what the other pairs cost is measured again.

Losses of pairs are not additive: layers 27, 28 and 29 of one model cost 0.03 nats each when they share alone and
many times their sum together. Lazy greedy search (Minoux 1978) measures only what can be next: what a pair costs
mostly grows with every pair that shares already, so an old measurement is taken as a lower bound, and the cheapest
pair is accepted when its measurement is new.
"""

from collections.abc import Callable, Sequence

from hf_ext.cla.ranking import PairLoss

Map = tuple[int, ...]


def search_pairs(
    losses: Sequence[PairLoss],
    layers: int,
    fits: Callable[[Sequence[int]], bool],
    measure: Callable[[Map, int], float],
    accept: Callable[[Map, int], None],
    largest_group: int = 3,
) -> Map:
    """Add the pair that costs least, as measured beside all earlier ones, until the map fits the budget.

    Args:
        losses: what pairs cost alone; only these are tried, and their order decides which are measured first.
        layers: how many the model has.
        fits: whether a map is within the budget.
        measure: the loss, in nats, of a map in which the given layer is new.
        accept: called with the map and the new layer when a pair is taken.
        largest_group: most layers that may use one layer's keys and values.

    Raises:
        ValueError: no map of these pairs fits the budget.
    """
    sources, reached = tuple(range(layers)), 0.0
    bounds = {(pair.layer, pair.source): pair.nats for pair in losses}
    measured: dict[Map, float] = {}
    while not fits(sources):
        open_pairs = {pair: joined for pair in bounds if (joined := join(sources, *pair, largest_group))}
        if not open_pairs:
            raise ValueError(
                f"No map of the {len(bounds)} pairs that were measured reaches this budget; allow groups of more than "
                f"{largest_group} layers, more bytes, or rank with a larger reach."
            )
        pair, new = min(open_pairs.items(), key=lambda item: bounds[item[0]])
        if new not in measured:
            measured[new] = measure(new, pair[0])
        if bounds[pair] != measured[new] - reached:  # it was a bound, or another pair of the same group's
            bounds[pair] = measured[new] - reached
            continue
        sources, reached = new, measured[new]
        accept(sources, pair[0])
    return sources


def join(sources: Map, layer: int, source: int, largest_group: int) -> Map | None:
    """The map with ``layer`` reading what ``source`` uses, or None when it may not: it shares or is read already."""
    root = sources[source]
    if sources.count(layer) != 1 or sources[layer] != layer or sources.count(root) >= largest_group:
        return None
    return (*sources[:layer], root, *sources[layer + 1 :])
