"""`BucketCollator`: equal rows stacked, labels kept, nothing padded or hidden."""

import pytest
import torch

from hf_ext.data.collate import BucketCollator


def test_rows_are_stacked_and_labels_default_to_the_ids():
    batch = BucketCollator()([{"input_ids": [1, 2]}, {"input_ids": [3, 0]}])
    assert batch.keys() == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], torch.tensor([[1, 2], [3, 0]])) and torch.equal(
        batch["input_ids"], batch["labels"]
    )
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_labels_positions_and_mask():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "offset": 4}]
    batch = BucketCollator(document_positions=True, attention_mask=True)(rows)
    assert batch["labels"].tolist() == [[-100, 2]]
    assert batch["position_ids"].tolist() == [[4, 5]] and batch["attention_mask"].tolist() == [[1, 1]]


def test_bad_input_in_words():
    with pytest.raises(ValueError, match=r"must have one length, got \[1, 2\]"):
        BucketCollator()([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    with pytest.raises(ValueError, match="need the column offset"):
        BucketCollator(document_positions=True)([{"input_ids": [1]}])
