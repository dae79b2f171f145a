"""`BucketBatchSampler`: one bucket and a constant number of tokens a step, each row once, reproducible, resumable."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_ext.data.bucket_sampler import BucketBatchSampler
from hf_ext.data.collate import BucketCollator

TOKENS = 64


def rows_of(counts, seed=0):
    """log2 lengths of a shuffled dataset with so many rows of 4, 8, 16, ... tokens."""
    exponents = np.repeat(np.arange(2, 2 + len(counts), dtype=np.int8), counts)
    np.random.default_rng(seed).shuffle(exponents)
    return exponents


def flat(batches):
    return [row for batch in batches for row in batch]


def dataset_of(counts):
    ids = [[100 * row + place for place in range(1 << k)] for row, k in enumerate(rows_of(counts))]
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int64")), "bucket": datasets.Value("int8")}
    )
    return datasets.Dataset.from_dict({"input_ids": ids, "bucket": rows_of(counts)}, features=features)


counts_of_buckets = st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(
    lambda counts: any(n * (4 << k) >= TOKENS for k, n in enumerate(counts))
)
micro = st.sampled_from([1, 2])


@settings(deadline=None, max_examples=60)
@given(counts_of_buckets, micro, st.integers(1, 4), st.sampled_from(["natural", "equal"]), st.integers(0, 3))
def test_laws_of_an_epoch(counts, micro_batches, cycles, mixture, epoch):
    exponents = rows_of(counts)
    sampler = BucketBatchSampler(
        exponents, TOKENS, micro_batches=micro_batches, cycles=cycles, mixture=mixture, seed=epoch + 1
    )
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == sampler.steps * micro_batches
    for step in range(sampler.steps):
        parts = batches[step * micro_batches : (step + 1) * micro_batches]
        ks = {int(exponents[row]) for part in parts for row in part}
        assert len(ks) == 1 and 1 << ks.pop() == sampler.schedule()[step]  # one bucket
        assert len({len(part) for part in parts}) == 1
        assert sum(1 << exponents[row] for part in parts for row in part) == TOKENS
    used = flat(batches)
    assert len(used) == len(set(used))  # no row twice
    for length, tokens in sampler.tokens.items():
        rows = int((exponents == length.bit_length() - 1).sum())
        assert tokens == length * sum(1 << exponents[row] == length for row in used)
        assert tokens + sampler.remainder[length] == rows * length
        if mixture == "natural":
            assert sampler.remainder[length] < TOKENS  # less than one batch
    assert list(sampler) == batches  # asking again gives the same
    other = BucketBatchSampler(exponents, TOKENS, cycles=cycles, mixture=mixture, seed=epoch + 1)
    other.set_epoch(epoch)
    joined = [flat(batches[i : i + micro_batches]) for i in range(0, len(batches), micro_batches)]
    assert list(other) == joined  # the steps do not depend on the micro-batches


@settings(deadline=None, max_examples=40)
@given(counts_of_buckets, micro, micro, st.data())
def test_resumes_where_it_was_also_with_other_micro_batches(counts, before, after, data):
    exponents = rows_of(counts)
    first = BucketBatchSampler(exponents, TOKENS, micro_batches=before, seed=5)
    first.set_epoch(2)
    taken = data.draw(st.integers(0, first.steps)) * before
    if before == after:
        taken = data.draw(st.integers(0, len(first)))
    batches = list(first)
    handed_out = iter(first)
    for _ in range(taken):
        next(handed_out)
    state = json.loads(json.dumps(first.state_dict()))
    assert state == first.state_dict(batches_taken=taken)
    second = BucketBatchSampler(exponents, TOKENS, micro_batches=after, seed=5)
    second.load_state_dict(state)
    second.set_epoch(2)  # the same epoch keeps the place
    left = list(second)
    assert flat(left) == flat(batches[taken:])
    assert len(list(second)) == len(second)  # only the first iteration after loading starts in the middle


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_data_loader_and_its_workers(workers):
    buckets = dataset_of([40, 20, 10])
    sampler = BucketBatchSampler(buckets, TOKENS, seed=3)
    rows = buckets.with_format("numpy")
    expected = [batch["input_ids"] for batch in DataLoader(rows, batch_sampler=sampler, collate_fn=BucketCollator())]
    loader = iter(DataLoader(rows, batch_sampler=sampler, collate_fn=BucketCollator(), num_workers=workers))
    for _ in range(3):
        next(loader)
    state = sampler.state_dict(batches_taken=3)  # workers have asked for more
    resumed = BucketBatchSampler(buckets, TOKENS, seed=3)
    resumed.load_state_dict(state)
    left = [batch["input_ids"] for batch in DataLoader(rows, batch_sampler=resumed, collate_fn=BucketCollator())]
    assert len(left) == len(expected) - 3
    assert all(torch.equal(a, b) for a, b in zip(left, expected[3:], strict=True))


def test_epochs_and_seeds_differ_and_processes_agree():
    exponents = rows_of([50, 30, 9])
    sampler = BucketBatchSampler(exponents, TOKENS, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(BucketBatchSampler(exponents, TOKENS, seed=2)) != first
    code = (
        "import numpy as np; from hf_ext.data.bucket_sampler import BucketBatchSampler\n"
        f"rows = np.array({exponents.tolist()}, dtype=np.int8)\n"
        f"print(list(BucketBatchSampler(rows, {TOKENS}, seed=1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == str(first), done.stderr


def test_no_global_randomness_is_used_or_changed():
    exponents = rows_of([50, 30])
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = list(BucketBatchSampler(exponents, TOKENS))
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    np.random.seed(1)
    assert list(BucketBatchSampler(exponents, TOKENS)) == first


def test_what_accelerate_reads():
    sampler = BucketBatchSampler(rows_of([50]), TOKENS)
    assert not hasattr(sampler, "batch_size") and sampler.drop_last


def test_memory_is_a_few_bytes_a_row():
    sampler = BucketBatchSampler(rows_of([200_000, 100_000]), TOKENS)
    sampler.batch(0)
    epoch = sampler._plan()
    assert epoch.rows.dtype == np.uint32 and sampler._exponents.dtype == np.int8
    assert (epoch.rows.nbytes + sampler._exponents.nbytes) / 300_000 == 5
    assert (epoch.order.nbytes + epoch.earlier.nbytes) / sampler.steps == 5


def test_a_bucket_that_fills_no_batch_is_reported(caplog):
    sampler = BucketBatchSampler(rows_of([40, 2]), TOKENS)
    assert "bucket of length 8 is left out: its 2 sequences do not fill a batch of 64 tokens" in caplog.text
    assert sampler.tokens == {4: 128, 8: 0} and sampler.remainder == {4: 32, 8: 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_batch": 8}, r"at least one sequence of the longest bucket \(16 tokens\), got 8"),
        ({"tokens_per_batch": 24}, "multiple of every length in use, got 24"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be a positive integer, got 0"),
        ({"micro_batches": 8}, r"each of 8 micro-batches at least one sequence of the longest bucket \(16 tokens\)"),
        ({"micro_batches": 3}, "micro-batches"),
        ({"curriculum": {4: 1, 8: 1, 16: 1, 32: 1}}, "names the length 32, but there is no such bucket"),
        ({"curriculum": {4: 1, 8: 1, 16: 1}, "tokens_per_batch": 256}, "16, but that bucket has no full batch"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": None}, "seed must be an integer of at least 0, got None"),
        ({"mixture": {}}, "mixture must name at least one length"),
        ({"cycles": 0}, "cycles must be a positive integer, got 0"),
        ({"odds_mode": "x"}, "odds_mode must be one of token-weighted, paper, got 'x'"),
        ({"tokens_per_batch": 4096}, "No bucket fills one batch of 4096 tokens"),
    ],
)
def test_bad_input_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(rows_of([100, 50, 9]), **{"tokens_per_batch": TOKENS, **options})


@pytest.mark.parametrize("given", [[-1, 3], [3, 3.5], [63], [[3]]])
def test_exponents_that_are_none(given):
    with pytest.raises(ValueError, match="log2 of every row's length"):
        BucketBatchSampler(given, TOKENS)


@pytest.mark.parametrize("index", [-1, 5])
def test_micro_batches_that_are_none(index):
    sampler = BucketBatchSampler(rows_of([80]), TOKENS)
    assert len(sampler) == 5
    with pytest.raises(IndexError, match=f"index from 0 to 4, got {index}"):
        sampler.batch(index)


def test_empty_data_in_words():
    with pytest.raises(ValueError, match="No bucket fills one batch"):
        BucketBatchSampler(np.zeros(0, dtype=np.int8), TOKENS)
    with pytest.raises(ValueError, match="needs a column bucket"):
        BucketBatchSampler(datasets.Dataset.from_dict({"input_ids": [[1]]}), TOKENS)


def test_a_changed_dataset_or_option_is_refused_on_resume():
    exponents = rows_of([50, 30])
    state = BucketBatchSampler(exponents, TOKENS).state_dict()
    for changed, message in [
        (BucketBatchSampler(exponents[:-1], TOKENS), "the number of sequences of each length was"),
        (BucketBatchSampler(exponents[::-1], TOKENS), "the checksum of the order of rows was"),
        (BucketBatchSampler(exponents, TOKENS, cycles=2), "cycles was 8 and is now 2"),
        (BucketBatchSampler(exponents, TOKENS, curriculum="uniform"), "curriculum was 'grow-p2' and is now 'uniform'"),
        (BucketBatchSampler(exponents, TOKENS, seed=4), "seed was 0 and is now 4"),
        (BucketBatchSampler(exponents, 2 * TOKENS), "tokens_per_batch was 64 and is now 128"),
    ]:
        with pytest.raises(ValueError, match=message):
            changed.load_state_dict(state)
    buckets = dataset_of([40, 20])
    state = BucketBatchSampler(buckets, TOKENS).state_dict()
    other = buckets.map(lambda row: {"input_ids": [token + 1 for token in row["input_ids"]]})
    with pytest.raises(ValueError, match="the checksum of the tokens was"):
        BucketBatchSampler(other, TOKENS).load_state_dict(state)


def test_a_state_inside_a_step_needs_the_same_micro_batches():
    exponents = rows_of([50, 30])
    state = BucketBatchSampler(exponents, TOKENS, micro_batches=2).state_dict(batches_taken=3)
    with pytest.raises(ValueError, match=r"inside a step of 2 micro-batches \(after 1\); with 1"):
        BucketBatchSampler(exponents, TOKENS).load_state_dict(state)
