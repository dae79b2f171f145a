"""The FLOP formula: against torch's own counter on a real forward and backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_ext.data.cost import attention_flops, attention_width, matrix_parameters, training_flops
from hf_ext.testing import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("length", [8, 64])
def test_equals_what_torch_counts(family, length):
    model = tiny_model(family, attn_implementation="eager").train()
    ids = torch.randint(0, 128, (4, length))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # norms, biases and rotary embeddings multiply no matrices: the counter leaves them out
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    expected = training_flops(model, {length: ids.numel()}) - 6 * vectors * ids.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_a_tied_head_counts_once_and_an_untied_table_not_at_all():
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model(tie_word_embeddings=False)
    assert matrix_parameters(tied) == matrix_parameters(untied) == sum(p.numel() for p in tied.parameters())


def test_attention_grows_with_length_and_causal_is_half():
    config = tiny_model().config
    assert attention_width(config) == (4, 64)
    assert (
        attention_flops(config, 100, 16) == 12 * 4 * 64 * 16 * 100 == 2 * attention_flops(config, 100, 16, causal=True)
    )
