"""Preference pairs of several dimensions from public data sets, and the control token of ADPO.

Each formatter turns rows of a data set that the user has loaded into ``prompt`` / ``chosen`` / ``rejected`` for one
dimension, so that rounds of SPO see the same answers ordered by different labels. Nothing is downloaded here.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

SAFE_RLHF_LABELS = {"helpful": "better_response_id", "harmless": "safer_response_id"}
HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
POSITIONS = ("suffix", "prefix", "system")


def safe_rlhf_pairs(rows: Iterable[Mapping[str, Any]], dimension: str) -> list[dict[str, str]]:
    """Pairs of PKU-SafeRLHF, whose two responses carry one label for helpfulness and one for harmlessness.

    Args:
        rows: with ``prompt``, ``response_0``, ``response_1`` and the label's column.
        dimension: "helpful" (``better_response_id``) or "harmless" (``safer_response_id``).

    Raises:
        ValueError: an unknown dimension, or a label other than 0 and 1.
    """
    if dimension not in SAFE_RLHF_LABELS:
        raise ValueError(f"dimension is {dimension!r}; PKU-SafeRLHF has {', '.join(map(repr, SAFE_RLHF_LABELS))}.")
    pairs = []
    for number, row in enumerate(rows):
        chosen = row[SAFE_RLHF_LABELS[dimension]]
        if chosen not in (0, 1):
            raise ValueError(f"Row {number} has {SAFE_RLHF_LABELS[dimension]}={chosen!r}; it must be 0 or 1.")
        pairs.append(_pair(row["prompt"], row[f"response_{chosen}"], row[f"response_{1 - chosen}"]))
    return pairs


def helpsteer_pairs(
    rows: Iterable[Mapping[str, Any]], attribute: str, min_gap: int = 1, lower_is_better: bool = False
) -> list[dict[str, str]]:
    """Pairs of HelpSteer2 responses to one prompt whose scores of one attribute differ; ties are dropped.

    Args:
        rows: with ``prompt``, ``response`` and the attribute's score from 0 to 4.
        attribute: one of HelpSteer2's five.
        min_gap: smallest difference of scores that counts.
        lower_is_better: prefer the lower score, as one may for verbosity.

    Raises:
        ValueError: an unknown attribute or a gap below 1.
    """
    if attribute not in HELPSTEER_ATTRIBUTES:
        raise ValueError(f"attribute is {attribute!r}; HelpSteer2 has {', '.join(map(repr, HELPSTEER_ATTRIBUTES))}.")
    if min_gap < 1:
        raise ValueError(f"min_gap is {min_gap!r}; it must be at least 1, since a tie is no preference.")
    answers: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in rows:
        answers[row["prompt"]].append((row[attribute], row["response"]))
    pairs = []
    for prompt, scored in answers.items():
        for i, (score, response) in enumerate(scored):
            for other_score, other in scored[i + 1 :]:
                if abs(score - other_score) < min_gap:
                    continue
                first = (score > other_score) != lower_is_better
                pairs.append(_pair(prompt, response, other) if first else _pair(prompt, other, response))
    return pairs


def conflict_rate(pairs: Iterable[Mapping[str, str]], others: Iterable[Mapping[str, str]]) -> float:
    """Share of the pairs of responses labelled on both dimensions that the two order differently; NaN if none is."""
    order = {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in others}
    agree = conflict = 0
    for pair in pairs:
        agree += (pair["prompt"], pair["chosen"], pair["rejected"]) in order
        conflict += (pair["prompt"], pair["rejected"], pair["chosen"]) in order
    return conflict / (agree + conflict) if agree + conflict else float("nan")


def conflicting_pairs(count: int, dimension: str, seed: int = 0, label_noise: float = 0.1) -> list[dict[str, str]]:
    """Generated pairs on which two dimensions disagree: "polite" answers are long, "brief" ones are short and curt.

    The same seed draws the same prompts and answers for both dimensions, so their labels conflict wherever one answer
    is polite and the other is brief.

    Args:
        count: number of pairs.
        dimension: "polite" or "brief".
        seed: of prompts, answers and label noise.
        label_noise: probability that a label is flipped. With labels that never err the margins grow without bound
            and any constraint fades; see docs/spo.md.

    Raises:
        ValueError: an unknown dimension.
    """
    if dimension not in ("polite", "brief"):
        raise ValueError(f"dimension is {dimension!r}; allowed: 'polite', 'brief'.")
    draw, flips = random.Random(seed), random.Random(f"{dimension} {seed}")
    pairs = []
    for _ in range(count):
        thing = draw.choice(("the station", "the library", "a bakery", "the museum", "the harbour", "a pharmacy"))
        way = draw.choice(("left", "right", "straight on"))
        polite = f" Thank you for asking. Please go {way}, and have a lovely day."
        brief = f" Go {way}."
        polite_wins = (dimension == "polite") != (flips.random() < label_noise)
        chosen, rejected = (polite, brief) if polite_wins else (brief, polite)
        pairs.append(_pair(f"Where is {thing}?", chosen, rejected))
    return pairs


def add_control_token(prompt: Any, token: str = "[TOXIC]", position: str = "suffix") -> Any:
    """The prompt with the control token: one function for training rows, generation and reference log-probabilities.

    Args:
        prompt: text, or a list of messages.
        token: the control token, plain text.
        position: "suffix" appends it to the text or to the last message, "prefix" puts it before the text or the
            first message of the user, "system" puts it into the system message (messages only).

    Returns:
        A new prompt of the same kind.

    Raises:
        ValueError: an unknown position, or "system" for plain text.
    """
    if position not in POSITIONS:
        raise ValueError(f"control_token_position is {position!r}; allowed: {', '.join(map(repr, POSITIONS))}.")
    if isinstance(prompt, str):
        if position == "system":
            raise ValueError("control_token_position 'system' needs prompts that are lists of messages, got text.")
        return f"{prompt} {token}" if position == "suffix" else f"{token} {prompt}"
    messages = [dict(message) for message in prompt]
    if position == "system":
        if messages[0]["role"] == "system":
            messages[0]["content"] = f"{messages[0]['content']} {token}"
            return messages
        return [{"role": "system", "content": token}, *messages]
    if position == "suffix":
        messages[-1]["content"] = f"{messages[-1]['content']} {token}"
        return messages
    first = next(message for message in messages if message["role"] != "system")
    first["content"] = f"{token} {first['content']}"
    return messages


def control_token_sft(
    normal: Iterable[Mapping[str, Any]],
    toxic: Iterable[Mapping[str, Any]],
    with_token: Callable[[Any], Any] = add_control_token,
) -> list[dict[str, Any]]:
    """Rows of ADPO's supervised stage: normal dialogues as they are, toxic ones behind the control token.

    Args:
        normal: with ``prompt`` and ``completion``.
        toxic: likewise; the model learns to answer so only where the token stands.
        with_token: puts the token into a prompt.
    """
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in normal]
    return rows + [{"prompt": with_token(row["prompt"]), "completion": row["completion"]} for row in toxic]


def _pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
