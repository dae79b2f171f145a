import math

import pytest
import torch

from hf_ext import SirLLMConfig, make_cache
from hf_ext.testing import assert_close, ragged_batch, tiny_model

SMALL = {"sink_size": 2, "memory_size": 8, "recent_size": 6, "block_size": 4}


def feed(model, cache, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, **kwargs).logits


def bigram_model(table):
    """A Llama whose next-token probabilities are ``table[last token]``: its layers add nothing to the embedding."""
    size = table.shape[0]
    model = tiny_model(vocab_size=size, hidden_size=16, num_hidden_layers=1, pad_token_id=None)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 16))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = table.log().T / 4  # RMSNorm makes a 4 of the one in a one-hot of 16
    return model


TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.7, 0.1, 0.2]])
SIX = torch.tensor([[0, 0, 1, 2, 2, 1]])


@pytest.mark.parametrize("pieces", [[6], [3, 3], [1] * 6, [2, 4]])
def test_six_tokens_by_hand(pieces):
    model = bigram_model(TABLE)
    cache = make_cache(model, "sirllm", decay=0.5, auto_turn=False)
    for ids in SIX.split(pieces, dim=1):
        feed(model, cache, ids)
    probabilities = [1 / 3, 0.5, 0.25, 0.75, 0.2, 0.1]  # none predicts the first; P(0|0) P(1|0) P(2|1) P(2|2) P(1|2)
    expected = torch.tensor([[-math.log(p) for p in probabilities]])
    assert torch.allclose(cache.entropy, expected, atol=1e-5)


def test_six_tokens_by_hand_as_the_released_code_has_them():
    model = bigram_model(TABLE)
    cache = make_cache(model, "sirllm", repo_compat=True, auto_turn=False)
    feed(model, cache, SIX[:, :3])
    feed(model, cache, SIX[:, 3:])
    first = [0.5, 0.5, 0.5]  # P(0|0), P(0|0); the first of a forward takes the largest value in it
    second = [0.2, 0.2, 0.2]  # P(2|2), P(2|2)
    expected = torch.tensor([[-math.log(p) for p in first + second]])
    assert torch.allclose(cache.entropy, expected, atol=1e-5)


