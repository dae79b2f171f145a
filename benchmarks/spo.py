"""Two preference dimensions that conflict: what sequential DPO, MODPO's form and SPO keep of the first.

Run: python benchmarks/spo.py [--seeds 3] [--steps 250]. Writes benchmarks/results/spo.json, .csv and .png.

Every policy is a tiny Llama whose probabilities of the four answers are computed exactly; "theory" is the closed form
of its training (see `hf_ext.data.preference_toy.ConflictTask`).
"""

import argparse
import dataclasses
import math
import tempfile
from typing import Any

from _preference import QUIET, clone, reply_logps, supervised, train
from _run import RESULTS, Report
from datasets import Dataset

from hf_ext.data.preference_toy import ConflictTask, tiny_llama, word_tokenizer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

TASK = ConflictTask()
LAMBDAS = (0.5, 1.0, 1.5)
SACPO_BETAS = (2.0, 4.0)


def sigmoid(value: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-value))


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
    """One seed: the policies of both rounds under every method."""

    def __init__(self, report: Report, seed: int, steps: int) -> None:
        self.report, self.seed, self.steps = report, seed, steps
        self.tokenizer = word_tokenizer(TASK.words)
        self.data = {d: Dataset.from_list(TASK.pairs(8000, d, seed)) for d in (1, 2)}
        model = tiny_llama(self.tokenizer, seed=seed)
        self.start = supervised(model, self.tokenizer, TASK.supervised(6400, seed), 100, seed).eval()
        self.base = self.record("pi_0", self.start, float("nan"), float("nan"))

    def record(self, method: str, model: Any, theory_a: float, theory_b: float) -> dict[str, Any]:
        """Add a row for this policy."""
        values = answers(model.eval(), self.tokenizer)
        return self.report.row(seed=self.seed, method=method, **values, theory_a=theory_a, theory_b=theory_b)

    def bias(self, which: str) -> float:
        """Log-odds of the attribute before any round, which every closed form starts from."""
        p = self.base[which]
        return math.log(p / (1 - p))

    def fit(
        self, dimension: int, args: SPOConfig, model: Any, reference: Any, earlier: list[Any] | None = None
    ) -> Any:
        """A trainer of copies, so that every method starts from the same weights."""
        return SPOTrainer(
            clone(model),
            clone(reference),
            args,
            train_dataset=self.data[dimension],
            processing_class=self.tokenizer,
            prev_policies=None if earlier is None else [clone(policy) for policy in earlier],
        )

    def run(self) -> None:
        """Round 1, then every way to do round 2."""
        a, b = self.bias("p_a"), self.bias("p_b")
        trainer = train(self.fit(1, arguments(self.steps, self.seed), self.start, self.start))
        one = trainer.model
        self.record("round 1", one, sigmoid(a + 2), sigmoid(b))
        for beta in (1.0, *SACPO_BETAS):
            args = arguments(self.steps, self.seed, beta, prev_betas=[1.0], prev_lambda=0.0)
            model = train(self.fit(2, args, one, one, [])).model
            name = "sequential DPO" if beta == 1 else f"sequential DPO, beta {beta:g}"
            self.record(name, model, sigmoid(a + 2 - 3 / beta), sigmoid(b + 2 / beta))
        for lam in LAMBDAS:
            args = arguments(self.steps, self.seed, prev_betas=[1.0], prev_lambda=lam)
            model = train(self.fit(2, args, one, one, [self.start])).model
            self.record(f"SPO, lambda {lam:g}", model, sigmoid(a + 2 * lam - 1), sigmoid(b + 2))
            self.modpo(one, lam, sigmoid(a + 2 * lam - 1), sigmoid(b + 2))

    def modpo(self, one: Any, lam: float, theory_a: float, theory_b: float) -> None:
        """MODPO's form (arXiv 2310.03708), w_0 = 1/(2 + lambda): the same optimum as SPO's, but starting at pi_0.

        Its logit (1/w_0)(w_0 D log(pi/pi_0) - (1 - w_0) D log(pi_1/pi_0)) is DPO's with temperature 1 against
        log pi_0 + (1 + lambda)(log pi_1 - log pi_0).
        """
        args = arguments(self.steps, self.seed, prev_betas=[1.0], prev_lambda=lam)
        trainer = self.fit(2, args, self.start, one, [self.start])
        trainer.plan = dataclasses.replace(trainer.plan, weights=(lam,), coefficients=(-lam, 1 + lam))
        self.record(f"MODPO form, w_0 = 1/{2 + lam:g}", train(trainer).model, theory_a, theory_b)


def plot(report: Report) -> None:
    """Draw both quantities of every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in report.rows):
        rows = [row for row in report.rows if row["method"] == method]
        axes.scatter([r["p_a"] for r in rows], [r["p_b"] for r in rows], label=method, s=22)
    axes.set(xlabel="P(A=1): dimension 1, trained in round 1", ylabel="P(B=1): dimension 2, trained in round 2")
    axes.legend(fontsize=7)
    figure.savefig(RESULTS / "spo.png", dpi=130)


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    report = Report("spo", {**vars(options), "batch": 64, "lr": 1e-3, "beta": 1.0, "pairs": 8000, "model": "2 x 32"})
    for seed in range(options.seeds):
        Study(report, seed, options.steps).run()
        report.save()
    plot(report)


if __name__ == "__main__":
    main()
