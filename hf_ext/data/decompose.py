"""`decompose`: tokenised documents to rows whose lengths are powers of two, each from one document (arXiv 2405.13226).

The work is one vectorised pass over Arrow buffers for every batch of documents, so it runs inside `datasets`' own
``map``: memory-mapped, cached, in several processes, and on streams.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ext.data.pieces import Integers, check_lengths, cut, round_up
from hf_ext.options import Options

IGNORED = -100
LIST_TOKENS = 2**31 - 1  # what the offsets of an Arrow list can count
MASKS = ("completion_mask", "assistant_masks")
REMAINDERS = ("drop", "pad")


@dataclass(frozen=True)
class Decomposition(Options):
    """How documents are cut.

    Attributes:
        min_length: tokens of the shortest bucket, a power of two of at least 2: a row of one token predicts nothing.
        max_length: tokens of the longest bucket, a power of two; longer documents fill it several times.
        eos_token_id: appended once to every document that is not empty and does not already end with it, and never
            to the pieces; None appends nothing.
        remainder: what happens to the tail of fewer than ``min_length`` tokens: ``"drop"`` as in the paper, or
            ``"pad"`` on the right to ``min_length`` with ``pad_token_id`` and labels of -100.
        pad_token_id: any id; causal attention from real tokens never reaches it.
        positions: also write ``document`` (row of the document) and ``offset`` (tokens of it before the piece).
    """

    min_length: int = 256
    max_length: int = 8192
    eos_token_id: int | None = None
    remainder: str = "drop"
    pad_token_id: int = 0
    positions: bool = False

    def __post_init__(self) -> None:
        check_lengths(self.min_length, self.max_length)
        if self.min_length < 2:
            raise ValueError("min_length must be at least 2, got 1: a row of one token has no next token to learn.")
        if self.remainder not in REMAINDERS:
            raise ValueError(f"remainder must be one of {', '.join(REMAINDERS)}, got {self.remainder!r}.")

    def whole_lengths(self, ids: NDArray[Any], lengths: Integers) -> Integers:
        """Tokens of each document ``[D]`` with its EOS, given the flat ids of all and their lengths without it."""
        if self.eos_token_id is None or not len(ids):
            return lengths
        last = ids[np.maximum(np.cumsum(lengths) - 1, 0)]
        return lengths + ((lengths > 0) & (last != self.eos_token_id))

    def cut_lengths(self, whole: Integers) -> Integers:
        """Tokens of each document ``[D]`` that are cut into pieces, padding included."""
        return round_up(whole, self.min_length) if self.remainder == "pad" else whole


def decompose(
    documents: Any,
    *,
    min_length: int = 256,
    max_length: int = 8192,
    eos_token_id: int | None = None,
    remainder: str = "drop",
    pad_token_id: int = 0,
    positions: bool = False,
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> Any:
    """Cut tokenised documents into rows of ``min_length`` ... ``max_length`` tokens, each row from one document.

    Every token of a document stands in exactly one row, except the tail of fewer than ``min_length`` tokens (see
    ``remainder``). Rows keep the order of the text. Other columns than those named here are dropped.

    Args:
        documents: a `datasets.Dataset` or `datasets.IterableDataset` with ``input_ids`` (unpadded documents) and,
            if only some tokens are to be learned, ``labels`` or TRL's ``completion_mask`` / ``assistant_masks``.
        min_length: see `Decomposition`, as for the other options.
        max_length: tokens of the longest row.
        eos_token_id: ends every document, once.
        remainder: ``"drop"`` or ``"pad"``.
        pad_token_id: used by ``remainder="pad"``.
        positions: also write where each row stands in its document.
        num_proc: processes of `datasets`' map; streams use one.
        batch_size: documents a batch of the map; its tokens must fit in memory.

    Returns:
        The same kind of dataset, one row a sequence: ``input_ids``, ``bucket`` (log2 of its length, int8), ``labels``
        if the documents have any or are padded (rows without any label to learn are left out), and with
        ``positions`` ``document`` and ``offset``.

    Raises:
        ValueError: an option is not allowed or does not fit the type of the ids; ``input_ids`` are missing or no lists
            of integers; documents are padded; or labels and ids of a document differ in length.
    """
    options = Decomposition(min_length, max_length, eos_token_id, remainder, pad_token_id, positions)
    columns = document_columns(documents)
    function = partial(decompose_table, options=options)
    settings: dict[str, Any] = {"batched": True, "batch_size": batch_size, "with_indices": positions}
    settings["features"] = bucket_features(documents, columns, options)
    if hasattr(documents, "__len__"):
        if not len(documents):  # map would give back a dataset without columns
            return _no_rows(settings["features"])
        settings |= {"remove_columns": columns, "num_proc": num_proc, "desc": "Cutting documents"}
        return documents.with_format("arrow").map(function, **settings).with_format(None)
    if num_proc is not None:
        raise ValueError(f"num_proc is for datasets that are not streamed, got num_proc={num_proc} for a stream.")
    if documents.features is not None:  # a stream of tables replaces them whole: there is nothing left to remove
        return documents.with_format("arrow").map(function, **settings).with_format(None)
    settings["remove_columns"] = [name for name in columns if name not in settings["features"]]
    return documents.map(partial(_decompose_lists, function=function), **settings)


def decompose_table(table: Any, indices: Any = None, *, options: Decomposition) -> Any:
    """Decompose one `pyarrow.Table` of documents; ``indices`` ``[D]`` are their rows in the dataset."""
    ids, lengths = flat_column(table, "input_ids")
    _check_fits("eos_token_id", options.eos_token_id, ids.dtype)
    _check_fits("pad_token_id", options.pad_token_id if options.remainder == "pad" else None, ids.dtype)
    _refuse_padding(table)
    labels = _labels(table, ids, lengths)
    whole = options.whole_lengths(ids, lengths)
    cut_to = options.cut_lengths(whole)
    pieces = cut(cut_to, options.min_length, options.max_length)
    gather = _Gather(lengths, whole, cut_to // options.min_length * options.min_length)
    sizes = np.int64(1) << pieces.exponent.astype(np.int64)
    columns = {"input_ids": gather(ids, options.eos_token_id, options.pad_token_id)}
    wanted = np.ones(len(sizes), dtype=bool)
    if labels is not None or options.remainder == "pad":
        columns["labels"] = gather(_signed(ids) if labels is None else labels, options.eos_token_id, IGNORED)
        wanted = _has_target(columns["labels"], sizes)
        if not wanted.all():
            token_wanted = np.repeat(wanted, sizes)
            columns = {name: values[token_wanted] for name, values in columns.items()}
    rows = {name: _lists(values, sizes[wanted]) for name, values in columns.items()}
    rows["bucket"] = pieces.exponent[wanted]
    if options.positions:
        rows["document"] = np.asarray(indices, dtype=np.int64)[pieces.document[wanted]]
        rows["offset"] = pieces.offset[wanted]
    return _table(rows)


def _decompose_lists(batch: dict[str, Any], indices: Any = None, *, function: Any) -> Any:
    """Decompose a batch of a stream that does not know its types: there an empty document has no type of its own."""
    import pyarrow as pa

    names = ("input_ids", "labels", "attention_mask", *MASKS)
    table = pa.table({name: pa.array(batch[name], pa.list_(pa.int64())) for name in names if name in batch})
    return function(table, indices).to_pydict()


def flat_column(table: Any, name: str) -> tuple[NDArray[Any], Integers]:
    """The values of a list column end to end ``[T]`` and the length of every row ``[D]``; null rows are empty.

    Raises:
        ValueError: the column is no list of integers or truth values for every row, or one of these is missing.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(name)
    if not _is_list_of_integers(column.type):
        raise ValueError(f"{name} must hold a list of integers for every document, got the type {column.type}.")
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    lengths = [np.asarray(pc.fill_null(pc.list_value_length(chunk), 0), dtype=np.int64) for chunk in chunks]
    flat = [chunk.flatten() for chunk in chunks]
    if missing := sum(chunk.null_count for chunk in flat if not pa.types.is_null(chunk.type)):
        raise ValueError(f"{name} must have a value for every token, got {missing} without one.")
    values = [chunk.to_numpy(zero_copy_only=False) for chunk in flat]
    if len(chunks) == 1:
        return values[0], lengths[0]
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate(values or [empty]), np.concatenate(lengths or [empty])


