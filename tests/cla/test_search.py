import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.cla.ranking import PairLoss
from hf_ext.cla.search import join, search_pairs

LAYERS = 5
PAIRS = [(layer, source) for layer in range(1, LAYERS) for source in range(layer)]


def shared(sources):
    return [(layer, source) for layer, source in enumerate(sources) if layer != source]


def at_most(producers):
    return lambda sources: len(set(sources)) <= producers


def eager(cost, producers, largest):
    """Every open pair measured in every round."""
    sources = tuple(range(LAYERS))
    while len(set(sources)) > producers:
        steps = [joined for pair in PAIRS if (joined := join(sources, *pair, largest))]
        sources = min(steps, key=cost)
    return sources


@given(st.integers(0, 10**9), st.integers(2, 4), st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_it_finds_what_measuring_everything_finds(seed, producers, largest):
    """Where costs only grow as more layers share; with fewer measurements."""
    draw = random.Random(seed)  # no ties
    alone, together = ([draw.random() for _ in range(LAYERS**2)] for _ in range(2))

    def cost(sources):
        pairs = [layer * LAYERS + source for layer, source in shared(sources)]
        return sum(alone[pair] for pair in pairs) + sum(
            together[(a + b) % len(together)] for a, b in itertools.combinations(pairs, 2)
        )

    lone = {pair: cost(join(tuple(range(LAYERS)), *pair, largest)) for pair in PAIRS}
    losses = [PairLoss(*pair, nats) for pair, nats in lone.items()]
    try:
        expected = eager(cost, producers, largest)
    except ValueError:
        with pytest.raises(ValueError, match="reaches this budget"):
            search_pairs(losses, LAYERS, at_most(producers), lambda map_, layer: cost(map_), lambda *_: None, largest)
        return
    measured, accepted = [], []

    def measure(sources, layer):
        assert sources[layer] != layer and sources not in measured
        measured.append(sources)
        return cost(sources)

    found = search_pairs(
        losses, LAYERS, at_most(producers), measure, lambda map_, layer: accepted.append(map_), largest
    )
    assert cost(found) == cost(expected)
    assert accepted[-1] == found and all(map_ in measured for map_ in accepted)


def test_a_bad_neighbour_is_passed_over():
    """Layers 3 and 2 are cheap alone and dear together; 1 is taken after 3."""
    losses = [PairLoss(3, 2, 0.1), PairLoss(2, 1, 0.11), PairLoss(1, 0, 0.2)]
    costs = {(3,): 0.1, (2, 3): 5.0, (1, 3): 0.3}
    found = search_pairs(
        losses, 4, at_most(2), lambda map_, layer: costs[tuple(one for one, _ in shared(map_))], lambda *_: None
    )
    assert found == (0, 0, 2, 2)


def test_joining():
    assert join((0, 1, 2, 3), 3, 2, 3) == (0, 1, 2, 2)
    assert join((0, 1, 1, 3), 3, 2, 3) == (0, 1, 1, 1)  # what layer 2 reads
    assert join((0, 1, 1, 3), 3, 2, 2) is None  # the group is full
    assert join((0, 1, 1, 3), 1, 0, 3) is None  # layer 2 reads layer 1
    assert join((0, 1, 1, 3), 2, 0, 3) is None  # layer 2 reads already


def test_out_of_reach():
    with pytest.raises(ValueError, match="No map of the 1 pairs that were measured reaches this budget"):
        search_pairs([PairLoss(1, 0, 0.1)], 3, at_most(1), lambda map_, layer: 1.0, lambda *_: None)
