"""``hf-ext buckets``: cut a dataset's documents into buckets on disk, and show what they hold."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_ext.data.bucket_sampler import BucketBatchSampler
from hf_ext.data.curriculum import CURRICULA
from hf_ext.data.decompose import REMAINDERS, Decomposition
from hf_ext.data.plots import plot_schedule, plot_statistics
from hf_ext.data.shards import write_buckets
from hf_ext.options import positive_integer

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "dataset", help="a folder of save_to_disk, a .jsonl, .parquet, .csv, .arrow or .txt file, or a name"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the buckets; an interrupted run goes on in it"
    )
    parser.add_argument("--split", default="train", help="split of a dataset that has several")
    parser.add_argument("--tokenizer", help="name or folder; needed unless the dataset has a column input_ids")
    parser.add_argument("--text-column", default="text", help="column that holds the documents' text")
    parser.add_argument("--min-length", type=int, default=256, help="tokens of the shortest bucket, a power of two")
    parser.add_argument("--max-length", type=int, default=8192, help="tokens of the longest bucket, a power of two")
    parser.add_argument(
        "--eos", default="auto", help="token id that ends every document, 'none', or 'auto': the tokenizer's"
    )
    parser.add_argument(
        "--remainder", choices=REMAINDERS, default="drop", help="tails shorter than the shortest bucket"
    )
    parser.add_argument("--positions", action="store_true", help="also write each row's document and offset in it")
    parser.add_argument("--num-proc", type=int, default=1, help="processes")
    parser.add_argument("--shard-documents", type=int, default=20_000, help="documents a file")
    parser.add_argument(
        "--plot", action="store_true", help="draw buckets.png, and schedule.png with --tokens-per-step"
    )
    parser.add_argument("--tokens-per-step", type=int, help="also plan an epoch with steps of so many tokens")
    parser.add_argument(
        "--curriculum", default="grow-p2", help=f"one of {', '.join(CURRICULA)}, grow-p<x>, shrink-p<x>"
    )
    parser.add_argument("--cycles", type=int, default=8, help="passes through the curriculum in an epoch")
    parser.add_argument("--json", action="store_true", help="print the statistics as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Cut, write, and print the statistics."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Buckets need datasets: pip install "hf_ext[train]"') from error
    documents = load_documents(arguments.dataset, arguments.split)
    tokenizer = _tokenizer(arguments.tokenizer)
    if "input_ids" not in documents.column_names:
        documents = _tokenised(documents, tokenizer, arguments)
    options = Decomposition(
        arguments.min_length,
        arguments.max_length,
        eos_token_id(arguments.eos, tokenizer),
        arguments.remainder,
        positions=arguments.positions,
    )
    statistics = write_buckets(
        documents, arguments.out, options, shard_documents=arguments.shard_documents, num_proc=arguments.num_proc
    )
    print(json.dumps(statistics.to_dict()) if arguments.json else statistics.table())
    if arguments.plot:
        plot_statistics(statistics, arguments.out / "buckets.png")
    if arguments.tokens_per_step:
        rows = datasets.load_from_disk(str(arguments.out))
        sampler = BucketBatchSampler(
            rows, arguments.tokens_per_step, curriculum=arguments.curriculum, cycles=arguments.cycles
        )
        left = sum(sampler.remainder.values())
        if not arguments.json:
            print(f"an epoch has {sampler.steps:,} steps; {left:,} tokens fill no batch")
        if arguments.plot:
            plot_schedule(sampler, arguments.out / "schedule.png")
    return 0


def load_documents(name: str, split: str) -> Any:
    """Open a dataset by folder, file or name.

    Raises:
        ValueError: it has no such split.
    """
    import datasets

    path = Path(name)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        loaded = datasets.load_from_disk(name)
    elif path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{name} must end in one of {', '.join(READERS)}, got {path.suffix or 'no ending'}.")
        whole = {"sample_by": "document"} if path.suffix == ".txt" else {}
        loaded = datasets.load_dataset(READERS[path.suffix], data_files=name, **whole)
    else:
        loaded = datasets.load_dataset(name)
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(loaded)}.")
        return loaded[split]
    return loaded


def eos_token_id(choice: str, tokenizer: Any) -> int | None:
    """The id that ``--eos`` stands for.

    Raises:
        ValueError: it is neither an id nor one of the words.
    """
    if choice == "auto":
        return getattr(tokenizer, "eos_token_id", None)
    if choice == "none":
        return None
    if not choice.isdecimal():
        raise ValueError(f"--eos must be a token id, 'none' or 'auto', got {choice!r}.")
    return int(choice)


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _tokenised(documents: Any, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """Documents as ids. `datasets`' cache keeps every shard that is done, for an interrupted run to go on."""
    import datasets

    column = arguments.text_column
    if tokenizer is None:
        raise ValueError("The dataset has no column input_ids: name a --tokenizer.")
    if column not in documents.column_names:
        raise ValueError(f"The dataset has no column {column!r}; it has {', '.join(documents.column_names)}.")
    size = positive_integer("shard_documents", arguments.shard_documents)
    starts = range(0, max(len(documents), 1), size)
    return datasets.concatenate_datasets(
        [
            documents.select(range(start, min(start + size, len(documents)))).map(
                _Tokenise(tokenizer, column),
                batched=True,
                remove_columns=documents.column_names,
                features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
                num_proc=arguments.num_proc if arguments.num_proc > 1 else None,
                desc=f"Tokenising shard {shard} of {len(starts)}",
            )
            for shard, start in enumerate(starts, 1)
        ]
    )


class _Tokenise:
    """A function that `datasets` can hash and send to other processes."""

    def __init__(self, tokenizer: Any, column: str) -> None:
        self.tokenizer, self.column = tokenizer, column

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": self.tokenizer(batch[self.column], return_attention_mask=False)["input_ids"]}
