"""`BucketBatchSampler`: batches of one sequence length and a constant number of tokens, in the order of a curriculum.

The variable sequence length training of Dataset Decomposition (arXiv 2405.13226, section 2.2 and Algorithm 1) as a
batch sampler for `torch.utils.data.DataLoader`.
"""

import logging
import zlib
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from hf_ext.data.curriculum import Curriculum, curriculum_odds, epoch_order
from hf_ext.data.fingerprint import content_crc
from hf_ext.data.mixture import Mixture, mixture_batches
from hf_ext.data.pieces import Integers
from hf_ext.data.statistics import exponents
from hf_ext.options import positive_integer

logger = logging.getLogger(__name__)

CHUNK = 1 << 24  # rows looked at in one go while an epoch is planned, so that temporary arrays stay small


class _Epoch(NamedTuple):
    """One epoch: the bucket of every step, how often it came before, and the shuffled rows of all buckets."""

    number: int
    order: NDArray[np.int8]
    earlier: NDArray[np.uint32]
    rows: NDArray[Any]


class BucketBatchSampler(Sampler[list[int]]):
    """Yields lists of rows; the rows of one optimizer step have one length and ``tokens_per_batch`` tokens in all.

    A step is handed out as ``micro_batches`` consecutive equal lists: one for every process and gradient
    accumulation step. The order is a pure function of the data's lengths, the options, ``seed`` and the epoch: it
    does not depend on ``micro_batches``, global random state or how often it was asked for. Each epoch uses every
    sequence of the mixture once; `remainder` says what does not fill a batch. A sequence takes 5 bytes: 4 for its row
    and 1 for its length. There is no attribute ``batch_size``: with one, accelerate drops batches of another size.

    Example:
        ```python
        sampler = BucketBatchSampler(buckets, tokens_per_batch=65536, curriculum="grow-p2", cycles=8)
        loader = DataLoader(buckets, batch_sampler=sampler, collate_fn=BucketCollator())
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for batch in loader: ...
        ```

    Args:
        buckets: a dataset made by `decompose`, or the log2 of every row's length (int8 ``[rows]``).
        tokens_per_batch: tokens of one optimizer step, on all processes together.
        mixture: tokens from each bucket, see `mixture_batches`.
        curriculum: order of the buckets within a cycle, see `curriculum_odds`.
        cycles: passes through the curriculum in an epoch.
        micro_batches: lists that a step is handed out in: processes times gradient accumulation steps.
        seed: of both the order and the choice of sequences.
        odds_mode: see `epoch_order`.

    Raises:
        ValueError: a batch does not hold whole sequences for every micro-batch, no bucket fills a batch, or an option
            is not allowed.
    """

    drop_last = True  # read by accelerate: every process gets equally many batches

    def __init__(
        self,
        buckets: Any,
        tokens_per_batch: int,
        *,
        mixture: Mixture = "natural",
        curriculum: Curriculum = "grow-p2",
        cycles: int = 8,
        micro_batches: int = 1,
        seed: int = 0,
        odds_mode: str = "token-weighted",
    ) -> None:
        is_dataset = hasattr(buckets, "column_names")
        self._exponents = exponents(buckets) if is_dataset else _exponents(buckets)
        self._content = content_crc(buckets) if is_dataset else 0
        counts = np.bincount(self._exponents, minlength=1) if len(self._exponents) else np.zeros(1, dtype=np.int64)
        self._ks = np.flatnonzero(counts)
        self._counts = counts[self._ks]
        self.lengths = [1 << int(k) for k in self._ks]
        self.tokens_per_batch = positive_integer("tokens_per_batch", tokens_per_batch)
        self.micro_batches = positive_integer("micro_batches", micro_batches)
        positive_integer("cycles", cycles)
        self.batches = self._plan_mixture(mixture)
        used = [length for length, n in zip(self.lengths, self.batches, strict=True) if n]
        self._odds = np.zeros(len(self.lengths))
        empty = [length for length in self.lengths if length not in used]
        self._odds[self.batches > 0] = curriculum_odds(curriculum, used, empty)
        self._options = {"mixture": mixture, "curriculum": curriculum, "cycles": int(cycles), "odds_mode": odds_mode}
        self.cycles, self.odds_mode, self.seed = int(cycles), odds_mode, _seed(seed)
        self.epoch = 0
        self._position = self._resume_at = 0
        self._planned: _Epoch | None = None
        epoch_order(self.batches[:0], self._odds[:0], 1, np.random.default_rng(0), odds_mode)  # refuse a bad mode now

    def _plan_mixture(self, mixture: Mixture) -> Integers:
        longest = max(self.lengths, default=0)
        if isinstance(mixture, Mapping):
            longest = max((int(length) for length in mixture), default=0)
        if self.tokens_per_batch < longest * self.micro_batches or self.tokens_per_batch % self.micro_batches:
            raise ValueError(
                f"tokens_per_batch must give each of {self.micro_batches} micro-batches at least one sequence of the "
                f"longest bucket ({longest} tokens), got {self.tokens_per_batch}."
            )
        batches = mixture_batches(mixture, self.lengths, self._counts, self.tokens_per_batch)
        for length, count, taken in zip(self.lengths, self._counts, batches, strict=True):
            if not taken and not isinstance(mixture, Mapping):
                logger.warning(
                    "The bucket of length %d is left out: its %d sequences do not fill a batch of %d tokens.",
                    length, count, self.tokens_per_batch,
                )  # fmt: skip
            if (self.tokens_per_batch // length) % self.micro_batches and taken:
                raise ValueError(
                    f"A batch of {self.tokens_per_batch} tokens has {self.tokens_per_batch // length} sequences of "
                    f"{length} tokens, which {self.micro_batches} micro-batches cannot share equally."
                )
        return batches

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return int(self.batches.sum())

    def __len__(self) -> int:
        """Micro-batches of an epoch, of all processes together."""
        return self.steps * self.micro_batches

    @property
    def tokens(self) -> dict[int, int]:
        """Tokens of each length in an epoch."""
        return {length: int(n) * self.tokens_per_batch for length, n in zip(self.lengths, self.batches, strict=True)}

    @property
    def remainder(self) -> dict[int, int]:
        """Tokens of each length that an epoch leaves out: other ones every epoch."""
        there = zip(self.lengths, self._counts, strict=True)
        return {length: int(count) * length - self.tokens[length] for length, count in there}

    def schedule(self, epoch: int | None = None) -> Integers:
        """Sequence length of every step ``[steps]`` of that epoch (default: the current one)."""
        order = self._order(self.epoch if epoch is None else epoch)
        return np.asarray(self.lengths, dtype=np.int64)[order]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration hands out; another one than now starts at its beginning."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume_at = int(epoch), 0, 0

    def batch(self, index: int) -> list[int]:
        """Rows of one micro-batch of the current epoch: ``index // micro_batches`` is the step.

        Raises:
            IndexError: there is no such micro-batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"A micro-batch of the epoch has an index from 0 to {len(self) - 1}, got {index}.")
        step, part = divmod(index, self.micro_batches)
        epoch = self._plan()
        bucket = int(epoch.order[step])
        size = self.tokens_per_batch // self.lengths[bucket] // self.micro_batches
        start = self._first_row(bucket) + (int(epoch.earlier[step]) * self.micro_batches + part) * size
        rows: list[int] = epoch.rows[start : start + size].tolist()
        return rows

    def __iter__(self) -> Iterator[list[int]]:
        self._position, self._resume_at = self._resume_at, 0
        return self._batches(self._position)

    def _batches(self, start: int) -> Iterator[list[int]]:
        for index in range(start, len(self)):
            self._position = index + 1
            yield self.batch(index)

    def state_dict(self, batches_taken: int | None = None, epoch: int | None = None) -> dict[str, Any]:
        """Where training stands, as JSON values.

        Args:
            batches_taken: micro-batches of the epoch that training has used. A `DataLoader` with workers asks for
                batches ahead of time, so there the number must be given; None takes what was handed out.
            epoch: default the current one.
        """
        position = self._position if batches_taken is None else int(batches_taken)
        epoch = self.epoch if epoch is None else int(epoch)
        step, part = divmod(position, self.micro_batches)
        place = {"epoch": epoch, "step": step, "micro_batch": part, "micro_batches": self.micro_batches}
        return {**place, **self.identity(epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, also with another number of micro-batches at a step's beginning.

        Raises:
            ValueError: the data or an option differ, so the order would not be the same.
        """
        self.check(state)
        if state["micro_batch"] and state["micro_batches"] != self.micro_batches:
            raise ValueError(
                f"The state stands inside a step of {state['micro_batches']} micro-batches (after "
                f"{state['micro_batch']}); with {self.micro_batches} it can only go on from the beginning of a step."
            )
        self.epoch = int(state["epoch"])
        self._resume_at = self._position = int(state["step"]) * self.micro_batches + int(state["micro_batch"])

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of other data or options.

        Raises:
            ValueError: naming what differs.
        """
        own = self.identity(int(state.get("epoch", 0)))
        for name, value in own.items():
            if state.get(name) != value:
                raise ValueError(
                    f"The saved order does not fit: {_NAMES.get(name, name)} was {state.get(name)!r} and is now "
                    f"{value!r}. Resume with the same data and options, or start anew."
                )

    def identity(self, epoch: int | None = None) -> dict[str, Any]:
        """What the order depends on, and a checksum of it, as JSON values."""
        plan = zlib.crc32(self._order(self.epoch if epoch is None else epoch).tobytes())
        options = {name: _json(value) for name, value in self._options.items()}
        return {
            "tokens_per_batch": self.tokens_per_batch,
            **options,
            "seed": self.seed,
            "sequences": {str(n): int(count) for n, count in zip(self.lengths, self._counts, strict=True)},
            "rows_crc": zlib.crc32(np.ascontiguousarray(self._exponents).tobytes()),
            "content_crc": self._content,
            "order_crc": plan,
        }

    def _first_row(self, bucket: int) -> int:
        return int(self._counts[:bucket].sum())

    def _order(self, epoch: int) -> NDArray[np.int8]:
        if self._planned is not None and self._planned.number == epoch:
            return self._planned.order
        return epoch_order(self.batches, self._odds, self.cycles, _rng(self.seed, epoch, 0), self.odds_mode)

    def _plan(self) -> _Epoch:
        if self._planned is None or self._planned.number != self.epoch:
            self._planned = None  # free the last epoch's rows first
            order = self._order(self.epoch)
            earlier = np.empty(len(order), dtype=np.uint32)
            for bucket in range(len(self.lengths)):
                steps = np.flatnonzero(order == bucket)
                earlier[steps] = np.arange(len(steps), dtype=np.uint32)
            self._planned = _Epoch(self.epoch, order, earlier, self._shuffled_rows())
        return self._planned

    def _shuffled_rows(self) -> NDArray[Any]:
        """All rows, bucket after bucket, each bucket shuffled."""
        rows = np.empty(len(self._exponents), dtype=np.uint32 if len(self._exponents) < 2**32 else np.uint64)
        for bucket, k in enumerate(self._ks):
            end = start = self._first_row(bucket)
            for chunk in range(0, len(self._exponents), CHUNK):
                found = np.flatnonzero(self._exponents[chunk : chunk + CHUNK] == k)
                rows[end : end + len(found)] = found + chunk
                end += len(found)
            _rng(self.seed, self.epoch, 1 + int(k)).shuffle(rows[start:end])
        return rows


_NAMES = {
    "sequences": "the number of sequences of each length",
    "rows_crc": "the checksum of the order of rows",
    "content_crc": "the checksum of the tokens",
    "order_crc": "the checksum of the order of steps (a changed numpy draws other numbers)",
}


def _rng(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, epoch, stream]))


def _exponents(given: Any) -> NDArray[np.int8]:
    values = np.asarray(given)
    if values.size and (values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 62):
        raise ValueError(
            f"buckets must be a dataset or the log2 of every row's length (integers from 0 to 62), got {given!r}."
        )
    return values.astype(np.int8, copy=False)


def _seed(seed: int) -> int:
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}.")
    return int(seed)


def _json(value: Any) -> Any:
    return {str(key): item for key, item in sorted(value.items())} if isinstance(value, Mapping) else value
