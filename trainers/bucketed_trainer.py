"""`BucketedTrainer`: `transformers.Trainer` on batches of one length and constant tokens (arXiv 2405.13226).

Only the training data loader differs: documents are decomposed into buckets, and every optimizer step takes one
bucket, the same on all processes. Evaluation, optimizers, checkpoints and the loss are the host's.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, seed_worker

from hf_ext.data.bucket_sampler import BucketBatchSampler
from hf_ext.data.bucket_stream import BucketStream
from hf_ext.data.collate import BucketCollator
from hf_ext.data.decompose import decompose
from hf_ext.data.statistics import exponents
from hf_ext.trainers.bucketed_config import BucketedTrainingArguments, check_bucket_arguments
from hf_ext.trainers.bucketed_meter import BucketMeter

logger = logging.getLogger(__name__)

STATE_FILE = "bucket_state.json"
LONGEST_BY_DEFAULT = 8192


class BucketedTrainerMixin:
    """Gives buckets to any trainer that builds on `transformers.Trainer`; put it before that trainer.

    ``train_dataset`` is a `datasets.Dataset` or `datasets.IterableDataset` of tokenised documents, or of rows that
    `decompose` made (recognised by their column ``bucket``). Training rows need no padding: they are
    stacked as they are, and a ``data_collator`` serves evaluation. For a trainer of TRL combine both classes:

        ```python
        @dataclass
        class BucketedSFTConfig(BucketedArguments, SFTConfig): ...
        class BucketedSFTTrainer(BucketedTrainerMixin, SFTTrainer): ...
        BucketedSFTTrainer(model, args=BucketedSFTConfig(..., max_length=None), train_dataset=dataset).train()
        ```

    Logs also hold, since the last log: ``sequence_length`` (tokens, mean over steps), ``tokens_per_second`` (all
    processes), ``attention_flops`` and ``loss_<length>`` for each length seen (losses of different lengths are not
    comparable: less context is harder). ``total_flos`` counts attention and a tied head, unlike the host's.

    Raises:
        ValueError: an argument is not allowed; ``args`` lacks the fields of `BucketedArguments`.
    """

    args: Any
    model: Any
    train_dataset: Any
    accelerator: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if given is not None and not hasattr(given, "bucket_min_length"):
            raise ValueError(
                f"{type(self).__name__} needs BucketedTrainingArguments, or another config with BucketedArguments "
                f"before it, got {type(given).__name__}."
            )
        if given is not None:
            check_bucket_arguments(given)
        self.bucket_sampler: BucketBatchSampler | None = None
        self._bucket_rows: tuple[Any, Any] = (None, None)
        self._resume_state: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        self._bucket_meter = BucketMeter(self.model)
        self.add_callback(_BucketCallback(self))  # type: ignore[attr-defined]

    # ---- data ----

    def bucket_rows(self) -> Any:
        """The training data as rows of equal lengths; documents are decomposed once, the result is kept.

        Raises:
            ValueError: there is no training data, or it is no dataset of tokenised documents.
        """
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        if self._bucket_rows[0] is not self.train_dataset:
            rows = self.train_dataset
            if "bucket" not in (getattr(rows, "column_names", None) or ()):
                with self.args.main_process_first(desc="cutting documents"):
                    rows = decompose(rows, **self._decompose_options())
                if self.args.bucket_remainder == "drop" and "labels" in (rows.column_names or ()):
                    logger.warning(
                        "bucket_remainder='drop' leaves out the end of nearly every document, and with it the end of "
                        "an answer and its EOS; with 'pad' they are learned."
                    )
            self._bucket_rows = (self.train_dataset, rows)
        return self._bucket_rows[1]

    def _decompose_options(self) -> dict[str, Any]:
        args = self.args
        eos = getattr(self.processing_class, "eos_token_id", None) if args.bucket_append_eos else None
        options = {"min_length": args.bucket_min_length, "max_length": self._longest_bucket(), "eos_token_id": eos}
        if hasattr(self.train_dataset, "__len__"):
            options["num_proc"] = args.bucket_num_proc
        return {**options, "remainder": args.bucket_remainder, "positions": args.bucket_document_positions}

    def _longest_bucket(self) -> int:
        """Tokens of the longest bucket.

        Raises:
            ValueError: the model has fewer positions.
        """
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(text, "max_position_embeddings", None)
        longest = self.args.bucket_max_length
        if longest is None:
            return min(LONGEST_BY_DEFAULT, 1 << (positions.bit_length() - 1) if positions else LONGEST_BY_DEFAULT)
        if positions and longest > positions:
            raise ValueError(f"bucket_max_length must not be above the model's {positions} positions, got {longest}.")
        return int(longest)

    def _shares(self) -> tuple[int, int]:
        """Processes that take different data, and the micro-batches of a step on all of them together."""
        parallel = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # type: ignore[attr-defined]
        processes = self.args.world_size // parallel
        return processes, processes * self.args.gradient_accumulation_steps

    def get_train_dataloader(self) -> DataLoader:
        """The loader of bucketed batches; called by `Trainer.train`."""
        rows = self.bucket_rows()
        _, micro_batches = self._shares()
        streamed = not hasattr(rows, "__len__")
        longest = self._longest_bucket() if streamed else _longest_row(rows, self._longest_bucket())
        tokens = self._train_batch_size * longest * micro_batches  # type: ignore[attr-defined]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        common = {"curriculum": self.args.bucket_curriculum, "odds_mode": self.args.bucket_odds_mode, "seed": seed}
        self._graph_for_each_length(longest)
        if streamed:
            return self._stream_loader(rows, tokens, longest, common)
        if self.args.bucket_document_positions:
            self._check_positions(rows)
        self.bucket_sampler = BucketBatchSampler(
            rows,
            tokens,
            mixture=self.args.bucket_mixture,
            cycles=self.args.bucket_cycles,
            micro_batches=micro_batches,
            **common,
        )
        self._check_resumed(self.bucket_sampler)
        columns = [name for name in ("input_ids", "labels", "offset") if name in rows.column_names]
        worker_init = partial(seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index)
        loader = DataLoader(
            rows.select_columns(columns).with_format("numpy"),
            batch_sampler=self.bucket_sampler,
            worker_init_fn=worker_init,
            **self._loader_options(),
        )
        return self.accelerator.prepare(loader)

    def _stream_loader(self, rows: Any, tokens: int, longest: int, common: dict[str, Any]) -> DataLoader:
        """Each process reads the stream and takes its own share, so accelerate must not share it out once more."""
        from accelerate.data_loader import prepare_data_loader

        self.bucket_sampler = None
        processes, micro_batches = self._shares()
        if processes != self.args.world_size:
            raise ValueError(
                "A streamed train_dataset needs one data-parallel process each, got tensor, context or sequence "
                f"parallelism: {self.args.world_size} processes for {processes} shares."
            )
        lengths = [1 << k for k in range(self.args.bucket_min_length.bit_length() - 1, longest.bit_length())]
        stream = BucketStream(
            rows,
            tokens,
            lengths=lengths,
            window_steps=self.args.bucket_window_steps,
            micro_batches=micro_batches,
            process_index=self.args.process_index,
            num_processes=processes,
            **common,
        )
        loader = DataLoader(stream, batch_size=None, **self._loader_options())
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def _loader_options(self) -> dict[str, Any]:
        args = self.args
        trl = any(base.__module__.startswith("trl.") for base in type(self).__mro__)  # counts tokens with the mask
        return {
            "collate_fn": BucketCollator(args.bucket_document_positions, attention_mask=trl),
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "in_order": args.dataloader_in_order,
        }

    def _check_positions(self, rows: Any) -> None:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if "offset" not in rows.column_names:
            raise ValueError("bucket_document_positions needs the column offset: decompose with positions=True.")
        if positions and len(rows):
            table = rows.select_columns(["offset"]).with_format("numpy")
            last = max(int(batch["offset"].max()) for batch in table.iter(1_000_000))
            if last >= positions:
                raise ValueError(
                    f"bucket_document_positions needs documents within the model's {positions} positions, got a piece "
                    f"that begins at {last}; cut documents there first or count from each piece."
                )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Sequences that an epoch of ``dataloader`` uses."""
        sampler = self.bucket_sampler
        own = sampler is not None and getattr(dataloader, "dataset", None) is not self.train_dataset
        if own and _inner_sampler(dataloader) is sampler:
            return sum(tokens // length for length, tokens in sampler.tokens.items())
        return int(super().num_examples(dataloader))  # type: ignore[misc]

    # ---- resuming ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`. Resuming checks that data and curriculum are the same.

        Raises:
            ValueError: they are not, so the batches that are left could not be known.
        """
        path = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._resume_state = self._read_state(path) if path else None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _read_state(self, checkpoint: str) -> dict[str, Any] | None:
        file = Path(checkpoint) / STATE_FILE
        if self.args.ignore_data_skip:
            logger.warning(
                "ignore_data_skip=True: the epoch's curriculum begins anew, and its batches are used twice."
            )
            return None
        if not file.is_file():
            logger.warning("%s has no %s: whether its data were the same is not known.", checkpoint, STATE_FILE)
            return None
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return state

    def _check_resumed(self, sampler: BucketBatchSampler) -> None:
        if self._resume_state is not None:
            sampler.check(self._resume_state)

    def bucket_state(self) -> dict[str, Any] | None:
        """Where the sampler stands now (after an epoch: at the next one's beginning); None for a stream."""
        sampler = self.bucket_sampler
        if sampler is None:
            return None
        epoch, done = divmod(self.state.global_step, sampler.steps)  # type: ignore[attr-defined]
        return sampler.state_dict(done * sampler.micro_batches, epoch)

    # ---- measuring ----

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, its length and loss noted for the logs."""
        count, length = inputs["input_ids"].shape
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._bucket_meter.add(int(length), int(count), loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the lengths, speed and attention FLOPs since the last training log."""
        if "loss" in logs:
            logs = {**logs, **self._bucket_meter.read(self.accelerator, self.args.gradient_accumulation_steps)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a forward and backward pass on this micro-batch: weights, head and attention."""
        flops = self._bucket_meter.flops(*inputs["input_ids"].shape) if "input_ids" in inputs else None
        return int(super().floating_point_ops(inputs)) if flops is None else flops  # type: ignore[misc]

    def _graph_for_each_length(self, longest: int) -> None:
        """With ``torch_compile``, one static graph for each length: lengths are few, and static shapes are faster."""
        if not self.args.torch_compile:
            return
        from torch import _dynamo

        lengths = longest.bit_length()
        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, lengths + 8)  # 8: the host's own shapes
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.dynamic is None:
            plugin.dynamic = False


class BucketedTrainer(BucketedTrainerMixin, Trainer):
    """`transformers.Trainer` with buckets; see `BucketedTrainerMixin` and `BucketedTrainingArguments`."""

    def __init__(
        self, model: Any = None, args: BucketedTrainingArguments | None = None, *rest: Any, **named: Any
    ) -> None:
        super().__init__(model, args or BucketedTrainingArguments("trainer_output"), *rest, **named)


class _BucketCallback(TrainerCallback):
    """Tells the sampler its epoch, also in an epoch that is resumed, and keeps its state in every checkpoint.

    The host reaches a sampler's ``set_epoch`` through two wrappers; resuming on several processes adds a third.
    """

    def __init__(self, trainer: BucketedTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._bucket_meter.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.trainer.bucket_sampler
        if sampler is not None:
            sampler.set_epoch(state.global_step // sampler.steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = self.trainer.bucket_state()
        if saved is not None and args.should_save and folder.is_dir():
            (folder / STATE_FILE).write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


def _longest_row(rows: Any, limit: int) -> int:
    """Tokens of the longest row there is.

    Raises:
        ValueError: it is above ``limit``, or there is no row.
    """
    ks = exponents(rows)
    if not len(ks):
        raise ValueError("train_dataset has no rows: no document reaches the shortest bucket with a token to learn.")
    longest = 1 << int(ks.max())
    if longest > limit:
        raise ValueError(f"The rows of train_dataset have up to {longest} tokens, but bucket_max_length is {limit}.")
    return longest


def _inner_sampler(dataloader: Any) -> Any:
    sampler = getattr(dataloader, "batch_sampler", None)
    while sampler is not None and hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return sampler