def _is_list_of_integers(kind: Any) -> bool:
    import pyarrow.types as types

    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    return any(test(kind.value_type) for test in (types.is_integer, types.is_boolean, types.is_null))


def _check_fits(name: str, token: int | None, dtype: Any) -> None:
    if token is None or dtype.kind not in "iu":
        return
    limits = np.iinfo(dtype)
    if not limits.min <= token <= limits.max:
        raise ValueError(f"{name} must fit the type of input_ids, {dtype}, got {token}.")


class _Gather:
    """Copies the first ``kept`` tokens of every document, with its EOS and padding, out of a flat column."""

    def __init__(self, lengths: Integers, whole: Integers, kept: Integers) -> None:
        starts, new_starts = np.cumsum(lengths) - lengths, np.cumsum(kept) - kept
        self.source = np.arange(int(kept.sum()))
        self.source += np.repeat(starts - new_starts, kept)
        self.eos = (new_starts + lengths)[(whole > lengths) & (kept > lengths)]
        padding = np.maximum(kept - whole, 0)
        ends = np.cumsum(padding)
        self.padding = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            new_starts + whole - ends + padding, padding
        )

    def __call__(self, values: NDArray[Any], eos: int | None, pad: int) -> NDArray[Any]:
        gathered = values.take(self.source, mode="clip")  # places past a document's own end are overwritten
        if eos is not None:
            gathered[self.eos] = eos
        gathered[self.padding] = pad
        return gathered