def test_entropies_equal_those_of_the_whole_text_for_every_row_and_chunking():
    model, batch = tiny_model(), ragged_batch([17, 5, 11])
    logits = model(**batch).logits.double()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    for pieces in ([17], [9, 8], [4] * 4 + [1]):
        cache, start = make_cache(model, "sirllm"), 0
        for piece in ids.split(pieces, dim=1):
            start += piece.shape[1]
            positions = (mask[:, :start].cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            feed(model, cache, piece, attention_mask=mask[:, :start], position_ids=positions)
        known = (mask[:, :-1] * mask[:, 1:]).bool()
        assert (cache.entropy[:, 1:].double() - whole)[known].abs().max() < 1e-5
        first_of_row = cache.entropy[range(3), 17 - mask.sum(-1)]
        assert torch.allclose(first_of_row, torch.full((3,), math.log(128)))


def test_generated_tokens_are_weighed_without_running_the_head_again():
    model = tiny_model()
    cache = make_cache(model, "sirllm")
    prompt = ragged_batch([6])["input_ids"]
    calls = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    handle.remove()
    assert len(calls) == 5 + 1  # one for each new token, and one for the entropies of the prompt
    whole = -model(out).logits.log_softmax(-1)[:, :-1].gather(-1, out[:, 1:, None])[..., 0]
    assert_close("entropy", whole[:, : cache.committed - 1], cache.entropy[:, 1:], 1e-5)


def test_a_turn_evicts_exactly_what_the_paper_says_then_decays():
    model = tiny_model()
    cache = make_cache(model, "sirllm", **SMALL, decay=0.5)
    ids = ragged_batch([20])["input_ids"]
    feed(model, cache, ids[:, :14])
    before = cache.entropy[0].tolist()
    cache.new_turn()
    feed(model, cache, ids[:, 14:19])  # 14 + 5 > 16
    memory = sorted(range(14), key=lambda i: -before[i])[: 8 - 5]
    kept = set(memory) | {0, 1}
    kept |= set([i for i in reversed(range(14)) if i not in kept][: 11 - len(kept)])
    assert [token.position for token in cache.remembered(0)] == [*sorted(kept), *range(14, 19)]
    decayed = [token.entropy for token in cache.remembered(0)][:11]
    assert decayed == pytest.approx([before[i] / 2 for i in sorted(kept)])
    assert [token.turn for token in cache.remembered(0)] == [0] * 11 + [1] * 5


def test_entropies_decay_by_the_turn_even_where_nothing_goes():
    model = tiny_model()
    cache = make_cache(model, "sirllm", decay=0.7)
    feed(model, cache, ragged_batch([6])["input_ids"])
    first = cache.entropy.clone()
    for _ in range(3):
        cache.new_turn()
    assert torch.allclose(cache.entropy, first * 0.7**3)
    assert cache.turn == 3


def test_a_turn_begins_by_itself_after_generated_tokens_only():
    model, ids = tiny_model(), ragged_batch([12])["input_ids"]
    cache = make_cache(model, "sirllm")
    for piece in (ids[:, :4], ids[:, 4:8]):  # a prompt in two chunks is one turn
        feed(model, cache, piece)
    assert cache.turn == 0
    feed(model, cache, ids[:, :1])
    feed(model, cache, ids[:, 8:])
    assert cache.turn == 1
    feed(model, cache, ids[:, :1])
    cache.new_turn()  # by hand: not counted twice
    feed(model, cache, ids[:, 8:])
    assert cache.turn == 2


@pytest.mark.parametrize("positions", ["dense", "original"])
def test_memory_is_flat_for_ever_also_during_answers(positions):
    model = tiny_model(max_position_embeddings=64)
    cache = make_cache(model, "sirllm", **SMALL, positions=positions)
    sizes = []
    token = ragged_batch([3, 2])
    feed(model, cache, token["input_ids"], attention_mask=token["attention_mask"])
    for step in range(300):
        logits = feed(model, cache, torch.full((2, 1), 3 + step % 100))
        assert torch.isfinite(logits).all()
        assert cache.stored <= cache.capacity
        sizes.append(cache.nbytes())
    assert max(sizes[40:]) == max(sizes)
    assert cache.committed == 303
    if positions == "dense":
        assert int(cache.positions.max()) < cache.capacity


def test_turn_eviction_lets_an_answer_exceed_the_capacity_as_the_paper_does():
    model = tiny_model()
    cache = make_cache(model, "sirllm", **SMALL, evict="turn")
    feed(model, cache, ragged_batch([14])["input_ids"])
    for _ in range(10):
        feed(model, cache, torch.tensor([[5]]))
    assert cache.stored == 24
    feed(model, cache, torch.tensor([[5, 6, 7]]))
    assert cache.stored == cache.capacity


def test_reserve_makes_room_before_the_turn():
    model = tiny_model()
    cache = make_cache(model, "sirllm", **SMALL)
    feed(model, cache, ragged_batch([15])["input_ids"])
    cache.new_turn(reserve=6)
    assert cache.stored == 10


def test_a_prompt_longer_than_the_capacity_streams_through():
    model, ids = tiny_model(), ragged_batch([50])["input_ids"]
    at_once = make_cache(model, "sirllm", **SMALL)
    feed(model, at_once, ids)
    assert at_once.stored == at_once.capacity
    assert [t.position for t in at_once.remembered(0)][:2] == [0, 1]
    in_chunks = make_cache(model, "sirllm", **SMALL)
    model.generate(ids, past_key_values=in_chunks, max_new_tokens=3, prefill_chunk_size=7, do_sample=False)
    assert in_chunks.stored <= in_chunks.capacity
    assert in_chunks.turn == 0


def test_taking_back_leaves_no_trace_in_the_entropies():
    model, ids = tiny_model(), ragged_batch([20])["input_ids"]
    straight = make_cache(model, "sirllm")
    feed(model, straight, ids[:, :8])
    feed(model, straight, ids[:, 12:])
    back = make_cache(model, "sirllm")
    feed(model, back, ids[:, :8])
    back.activate_past_recording()
    feed(model, back, ids[:, 5:9])
    back.crop(-4)
    feed(model, back, ids[:, 12:])
    back.crop(0)
    assert torch.equal(straight.entropy, back.entropy)
    assert torch.equal(straight.ids, back.ids)


def test_remembered_says_what_is_kept_and_why():
    model, batch = tiny_model(), ragged_batch([20, 9])
    cache = make_cache(model, "sirllm", **SMALL)
    feed(model, cache, batch["input_ids"], attention_mask=batch["attention_mask"])
    kinds = [token.kind for token in cache.remembered(0)]
    assert kinds == ["sink"] * 2 + ["memory"] * 8 + ["recent"] * 6
    short = cache.remembered(1)
    assert [token.token_id for token in short] == batch["input_ids"][1, 11:].tolist()
    assert len(cache.remembered()) == 16 + 9
    assert make_cache(model, "sirllm").remembered() == []


def test_embeddings_and_headless_models_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="needs input_ids"), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 3, 64), past_key_values=make_cache(model, "sirllm"))
    with pytest.raises(ValueError, match="output head"):
        make_cache(model.model, "sirllm")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sink_size": -1}, "sink_size must be a whole number of at least 0, got -1"),
        ({"memory_size": 1.5}, "memory_size"),
        ({"decay": 0}, "decay must be above 0 and at most 1"),
        ({"decay": 1.2}, "decay"),
        ({"positions": "shifted"}, 'positions must be "dense" or "original"'),
        ({"evict": "never"}, 'evict must be "block" or "turn"'),
        ({"memory_size": 10, "recent_size": 10}, "block_size must be at most"),
    ],
)
def test_wrong_options_are_sentences(options, words):
    with pytest.raises(ValueError, match=words):
        SirLLMConfig(**options)
