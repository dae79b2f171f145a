"""Buckets on disk: equal to `decompose`, resumable, refused for other documents or options."""

import datasets
import pytest

from hf_ext.data.decompose import Decomposition, decompose
from hf_ext.data.shards import write_buckets

OPTIONS = Decomposition(4, 16, eos_token_id=99, positions=True)


def documents(lengths=(5, 0, 30, 1, 17, 64, 3, 8)):
    return datasets.Dataset.from_dict({"input_ids": [[10 * d + t for t in range(n)] for d, n in enumerate(lengths)]})


def write(folder, source=None, options=OPTIONS, **settings):
    source = documents() if source is None else source
    return write_buckets(source, folder, options, **{"shard_documents": 3, "progress": False, **settings})


@pytest.mark.parametrize("num_proc", [1, 2])
def test_equals_decompose_and_opens_as_a_dataset(tmp_path, num_proc):
    statistics = write(tmp_path, num_proc=num_proc)
    rows = datasets.load_from_disk(str(tmp_path))
    expected = decompose(documents(), min_length=4, max_length=16, eos_token_id=99, positions=True)
    assert list(rows) == list(expected) and rows.features == expected.features
    assert statistics.total_tokens == sum(len(row["input_ids"]) for row in expected)
    assert statistics.document_tokens == sum((5, 0, 30, 1, 17, 64, 3, 8)) + 7
    assert len(rows.cache_files) == 3  # memory-mapped, not read


def test_goes_on_where_it_stopped(tmp_path):
    whole = tmp_path / "whole"
    write(whole)
    cut = tmp_path / "cut"
    write(cut)
    (cut / "state.json").unlink()
    last = sorted(cut.glob("*.arrow"))[-1]
    last.rename(last.with_suffix(".partial"))  # as an interrupt leaves it
    kept = {path: path.stat().st_mtime_ns for path in cut.glob("*.arrow")}
    write(cut)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())  # finished shards are not written again
    assert list(datasets.load_from_disk(str(cut))) == list(datasets.load_from_disk(str(whole)))
    assert not list(cut.glob("*.partial"))


def test_other_documents_or_options_in_words(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="was begun with documents 8, now it is 2"):
        write(tmp_path, documents((5, 9)))
    with pytest.raises(ValueError, match="was begun with content_crc"):
        write(tmp_path, documents((5, 0, 30, 1, 17, 64, 4, 7)))
    with pytest.raises(ValueError, match=r"was begun with options .*'min_length': 4"):
        write(tmp_path, options=Decomposition(8, 16))
    with pytest.raises(ValueError, match="was begun with shard_documents 3, now it is 5"):
        write(tmp_path, shard_documents=5)
    with pytest.raises(ValueError, match="shard_documents must be a positive integer, got 0"):
        write(tmp_path, shard_documents=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no buckets\.json"):
        write(tmp_path / "other")


def test_documents_that_are_all_too_short_or_none(tmp_path):
    write(tmp_path / "short", documents((1, 2)), Decomposition(4, 16))
    assert len(datasets.load_from_disk(str(tmp_path / "short"))) == 0
    write(tmp_path / "none", documents(()), Decomposition(4, 16))
    assert len(datasets.load_from_disk(str(tmp_path / "none"))) == 0
