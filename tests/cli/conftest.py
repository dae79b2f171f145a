"""A tiny random chat model on disk, with a byte tokenizer and a chat template, and a way to call ``hf-ext``."""

import pytest

from hf_ext.cli import main
from hf_ext.testing import tiny_model

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(chat_template=TEMPLATE):
    """One token a byte, after five special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<eos>", "<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder: 4 Llama layers, context 2048."""
    path = tmp_path_factory.mktemp("chat_model")
    model = tiny_model(vocab_size=261, eos_token_id=4, max_position_embeddings=2048)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def hf_ext_command(capsys):
    """Call ``hf-ext`` in this process: arguments -> (status, stdout, stderr)."""

    def call(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leave:  # argparse
            status = leave.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
