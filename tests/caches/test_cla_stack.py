"""Packed and evicting caches under Cross-Layer Attention: consumers read the producer's packed keys."""

import pytest
import torch
from transformers import cache_utils

from hf_ext import HfExtConfig, make_cache
from hf_ext.testing import SMALL, assert_close, ragged_batch, tiny_config, tiny_model

pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "KVSharingDict"), reason="Cross-Layer Attention needs transformers 5.23"
)
PACKED = {"type": "decoquant", "bits": 8, "first_block": 8, "block_size": 3, "sink_size": 2}


def cla_model():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config()
    config.hf_ext = HfExtConfig(cla={"sharing_factor": 2})
    return AutoModelForCausalLM.from_config(config).eval().double()


ALONE = [[{"type": kind, **options}] for kind, options in sorted(SMALL.items())]
STACKED = [[*alone, PACKED] for alone in ALONE if alone[0]["type"] in ("snapkv", "h2o", "tova", "pyramid_infer_cache")]


@pytest.mark.parametrize("stack", ALONE + STACKED, ids=lambda stack: "+".join(member["type"] for member in stack))
def test_rows_are_independent_and_half_the_layers_store(stack):
    model = cla_model()
    batch = ragged_batch([20, 9])
    cache = make_cache(model, stack)
    out = model.generate(**batch, past_key_values=cache, max_new_tokens=6, do_sample=False)
    alone = make_cache(model, stack)
    single = model.generate(
        batch["input_ids"][1:, -9:], past_key_values=alone, max_new_tokens=6, do_sample=False, use_cache=True
    )
    assert torch.equal(out[1, -len(single[0]) + 9 :], single[0, 9:])
    assert len(cache.own_layers) == 2


def test_a_packed_cache_comes_close_to_the_dense_one():
    model, ids = cla_model(), torch.randint(3, 128, (1, 60))
    with torch.no_grad():
        expected = model(ids).logits[:, 50:]
        cache = make_cache(model, [PACKED])
        model(ids[:, :50], past_key_values=cache)
        assert_close("logits", expected, model(ids[:, 50:], past_key_values=cache).logits, 0.05)


def test_a_saved_cache_of_the_stock_model_is_refused():
    stock, model = tiny_model(), cla_model()
    cache = make_cache(stock, "snapkv", **SMALL["snapkv"])
    with torch.no_grad():
        stock(torch.randint(3, 128, (1, 30)), past_key_values=cache)
    with pytest.raises(ValueError, match=r"this one for 4 layers \(1, 3 sharing those of others\)"):
        make_cache(model, "snapkv", **SMALL["snapkv"]).load_state_dict(cache.state_dict())
