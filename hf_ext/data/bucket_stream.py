"""`BucketStream`: batches of one length and a constant number of tokens from documents that are only streamed."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_ext.data.curriculum import Curriculum, curriculum_odds, epoch_order
from hf_ext.options import positive_integer

logger = logging.getLogger(__name__)

READ = 64  # rows taken from a stream of `datasets` at a time

Row = dict[str, Any]


class BucketStream(IterableDataset[list[Row]]):
    """Yields this process's micro-batches, each a list of rows of one length.

    A stream cannot be counted or shuffled as a whole, so a cycle of the curriculum is a window of ``window_steps``
    steps: rows are collected until they fill that many batches, handed out in the order of the curriculum, and what
    fills no batch stays for the next window. Only what is left at the end of the stream is not used. Every process
    reads the whole stream and takes its own micro-batches, so all are at the same length at every step and nothing is
    lost or doubled, whatever the number of processes and of `DataLoader` workers.

    Args:
        rows: an iterable of rows with ``input_ids``, such as `decompose` gives for a `datasets.IterableDataset`.
        tokens_per_batch: tokens of one optimizer step, on all processes together.
        lengths: the lengths that may occur.
        curriculum: see `curriculum_odds`.
        window_steps: steps of a window; it is held in memory.
        micro_batches: lists that a step is handed out in: processes times gradient accumulation steps.
        process_index: which process this is, from 0.
        num_processes: of how many; each takes equally many micro-batches.
        seed: of the order.
        odds_mode: see `epoch_order`.

    Raises:
        ValueError: a number is not positive, a micro-batch does not hold whole sequences of every length, or the
            micro-batches cannot be shared out equally.
    """

    def __init__(
        self,
        rows: Any,
        tokens_per_batch: int,
        *,
        lengths: Sequence[int],
        curriculum: Curriculum = "grow-p2",
        window_steps: int = 256,
        micro_batches: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        seed: int = 0,
        odds_mode: str = "token-weighted",
    ) -> None:
        self.rows = rows
        self.tokens_per_batch = positive_integer("tokens_per_batch", tokens_per_batch)
        self.window_steps = positive_integer("window_steps", window_steps)
        self.micro_batches = positive_integer("micro_batches", micro_batches)
        self.lengths = sorted(positive_integer("a length", length) for length in lengths)
        if not self.lengths:
            raise ValueError("lengths must name at least one length, got none.")
        if odd := [length for length in self.lengths if tokens_per_batch % (length * micro_batches)]:
            raise ValueError(
                f"tokens_per_batch must be a multiple of {micro_batches} micro-batches times every length, got "
                f"{tokens_per_batch} for sequences of {odd[-1]} tokens."
            )
        if micro_batches % positive_integer("num_processes", num_processes) or not 0 <= process_index < num_processes:
            raise ValueError(
                f"Every process needs a number from 0 and equally many of the {micro_batches} micro-batches, got "
                f"process_index={process_index} and num_processes={num_processes}."
            )
        self.odds = curriculum_odds(curriculum, self.lengths)
        self.process_index, self.num_processes = process_index, num_processes
        self.seed, self.odds_mode = seed, odds_mode
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive read it there

    @property
    def epoch(self) -> int:
        """The epoch whose order the next iteration has."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, and of the stream itself where it shuffles."""
        self._epoch.fill_(int(epoch))
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(self.epoch)

    def steps(self) -> Iterator[list[Row]]:
        """The rows of each optimizer step, on all processes together."""
        waiting: dict[int, list[Row]] = {length: [] for length in self.lengths}
        windows, full = 0, 0
        for row in _whole(self.rows):
            length = len(row["input_ids"])
            if length not in waiting:
                raise ValueError(f"A row of {length} tokens fits none of the lengths {self.lengths}.")
            waiting[length].append(row)
            full += len(waiting[length]) % (self.tokens_per_batch // length) == 0
            if full == self.window_steps:
                yield from self._window(waiting, windows)
                windows, full = windows + 1, 0
        yield from self._window(waiting, windows)
        if left := sum(length * len(rows) for length, rows in waiting.items()):
            logger.info("The stream ended with %d tokens that fill no batch.", left)

    def __iter__(self) -> Iterator[list[Row]]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        own = 0
        for step in self.steps():
            size = len(step) // self.micro_batches
            for part in range(self.process_index, self.micro_batches, self.num_processes):
                if own % workers == index:  # a DataLoader takes from its workers in turn
                    yield step[part * size : (part + 1) * size]
                own += 1

    def _window(self, waiting: dict[int, list[Row]], window: int) -> Iterator[list[Row]]:
        """All full batches among the waiting rows, which are removed from them."""
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch, window]))
        sizes = [self.tokens_per_batch // length for length in self.lengths]
        batches = np.array([len(waiting[length]) // size for length, size in zip(self.lengths, sizes, strict=True)])
        queues = {}
        for length, size, count in zip(self.lengths, sizes, batches, strict=True):
            rows, waiting[length] = waiting[length][: count * size], waiting[length][count * size :]
            queues[length] = iter([rows[i] for i in rng.permutation(len(rows))])
        for bucket in epoch_order(batches, self.odds, 1, rng, self.odds_mode):
            queue = queues[self.lengths[bucket]]
            yield [next(queue) for _ in range(sizes[bucket])]


def _whole(rows: Any) -> Iterator[Row]:
    """All rows, also in a worker of a `DataLoader`, where a `datasets.IterableDataset` hands out only a part."""
    if not hasattr(rows, "iter"):
        yield from rows
        return
    for batch in rows.iter(READ):  # knows nothing of workers
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
