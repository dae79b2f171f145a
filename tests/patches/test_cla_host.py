"""Cross-Layer Attention needs a host whose caches know layers that store nothing: transformers 5.23."""

import pytest
from transformers import cache_utils

from hf_ext.testing import tiny_model

CLA = {"cla": {"sharing_factor": 2}}


def test_an_older_host_is_refused_by_version(monkeypatch):
    monkeypatch.delattr(cache_utils, "KVSharingDict", raising=False)
    with pytest.raises(ImportError, match=r"The cla flag needs transformers 5\.23 or newer, got 5\."):
        tiny_model(hf_ext=CLA)
