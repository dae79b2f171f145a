"""Train the low-rank term of a ReALLM model as an ordinary LoRA adapter with transformers' Trainer.

    python examples/reallm_qlora.py --text some_text.txt [--model FOLDER_OF_A_QUANTISED_MODEL] [--steps 20]

Without ``--model`` the default model is quantised first, without data. The codes never change: only the adapter is
trained and saved, and it loads with ``PeftModel.from_pretrained``.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_ext import ReALLMConfig
from hf_ext.default_model import resolve_model
from hf_ext.quant.adapter import low_rank_to_adapter, prepare_for_training


def main() -> None:
    """Make an adapter of the low-rank term, train it, save it, load it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a quantised model")
    parser.add_argument("--text", required=True, help="text file to train on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--out", default="runs/reallm-qlora")
    arguments = parser.parse_args()
    place = arguments.model or resolve_model(None)
    config = None if arguments.model else ReALLMConfig(bits=3, rank=8)
    tokenizer = AutoTokenizer.from_pretrained(place)
    options = {} if config is None else {"quantization_config": config}
    model = prepare_for_training(low_rank_to_adapter(AutoModelForCausalLM.from_pretrained(place, **options)))
    model.print_trainable_parameters()

    ids = tokenizer(Path(arguments.text).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    starts = range(0, len(ids) - arguments.length, arguments.length)
    rows = [ids[start : start + arguments.length] for start in starts]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    training = TrainingArguments(
        arguments.out, max_steps=arguments.steps, learning_rate=2e-4, per_device_train_batch_size=1, logging_steps=5,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    Trainer(model, training, train_dataset=dataset).train()

    model.save_pretrained(f"{arguments.out}/adapter")
    base = model.unload()
    base.save_pretrained(f"{arguments.out}/base")
    again = AutoModelForCausalLM.from_pretrained(f"{arguments.out}/base")
    again = PeftModel.from_pretrained(again, f"{arguments.out}/adapter")
    print(f"Loaded again: {sum(parameter.numel() for parameter in again.parameters()):,} parameters beside the codes")


if __name__ == "__main__":
    main()
