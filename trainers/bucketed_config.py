"""Arguments of bucketed-length training (Dataset Decomposition, arXiv 2405.13226)."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_ext.data.curriculum import ODDS_MODES, curriculum_odds
from hf_ext.data.decompose import Decomposition
from hf_ext.data.mixture import MIXTURES
from hf_ext.options import positive_integer


@dataclass
class BucketedArguments:
    """The fields that `BucketedTrainerMixin` reads, to be put before any subclass of `TrainingArguments`.

    A step has ``per_device_train_batch_size`` sequences of the longest bucket on each device and accumulation step,
    or twice as many of half the length, and so on: always the same number of tokens.
    """

    bucket_min_length: int = field(default=256, metadata={"help": "Tokens of the shortest bucket, a power of two."})
    bucket_max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of the longest bucket. Default: what the model has positions for, at most 8192."},
    )
    bucket_mixture: dict | str | None = field(
        default="natural",
        metadata={"help": "Tokens from each bucket: natural, equal, or weights by length as JSON."},
    )
    bucket_curriculum: dict | str | None = field(
        default="grow-p2",
        metadata={"help": "uniform, grow-linear, grow-p2, grow-p100, shrink-..., or odds by length as JSON."},
    )
    bucket_cycles: int = field(default=8, metadata={"help": "Passes through the curriculum in an epoch."})
    bucket_odds_mode: str = field(
        default="token-weighted", metadata={"help": f"How odds meet unequal buckets: {' or '.join(ODDS_MODES)}."}
    )
    bucket_remainder: str = field(
        default="drop", metadata={"help": "Tails shorter than the shortest bucket: drop or pad."}
    )
    bucket_append_eos: bool = field(
        default=True, metadata={"help": "End every document with the tokenizer's EOS, if a tokenizer is given."}
    )
    bucket_document_positions: bool = field(
        default=False, metadata={"help": "Count position_ids from the beginning of the document, not of the piece."}
    )
    bucket_window_steps: int = field(
        default=256, metadata={"help": "Steps of a curriculum cycle over a streamed dataset, held in memory."}
    )
    bucket_num_proc: int | None = field(default=None, metadata={"help": "Processes that cut the documents."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the TrainingArguments that this stands before
        for name in ("bucket_mixture", "bucket_curriculum"):
            setattr(self, name, _by_length(name, getattr(self, name)))
        check_bucket_arguments(self)


@dataclass
class BucketedTrainingArguments(BucketedArguments, TrainingArguments):
    """`TrainingArguments` with the fields of bucketed-length training."""


def check_bucket_arguments(args: Any) -> None:
    """Refuse values that no data could make right, and host options that would undo the buckets.

    Raises:
        ValueError: naming the argument, the value got and what is allowed.
    """
    Decomposition(args.bucket_min_length, args.bucket_max_length or 2**30, remainder=args.bucket_remainder)
    positive_integer("bucket_cycles", args.bucket_cycles)
    positive_integer("bucket_window_steps", args.bucket_window_steps)
    if not isinstance(args.bucket_curriculum, dict):
        curriculum_odds(args.bucket_curriculum, [1, 2])
    if not isinstance(args.bucket_mixture, dict) and args.bucket_mixture not in MIXTURES:
        raise ValueError(
            f"bucket_mixture must be one of {', '.join(MIXTURES)} or a dict, got {args.bucket_mixture!r}."
        )
    if args.bucket_odds_mode not in ODDS_MODES:
        raise ValueError(f"bucket_odds_mode must be one of {', '.join(ODDS_MODES)}, got {args.bucket_odds_mode!r}.")
    if args.train_sampling_strategy != "random":
        raise ValueError(
            "Buckets have an order of their own; train_sampling_strategy must be 'random', got "
            f"{args.train_sampling_strategy!r}."
        )
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(f"Buckets are shared out among processes already; accelerator_config.{name} must be off.")
    for name in ("packing", "padding_free"):
        if getattr(args, name, False):
            raise ValueError(f"Buckets need no packing or padding; {name} must be False.")
    if getattr(args, "max_length", None) is not None:
        raise ValueError(
            f"max_length={args.max_length} would cut documents before they are put into buckets; set max_length=None "
            "and use bucket_max_length."
        )


def _by_length(name: str, value: Any) -> Any:
    """A mapping from length, also where it came as JSON text or with the string keys of JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
        return {int(length): float(weight) for length, weight in found.items()} if isinstance(found, dict) else found
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must give a number for each length in tokens, got {value!r}.") from error