def _labels(table: Any, ids: NDArray[Any], lengths: Integers) -> NDArray[Any] | None:
    """Flat labels ``[T]`` from ``labels`` or from the masks of prompt-completion and chat data; None if all count."""
    names = ["labels"] if "labels" in table.column_names else [mask for mask in MASKS if mask in table.column_names]
    labels = None
    for name in names:
        values, own_lengths = flat_column(table, name)
        if not np.array_equal(own_lengths, lengths):
            row = int(np.flatnonzero(own_lengths != lengths)[0])
            raise ValueError(
                f"{name} and input_ids must have one value for each token of a document, got {own_lengths[row]} and "
                f"{lengths[row]} in row {row} of a batch."
            )
        masked = _signed(ids) if labels is None else labels
        labels = _signed(values) if name == "labels" else np.where(values.astype(bool), masked, IGNORED)
    return labels


def _signed(ids: NDArray[Any]) -> NDArray[Any]:
    return ids if ids.dtype.kind == "i" else ids.astype(np.int64)  # -100 has no place among unsigned ids


def _has_target(labels: NDArray[Any], sizes: Integers) -> NDArray[np.bool_]:
    """Which rows ``[N]`` have a label to learn; the first of a row is predicted by nothing."""
    if not len(sizes):
        return np.zeros(0, dtype=bool)
    starts = np.cumsum(sizes) - sizes
    learned = labels != IGNORED
    learned[starts] = False
    return np.logical_or.reduceat(learned, starts)


def _refuse_padding(table: Any) -> None:
    if "attention_mask" in table.column_names:
        mask, _ = flat_column(table, "attention_mask")
        if not mask.all():
            raise ValueError(
                "Documents must not be padded, got an attention_mask with zeros; tokenise with padding=False."
            )


def document_columns(documents: Any) -> list[str]:
    """Names of all columns.

    Raises:
        ValueError: this is no dataset of tokenised documents.
    """
    if not hasattr(documents, "with_format") or not hasattr(documents, "column_names"):
        raise ValueError(
            f"documents must be a datasets.Dataset or datasets.IterableDataset, got {type(documents).__name__}; "
            "datasets.Dataset.from_list and from_generator make one."
        )
    columns = documents.column_names
    if columns is None:  # a stream that has not been looked into
        columns = list(next(iter(documents), {}))
    if "input_ids" not in columns:
        raise ValueError(f"documents need a column input_ids (tokenise them first), got the columns {columns}.")
    return list(columns)


def bucket_features(documents: Any, columns: list[str], options: Decomposition) -> Any:
    """The schema of the result; ids, and labels that can be negative, keep their type (int64 where there is none)."""
    import datasets

    def integers(name: str, *kinds: str) -> Any:
        feature = (documents.features or {}).get(name)
        dtype = getattr(getattr(feature, "feature", None), "dtype", "int64")
        return datasets.List(datasets.Value(dtype if str(dtype).startswith(kinds) else "int64"))

    features = {"input_ids": integers("input_ids", "int", "uint")}
    if "labels" in columns:
        features["labels"] = integers("labels", "int")
    elif options.remainder == "pad" or any(mask in columns for mask in MASKS):
        features["labels"] = datasets.List(datasets.Value("int64"))
    features["bucket"] = datasets.Value("int8")
    if options.positions:
        features |= {"document": datasets.Value("int64"), "offset": datasets.Value("int64")}
    return datasets.Features(features)


def _no_rows(features: Any) -> Any:
    import datasets

    return datasets.Dataset.from_dict({name: [] for name in features}, features=features)


def _lists(values: NDArray[Any], sizes: Integers) -> Any:
    import pyarrow as pa

    if len(values) > LIST_TOKENS:
        raise ValueError(f"A batch of documents has {len(values):,} tokens, more than a list holds; lower batch_size.")
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _table(rows: dict[str, Any]) -> Any:
    import pyarrow as pa

    return pa.table(
        {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in rows.items()}
    )
