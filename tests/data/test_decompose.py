"""`decompose`: tokens conserved, one document a row, lengths powers of two; EOS, tails, labels, streams, bad input."""

import json

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.data.decompose import Decomposition, decompose
from hf_ext.data.statistics import BucketStatistics, bucket_statistics

EOS = 99


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def documents(lengths, dtype="int64", **columns):
    """Documents whose tokens say where they stand: document d, place t is 1000 d + t + 100."""
    ids = [[1000 * d + t + 100 for t in range(n)] for d, n in enumerate(lengths)]
    features = {"input_ids": datasets.List(datasets.Value(dtype))}
    for name in columns:
        features[name] = datasets.List(datasets.Value("int64"))
    return datasets.Dataset.from_dict({"input_ids": ids, **columns}, features=datasets.Features(features))


def whole(document, eos):
    return [*document, eos] if document and eos is not None and document[-1] != eos else list(document)


sizes = st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda pair: (2 ** pair[0], 2 ** (pair[0] + pair[1])))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=12),
    sizes,
    st.sampled_from([None, EOS]),
    st.sampled_from(["drop", "pad"]),
)
def test_tokens_are_conserved_and_rows_come_from_one_document(lengths, limits, eos, remainder):
    low, high = limits
    source = documents(lengths)
    rows = decompose(
        source, min_length=low, max_length=high, eos_token_id=eos, remainder=remainder, positions=True, batch_size=5
    )
    texts = [whole(ids, eos) for ids in source["input_ids"]]
    found = [[] for _ in texts]
    for row in rows:
        ids, size = row["input_ids"], len(row["input_ids"])
        assert size == 1 << row["bucket"] and low <= size <= high
        if remainder == "pad":
            ids = [token for token, label in zip(ids, row["labels"], strict=True) if label != -100]
        assert row["offset"] == len(found[row["document"]])  # in order, adjacent
        found[row["document"]] += ids
    for text, kept in zip(texts, found, strict=True):
        if remainder == "drop":
            assert kept == text[: len(text) // low * low]
        elif len(text) % low != 1:  # a tail of one token alone in its row is learned by nothing
            assert kept == text
    statistics = bucket_statistics(rows, source, Decomposition(low, high, eos, remainder))
    assert statistics.document_tokens == sum(map(len, texts))
    assert statistics.dropped_tokens == (sum(len(text) % low for text in texts) if remainder == "drop" else 0)
    kept = statistics.total_tokens - statistics.padding_tokens
    assert kept + statistics.dropped_tokens + statistics.unlearned_tokens == statistics.document_tokens


def test_an_eos_that_is_there_is_not_doubled():
    source = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, EOS], [1, 2, 3], []]})
    rows = decompose(source, min_length=4, max_length=8, eos_token_id=EOS)
    assert rows["input_ids"][:] == [[1, 2, 3, EOS], [1, 2, 3, EOS]]


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64"])
def test_the_integer_type_of_the_ids_is_kept(dtype):
    rows = decompose(documents([9], dtype), min_length=2, max_length=4, remainder="pad")
    assert rows.features["input_ids"].feature.dtype == dtype
    assert rows["labels"][0] == rows["input_ids"][0]


def test_unsigned_labels_can_be_padded():
    features = datasets.Features({name: datasets.List(datasets.Value("uint8")) for name in ("input_ids", "labels")})
    source = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}, features=features)
    assert decompose(source, min_length=4, max_length=4, remainder="pad")["labels"][:] == [[1, 2, 3, -100]]


def test_processes_streams_and_shuffled_views_agree():
    source = documents([5, 0, 30, 1, 17, 64, 3, 8])
    expected = list(decompose(source, min_length=4, max_length=16, positions=True))
    assert list(decompose(source, min_length=4, max_length=16, positions=True, num_proc=2)) == expected
    assert list(decompose(source.to_iterable_dataset(), min_length=4, max_length=16, positions=True)) == expected
    generated = datasets.IterableDataset.from_generator(lambda: ({"input_ids": ids} for ids in source["input_ids"]))
    assert list(decompose(generated, min_length=4, max_length=16, positions=True)) == expected
    backwards = decompose(source.select(range(7, -1, -1)), min_length=4, max_length=16)
    assert sorted(map(tuple, backwards["input_ids"])) == sorted(tuple(row["input_ids"]) for row in expected)


def test_masks_become_labels_and_rows_without_target_are_left_out():
    mask = [[0] * 5 + [1] * 4, [0] * 8]
    chat = [[1] * 9, [1] * 8]
    chat[0][6] = 0
    source = documents([9, 8], completion_mask=mask, assistant_masks=chat)
    rows = decompose(source, min_length=4, max_length=8, eos_token_id=EOS, remainder="pad")
    assert rows["input_ids"][:] == [source["input_ids"][0][:8], [108, EOS, 0, 0]]
    assert rows["labels"][:] == [[-100] * 5 + [105, -100, 107], [108, EOS, -100, -100]]
    statistics = bucket_statistics(rows, source, Decomposition(4, 8, EOS, "pad"))
    assert (statistics.unlearned_tokens, statistics.padding_tokens) == (9 + 3, 2 + 3)


