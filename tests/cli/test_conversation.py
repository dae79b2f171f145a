"""A conversation feeds each token once, stops where asked to, and goes on from a file as if never interrupted."""

import pytest
import torch

from hf_ext.caches.config import cache_configs
from hf_ext.cli.conversation import PIECE, Conversation
from hf_ext.default_model import load_model
from hf_ext.testing import tiny_model

SMALL = {"type": "sirllm", "sink_size": 2, "memory_size": 30, "recent_size": 30, "block_size": 8}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


def conversation(loaded, stack="sirllm", **options):
    return Conversation(*loaded, None if stack is None else cache_configs(stack), **options)


@pytest.fixture
def fed(loaded):
    """Every token the model is given, in order."""
    ids = []
    hook = loaded[0].register_forward_pre_hook(
        lambda module, args, kwargs: ids.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    yield ids
    hook.remove()


@pytest.mark.parametrize("stack", [None, "sirllm", SMALL])
def test_every_token_is_fed_once(loaded, fed, stack):
    talk = conversation(loaded, stack)
    for text in ("Hi there", "x" * (PIECE + 50), "And?"):
        talk.answer(text, **GREEDY)
    _, tokenizer = loaded
    rendered = tokenizer.apply_chat_template(talk.messages, tokenize=False)
    told = [*fed, *talk.pending]
    assert tokenizer.decode(told).count("<|im_start|>user") == 3
    assert len(told) == talk.seen + len(talk.pending)
    for message in talk.messages:
        assert message["content"] in rendered
    if stack == SMALL:
        assert talk.kept <= 62 < talk.seen
    else:
        assert talk.kept == talk.seen == len(fed)


def test_answers_equal_those_over_the_whole_history(loaded):
    model, tokenizer = loaded
    talk = conversation(loaded)
    ids = []
    for text in ("Hi there", "What?", "And?"):
        ids += talk.turns.later(text) if talk.messages else talk.turns.first(text)
        with torch.no_grad():
            output = model.generate(torch.tensor([ids]), **GREEDY, pad_token_id=0)[0].tolist()
        answer = output[len(ids) :]
        assert talk.answer(text, **GREEDY) == tokenizer.decode(answer, skip_special_tokens=True)
        ids = output[:-1] if output[-1] == tokenizer.eos_token_id else output


def test_pieces_shown_are_the_answer(loaded):
    shown = []
    talk = conversation(loaded)
    assert talk.answer("Hi", shown.append, **GREEDY) == "".join(shown)


@pytest.mark.parametrize("stack", [None, "sirllm", SMALL])
def test_a_stopped_answer_leaves_the_conversation_whole(loaded, fed, stack):
    talk = conversation(loaded, stack)
    count = []

    def stop_after_three(module, args, kwargs):
        count.append(1)
        talk.stop = len(count) >= 3

    hook = loaded[0].register_forward_pre_hook(stop_after_three, with_kwargs=True)
    talk.answer("Hi", **GREEDY)
    hook.remove()
    assert talk.stop and talk.messages[-1]["role"] == "assistant" and len(talk.pending) == 1
    stopped = [*fed, *talk.pending]
    talk.answer("Go on", **GREEDY)
    assert [*fed][: len(stopped)] == stopped  # the last token of the cut answer is fed, then the next turn
    assert [*fed][len(stopped) :][: len(talk.turns.later("Go on"))] == talk.turns.later("Go on")


def test_stopping_while_a_long_text_is_read(loaded):
    talk = conversation(loaded)
    hook = loaded[0].register_forward_hook(lambda *_: setattr(talk, "stop", True))
    assert talk.answer("x" * 3 * PIECE, **GREEDY) == ""
    hook.remove()
    assert talk.seen == PIECE and len(talk.pending) > 2 * PIECE - 1
    talk.answer("Go on", **GREEDY)
    assert talk.seen > 3 * PIECE


@pytest.mark.parametrize("stack", [None, "sirllm", SMALL])
def test_saved_and_loaded_it_goes_on_the_same(loaded, tmp_path, stack):
    talk = conversation(loaded, stack)
    for text in ("Hi there", "y" * 80):
        talk.answer(text, **GREEDY)
    talk.save(tmp_path / "talk")
    other = conversation(loaded, "sink_window")  # the file's cache and options take the place of these
    other.load(tmp_path / "talk")
    assert (other.messages, other.stack) == (talk.messages, talk.stack)
    if stack is not None:
        assert (other.pending, other.seen, other.kept) == (talk.pending, talk.seen, talk.kept)
    assert other.answer("And?", **GREEDY) == talk.answer("And?", **GREEDY)


def test_files_that_do_not_fit_are_sentences(loaded, tmp_path):
    talk = conversation(loaded)
    talk.answer("Hi", **GREEDY)
    talk.save(tmp_path / "talk")
    talk.cache.save(tmp_path / "cache")
    (tmp_path / "broken").write_bytes((tmp_path / "talk").read_bytes()[:-50])
    other = Conversation(tiny_model("qwen2", vocab_size=261), loaded[1], cache_configs("sirllm"))
    with pytest.raises(ValueError, match=r"saved with another model: LlamaForCausalLM .* not Qwen2ForCausalLM"):
        other.load(tmp_path / "talk")
    with pytest.raises(ValueError, match="saved without --plain"):
        conversation(loaded, plain=True).load(tmp_path / "talk")
    before = (talk.messages, talk.seen)
    with pytest.raises(ValueError, match="a saved cache, but no conversation"):
        talk.load(tmp_path / "cache")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        talk.load(tmp_path / "broken")
    with pytest.raises(OSError, match="no saved cache at"):
        talk.load(tmp_path / "nothing")
    assert (talk.messages, talk.seen) == before  # nothing is lost by a load that fails


def test_reset_forgets(loaded):
    talk = conversation(loaded)
    first = talk.answer("Hi", **GREEDY)
    talk.reset()
    assert (talk.messages, talk.seen, talk.nbytes()) == ([], 0, 0)
    assert talk.answer("Hi", **GREEDY) == first
