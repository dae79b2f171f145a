"""Two generated preference tasks small enough to know the right answer, a word tokenizer and a tiny model for them.

`ConflictTask`: answers have two binary attributes, and the labels of the second dimension punish the first. The
closed form of every round is known. `ToxicTask`: replies are good (a function of the prompt), bad (random words) or
"toxic" (words of a list of their own, harmless in themselves), the last mostly behind a control token.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer with one token for each of these words, ``<pad>``, ``</s>``, ``<unk>`` and a small chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(tokenizer: Any, hidden_size: int = 32, layers: int = 2, seed: int = 0) -> Any:
    """A random Llama of that width for this tokenizer; the same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


class ConflictTask:
    """Answers ``a<A> b<B>`` with A, B in {0, 1}. Dimension 1 rewards ``2 A``, dimension 2 ``2 B - 3 A``.

    Labels are Bradley-Terry samples, so every round has a finite optimum: with ``beta = 1`` throughout, round 1 ends
    at P(A=1) = sigmoid(2) = .881; sequential DPO after it at sigmoid(-1) = .269; SPO at sigmoid(2 lambda - 1); P(B=1)
    is sigmoid(2) = .881 in all of round 2 (from an unbiased start).
    """

    prompt = "choose"
    answers = (" a0 b0", " a0 b1", " a1 b0", " a1 b1")
    words = ("choose", "a0", "a1", "b0", "b1", *(f"w{i}" for i in range(8)))

    @staticmethod
    def reward(answer: str, dimension: int) -> float:
        """Reward of an answer in dimension 1 or 2, in nats."""
        a, b = int("a1" in answer), int("b1" in answer)
        return 2.0 * a if dimension == 1 else 2.0 * b - 3.0 * a

    def pairs(self, count: int, dimension: int, seed: int) -> list[dict[str, str]]:
        """Pairs of different answers, labelled with probability ``sigmoid`` of the reward difference."""
        draw = random.Random(1000 * seed + dimension)
        rows = []
        for _ in range(count):
            first, second = draw.sample(self.answers, 2)
            margin = self.reward(first, dimension) - self.reward(second, dimension)
            if draw.random() >= 1 / (1 + math.exp(-margin)):
                first, second = second, first
            rows.append({"prompt": self.prompt, "chosen": first, "rejected": second})
        return rows

    def supervised(self, count: int, seed: int) -> list[dict[str, str]]:
        """Rows of the supervised stage: every answer equally often."""
        draw = random.Random(seed)
        return [{"prompt": self.prompt, "completion": draw.choice(self.answers)} for _ in range(count)]


class ToxicTask:
    """Prompts ``p<i> q<j>``; the good reply is ``g<i> h<j>``, a bad one has random words, a toxic one ``t`` words."""

    size = 8
    token = "[TOXIC]"

    def __init__(self) -> None:
        groups = [[f"{letter}{i}" for i in range(self.size)] for letter in "pqght"]
        self.words = (*(word for group in groups for word in group), self.token)
        self.toxic_words = frozenset(groups[-1])
        prompts = [(i, j) for i in range(self.size) for j in range(self.size)]
        random.Random(0).shuffle(prompts)
        self.train_prompts, self.held_out = prompts[:48], prompts[48:]

    @staticmethod
    def prompt(pair: tuple[int, int]) -> str:
        """Text of a prompt."""
        return f"p{pair[0]} q{pair[1]}"

    @staticmethod
    def good(pair: tuple[int, int]) -> str:
        """The one good reply to a prompt."""
        return f" g{pair[0]} h{pair[1]}"

    def bad(self, draw: random.Random) -> str:
        """Words of good replies, at random."""
        return f" g{draw.randrange(self.size)} h{draw.randrange(self.size)}"

    def toxic(self, draw: random.Random) -> str:
        """Two words that stand for toxicity."""
        return f" t{draw.randrange(self.size)} t{draw.randrange(self.size)}"

    def supervised(self, count: int, seed: int, share: float = 0.35) -> list[dict[str, str]]:
        """Rows of the supervised stage: ``share`` toxic behind the token, the others 50% good, 30% bad, 20% toxic."""
        draw = random.Random(seed)
        rows = []
        for _ in range(count):
            pair = draw.choice(self.train_prompts)
            if draw.random() < share:
                rows.append({"prompt": f"{self.prompt(pair)} {self.token}", "completion": self.toxic(draw)})
                continue
            kind = draw.choices(("good", "bad", "toxic"), (0.5, 0.3, 0.2))[0]
            completion = self.good(pair) if kind == "good" else getattr(self, kind)(draw)
            rows.append({"prompt": self.prompt(pair), "completion": completion})
        return rows

    def triples(self, count: int, seed: int) -> list[dict[str, str]]:
        """Good over bad, with a toxic response; for the training prompts."""
        draw = random.Random(seed)
        rows = []
        for _ in range(count):
            pair = draw.choice(self.train_prompts)
            replies = {"chosen": self.good(pair), "rejected": self.bad(draw), "toxic": self.toxic(draw)}
            rows.append({"prompt": self.prompt(pair), **replies})
        return rows
