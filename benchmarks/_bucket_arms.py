"""Documents and ways of laying them out for `benchmarks/buckets.py`: the same tokens in chunks, packs and buckets."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor

from hf_ext.data.bucket_sampler import BucketBatchSampler
from hf_ext.data.decompose import decompose

EOS = 256
VOCABULARY = 257
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
Batch = dict[str, Tensor]


class Corpus(NamedTuple):
    """Byte-level documents, and the few held out for validation."""

    train: list[np.ndarray]
    held_out: list[np.ndarray]


def library_texts() -> list[str]:
    """The interpreter's own library: every top-level function and class, and every page of its help."""
    texts = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            body = ast.parse(source).body
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines(keepends=True)
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                texts.append("".join(lines[node.lineno - 1 : node.end_lineno]))
    return texts + list(topics.topics.values())


def corpus(folder: Path | None, held_out: int) -> Corpus:
    """Documents as bytes: files of ``folder`` or the interpreter's library; every n-th is held out."""
    if folder is None:
        texts = library_texts()
    else:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob("*.txt"))]
    documents = [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts if text.strip()]
    order = np.random.default_rng(0).permutation(len(documents))
    return Corpus([documents[i] for i in order[held_out:]], [documents[i] for i in order[:held_out]])


def as_dataset(documents: list[np.ndarray]) -> datasets.Dataset:
    """Documents as a dataset with ``input_ids``, each ended by EOS."""
    return datasets.Dataset.from_dict({"input_ids": [np.append(document, EOS) for document in documents]})


def batch_of(ids: np.ndarray, labels: np.ndarray | None = None) -> Batch:
    """Ids ``[B, L]`` and their labels, by default the ids."""
    tensor = torch.from_numpy(np.ascontiguousarray(ids))
    return {"input_ids": tensor, "labels": tensor if labels is None else torch.from_numpy(labels)}


def chunks(stream: np.ndarray, length: int, tokens: int) -> Iterator[list[Batch]]:
    """Concat-and-chunk: one stream of ids cut every ``length``, attention over all of it."""
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    size = tokens // length
    for start in range(0, len(rows) - size + 1, size):
        yield [batch_of(rows[start : start + size])]


def packs(documents: list[np.ndarray], length: int, tokens: int, seed: int) -> Iterator[list[Batch]]:
    """TRL's best-fit packing: whole documents in rows of ``length`` with positions that restart.

    Long documents are split, as TRL does for pre-training. One row a micro-batch: without a variable-length kernel
    the block-diagonal mask of several rows at once costs more.
    """
    from trl import pack_dataset

    packed = pack_dataset(as_dataset(documents), length, "bfd_split", {"batch_size": 1000, "keep_in_memory": True})
    packed = packed.shuffle(seed=seed)
    step: list[Batch] = []
    for row in packed:
        ids = torch.tensor(row["input_ids"])[None]
        positions = torch.cat([torch.arange(n) for n in row["seq_lengths"]])[None]
        labels = ids.masked_fill(positions == 0, -100)  # a document's first token is predicted by nothing
        step.append({"input_ids": ids, "labels": labels, "position_ids": positions})
        if len(step) == tokens // length:
            yield step
            step = []


def buckets(
    documents: list[np.ndarray], shortest: int, length: int, tokens: int, seed: int, remainder: str, **options: Any
) -> Any:
    """The decomposed documents as a dataset, and the sampler of their batches."""
    rows = decompose(as_dataset(documents), min_length=shortest, max_length=length, remainder=remainder)
    rows = rows.with_format("numpy")
    return rows, BucketBatchSampler(rows, tokens, seed=seed, **options)


def bucket_batches(rows: Any, sampler: BucketBatchSampler) -> Iterator[list[Batch]]:
    """One micro-batch a step, all its rows of one length."""
    for batch in sampler:
        found = rows[batch]
        yield [batch_of(*(np.stack(found[name]) for name in ("input_ids", "labels") if name in found))]


def arm_steps(name: str, documents: list[np.ndarray], options: dict[str, Any], seed: int) -> Iterator[list[Batch]]:
    """The steps of one arm, each a list of micro-batches, in an order drawn from ``seed``."""
    shortest, length, tokens = options["shortest"], options["context"], options["tokens_per_step"]
    shuffled = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    if name in ("concat-chunk", "concat-chunk-equal-time"):
        stream = np.concatenate([np.append(document, EOS) for document in shuffled])
        rows = stream[: len(stream) // length * length].reshape(-1, length)
        return chunks(np.random.default_rng(seed).permutation(rows).ravel(), length, tokens)
    if name == "trl-bfd":
        return packs(shuffled, length, tokens, seed)
    curriculum = {"curriculum": "uniform", "cycles": 1} if name.endswith("uniform") else {"cycles": 8}
    mixture = "natural" if "natural" in name else "equal"
    remainder = "pad" if "-pad-" in name else "drop"
    rows, sampler = buckets(shuffled, shortest, length, tokens, seed, remainder, mixture=mixture, **curriculum)
    rows, sampler = _shorter_epoch(rows, sampler, options["steps"], curriculum)
    if name == "same-rows-chunked":  # the very rows of the equal mixture, shuffled, concatenated and cut
        used = np.random.default_rng(seed).permutation([row for batch in sampler for row in batch])
        return chunks(np.concatenate([rows[int(row)]["input_ids"] for row in used]), length, tokens)
    return bucket_batches(rows, sampler)


def _shorter_epoch(rows: Any, sampler: BucketBatchSampler, steps: int, curriculum: dict[str, Any]) -> Any:
    """Rows and sampler of an epoch of ``steps`` steps: the same share of every bucket, and all cycles."""
    lengths = 1 << np.asarray(rows["bucket"][:]).astype(np.int64)
    total, kept = sum(sampler.tokens.values()), []
    for length, tokens in sampler.tokens.items():
        batches = min(round(steps * tokens / total), tokens // sampler.tokens_per_batch)
        chosen = np.random.default_rng([sampler.seed, length]).permutation(np.flatnonzero(lengths == length))
        kept.append(chosen[: batches * sampler.tokens_per_batch // length])
    fewer = rows.select(np.concatenate(kept))
    return fewer, BucketBatchSampler(fewer, sampler.tokens_per_batch, seed=sampler.seed, **curriculum)
