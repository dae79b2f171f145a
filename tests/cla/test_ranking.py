import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.cla.config import check_map
from hf_ext.cla.ranking import PairLoss, propose_map, within_bytes


def losses(nats):
    return [PairLoss(layer, layer - 1, value) for layer, value in enumerate(nats, start=1)]


def at_most(producers):
    return lambda sources: len(set(sources)) <= producers


def test_cheapest_pairs_first():
    nats = [9.0, 0.1, 0.5, 0.2, 0.9]
    assert propose_map(losses(nats), 6, at_most(5)) == (0, 1, 1, 3, 4, 5)
    assert propose_map(losses(nats), 6, at_most(4)) == (0, 1, 1, 3, 3, 5)
    assert propose_map(losses(nats), 6, at_most(6)) == (0, 1, 2, 3, 4, 5)


def test_a_pair_joins_its_sources_group_up_to_the_largest():
    nats = [9.0, 0.1, 0.2, 0.3, 0.9]
    assert propose_map(losses(nats), 6, at_most(4)) == (0, 1, 1, 1, 4, 5)
    assert propose_map(losses(nats), 6, at_most(3)) == (0, 1, 1, 1, 4, 4)  # 4 may not be the fourth to read 1
    assert propose_map(losses(nats), 6, at_most(4), largest_group=2) == (0, 1, 1, 3, 3, 5)


def test_a_layer_keeps_to_the_cheapest_of_its_sources():
    several = [PairLoss(3, 2, 0.5), PairLoss(3, 1, 0.1), PairLoss(2, 1, 0.9), PairLoss(3, 0, 0.2)]
    assert propose_map(several, 4, at_most(3)) == (0, 1, 2, 1)
    assert propose_map(several, 4, at_most(2)) == (0, 1, 1, 1)


def test_budget_out_of_reach():
    with pytest.raises(ValueError, match="groups of at most 2 layers reaches this budget"):
        propose_map(losses([1.0, 2.0, 3.0]), 4, at_most(1), largest_group=2)


def test_bytes():
    fits = within_bytes(3 * 2 * 16 * 4, [16] * 4, 4)
    assert fits((0, 0, 2, 3)) and not fits((0, 1, 2, 3))


@settings(deadline=None)
@given(st.lists(st.floats(-1, 10), min_size=1, max_size=30), st.integers(1, 4), st.data())
def test_every_proposal_is_a_valid_map_within_its_limits(nats, largest, data):
    layers = len(nats) + 1
    producers = data.draw(st.integers(1, layers))
    try:
        found = propose_map(losses(nats), layers, at_most(producers), largest)
    except ValueError:
        return
    assert check_map(found) == found
    assert len(set(found)) <= producers and max(found.count(source) for source in found) <= max(largest, 1)
