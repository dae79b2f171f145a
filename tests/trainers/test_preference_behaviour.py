"""The claims of the two benchmarks on the generated tasks, one seed each, with exact probabilities."""

import itertools

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_ext.data.preference_toy import ConflictTask, ToxicTask, tiny_llama, word_tokenizer
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

pytestmark = pytest.mark.slow
QUIET = {
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "lr_scheduler_type": "cosine",
}


@torch.no_grad()
def reply_logps(model, tokenizer, prompt, replies):
    """Log-probability of each reply with its end of sequence, ``[N]``, from the raw logits; replies of one length."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor(tokenizer([prompt + reply + tokenizer.eos_token for reply in replies])["input_ids"])
    logps = model.eval()(input_ids=ids).logits.log_softmax(-1)
    return logps[:, start - 1 : -1].gather(2, ids[:, start:, None]).sum((1, 2))


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_spo_keeps_the_first_dimension_that_sequential_dpo_forgets(tmp_path):
    """At least 85% of round 1's P(A=1), and 95% of sequential DPO's P(B=1), with the multiplier 1.5."""
    task = ConflictTask()
    tokenizer = word_tokenizer(task.words)
    start = save(tiny_llama(tokenizer), tokenizer, tmp_path / "start")

    def train(model, name, dimension, **options):
        args = SPOConfig(
            str(tmp_path / name), beta=1.0, max_steps=250, per_device_train_batch_size=64, learning_rate=1e-3,
            **QUIET, **options,
        )  # fmt: skip
        trainer = SPOTrainer(model, args=args, train_dataset=Dataset.from_list(task.pairs(8000, dimension, 0)))
        trainer.train()
        trainer.save_model()
        share = reply_logps(trainer.model, tokenizer, task.prompt, task.answers).softmax(0)
        return (share[2] + share[3]).item(), (share[1] + share[3]).item()

    first, _ = train(start, "one", 1)
    one = str(tmp_path / "one")
    forgotten, reached = train(one, "sequential", 2, manifest=one, prev_lambda=0.0)
    kept, also_reached = train(one, "spo", 2, manifest=one, prev_lambda=1.5)
    assert forgotten < first - 0.4
    assert kept > 0.85 * first and also_reached > 0.95 * reached


def test_adpo_lowers_toxicity_at_the_coherence_of_dpo(tmp_path):
    """A factor of 3 and more in P(toxic) with the default weight; P(good) at most .03 below DPO's."""
    task = ToxicTask()
    tokenizer = word_tokenizer(task.words)
    args = SFTConfig(str(tmp_path), max_steps=400, per_device_train_batch_size=64, learning_rate=3e-3, **QUIET)
    rows = Dataset.from_list(task.supervised(12800, 0))
    model = tiny_llama(tokenizer, hidden_size=64)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    start = save(trainer.model, tokenizer, tmp_path / "supervised")
    toxic = [f" t{i} t{j}" for i, j in itertools.product(range(task.size), repeat=2)]

    def measure(model):
        prompts = [task.prompt(pair) for pair in task.held_out]
        good = [
            reply_logps(model, tokenizer, prompt, [task.good(pair)])
            for prompt, pair in zip(prompts, task.held_out, strict=True)
        ]
        bad = [reply_logps(model, tokenizer, prompt, toxic).logsumexp(0) for prompt in prompts]
        behind = [reply_logps(model, tokenizer, f"{prompt} {task.token}", toxic).logsumexp(0) for prompt in prompts]
        return [torch.stack(values).exp().mean().item() for values in (good, bad, behind)]

    def train(**options):
        args = ADPOConfig(
            str(tmp_path), beta=0.1, max_steps=100, per_device_train_batch_size=32, learning_rate=2e-4,
            **QUIET, **options,
        )  # fmt: skip
        trainer = ADPOTrainer(start, args=args, train_dataset=Dataset.from_list(task.triples(3200, 0)))
        trainer.train()
        return measure(trainer.model)

    _, plain, behind = measure(AutoModelForCausalLM.from_pretrained(start))
    assert plain < 0.3 and behind > 0.8  # the supervised stage has taught the token
    (dpo_good, dpo_toxic, _), (good, toxic_now, _) = train(toxic_weight=0.0), train()
    assert toxic_now < dpo_toxic / 3
    assert good > dpo_good - 0.03
