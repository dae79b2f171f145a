"""Turns rendered one by one are the tokens of the whole conversation rendered at once."""

import pytest
from transformers import AutoTokenizer

from hf_ext.cli.turns import TurnFormat


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def whole(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_turn_by_turn_equals_all_at_once(tokenizer, system):
    turns = TurnFormat(tokenizer, system=system)
    said = [("Hi", "Hello!"), ("How are you?\nWell?", ""), ("<b> & {{x}}", "Bye")]
    messages = [] if system is None else [{"role": "system", "content": system}]
    ids = []
    for index, (user, answer) in enumerate(said):
        ids += turns.later(user) if index else turns.first(user)
        messages.append({"role": "user", "content": user})
        assert ids == whole(tokenizer, messages)
        ids += turns.ids(answer)
        messages.append({"role": "assistant", "content": answer})


def test_plain_text_is_as_it_is(tokenizer):
    turns = TurnFormat(tokenizer, plain=True)
    assert tokenizer.decode(turns.first("Once upon") + turns.later(" a time")) == "Once upon a time"


def test_templates_that_cannot_serve_are_sentences(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; `hf-ext chat --plain`"):
        TurnFormat(tokenizer)
    with pytest.raises(ValueError, match="--system needs a chat template"):
        TurnFormat(tokenizer, plain=True, system="x")
    tokenizer.chat_template = "{{ raise_exception('only users speak') if messages | length > 1 }}"
    with pytest.raises(ValueError, match="refuses the conversation: only users speak"):
        TurnFormat(tokenizer).later("x")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="changes the answers"):
        TurnFormat(tokenizer).later("x")