def test_labels_are_cut_with_the_ids():
    source = documents([8], labels=[[-100, -100, 7, 8, 9, 10, 11, 12]])
    assert decompose(source, min_length=4, max_length=4)["labels"][:] == [[-100, -100, 7, 8], [9, 10, 11, 12]]


def test_only_short_documents_give_an_empty_dataset_with_its_columns():
    rows = decompose(documents([0, 1, 3]), min_length=4, max_length=8)
    assert len(rows) == 0 and rows.column_names == ["input_ids", "bucket"]
    assert bucket_statistics(rows).average_context_length == 0
    for nothing in (documents([]), datasets.Dataset.from_dict({"input_ids": []})):
        rows = decompose(nothing, min_length=4, max_length=8, remainder="pad")
        assert len(rows) == 0 and rows.column_names == ["input_ids", "labels", "bucket"]


@pytest.mark.parametrize(
    (
        "shares",
        "sequence",
        "context",
    ),  # token shares of lengths 64 ... 8192 and the averages the paper prints for them
    [
        ((3, 6, 10, 17, 21, 17, 13, 9), 482, 1018),
        ((12,) * 8, 257, 1020),
        ((0, 0, 0, 0, 96, 0, 0, 0), 1024, 512),
        ((16,) * 6 + (0, 0), 195, 336),
        ((0, 0) + (16,) * 6, 780, 1344),
    ],
)
def test_averages_of_the_papers_mixtures(shares, sequence, context):
    rows = {64 << k: share * 2**20 // (64 << k) for k, share in enumerate(shares) if share}
    statistics = BucketStatistics(rows)
    assert abs(statistics.average_sequence_length - sequence) < 1
    assert abs(statistics.average_context_length - context) < 1
    json.dumps(statistics.to_dict())


def test_more_tokens_than_a_list_counts_are_refused(monkeypatch):
    monkeypatch.setattr("hf_ext.data.decompose.LIST_TOKENS", 15)
    assert len(decompose(documents([8, 7]), min_length=4, max_length=4)) == 3
    with pytest.raises(ValueError, match="A batch of documents has 16 tokens, more than a list holds"):
        decompose(documents([8, 8]), min_length=4, max_length=4)


def test_bad_input_in_words():
    source = documents([4])
    with pytest.raises(ValueError, match="a row of one token has no next token"):
        decompose(source, min_length=1)
    with pytest.raises(ValueError, match="min_length must be a power of two, got 100"):
        decompose(source, min_length=100)
    with pytest.raises(ValueError, match="remainder must be one of drop, pad, got 'keep'"):
        decompose(source, remainder="keep")
    with pytest.raises(ValueError, match=r"must be a datasets\.Dataset or datasets\.IterableDataset, got list"):
        decompose([[1, 2]])
    with pytest.raises(ValueError, match="need a column input_ids"):
        decompose(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="num_proc is for datasets that are not streamed"):
        decompose(source.to_iterable_dataset(), num_proc=2)
    with pytest.raises(ValueError, match="must not be padded"):
        decompose(documents([4], attention_mask=[[1, 1, 1, 0]]), min_length=2)
    with pytest.raises(ValueError, match=r"labels and input_ids must have one value for each token.*3 and 4 in row 0"):
        decompose(documents([4], labels=[[1, 2, 3]]), min_length=2)
    for ids, kind in ((["ab"], "string"), ([7], "int32"), ([[1.5]], "double"), ([[[1]]], "list<item: list")):
        with pytest.raises(ValueError, match=f"input_ids must hold a list of integers for every document, .*{kind}"):
            decompose(datasets.Dataset.from_dict({"input_ids": ids}), min_length=2)
    with pytest.raises(ValueError, match="input_ids must have a value for every token, got 1 without one"):
        decompose(datasets.Dataset.from_dict({"input_ids": [[1, None]]}), min_length=2)
    with pytest.raises(ValueError, match="eos_token_id must fit the type of input_ids, uint8, got 300"):
        decompose(documents([4], "uint8"), min_length=2, eos_token_id=300)
    with pytest.raises(ValueError, match="pad_token_id must fit the type of input_ids, uint8, got -1"):
        decompose(documents([4], "uint8"), min_length=2, pad_token_id=-1, remainder="pad")
    with pytest.raises(ValueError, match="options they were cut with"):
        bucket_statistics(decompose(source, min_length=2), source)
    assert np.array_equal(bucket_statistics(decompose(source, min_length=2)).tokens[4], 4)
