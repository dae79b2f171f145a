"""Perplexity equals its definition in float64, whatever the windows, chunks and cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext import make_cache
from hf_ext.evaluation import Perplexity, perplexity, tokenize, windows
from hf_ext.testing import tiny_model

IDS = torch.randint(3, 128, (150,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def oracle(model, ids, window, stride):
    """The definition: for each token not scored yet, the window that holds it and reaches furthest back last."""
    model = model.double()
    nats, scored = [], 0
    for begin in range(0, len(ids), stride):
        piece = ids[begin : begin + window]
        with torch.no_grad():
            logprobs = model(piece[None]).logits[0].log_softmax(-1)
        for i in range(1, len(piece)):
            if begin + i >= scored:
                nats.append(-logprobs[i - 1, piece[i]].item())
        scored = max(scored, begin + len(piece))
        if scored == len(ids):
            break
    model.float()
    return sum(nats) / len(nats), len(nats)


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 7), (150, 150), (400, 400), (2, 1), (149, 149)])
def test_equals_the_definition(model, window, stride):
    nats, tokens = oracle(model, IDS, window, stride)
    result = perplexity(model, IDS, window, stride)
    assert result.tokens == tokens
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("name", [None, "sirllm", "sink_window"])
def test_chunks_and_caches_that_forget_nothing_change_nothing(model, chunk, name):
    cache = None if name is None else lambda: make_cache(model, name)
    expected = perplexity(model, IDS, 60, 20)
    result = perplexity(model, IDS, 60, 20, cache=cache, chunk=chunk)
    assert result.nats == pytest.approx(expected.nats, rel=1e-6)
    assert (result.tokens, result.windows) == (expected.tokens, expected.windows)


def test_a_small_cache_forgets(model):
    options = {"sink_size": 2, "window_size": 10, "block_size": 4}
    small = perplexity(model, IDS, 150, cache=lambda: make_cache(model, "sink_window", **options), chunk=4)
    assert small.nats != pytest.approx(perplexity(model, IDS, 150).nats, rel=1e-4)


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(2, 50), st.integers(1, 50))
def test_windows_score_every_token_at_most_once_and_overlapping_ones_all(length, window, stride):
    stride = min(stride, window)
    found = windows(length, window, stride)
    scored = [i for begin, end, first in found for i in range(first, end)]
    assert len(scored) == len(set(scored)) and scored == sorted(scored)
    assert all(begin < first < end <= begin + window for begin, end, first in found)
    expected = set(range(1, length))
    if stride == window:
        expected -= set(range(window, length, window))
    assert set(scored) == expected


def test_max_windows_and_mode(model):
    model.train()
    assert perplexity(model, IDS, 32, max_windows=2).tokens == 62
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[:1], {}, "at least 2 tokens, got 1"),
        (IDS, {"window": 1}, "window must be at least 2 tokens, got 1"),
        (IDS, {"window": 8, "stride": 9}, r"stride must be from 1 to the window \(8\), got 9"),
        (IDS, {"chunk": -1}, "chunk must be at least 1"),
        (IDS, {"max_windows": 0}, "max_windows must be at least 1"),
        (IDS.repeat(5), {"window": 700}, "at most the model's context of 512 tokens, got 700"),
    ],
)
def test_mistakes_are_sentences(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, **options)


def test_huge_nats_are_infinite_perplexity():
    assert Perplexity(1e4, 1, 1).perplexity == math.inf


def test_tokenize_silently(caplog):
    class Tokenizer:
        def __call__(self, text, verbose):
            assert not verbose
            return {"input_ids": [ord(character) for character in text]}

    assert tokenize(Tokenizer(), "ab").tolist() == [97, 98]
