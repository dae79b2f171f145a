"""What a preference trainer refuses before any step is taken, each as one sentence."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)

TRAINED_ADAPTER = "default"
REFERENCE_ADAPTER = "ref"


def check_columns(example: dict[str, Any], required: Iterable[str], dataset_name: str) -> None:
    """Refuse a dataset without the columns of text (or of messages) that training reads.

    Raises:
        ValueError: a column is missing.
    """
    missing = [name for name in required if name not in example]
    if missing:
        raise ValueError(
            f"The {dataset_name} dataset has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, example))}. Preference data needs 'chosen' and 'rejected', and 'prompt' unless the "
            f"two begin with it."
        )


def check_completions(dataset: Any, columns: list[str], dataset_name: str) -> Any:
    """Refuse empty completions: at once in a map-style dataset, when the row is read in a streamed one.

    Returns:
        The dataset; a streamed one with the check attached.

    Raises:
        ValueError: a completion is empty or None.
    """
    if not hasattr(dataset, "__len__"):
        return dataset.map(_refuse_empty(columns, dataset_name))
    for column in columns:
        for row, completion in enumerate(dataset[column]):
            _check_completion(completion, column, f"row {row}", dataset_name)
    return dataset


def check_prompt_lengths(before: Any, after: Any, max_length: int | None, dataset_name: str) -> None:
    """Say how many rows were dropped because their prompt alone fills ``max_length``.

    Raises:
        ValueError: nothing is left.
    """
    if not hasattr(before, "__len__") or not hasattr(after, "__len__"):
        return
    dropped = len(before) - len(after)
    if not dropped:
        return
    sentence = (
        f"{dropped} of the {len(before)} rows of the {dataset_name} dataset have a prompt of max_length={max_length} "
        f"tokens or more, which leaves no room for a completion"
    )
    if not len(after):
        raise ValueError(f"{sentence}; no row is left to train on. Raise max_length or shorten the prompts.")
    logger.warning("%s; they are dropped.", sentence)


def check_adapters(model: Any, ref_model: Any) -> None:
    """Refuse a `PeftModel` whose adapter names stand in the way of the reference adapter.

    Raises:
        ValueError: there is no adapter named "default" to train, or one is already named "ref".
    """
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, dict) or ref_model is not None or not hasattr(model, "get_base_model"):
        return
    names = ", ".join(map(repr, adapters))
    if REFERENCE_ADAPTER in adapters:
        raise ValueError(
            f"The model has an adapter named {REFERENCE_ADAPTER!r} (adapters: {names}); that name is kept for the "
            f"frozen copy that serves as reference. Load your adapter under another name."
        )
    if TRAINED_ADAPTER not in adapters:
        raise ValueError(
            f"The model has no adapter named {TRAINED_ADAPTER!r} (adapters: {names}), which is the one that is "
            f"trained. Load the adapter to be trained under that name."
        )


def check_number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> None:
    """Refuse an option that is not a finite number in its range.

    Raises:
        ValueError: with the name, the value and the range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
    if number and (above is None or value > above) and (at_least is None or value >= at_least):
        return
    bound = f"above {above}" if above is not None else f"of at least {at_least}"
    raise ValueError(f"{name} is {value!r}; it must be a finite number {bound}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is not one of its variants.

    Raises:
        ValueError: with the name, the value and the variants.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def _refuse_empty(columns: list[str], dataset_name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def check(example: dict[str, Any]) -> dict[str, Any]:
        for column in columns:
            _check_completion(example[column], column, "a row", dataset_name)
        return example

    return check


def _check_completion(completion: Any, column: str, row: str, dataset_name: str) -> None:
    text = completion
    if isinstance(completion, list):
        text = (completion[-1].get("content") or completion[-1].get("tool_calls")) if completion else ""
    if not text or (isinstance(text, str) and not text.strip()):
        raise ValueError(
            f"{row} of the {dataset_name} dataset has an empty completion in column {column!r}; an empty completion "
            f"carries no preference. Drop the row or fill it in."
        )
