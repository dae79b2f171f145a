"""Plays the demo's dialogue into a cache, asks what it remembers, and measures what that costs.

Each word of a question's four is scored by the mean log-probability of its tokens after the opening of the answer, as
the SirLLM paper (arXiv 2405.12528) scores its multiple-choice tasks. A language model prefers some words whatever it
was told; so the choice is also given calibrated: from each score its mean over the four versions of the dialogue is
taken away, and the word that this version's telling raised most is chosen. Chance is one in four for both.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_ext.cli import demo_script as script
from hf_ext.cli.turns import TurnFormat

VERSIONS = 4


@dataclass
class Recall:
    """What one kind of cache remembered, and its size during the first version of the dialogue.

    Attributes:
        scores: ``[versions, places, words]`` mean log-probability in nats of each word.
        said: for each place, how the model goes on by itself after the opening of the answer, first version.
        seen: tokens of the dialogue read so far, at each point of measurement.
        nbytes: bytes held by the cache there.
        kept: tokens stored there.
    """

    scores: Tensor
    said: list[str] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    @property
    def right(self) -> int:
        """Right choices, calibrated."""
        return _hits(self.scores - self.scores.mean(0))

    @property
    def right_uncalibrated(self) -> int:
        """Right choices by the plain scores."""
        return _hits(self.scores)

    @property
    def asked(self) -> int:
        """How many choices there were."""
        return self.scores.shape[0] * self.scores.shape[1]


def _hits(scores: Tensor) -> int:
    truth = torch.arange(scores.shape[0])[:, None]
    return int((scores.argmax(-1) == truth).sum())


def exchanges(turns: TurnFormat) -> Iterator[list[list[int]]]:
    """The dialogue's token ids, an exchange at a time: a list for each version, alike after the first exchange."""
    answer = turns.ids(script.OPENING_ANSWER)
    told = (
        [script.FACT.format(place=place, word=words[v]) for place, words in script.WORDS.items()]
        for v in range(VERSIONS)
    )
    yield [turns.first(" ".join([script.OPENING, *facts])) + answer for facts in told]
    for question, reply in script.TALK:
        yield [turns.later(question) + turns.ids(reply)] * VERSIONS


def steps() -> int:
    """How often `recall` calls ``step``."""
    return 1 + len(script.TALK) + len(script.WORDS)


def recall(
    model: Any,
    turns: TurnFormat,
    cache: Any,
    nbytes: Callable[[Any], int],
    kept: Callable[[Any], int],
    step: Callable[[], None],
) -> Recall:
    """Play all versions of the dialogue, as the rows of one batch, into a cache and ask for every word.

    Args:
        model: the causal language model.
        turns: its chat format.
        cache: an empty cache.
        nbytes: bytes a cache holds.
        kept: tokens of each row a cache stores.
        step: called after each exchange and each question, for a progress bar.
    """
    listener = _Listener(model, cache)
    result = Recall(torch.zeros(VERSIONS, len(script.WORDS), VERSIONS))
    for exchange in exchanges(turns):
        listener.read(exchange)
        result.seen.append(listener.mask.shape[1])
        result.nbytes.append(nbytes(cache) // VERSIONS)
        result.kept.append(kept(cache))
        step()
    for index, (place, words) in enumerate(script.WORDS.items()):
        question = turns.later(script.QUESTION.format(place=place)) + turns.ids(script.ANSWER.format(place=place))
        asked = copy.deepcopy(listener)
        expected = asked.read([question] * VERSIONS)[:, -1]
        for choice, word in enumerate(words):
            result.scores[:, index, choice] = _score(asked, expected, turns.ids(f" {word}"))
        result.said.append(_go_on(asked, expected, turns))
        step()
    return result


class _Listener:
    """A cache with what its rows have read.

    Attributes:
        mask: ``[B, T]``, 0 for padding in front of rows whose beginning is shorter.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor | None = None) -> None:
        self.model, self.cache = model, cache
        self.mask = torch.zeros(VERSIONS, 0, dtype=torch.long, device=model.device) if mask is None else mask

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Listener":
        return _Listener(self.model, copy.deepcopy(self.cache, memo), self.mask)

    @torch.no_grad()
    def read(self, rows: list[list[int]], keep: int = 1) -> Tensor:
        """Feed each row of the cache its ids and return the last ``keep`` log-probabilities ``[B, keep, V]``."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        self.mask = torch.cat([self.mask, mask], dim=1)
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": keep}
        logits = self.model(input_ids=ids, attention_mask=self.mask, **options).logits
        return torch.as_tensor(logits).float().log_softmax(-1)


def _score(asked: _Listener, expected: Tensor, ids: list[int]) -> Tensor:
    """Mean log-probability ``[B]`` of a word's tokens, given the log-probabilities ``[B, V]`` of its first."""
    total = expected[:, ids[0]]
    if len(ids) > 1:
        following = copy.deepcopy(asked).read([ids[:-1]] * VERSIONS, keep=len(ids) - 1)
        total = total + sum(following[:, index, token] for index, token in enumerate(ids[1:]))
    return (total / len(ids)).cpu()


def _go_on(asked: _Listener, expected: Tensor, turns: TurnFormat, tokens: int = 3) -> str:
    """The likeliest next word of the first version."""
    said: list[int] = []
    for _ in range(tokens):
        best = expected.argmax(-1).tolist()
        said.append(best[0])
        expected = asked.read([[token] for token in best])[:, -1]
    words = str(turns.tokenizer.decode(said, skip_special_tokens=True)).split()
    return words[0].strip(".,\"'") if words else ""
