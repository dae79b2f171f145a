"""Buckets on disk, written shard by shard so that an interrupted run goes on where it stopped."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_ext.data.decompose import Decomposition, bucket_features, decompose_table, document_columns
from hf_ext.data.fingerprint import content_crc
from hf_ext.data.statistics import BucketStatistics, bucket_statistics
from hf_ext.options import positive_integer

MANIFEST = "buckets.json"
BATCH = 1000  # documents cut at once


def write_buckets(
    documents: Any,
    folder: str | Path,
    options: Decomposition,
    *,
    shard_documents: int = 20_000,
    num_proc: int = 1,
    progress: bool = True,
) -> BucketStatistics:
    """Decompose into a folder that `datasets.load_from_disk` opens memory-mapped.

    Each shard of documents becomes one Arrow file, renamed into place when it is whole; a second call writes only
    what is missing. ``buckets.json`` keeps the options, the documents' checksum and the statistics.

    Args:
        documents: a `datasets.Dataset` of tokenised documents.
        folder: where to write.
        options: how to cut.
        shard_documents: documents a file.
        num_proc: processes.
        progress: show a bar of documents.

    Raises:
        ValueError: the folder holds buckets of other documents, options or shards, or the documents are not tokenised.
    """
    folder = Path(folder)
    columns = document_columns(documents)
    count = -(-len(documents) // positive_integer("shard_documents", shard_documents)) or 1
    manifest = {
        "options": options.to_dict(),
        "documents": len(documents),
        "content_crc": content_crc(documents),
        "shard_documents": shard_documents,
    }
    _check_manifest(folder, manifest)
    features = bucket_features(documents, columns, options)
    paths = [folder / f"data-{shard:05d}-of-{count:05d}.arrow" for shard in range(count)]
    with tqdm(total=len(documents), desc="Cutting documents", unit="doc", disable=not progress) as bar:
        jobs = []
        for shard, path in enumerate(paths):
            first, last = shard * shard_documents, min((shard + 1) * shard_documents, len(documents))
            if path.is_file():
                bar.update(last - first)
            else:
                jobs.append((documents.select(range(first, last)), first, path, options, features))
        for written in _run(jobs, positive_integer("num_proc", num_proc)):
            bar.update(written)
    rows = _finish(folder, paths, features)
    statistics = bucket_statistics(rows, documents, options)
    _write(folder / MANIFEST, {**manifest, "statistics": statistics.to_dict()})
    return statistics


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no {MANIFEST}; choose a new folder.")
        _write(path, manifest)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in manifest.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name} {found.get(name)!r}, now it is {value!r}; choose a new folder or "
                "remove the old one."
            )


def _run(jobs: list[tuple[Any, ...]], num_proc: int) -> Iterator[int]:
    """Documents written, as they are; in this process or in several."""
    if num_proc == 1:
        for job in jobs:
            yield from _write_shard(*job)
        return
    with ProcessPoolExecutor(num_proc) as pool:
        for done in as_completed([pool.submit(_write_whole_shard, *job) for job in jobs]):
            yield done.result()


def _write_whole_shard(*job: Any) -> int:
    return sum(_write_shard(*job))


def _write_shard(documents: Any, first: int, path: Path, options: Decomposition, features: Any) -> Iterator[int]:
    """Write one shard; yields the documents of every batch that is done."""
    from datasets.arrow_writer import ArrowWriter

    partial = path.with_suffix(".partial")
    with ArrowWriter(features=features, path=str(partial)) as writer:
        for table in documents.with_format("arrow").iter(BATCH):
            rows = decompose_table(table, range(first, first + len(table)), options=options)
            writer.write_table(rows.cast(features.arrow_schema))
            first += len(table)
            yield len(table)
        writer.finalize()
    os.replace(partial, path)


def _finish(folder: Path, paths: list[Path], features: Any) -> Any:
    """Make the folder one that `datasets.load_from_disk` knows, and open it."""
    import datasets

    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": path.name} for path in paths],
        "_fingerprint": f"{content_crc(datasets.Dataset.from_file(str(paths[0]))):016x}",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    _write(folder / "state.json", state)
    return datasets.load_from_disk(str(folder))


def _write(path: Path, values: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)
