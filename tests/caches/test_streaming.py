"""Streams against an oracle that keeps keys unrotated and rotates them all at every step, as StreamingLLM does."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_ext import make_cache
from hf_ext.testing import assert_close, ragged_batch, tiny_model

SMALL = {
    "sink_window": {"sink_size": 4, "window_size": 12, "block_size": 1},
    "sirllm": {"sink_size": 2, "memory_size": 8, "recent_size": 6, "block_size": 4},
}


class Oracle:
    """A Llama of one row, one token at a time: keys without positions; the stored ones are numbered anew each step."""

    def __init__(self, model):
        self.model, self.layers = model.model, model.model.layers
        self.head = model.lm_head
        self.memory = [(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16)) for _ in self.layers]

    def keep(self, slots):
        self.memory = [(keys[:, :, slots], values[:, :, slots]) for keys, values in self.memory]

    @torch.no_grad()
    def step(self, token):
        x = self.model.embed_tokens(token[None, None])
        for index, layer in enumerate(self.layers):
            x = x + self._attend(index, layer.self_attn, layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.model.norm(x))[0, 0]

    def _attend(self, index, attention, x):
        query, key, value = (
            project(x).view(1, 1, -1, 16).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.memory[index], (key, value), strict=True))
        self.memory[index] = (keys, values)
        cos, sin = self.model.rotary_emb(x, torch.arange(keys.shape[2])[None])
        _, rotated = apply_rotary_pos_emb(keys, keys, cos, sin)
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
        out = F.scaled_dot_product_attention(query, rotated, values, enable_gqa=True)
        return attention.o_proj(out.transpose(1, 2).reshape(1, 1, -1))


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_four_hundred_tokens_equal_attention_rerun_with_dense_positions(kind, attention):
    model = tiny_model(max_position_embeddings=64, attn_implementation=attention)
    cache, oracle = make_cache(model, kind, **SMALL[kind]), Oracle(model)
    for seen, token in enumerate(torch.randint(3, 128, (400,))):
        before = [] if seen == 0 else cache.ordinals[0].tolist()
        with torch.no_grad():
            logits = model(input_ids=token[None, None], past_key_values=cache).logits[0, 0]
        oracle.keep([before.index(ordinal) for ordinal in cache.ordinals[0].tolist()[:-1]])
        assert_close(f"logits of token {seen}", oracle.step(token), logits, 1e-4)
    assert int(cache.positions.max()) == cache.stored - 1 < cache.capacity


def test_the_window_is_the_first_and_the_last_tokens():
    model = tiny_model()
    cache = make_cache(model, "sink_window", **SMALL["sink_window"])
    for token in range(3, 40):
        with torch.no_grad():
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    assert cache.ordinals.tolist() == [[0, 1, 2, 3, *range(25, 37)]]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_left_padded_batch_equal_single_runs(kind, attention):
    model, lengths = tiny_model(attn_implementation=attention), [30, 25, 12, 5]
    batch, turns = ragged_batch(lengths), [torch.randint(3, 128, (4, n)) for n in (1, 1, 4, 1, 7, 1, 1, 1, 1, 1, 5)]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    together = run(model, make_cache(model, kind, **SMALL[kind]), ids, mask, turns)
    for row, length in enumerate(lengths):
        alone = run(
            model,
            make_cache(model, kind, **SMALL[kind]),
            ids[row : row + 1, -length:],
            mask[row : row + 1, -length:],
            [turn[row : row + 1] for turn in turns],
        )
        assert_close(f"row {row}", alone[0], together[row], 1e-4)


def run(model, cache, ids, mask, turns):
    """The logits of all turns after the prompt, as generate would feed them."""
    outputs = []
    for turn in [ids, *turns]:
        if outputs or turn is not ids:
            mask = torch.cat([mask, torch.ones_like(turn)], dim=-1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -turn.shape[1] :]
        with torch.no_grad():
            out = model(input_ids=turn, attention_mask=mask, position_ids=positions, past_key_values=cache)
        outputs.append(out.logits)
    return torch.cat([outputs[0][:, -1:], *outputs[1:]], dim=1)


def test_padding_inside_the_dialogue_is_exact_too():
    model, turn = tiny_model(), ragged_batch([6, 2], seed=1)
    first = ragged_batch([14, 14], seed=2)["input_ids"]
    ids, mask = turn["input_ids"], turn["attention_mask"]
    both = make_cache(model, "sink_window", **SMALL["sink_window"])
    with torch.no_grad():
        model(input_ids=first, past_key_values=both)
        whole = torch.cat([torch.ones_like(first), mask], dim=1)
        positions = (whole.cumsum(-1) - 1)[:, -6:]
        together = model(input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=both).logits
        alone = make_cache(model, "sink_window", **SMALL["sink_window"])
        model(input_ids=first[1:], past_key_values=alone)
        expected = model(input_ids=ids[1:, 4:], past_key_values=alone).logits
    assert_close("the short row", expected[0], together[1, 4:], 1e-4)


def test_moving_keys_again_and_again_costs_bfloat16_little():
    errors = []
    text = torch.randint(3, 128, (1, 200))
    for block in (1, 60):
        caches = []
        for model in (tiny_model(), tiny_model().to(torch.bfloat16)):
            cache = make_cache(model, "sink_window", sink_size=4, window_size=60, block_size=block)
            for token in text.split(1, dim=1):
                with torch.no_grad():
                    model(input_ids=token, past_key_values=cache)
            caches.append(cache.layers[0].keys.float())
        errors.append(((caches[1] - caches[0]).norm() / caches[0].norm()).item())
    assert errors[0] < 0.03  # keys moved up to 60 times, each time rounded
    assert errors[1] < 0.005  # keys moved once


def test_tokens_that_are_gone_cannot_be_taken_back():
    model = tiny_model()
    cache = make_cache(model, "sink_window", **SMALL["sink_window"])
    with torch.no_grad():
        model(input_ids=ragged_batch([30])["input_ids"], past_key_values=cache)
    cache.crop(-12)
    with pytest.raises(ValueError, match="no longer stored"):
        cache.crop(-1)


def test_a_recording_that_nobody_commits_ends():
    model = tiny_model()
    cache = make_cache(model, "sink_window", **SMALL["sink_window"])
    cache.activate_past_recording()
    for _ in range(100):
        with torch.no_grad():
            model(input_ids=torch.randint(3, 128, (1, 5)), past_key_values=cache)
    assert cache.stored <= cache.capacity


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3, 3)])
def test_masks_of_other_shapes_are_refused(shape):
    model = tiny_model()
    cache = make_cache(model, "sink_window")
    ids = ragged_batch([3])["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(input_ids=ids, attention_mask=torch.ones(shape), past_key_values=cache)
