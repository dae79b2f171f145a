"""`heal`: distil a converted model back towards its dense original, resumable, with settings that suit that."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_ext.trainers.cla_distill import CLADistillTrainer
from hf_ext.trainers.cla_distill_config import CLADistillArguments
from hf_ext.trainers.cla_layerwise import heal_layerwise


def heal(
    student: Any,
    teacher: Any,
    ids: Tensor,
    folder: str | Path,
    *,
    tokens: int,
    length: int = 512,
    rows: int = 1,
    layer_tokens: int = 0,
    passes: int = 8,
    save_steps: int = 25,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> CLADistillTrainer:
    """Train ``student`` in place with `CLADistillTrainer` on a text, if asked after `heal_layerwise`.

    Run again with the same folder, it goes on from what is there. Small steps at a high learning rate and at
    temperature 1 are what docs/cla.md has measured.

    Args:
        student: the converted model.
        teacher: the dense model.
        ids: token ids `[T]` of a text, cut into rows.
        folder: for checkpoints; they hold model, optimiser and position.
        tokens: how many to distil on; more than the text has means more than one epoch.
        length: tokens a row.
        rows: rows a step.
        layer_tokens: how many of the text's first tokens are for `heal_layerwise` before that; 0 leaves it out.
        passes: of `heal_layerwise` over them.
        save_steps: steps between checkpoints; only the last one is kept.
        callbacks: callbacks of the trainer.
        options: further `CLADistillArguments`, or others in the place of those chosen here.

    Raises:
        ValueError: the text is shorter than one step, or there are fewer tokens to train on than one step takes.
    """
    chunks = ids.reshape(-1)[: len(ids) // length * length].view(-1, length)
    steps = tokens // (length * rows)
    if len(chunks) < rows or steps < 1:
        raise ValueError(
            f"Healing needs at least one step of {rows} x {length} tokens, got a text of {ids.numel()} tokens "
            f"and tokens={tokens}."
        )
    settings: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "temperature": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.0,
        "logging_steps": 5,
        "save_steps": save_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
    }
    if layer_tokens:
        given: dict[str, Any] = {"passes": passes, "window": length, "folder": folder}
        heal_layerwise(student, teacher, ids[:layer_tokens], progress=not options.get("disable_tqdm"), **given)
    args = CLADistillArguments(output_dir=str(folder), **{**settings, **options})
    dataset: Any = [{"input_ids": chunk} for chunk in chunks]
    trainer = CLADistillTrainer(student, teacher, args, train_dataset=dataset, callbacks=list(callbacks))
    checkpoint = get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer
