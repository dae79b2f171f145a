"""Rows of ADPO: the toxic response tokenised beside TRL's pair, under one prompt and under the prompt with the token.

TRL's rules hold for the third response too: the same end of sequence, the same cut of the prompt where tokenisations
diverge, the same ``max_length``.
"""

import json
from typing import Any

from trl.data_utils import _tokenize, common_prefix_length, extract_prompt, is_conversational

from hf_ext.data.preference import add_control_token
from hf_ext.trainers.adpo_config import ADPOConfig

TOXIC_COLUMNS = ("toxic_ids", "control_prompt_ids", "control_toxic_ids")


def split_prompt(example: dict[str, Any], column: str) -> dict[str, Any]:
    """Take the prompt that all three responses begin with off them; text is cut before a space.

    Raises:
        ValueError: the toxic response begins differently.
    """
    toxic, pair = example[column], extract_prompt(example)
    if not toxic:
        return {**pair, column: toxic}
    shared = example["chosen"][: len(example["chosen"]) - len(pair["chosen"])]
    length = common_prefix_length(shared, toxic)
    if isinstance(toxic, str) and length < len(shared):
        length = max(0, toxic[:length].rfind(" "))
    if shared and not length:
        raise ValueError(
            f"A response in column {column!r} does not begin with the prompt that 'chosen' and 'rejected' share; give "
            f"the prompt in a column of its own."
        )
    return {"prompt": toxic[:length], **{name: example[name][length:] for name in ("chosen", "rejected", column)}}


def tokenize_toxic(example: dict[str, Any], processing_class: Any, eos_token: str, args: ADPOConfig) -> dict[str, Any]:
    """Add `TOXIC_COLUMNS` to a row that TRL has tokenised; empty lists where the row has no toxic response.

    Both copies of the response are cut to the same number of tokens, so that the policy's log-probability and its
    reference are of the same text.
    """
    toxic = example[args.toxic_column]
    if not toxic:
        return {column: [] for column in TOXIC_COLUMNS}
    if isinstance(toxic, str) and not toxic.endswith(eos_token):
        toxic = toxic + eos_token
    template = _template_options(example)
    known = example["prompt_ids"]
    prompt, completion, tail = _tokenize_pair(example["prompt"], toxic, known, processing_class, template)
    if args.toxic_reference == "tox":
        with_token = add_control_token(example["prompt"], args.control_token, args.control_token_position)
        control, control_completion, _ = _tokenize_pair(with_token, toxic, None, processing_class, template)
    else:
        control, control_completion = prompt, completion
    if args.max_length is not None:
        room = max(0, args.max_length - max(len(prompt), len(control)))
        completion, control_completion = completion[:room], control_completion[:room]
    columns: dict[str, Any] = dict(zip(TOXIC_COLUMNS, (completion, control, control_completion), strict=True))
    if tail:  # the toxic tokenisation leaves the common prompt earlier than the pair does
        columns |= {"prompt_ids": prompt}
        columns |= {name: tail + example[name] for name in ("chosen_ids", "rejected_ids")}
    return columns


def _tokenize_pair(
    prompt: Any, completion: Any, known: list[int] | None, processing_class: Any, template: dict[str, Any]
) -> tuple[list[int], list[int], list[int]]:
    """(prompt ids, completion ids, what was cut off the prompt's end because it diverges)."""
    if is_conversational({"prompt": prompt}):
        if known is None:
            known = _tokenize(processing_class, prompt, add_generation_prompt=True, **template)["input_ids"]
        full = _tokenize(processing_class, prompt + completion, **template)["input_ids"]
    else:
        known = _tokenize(processing_class, prompt)["input_ids"] if known is None else known
        full = _tokenize(processing_class, prompt + completion)["input_ids"]
    length = common_prefix_length(known, full)
    return known[:length], full[length:], known[length:]


def _template_options(example: dict[str, Any]) -> dict[str, Any]:
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(example.get("chat_template_kwargs") or {})}
