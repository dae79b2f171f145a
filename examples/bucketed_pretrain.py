"""Pretrain a small Llama on documents of any length with BucketedTrainer, interrupted once and resumed.

    python examples/bucketed_pretrain.py [--data FOLDER] [--out runs/buckets] [--epochs 1]

Without ``--data`` (a folder of .txt files) the documents are the help pages of the interpreter, as bytes. What is
shown: the buckets they make, the schedule of one epoch, and the logs by length.
"""

import argparse
from pathlib import Path
from pydoc_data import topics

import datasets
import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext import BucketedTrainer, BucketedTrainingArguments
from hf_ext.data.statistics import bucket_statistics

EOS = 256


def documents(folder: Path | None) -> datasets.Dataset:
    """Byte-level documents, each ended by EOS."""
    texts = (
        [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]
        if folder
        else topics.topics.values()
    )
    return datasets.Dataset.from_dict({"input_ids": [[*text.encode(), EOS] for text in texts]})


def main() -> None:
    """Train, stop in the middle, resume, and print what was used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", default="runs/buckets")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_theta=1e5,  # the paper's base
    )
    arguments = BucketedTrainingArguments(
        options.out,
        per_device_train_batch_size=1,  # sequences of the longest bucket: 4096 tokens a step
        num_train_epochs=options.epochs,
        learning_rate=3e-3,
        bucket_min_length=128,
        bucket_curriculum="grow-p2",
        bucket_cycles=4,
        logging_steps=10,
        report_to=[],
    )
    data = documents(options.data)
    trainer = BucketedTrainer(LlamaForCausalLM(config), arguments, train_dataset=data)
    print(bucket_statistics(trainer.bucket_rows()).table())
    trainer.get_train_dataloader()
    lengths, steps = np.unique(trainer.bucket_sampler.schedule(), return_counts=True)
    print("steps an epoch:", dict(zip(lengths.tolist(), steps.tolist(), strict=True)))

    arguments.max_steps = arguments.save_steps = max(1, trainer.bucket_sampler.steps // 2)  # as if interrupted there
    trainer.train()
    arguments.max_steps = -1
    resumed = BucketedTrainer(LlamaForCausalLM(config), arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=True)


if __name__ == "__main__":
    main()
