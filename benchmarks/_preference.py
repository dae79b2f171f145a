"""What the preference studies share: quiet arguments, the supervised stage, and exact probabilities of replies."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from _run import Report
from torch import Tensor
from transformers import PrinterCallback, Trainer

QUIET = {
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "disable_tqdm": True,
    "lr_scheduler_type": "cosine",
}


def resume(report: Report) -> set[tuple[int, str]]:
    """Take over the rows that an interrupted run of the same settings has saved; returns their (seed, method)."""
    path = report.folder / f"{report.stem}.json"
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] == report.settings:
            report.rows = stored["rows"]
    return {(row["seed"], row["method"]) for row in report.rows}


def print_table(report: Report, columns: Mapping[str, str]) -> None:
    """Print a Markdown table of the seeds' mean, least and greatest value of some columns.

    Args:
        report: with rows that have a "method".
        columns: name -> format, for example ".2f".
    """
    print(f"| method | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for method in dict.fromkeys(row["method"] for row in report.rows):
        cells = []
        for column, form in columns.items():
            values = [row[column] for row in report.rows if row["method"] == method and column in row]
            spread = f"{min(values):{form}} to {max(values):{form}}" if values else ""
            cells.append(f"{sum(values) / len(values):{form}} ({spread})" if values else "")
        print(f"| {method} | {' | '.join(cells)} |")


def train(trainer: Trainer) -> Trainer:
    """Train without printing every step; the history stays in ``trainer.state``."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def clone(model: Any) -> Any:
    """The same weights in a fresh model. A deep copy would keep TRL's forward, which closes over the original."""
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def supervised(model: Any, tokenizer: Any, rows: list[dict[str, str]], steps: int, seed: int, lr: float = 3e-3) -> Any:
    """Train a copy of the model on prompt/completion rows with TRL's SFTTrainer, batch 64."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=64, learning_rate=lr, seed=seed, **QUIET
    )
    trainer = SFTTrainer(clone(model), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return train(trainer).model


@torch.no_grad()
def reply_logps(model: Any, tokenizer: Any, prompt: str, replies: Sequence[str]) -> Tensor:
    """Log-probability in nats of each reply followed by the end of sequence, ``[N]``; replies of equal token count."""
    start = len(tokenizer(prompt)["input_ids"])
    texts = [prompt + reply + tokenizer.eos_token for reply in replies]
    ids = torch.tensor(tokenizer(texts)["input_ids"], device=model.device)
    logps = model(input_ids=ids).logits.float().log_softmax(-1)
    return logps[:, start - 1 : -1].gather(2, ids[:, start:, None]).sum((1, 2)).cpu()


def loss_statistics(trainer: Trainer, last: int = 50) -> dict[str, float]:
    """Standard deviation of the loss over the last steps, and the largest gradient norm of the run."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = torch.tensor([entry["loss"] for entry in steps[-last:]])
    return {"loss_std": losses.std().item(), "max_grad_norm": max(entry["grad_norm"] for entry in steps)}
