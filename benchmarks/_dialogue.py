"""Multi-turn tasks scored by log-probability of fixed answers, as SirLLM (arXiv 2405.12528) scores them.

A dialogue goes through one cache, turn by turn, in the model's chat template. Each answer of a scored turn is tried on
the same past (it is taken back with ``crop``) and the one with the highest mean log-probability per token is chosen.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Turn:
    """What the user says, the answers to choose from, the index of the right one, and what this turn counts for."""

    user: str
    answers: tuple[str, ...]
    right: int
    kind: str


class Dialogue:
    """One dialogue of a model through one cache.

    Args:
        model, tokenizer: a chat model.
        cache: any `transformers.Cache` that can take tokens back; ``new_turn`` is called where it exists.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: Any) -> None:
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.messages: list[dict[str, str]] = []
        self.text = ""

    @torch.inference_mode()
    def say(self, user: str, answers: tuple[str, ...], forced: int | None = None) -> int:
        """Take a turn: choose an answer, or the ``forced`` one, and keep it as what was said; return its index."""
        self.messages.append({"role": "user", "content": user})
        prompt = self._new_ids(generation_prompt=True)
        ids = [self._ids(answer) for answer in answers]
        if hasattr(self.cache, "new_turn") and self.cache.get_seq_length() > 0:
            self.cache.new_turn(reserve=len(prompt) + max(len(answer) for answer in ids) + 8)
        chosen = forced if forced is not None else self._choose(self._feed(prompt, logits=1), ids)
        self.messages.append({"role": "assistant", "content": answers[chosen]})
        said = self._new_ids(generation_prompt=False)
        self._feed(prompt + said if forced is not None else said, logits=1)
        return chosen

    def _choose(self, first: torch.Tensor, answers: list[list[int]]) -> int:
        """The answer of highest mean log-probability; ``first`` ``[1, V]`` are the logits of its first token."""
        scores = []
        for ids in answers:
            if not ids:  # a few choices of the data are blank
                scores.append(-math.inf)
                continue
            self.cache.activate_past_recording()
            logits = torch.cat([first, self._feed(ids)[:-1]])
            self.cache.crop(-len(ids))
            scores.append(logits.float().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).mean().item())
        if hasattr(self.cache, "end_recording"):
            self.cache.end_recording()
        return max(range(len(answers)), key=scores.__getitem__)

    def _feed(self, ids: list[int], logits: int = 0) -> torch.Tensor:
        """Logits ``[logits, V]`` after the last ``logits`` of ``ids``, or after each of them for 0."""
        output = self.model(input_ids=torch.tensor([ids]), past_key_values=self.cache, logits_to_keep=logits)
        return output.logits[0]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _new_ids(self, generation_prompt: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=generation_prompt
        )
        if not text.startswith(self.text):
            raise ValueError("this chat template rewrites earlier turns, so a dialogue cannot be fed turn by turn.")
        new, self.text = text[len(self.text) :], text
        return self._ids(new)


def read_choices(path: Path) -> list[list[Turn]]:
    """Dialogues of a file of four-way questions; a dialogue is the rows whose ids share what names it."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    grocery = any(row["id"].startswith("key_") for row in rows)
    started = 0
    names = []
    for row in rows:
        started += row["id"].startswith("key_")
        names.append(str(started) if grocery else row["id"].split("_")[0])
    groups = groupby(zip(names, rows, strict=True), key=lambda pair: pair[0])
    return [[_turn(row, grocery) for _, row in group] for _, group in groups]


def _turn(row: dict[str, Any], grocery: bool) -> Turn:
    choices = row["question"]["choices"]
    right = [choice["label"] for choice in choices].index(row["answerKey"])
    kind = row["id"].split("_")[0] if grocery else "reply"
    return Turn(
        row["question"]["stem"].strip(),
        tuple(choice["text"].strip() for choice in choices),
        right,
        kind if kind in ("key", "answer", "reply") else "distractor",
    )


def play_choices(dialogue: Dialogue, turns: list[Turn], scored: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Play one dialogue; yield kind and correctness of each turn whose kind is scored. Others get the right answer."""
    for turn in turns:
        forced = None if turn.kind in scored else turn.right
        chosen = dialogue.say(turn.user, turn.answers, forced)
        if forced is None:
            yield turn.kind, chosen == turn.right


MOVES = ("rock", "paper", "scissors")


def play_games(dialogue: Dialogue, moves: list[int]) -> Iterator[int]:
    """Rock-paper-scissors against a player who makes ``moves``; yield 1 for a win of the model, 0 a tie, -1 a loss."""
    report = ""
    for move in moves:
        chosen = dialogue.say(f"{report}Please play a game of Rock-Paper-Scissors.", MOVES)
        result = (chosen - move + 1) % 3 - 1
        report = f"I played {MOVES[move]}. You {('lose', 'tie', 'win')[result + 1]}. "
        yield result


def read_moves(path: Path) -> list[int]:
    """The player's moves in a rock-paper-scissors file, as indices into `MOVES`."""
    return ["ABC".index(json.loads(line)["user_choice"]) for line in path.read_text(encoding="utf-8").splitlines()]
