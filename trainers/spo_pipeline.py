"""SPOPipeline: all rounds of SPO one after the other, with every dimension evaluated after each round.

A finished round is recognised by its manifest, so an interrupted pipeline goes on where it stopped: the round under
way resumes from its last checkpoint.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_manifest import FILE_NAME
from hf_ext.trainers.spo_trainer import SPOTrainer

REPORT_NAME = "spo_rounds.json"


@dataclass(frozen=True)
class SPORound:
    """One dimension: its data, and what of the common arguments differs in this round.

    Attributes:
        dimension: its name; names the evaluation too.
        train_dataset: preference pairs labelled on this dimension.
        eval_dataset: held-out pairs of this dimension, evaluated after every round; None leaves it out.
        options: fields of `SPOConfig` for this round, such as ``beta`` or ``prev_lambda``.
    """

    dimension: str
    train_dataset: Any
    eval_dataset: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)


class SPOPipeline:
    """Runs the rounds in order and reports, after each, the accuracy and margin of every dimension.

    Example:
        ```python
        rounds = [SPORound("harmless", safe, safe_eval), SPORound("helpful", useful, useful_eval)]
        SPOPipeline("sft-model", rounds, SPOConfig("out", beta=0.1)).run()  # out/round_1, out/round_2
        ```

    Accuracy and margin of a dimension are those of ``D (log pi_n - log pi_0)`` on its evaluation pairs: the total
    implicit reward, in nats. "kept" is the accuracy relative to that right after the dimension's own round.

    Args:
        model: folder or hub name of ``pi_0``.
        rounds: in training order; put first the dimension that must never be lost.
        args: common arguments; ``output_dir`` holds a folder for each round.
        **trainer_options: further arguments of `SPOTrainer`, such as ``processing_class`` or ``peft_config``.

    Raises:
        ValueError: no rounds, two of one name, or a model that is not a path.
    """

    def __init__(self, model: str, rounds: Sequence[SPORound], args: SPOConfig, **trainer_options: Any) -> None:
        names = [spo_round.dimension for spo_round in rounds]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"rounds have the dimensions {names}; give at least one, each with a name of its own.")
        if not isinstance(model, str):
            raise ValueError(
                f"model is a {type(model).__name__}; each round loads its policies anew, so give a folder or hub name "
                f"(save_pretrained writes one)."
            )
        self.model, self.rounds, self.args = model, list(rounds), args
        self.trainer_options = trainer_options
        self.folder = Path(args.output_dir)
        self._start: dict[str, Tensor] = {}  # dimension -> margins of pi_0 on its evaluation pairs, [N]

    def run(self) -> list[dict[str, Any]]:
        """Train what is not trained yet.

        Returns:
            One record a round: "round", "dimension", and for each evaluated dimension "accuracy", "margin" and
            "kept" (None before its own round).
        """
        records = self._finished()
        for number in range(len(records) + 1, len(self.rounds) + 1):
            trainer = self._trainer(number)
            self._measure_start(trainer, number)
            trainer.train(resume_from_checkpoint=_last_checkpoint(trainer.args.output_dir))
            records.append({"round": number, **self._evaluate(trainer, number, records)})
            trainer.save_model()
            self._write(trainer, records)
        return records

    def _round_folder(self, number: int) -> Path:
        return self.folder / f"round_{number}"

    def _finished(self) -> list[dict[str, Any]]:
        report = self.folder / REPORT_NAME
        records = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else []
        for record, spo_round in zip(records, self.rounds, strict=False):
            if record["dimension"] != spo_round.dimension:
                raise ValueError(
                    f"{report} has {record['dimension']!r} as round {record['round']}, where these rounds have "
                    f"{spo_round.dimension!r}; use another output_dir."
                )
        return [r for r in records[: len(self.rounds)] if (self._round_folder(r["round"]) / FILE_NAME).is_file()]

    def _trainer(self, number: int) -> SPOTrainer:
        spo_round = self.rounds[number - 1]
        args = copy.deepcopy(self.args)
        args.output_dir = str(self._round_folder(number))
        options = {"dimension": spo_round.dimension, **spo_round.options}
        unknown = set(options) - {item.name for item in dataclasses.fields(SPOConfig)}
        if unknown:
            raise ValueError(f"Round {number} has options {sorted(unknown)}, which SPOConfig does not have.")
        for name, value in options.items():
            setattr(args, name, value)
        trainer_options = dict(self.trainer_options)
        model = self.model
        if number > 1:
            args.manifest = str(self._round_folder(number - 1))
            if "peft_config" not in trainer_options:
                model = args.manifest
        args.check()
        return SPOTrainer(model, args=args, train_dataset=spo_round.train_dataset, **trainer_options)

    def _measure_start(self, trainer: SPOTrainer, number: int) -> None:
        """Margins of ``pi_0``: the first round's trainer starts with it, later rounds read what that one stored."""
        stored = self.folder / "start_margins.json"
        if number == 1:
            self._start = {
                item.dimension: _margins(trainer, item.eval_dataset)
                for item in self.rounds
                if item.eval_dataset is not None
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            if trainer.is_world_process_zero():
                stored.write_text(json.dumps({k: v.tolist() for k, v in self._start.items()}), encoding="utf-8")
        elif not self._start:
            self._start = {k: torch.tensor(v) for k, v in json.loads(stored.read_text(encoding="utf-8")).items()}

    def _evaluate(self, trainer: SPOTrainer, number: int, records: list[dict[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {"dimension": self.rounds[number - 1].dimension, "dimensions": {}}
        for index, item in enumerate(self.rounds, start=1):
            if item.eval_dataset is None:
                continue
            gain = _margins(trainer, item.eval_dataset) - self._start[item.dimension]
            accuracy = (gain > 0).float().mean().item()
            own = accuracy if index == number else None
            if index < number:
                own = records[index - 1]["dimensions"][item.dimension]["accuracy"]
            kept = None if own is None else accuracy / max(own, 1e-9)
            result["dimensions"][item.dimension] = {
                "accuracy": accuracy,
                "margin": gain.mean().item(),
                "kept": kept,
            }
        return result

    def _write(self, trainer: SPOTrainer, records: list[dict[str, Any]]) -> None:
        if not trainer.is_world_process_zero():
            return
        scratch = self.folder / f"{REPORT_NAME}.tmp"
        scratch.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, self.folder / REPORT_NAME)


def plot_rounds(records: Sequence[Mapping[str, Any]], path: str) -> None:
    """Draw every dimension's margin and accuracy over the rounds.

    Args:
        records: of `SPOPipeline.run`.
        path: of the picture, for example "rounds.png".

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "hf_ext[demo]".') from error
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 2)
    numbers = [record["round"] for record in records]
    for panel, quantity, unit in zip(panels, ("margin", "accuracy"), ("nats", "share of pairs"), strict=True):
        for name in records[0]["dimensions"]:
            panel.plot(numbers, [r["dimensions"][name][quantity] for r in records], marker="o", label=name)
        panel.set(xlabel="after round", ylabel=f"{quantity} ({unit})", xticks=numbers)
    panels[0].legend()
    figure.savefig(path, dpi=150)


def _margins(trainer: SPOTrainer, dataset: Any) -> Tensor:
    chosen, rejected = trainer.pair_logps(dataset)
    return chosen - rejected


def _last_checkpoint(folder: str | None) -> str | None:
    return get_last_checkpoint(folder) if folder and os.path.isdir(folder) else None
