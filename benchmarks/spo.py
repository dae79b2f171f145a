"""Two preference dimensions that conflict: what sequential DPO, MODPO's form and SPO keep of the first.

Run: python benchmarks/spo.py [--seeds 3] [--steps 250]. Writes benchmarks/results/spo.json, .csv and .png.

Every policy is a tiny Llama whose probabilities of the four answers are computed exactly; "theory" is the closed form
of its training (see `hf_ext.data.preference_toy.ConflictTask`).
"""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _preference import QUIET, print_table, reply_logps, resume, supervised, train
from _run import RESULTS, Report
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_ext.data.preference_toy import ConflictTask, tiny_llama, word_tokenizer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

TASK = ConflictTask()
LAMBDAS = (0.5, 1.0, 1.5)
SACPO_BETAS = (2.0, 4.0)


def logistic(value: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-value))


def logit(p: float) -> float:
    """Its inverse."""
    return math.log(p / (1 - p))


def answers(model: Any, tokenizer: Any) -> dict[str, float]:
    """P(A=1) and P(B=1) among the four answers, and the mass that the four have together."""
    logps = reply_logps(model, tokenizer, TASK.prompt, TASK.answers)
    p = logps.exp()
    share = p / p.sum()
    return {
        "p_a": (share[2] + share[3]).item(),
        "p_b": (share[1] + share[3]).item(),
        "valid_mass": p.sum().item(),
    }


def arguments(steps: int, seed: int, beta: float = 1.0, **options: Any) -> SPOConfig:
    """Arguments of one round."""
    return SPOConfig(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        seed=seed,
        beta=beta,
        **QUIET,
        **options,
    )


