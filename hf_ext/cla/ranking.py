"""From measured losses to a map: which layers give up their keys and values first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_ext.cla.plan import kv_bytes_per_token


@dataclass(frozen=True)
class PairLoss:
    """What it cost when one layer alone read an earlier one.

    Attributes:
        layer: the consumer.
        source: the layer it read.
        nats: increase of the mean loss of a token over the dense model, in nats.
    """

    layer: int
    source: int
    nats: float


def propose_map(
    losses: Sequence[PairLoss],
    layers: int,
    fits: Callable[[Sequence[int]], bool],
    largest_group: int = 3,
) -> tuple[int, ...]:
    """Add the cheapest pairs one after another until the map fits the budget.

    A pair whose source reads another layer itself joins that group; a layer that reads another already keeps to it.
    The losses of single pairs are taken as additive, which they are not; the map is a proposal to be measured.

    Args:
        losses: one or more for every layer that may become a consumer.
        layers: how many the model has.
        fits: whether a map is within the budget.
        largest_group: most layers that may use one layer's keys and values.

    Raises:
        ValueError: no map of these pairs fits the budget.
    """
    sources = list(range(layers))
    for pair in sorted(losses, key=lambda pair: pair.nats):
        if fits(sources):
            break
        if sources[pair.layer] != pair.layer:
            continue
        root = sources[pair.source]
        joined = [root if source in (pair.layer, root) else source for source in sources]
        if joined.count(root) <= largest_group:
            sources = joined
    if not fits(sources):
        raise ValueError(
            f"No map with groups of at most {largest_group} layers reaches this budget; allow larger groups or more "
            f"bytes."
        )
    return tuple(sources)


def within_bytes(budget: int, elements: Sequence[int], element_size: int) -> Callable[[Sequence[int]], bool]:
    """Whether a map's keys and values take at most ``budget`` bytes a token; the rest as in `kv_bytes_per_token`."""
    return lambda sources: kv_bytes_per_token(sources, elements, element_size) <= budget
