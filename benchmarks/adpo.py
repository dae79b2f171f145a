"""Toxicity against coherence: DPO, DPO with the toxic replies as extra rejected ones, and ADPO over lambda.

Run: python benchmarks/adpo.py [--seeds 3] [--steps 100]. Writes benchmarks/results/adpo.json, .csv and .png.

The model is a tiny Llama and every probability is exact, on prompts held out from training (see
`hf_ext.data.preference_toy.ToxicTask`; its "toxic" words are harmless). Coherence is the probability of the
good reply.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from _preference import QUIET, loss_statistics, print_table, reply_logps, resume, supervised, train
from _run import RESULTS, Report
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_ext.data.preference_toy import ToxicTask, tiny_llama, word_tokenizer
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer

TASK = ToxicTask()
ARMS: dict[str, dict[str, Any]] = {
    "DPO": {"toxic_weight": 0.0},
    **{f"ADPO, lambda {lam:g}": {"toxic_weight": lam} for lam in (0.1, 0.25, 0.5, 1.0, 2.0)},
    **{f"ADPO ref, lambda {lam:g}": {"toxic_weight": lam, "toxic_reference": "ref"} for lam in (0.25, 1.0)},
    **{f"ADPO pairwise, lambda {lam:g}": {"toxic_weight": lam, "toxic_loss": "pairwise"} for lam in (0.25, 1.0)},
    **{
        f"DPO, toxic as rejected, batch {batch}": {"toxic_weight": 0.0, "extra_pairs": True, "batch": batch}
        for batch in (32, 64)
    },
    **{f"ADPO joint, lambda {lam:g}": {"toxic_weight": lam, "toxic_loss": "joint"} for lam in (0.25, 1.0)},
}


def probabilities(model: Any, tokenizer: Any) -> dict[str, float]:
    """Held-out means: P(good), its log, P(any toxic reply) without and with the control token, and its log."""
    size = range(TASK.size)
    toxic = [f" t{i} t{j}" for i, j in itertools.product(size, size)]
    good, plain, behind_token = [], [], []
    for pair in TASK.held_out:
        prompt = TASK.prompt(pair)
        good.append(reply_logps(model, tokenizer, prompt, [TASK.good(pair)])[0])
        plain.append(reply_logps(model, tokenizer, prompt, toxic).logsumexp(0))
        behind_token.append(reply_logps(model, tokenizer, f"{prompt} {TASK.token}", toxic).logsumexp(0))
    good, plain, behind_token = torch.stack(good), torch.stack(plain), torch.stack(behind_token)
    return {
        "p_good": good.exp().mean().item(),
        "log_p_good": good.mean().item(),
        "p_toxic": plain.exp().mean().item(),
        "log_p_toxic": plain.mean().item(),
        "p_toxic_behind_token": behind_token.exp().mean().item(),
    }


def extra_pairs(triples: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each toxic reply as one more rejected one: the simplest use of the same data."""
    kept = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in triples]
    return kept + [{**pair, "rejected": row["toxic"]} for pair, row in zip(kept, triples, strict=True)]


def start(seed: int, work: Path) -> tuple[Any, Any]:
    """The supervised model, kept in the work folder, and its tokenizer."""
    tokenizer, folder = word_tokenizer(TASK.words), work / f"supervised_{seed}"
    if not (folder / "config.json").exists():
        model = tiny_llama(tokenizer, hidden_size=64, seed=seed)
        supervised(model, tokenizer, TASK.supervised(12800, seed), 600, seed).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer


def run_arm(report: Report, method: str, seed: int, steps: int, work: Path) -> None:
    """Train and measure one arm."""
    model, tokenizer = start(seed, work)
    if method == "SFT":
        report.row(seed=seed, method=method, **probabilities(model.eval(), tokenizer))
        return
    rows, options = TASK.triples(3200, seed), dict(ARMS[method])
    if options.pop("extra_pairs", False):
        rows = extra_pairs(rows)
    args = ADPOConfig(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=options.pop("batch", 32), learning_rate=2e-4,
        beta=0.1, seed=seed, **QUIET, **options,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trainer = train(ADPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer))
    values = probabilities(trainer.model.eval(), tokenizer)
    report.row(seed=seed, method=method, **values, **loss_statistics(trainer))


FRONTIERS = {  # prefix of the methods' names -> colour; a line joins those of growing lambda or batch
    "DPO, toxic as rejected": "black",
    "ADPO, lambda": "tab:red",
    "ADPO ref": "tab:orange",
    "ADPO pairwise": "tab:blue",
    "ADPO joint": "tab:green",
}


def plot(report: Report) -> None:
    """Draw coherence against toxicity, a panel for each seed and a line for each form."""
    from matplotlib.figure import Figure

    seeds = sorted({row["seed"] for row in report.rows})
    figure = Figure(figsize=(3.6 * len(seeds), 3.6), layout="constrained")
    for axes, seed in zip(figure.subplots(1, len(seeds), squeeze=False)[0], seeds, strict=True):
        rows = {row["method"]: (row["log_p_toxic"], row["p_good"]) for row in report.rows if row["seed"] == seed}
        for method, marker in (("SFT", "s"), ("DPO", "D")):
            if method in rows:
                axes.plot(*rows[method], marker, color="gray", label=method)
        for prefix, colour in FRONTIERS.items():
            points = [point for method, point in rows.items() if method.startswith(prefix)]
            if points:
                style = "*-" if prefix.startswith("DPO") else "o-"
                axes.plot(*zip(*points, strict=True), style, color=colour, ms=8 if "*" in style else 4, label=prefix)
        axes.set(title=f"seed {seed}", xlabel="log P(toxic), nats", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("P(good): coherence")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(RESULTS / "adpo.png", dpi=110)


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", type=Path, default=None, help="folder for policies, to go on in a later call")
    parser.add_argument("--runs", type=int, default=None, help="stop after so many new rows")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    settings = {
        "steps": options.steps,
        "batch": 32,
        "lr": 2e-4,
        "beta": 0.1,
        "toxic_beta": 0.1,
        "model": "2 layers x 64",
    }
    report = Report("adpo", settings)
    done, left = resume(report), options.runs
    for seed in range(options.seeds):
        for method in ("SFT", *ARMS):
            if (seed, method) in done or left == 0:
                continue
            run_arm(report, method, seed, options.steps, work)
            report.save()
            left = None if left is None else left - 1
    plot(report)
    columns = {"p_good": ".3f", "log_p_toxic": ".1f", "p_toxic": ".1e", "p_toxic_behind_token": ".1e"}
    print_table(report, {**columns, "max_grad_norm": ".1f"})


if __name__ == "__main__":
    main()
