"""A tiny saved model, its word tokenizer and generated preference rows, for the preference trainers' tests."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture(scope="session")
def preference(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """``folder(seed)`` of a saved model, ``rows(n, seed)`` of triples with uneven lengths, ``options(folder, **)``."""
    pytest.importorskip("trl")
    import random

    from datasets import Dataset

    from hf_ext.data.preference_toy import tiny_llama, word_tokenizer

    words = [f"w{i}" for i in range(40)]
    tokenizer = word_tokenizer([*words, "[TOXIC]"])
    folders: dict[tuple[int, int], str] = {}

    def folder(seed: int = 0, hidden_size: int = 32) -> str:
        key = (seed, hidden_size)
        if key not in folders:
            folders[key] = str(tmp_path_factory.mktemp(f"model{seed}"))
            tiny_llama(tokenizer, hidden_size, seed=seed).save_pretrained(folders[key])
            tokenizer.save_pretrained(folders[key])
        return folders[key]

    def text(draw: random.Random, longest: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, longest)))

    def rows(count: int = 16, seed: int = 0) -> Dataset:
        draw = random.Random(seed)
        names = ("chosen", "rejected", "toxic")
        return Dataset.from_list(
            [{"prompt": text(draw, 6), **{name: " " + text(draw, 5) for name in names}} for _ in range(count)]
        )

    def options(output_dir: Any, **changes: Any) -> dict[str, Any]:
        return {
            "output_dir": str(output_dir),
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 5,
            **changes,
        }

    return SimpleNamespace(folder=folder, rows=rows, options=options, tokenizer=tokenizer)
