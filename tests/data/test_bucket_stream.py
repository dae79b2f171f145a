"""`BucketStream`: one bucket and constant tokens a step, no row lost or doubled, processes and workers aligned."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_ext.data.bucket_stream import BucketStream

TOKENS = 32
LENGTHS = [4, 8, 16]


def rows_of(lengths):
    return [{"input_ids": [number] * length} for number, length in enumerate(lengths)]


def numbers(batch):
    return [row["input_ids"][0] for row in batch]


def stream(lengths, **options):
    return BucketStream(rows_of(lengths), TOKENS, lengths=LENGTHS, **options)


some_lengths = st.lists(st.sampled_from(LENGTHS), max_size=80)


@settings(deadline=None, max_examples=50)
@given(some_lengths, st.integers(1, 5), st.sampled_from([1, 2]))
def test_laws(lengths, window, processes):
    whole = list(stream(lengths, window_steps=window).steps())
    used = [number for step in whole for number in numbers(step)]
    assert len(used) == len(set(used))
    for step in whole:
        assert len({len(row["input_ids"]) for row in step}) == 1
        assert sum(len(row["input_ids"]) for row in step) == TOKENS
    for length in LENGTHS:  # only what fills no batch is left
        left = sum(n == length for n in lengths) - sum(lengths[number] == length for number in used)
        assert 0 <= left * length < TOKENS
    shares = [
        [
            numbers(b)
            for b in stream(lengths, window_steps=window, micro_batches=2, num_processes=processes, process_index=rank)
        ]
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    together = [number for parts in zip(*shares, strict=True) for part in parts for number in part]
    assert together == used  # the same steps, shared out


def test_workers_do_not_change_the_order():
    lengths = [4, 8, 16, 16, 8, 4, 4] * 30
    expected = [numbers(batch) for batch in stream(lengths, window_steps=7, micro_batches=2)]
    for workers in (1, 2):
        loader = DataLoader(
            stream(lengths, window_steps=7, micro_batches=2), batch_size=None, num_workers=workers, collate_fn=numbers
        )
        assert list(loader) == expected


@pytest.mark.parametrize("shards", [1, 3])
def test_workers_that_a_dataset_would_give_a_part_of_its_shards(shards):
    rows = rows_of([4, 8, 16, 16, 8, 4, 4] * 30)
    expected = [numbers(b) for b in BucketStream(rows, TOKENS, lengths=LENGTHS, window_steps=7, micro_batches=2)]
    data = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
    streamed = BucketStream(data, TOKENS, lengths=LENGTHS, window_steps=7, micro_batches=2)
    for workers in (0, 2):
        loader = DataLoader(streamed, batch_size=None, num_workers=workers, collate_fn=numbers)
        assert list(loader) == expected


def test_epochs_differ_and_repeat():
    data = stream([4, 8, 16] * 40, window_steps=20)
    first = [numbers(step) for step in data.steps()]
    data.set_epoch(1)
    assert [numbers(step) for step in data.steps()] != first
    data.set_epoch(0)
    assert [numbers(step) for step in data.steps()] == first


def test_workers_that_stay_alive_learn_the_epoch():
    data = stream([4, 8, 16] * 40, window_steps=20)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True, collate_fn=numbers)
    orders = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        orders.append(list(loader))
        assert orders[-1] == [numbers(step) for step in data.steps()]
    assert orders[0] != orders[1]


def test_bad_input_in_words():
    with pytest.raises(ValueError, match="times every length, got 32 for sequences of 64 tokens"):
        BucketStream([], TOKENS, lengths=[64, 4])
    with pytest.raises(ValueError, match="got 32 for sequences of 3 tokens"):
        BucketStream([], TOKENS, lengths=[3, 4])
    with pytest.raises(ValueError, match="lengths must name at least one length"):
        BucketStream([], TOKENS, lengths=[])
    for places in ({"process_index": 1}, {"micro_batches": 1, "num_processes": 2}, {"process_index": -1}):
        with pytest.raises(ValueError, match="equally many of the 1 micro-batches, got process_index"):
            stream([], **places)
    with pytest.raises(ValueError, match="window_steps must be a positive integer, got 0"):
        stream([], window_steps=0)
    with pytest.raises(ValueError, match=r"A row of 5 tokens fits none of the lengths \[4, 8, 16\]"):
        list(stream([5]))
