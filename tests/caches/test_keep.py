import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.caches.keep import keep_slots


def reference(entropies, sinks, memory, keep):
    """The rule of the released code for one row without padding, in plain Python."""
    by_entropy = sorted(range(len(entropies)), key=lambda i: -entropies[i])  # stable: the earlier one on a tie
    kept = set(by_entropy[:memory]) | set(range(min(sinks, len(entropies))))
    for index in reversed(range(len(entropies))):
        if len(kept) >= min(keep, len(entropies)):
            break
        kept.add(index)
    return sorted(kept)


@st.composite
def memories(draw):
    sinks, memory, recent = draw(st.integers(0, 4)), draw(st.integers(0, 8)), draw(st.integers(0, 6))
    rows = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    entropies = [draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 7.0]), min_size=n, max_size=n)) for n in rows]
    return sinks, memory, sinks + memory + recent + draw(st.integers(0, 3)), entropies


@settings(deadline=None, max_examples=200)
@given(memories())
def test_every_row_of_a_padded_batch_keeps_what_the_rule_keeps(example):
    sinks, memory, keep, entropies = example
    keep = max(keep, 1)
    width = max(map(len, entropies))
    real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in entropies])
    entropy = torch.tensor([[9.0] * (width - len(row)) + row for row in entropies])  # pads look most surprising
    rows = len(entropies)
    slots, alive = keep_slots(real, torch.full((rows,), keep), sinks, entropy, torch.full((rows,), memory))
    for row, values in enumerate(entropies):
        expected = [width - len(values) + index for index in reference(values, sinks, memory, keep)]
        assert slots[row][alive[row]].tolist() == expected
        assert alive[row].tolist() == sorted(alive[row].tolist())  # dead slots in front
    assert slots.shape[1] == max(min(keep, len(values)) for values in entropies)


def test_rows_may_keep_different_numbers():
    real = torch.ones(2, 6, dtype=torch.bool)
    slots, alive = keep_slots(real, torch.tensor([6, 3]), sinks=1)
    assert slots[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert slots[1][alive[1]].tolist() == [0, 4, 5]


def test_a_hand_example():
    entropy = torch.tensor([[0.1, 5.0, 0.2, 4.0, 0.3, 0.4, 3.0, 0.5]])
    real = torch.ones(1, 8, dtype=torch.bool)
    slots, _ = keep_slots(real, torch.tensor([5]), 1, entropy, torch.tensor([2]))
    assert slots.tolist() == [[0, 1, 3, 6, 7]]  # sink 0, memory 1 and 3, the latest 6 and 7


def test_the_order_of_rows_does_not_matter():
    generator = np.random.default_rng(0)
    entropy = torch.tensor(generator.exponential(size=(3, 12)), dtype=torch.float32)
    real = torch.ones(3, 12, dtype=torch.bool)
    keep, memory = torch.tensor([5, 9, 7]), torch.tensor([2, 3, 4])
    slots, alive = keep_slots(real, keep, 2, entropy, memory)
    again, alive_again = keep_slots(real, keep.flip(0), 2, entropy.flip(0), memory.flip(0))
    for row in range(3):
        assert slots[row][alive[row]].tolist() == again[2 - row][alive_again[2 - row]].tolist()
