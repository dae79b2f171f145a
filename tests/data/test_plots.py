"""Pictures are written, and say in words what they need."""

import sys

import numpy as np
import pytest

from hf_ext.data.bucket_sampler import BucketBatchSampler
from hf_ext.data.plots import plot_schedule, plot_statistics
from hf_ext.data.statistics import BucketStatistics


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    sampler = BucketBatchSampler(np.repeat(np.arange(4, 8, dtype=np.int8), 64), 512)
    for path in (
        plot_statistics(BucketStatistics({16: 64, 32: 9}), tmp_path / "a.png"),
        plot_schedule(sampler, tmp_path / "b.png", epoch=1),
    ):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_without_matplotlib_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "hf_ext\[demo\]"'):
        plot_statistics(BucketStatistics({}), tmp_path / "a.png")
