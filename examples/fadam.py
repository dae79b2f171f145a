"""FAdam in place of AdamW: in a plain loop, in the host's Trainer by name, and in a TRL trainer through the mixin.

python examples/fadam.py                       # a tiny random model, a few seconds
"""

import argparse
import tempfile

import torch
from transformers import Trainer, TrainingArguments

from hf_ext import FAdam, FAdamTrainerMixin
from hf_ext.testing import tiny_model

SENTENCE = [1, *range(3, 40), 2]


class FAdamTrainer(FAdamTrainerMixin, Trainer):
    """The host's Trainer, always with FAdam and without decay on embeddings; the same works for trl.DPOTrainer."""


def plain_loop(steps: int) -> float:
    """Train without any trainer; returns the last loss in nats."""
    model = tiny_model().train()
    optimizer = FAdam(model.parameters(), lr=1e-2)
    ids = torch.tensor([SENTENCE])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return loss.item()


def with_trainer(cls: type[Trainer], steps: int, **options: str) -> float:
    """Train with a Trainer; returns the mean loss in nats."""
    rows = [{"input_ids": SENTENCE, "labels": SENTENCE}] * 8
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, learning_rate=1e-2, weight_decay=1e-3, report_to=[], use_cpu=True, **options
        )
        return cls(tiny_model().train(), args, train_dataset=rows).train().training_loss


def main() -> None:
    """Run all three and print their losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    print(f"loop: last loss {plain_loop(steps):.3f} nats")
    print(f"Trainer, optim='fadam': mean loss {with_trainer(Trainer, steps, optim='fadam'):.3f} nats")
    print(f"FAdamTrainerMixin: mean loss {with_trainer(FAdamTrainer, steps):.3f} nats")


if __name__ == "__main__":
    main()
