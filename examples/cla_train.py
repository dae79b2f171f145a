"""Train a small model from scratch twice, dense multi-query attention and CLA2, on equal tokens of real text.

    python examples/cla_train.py [--steps 200] [--out cla_train.png]

The text is the Python manual that every interpreter carries; tokens are its bytes.
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_ext import CLAConfig, HfExtConfig

TEXT = torch.tensor(list("\n\n".join(topics.values()).encode("utf-8")))
ROWS, LENGTH = 8, 128


def build(flags: HfExtConfig | None, seed: int = 0, **options: Any) -> Any:
    """A Llama of 4 layers with one key-value head, with random weights."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    config = LlamaConfig(vocab_size=256, num_key_value_heads=1, **{**shape, **options})
    config.hf_ext = flags
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def train(model: Any, steps: int, learning_rate: float, seed: int = 0) -> list[float]:
    """The loss of every step, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        starts = torch.randint(len(TEXT) - LENGTH, (ROWS,), generator=generator)
        rows = torch.stack([TEXT[start : start + LENGTH] for start in starts.tolist()])
        loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train both and draw their losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", default="cla_train.png")
    args = parser.parse_args()
    import matplotlib.pyplot as plt

    for name, flags in (("dense MQA", None), ("CLA2", HfExtConfig(cla=CLAConfig(sharing_factor=2)))):
        model = build(flags)
        losses = train(model, args.steps, args.learning_rate)
        last = sum(losses[-20:]) / len(losses[-20:])
        print(f"{name}: {model.kv_bytes_per_token()} bytes a token, {last:.4f} nats a byte over the last 20 steps")
        plt.plot(losses, label=f"{name}, {model.kv_bytes_per_token()} bytes of keys and values a token", linewidth=0.8)
    plt.xlabel(f"steps of {ROWS * LENGTH} tokens")
    plt.ylabel("loss, nats a byte")
    plt.legend()
    plt.savefig(args.out, dpi=120)
    print(f"drew {args.out}")


if __name__ == "__main__":
    main()