class Study:
    """One seed: the policies of both rounds under every method.

    Args:
        report: takes a row for each policy.
        seed: of weights, data and order.
        steps: of each round.
        work: folder that keeps ``pi_0`` and ``pi_1`` between calls.
    """

    def __init__(self, report: Report, seed: int, steps: int, work: Path) -> None:
        self.report, self.seed, self.steps, self.work = report, seed, steps, work
        self.tokenizer = word_tokenizer(TASK.words)
        self.data = {d: Dataset.from_list(TASK.pairs(8000, d, seed)) for d in (1, 2)}
        self.methods: dict[str, Callable[[], tuple[Any, float, float]]] = {
            "pi_0": lambda: (self.start(), 0.0, 0.0),
            "round 1": lambda: (self.one(), 2.0, 0.0),
        }
        for beta in (1.0, *SACPO_BETAS):
            name = "sequential DPO" if beta == 1 else f"sequential DPO, beta {beta:g}"
            self.methods[name] = partial(self.sequential, beta)
        for lam in LAMBDAS:
            self.methods[f"SPO, lambda {lam:g}"] = partial(self.spo, lam)
            self.methods[f"MODPO form, w_0 = 1/{2 + lam:g}"] = partial(self.modpo, lam)

    def run(self, method: str) -> None:
        """Train a method and add its row; theory is the closed form from the measured start."""
        model, shift_a, shift_b = self.methods[method]()
        start = answers(self.start().eval(), self.tokenizer)
        theory = {f"theory_{x}": logistic(logit(start[f"p_{x}"]) + d) for x, d in (("a", shift_a), ("b", shift_b))}
        self.report.row(seed=self.seed, method=method, **answers(model.eval(), self.tokenizer), **theory)

    def start(self) -> Any:
        """``pi_0``: trained on all answers alike."""
        model = tiny_llama(self.tokenizer, seed=self.seed)
        return self.kept(
            "start", lambda: supervised(model, self.tokenizer, TASK.supervised(6400, self.seed), 100, self.seed)
        )

    def one(self) -> Any:
        """``pi_1``: DPO on dimension 1."""
        return self.kept(
            "one", lambda: self.fit(1, arguments(self.steps, self.seed), self.start(), self.start()).model
        )

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The policy of that name from the work folder, made if it is not there."""
        folder = self.work / f"{name}_{self.seed}_{self.steps}"
        if not (folder / "config.json").exists():
            make().save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder)

    def sequential(self, beta: float) -> tuple[Any, float, float]:
        """DPO on dimension 2 from and against ``pi_1``; a larger beta is how SACPO trades."""
        args = arguments(self.steps, self.seed, beta, prev_betas=[1.0], prev_lambda=0.0)
        return self.fit(2, args, self.one(), self.one(), []).model, 2 - 3 / beta, 2 / beta

    def spo(self, lam: float) -> tuple[Any, float, float]:
        """SPO on dimension 2."""
        args = arguments(self.steps, self.seed, prev_betas=[1.0], prev_lambda=lam)
        return self.fit(2, args, self.one(), self.one(), [self.start()]).model, 2 * lam - 1, 2.0

    def modpo(self, lam: float) -> tuple[Any, float, float]:
        """MODPO's form (arXiv 2310.03708), w_0 = 1/(2 + lambda): the same optimum as SPO's, but starting at pi_0.

        Its logit (1/w_0)(w_0 D log(pi/pi_0) - (1 - w_0) D log(pi_1/pi_0)) is DPO's with temperature 1 against
        log pi_0 + (1 + lambda)(log pi_1 - log pi_0).
        """
        args = arguments(self.steps, self.seed, prev_betas=[1.0], prev_lambda=lam)
        plan = {"weights": (lam,), "coefficients": (-lam, 1 + lam)}
        return self.fit(2, args, self.start(), self.one(), [self.start()], plan).model, 2 * lam - 1, 2.0

    def fit(
        self, dimension: int, args: SPOConfig, model: Any, reference: Any, earlier: list[Any] | None = None,
        plan: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """A trained trainer."""
        trainer = SPOTrainer(
            model,
            reference,
            args,
            train_dataset=self.data[dimension],
            processing_class=self.tokenizer,
            prev_policies=earlier,
        )
        trainer.plan = dataclasses.replace(trainer.plan, **(plan or {}))
        return train(trainer)


FAMILIES = {  # prefix of the methods' names -> (colour, marker); a line joins those of growing beta or lambda
    "sequential DPO": ("tab:gray", "o-"),
    "SPO": ("tab:red", "o-"),
    "MODPO": ("tab:blue", "x"),
    "pi_0": ("black", "s"),
    "round 1": ("black", "D"),
}
KEEP, REACH = 0.85, 0.95  # of round 1's dimension 1, of sequential DPO's dimension 2


def plot(report: Report) -> None:
    """Draw both dimensions of every policy, each seed by itself, and shade what keeps one and reaches the other."""
    from matplotlib.figure import Figure

    seeds = sorted({row["seed"] for row in report.rows})
    figure = Figure(figsize=(3.6 * len(seeds), 3.6), layout="constrained")
    for axes, seed in zip(figure.subplots(1, len(seeds), squeeze=False)[0], seeds, strict=True):
        rows = {row["method"]: (row["p_a"], row["p_b"]) for row in report.rows if row["seed"] == seed}
        for prefix, (colour, style) in FAMILIES.items():
            points = [point for method, point in rows.items() if method.startswith(prefix)]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=prefix)
        if {"round 1", "sequential DPO"} <= set(rows):
            corner = KEEP * rows["round 1"][0], REACH * rows["sequential DPO"][1]
            axes.fill_between((corner[0], 1), corner[1], 1, color="tab:green", alpha=0.15, label="both bars met")
        axes.set(title=f"seed {seed}", xlabel="P(A=1): dimension 1", xlim=(0.2, 0.95), ylim=(0.45, 0.95))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("P(B=1): dimension 2")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(RESULTS / "spo.png", dpi=110)


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--work", type=Path, default=None, help="folder for policies, to go on in a later call")
    parser.add_argument("--runs", type=int, default=None, help="stop after so many new rows")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    settings = {"steps": options.steps, "batch": 64, "lr": 1e-3, "beta": 1.0, "pairs": 8000, "model": "2 layers x 32"}
    report = Report("spo", settings)
    done, left = resume(report), options.runs
    for seed in range(options.seeds):
        study = Study(report, seed, options.steps, work)
        for method in study.methods:
            if (seed, method) in done or left == 0:
                continue
            study.run(method)
            report.save()
            left = None if left is None else left - 1
    plot(report)
    print_table(report, dict.fromkeys(("p_a", "theory_a", "p_b", "theory_b", "valid_mass"), ".3f"))


if __name__ == "__main__":
    main()
