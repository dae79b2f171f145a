import copy

import numpy as np
import pytest
import torch

from hf_ext import convert_to_cla
from hf_ext.patches.cla_rank import rank_layers
from hf_ext.patches.cla_search import search_map
from hf_ext.testing import tiny_model

TEXT = torch.randint(3, 128, (128,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense():
    model = tiny_model("llama", num_hidden_layers=6)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(6 if "self_attn" in name or "lm_head" in name else 1)
    return model


@pytest.fixture(scope="module")
def ranked(dense):
    return rank_layers(dense, TEXT, init="fit", reach=2, window=64)


@torch.no_grad()
def kl(dense, shared):
    """KL(dense ‖ shared) in nats a token over windows of 64 tokens, in float64."""
    total = []
    for window in TEXT.view(-1, 64):
        p, q = (model(window[None]).logits[0].double().numpy() for model in (dense, shared))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        total.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(total).mean()


def test_every_step_is_measured_on_what_is_converted_so_far(dense, ranked):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    measured = {}
    half = dense.kv_bytes_per_token() // 2
    found = search_map(dense, TEXT, half, ranked, window=64, done=measured.__setitem__)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert len(set(found)) == 3
    student, sources = copy.deepcopy(dense), tuple(range(6))
    while sources != found:  # one more layer of the map at a time, in the order in which they were accepted
        towards = [one for one in measured if all(one[i] in (i, found[i]) for i in range(6))]
        steps = [one for one in towards if all(one[i] == sources[i] or sources[i] == i for i in range(6))]
        steps = [one for one in steps if len(set(one)) == len(set(sources)) - 1]
        sources = min(steps, key=lambda one: measured[one])
        student = convert_to_cla(student, {"kv_source_layers": sources}, "fit", TEXT)
        assert measured[sources] == pytest.approx(kl(dense, student), rel=2e-2)


def test_an_interrupted_search_goes_on(dense, ranked):
    budget, known = 2 * dense.kv_bytes_per_token() // 3, {}

    class Stop(Exception):
        pass

    def stop_after_3(sources, nats):
        known[sources] = nats
        if len(known) == 3:
            raise Stop

    with pytest.raises(Stop):
        search_map(dense, TEXT, budget, ranked, window=64, done=stop_after_3)
    whole, rest = {}, {}
    expected = search_map(dense, TEXT, budget, ranked, window=64, done=whole.__setitem__)
    assert search_map(dense, TEXT, budget, ranked, window=64, known=known, done=rest.__setitem__) == expected
    assert {**known, **rest} == whole and not known.keys() & rest.keys()


def test_what_cannot_be_reached(dense, ranked):
    with pytest.raises(
        ValueError, match="allow groups of more than 3 layers, more bytes, or rank with a larger reach"
    ):
        search_map(dense, TEXT, 1, ranked, window=64)
