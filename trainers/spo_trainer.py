"""SPOTrainer: sequential preference optimisation, one dimension a round, after arXiv 2405.12739.

Round n maximises the reward of dimension n under a trust region on the previous policy and lower bounds on earlier
rewards. In closed form that is DPO against an effective reference made of frozen policies, so TRL's DPOTrainer does
the training and this class supplies the reference. The paper's printed loss could not be consulted; docs/spo.md
derives this one from the stated problem.
"""

import textwrap
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.trainers.losses import spo_reference_logps
from hf_ext.trainers.preference_base import PreferenceTrainer
from hf_ext.trainers.preference_collator import OLDEST_MARGIN, PREVIOUS_MARGIN, pair_examples
from hf_ext.trainers.preference_scoring import sum_logps
from hf_ext.trainers.spo_config import SPOConfig, SPOPlan, make_plan
from hf_ext.trainers.spo_manifest import (
    check_manifest,
    describe_base,
    policy_fingerprint,
    policy_path,
    read_manifest,
    write_manifest,
)
from hf_ext.trainers.spo_policies import (
    FrozenPolicy,
    continue_adapter,
    freeze_policy,
    is_adapter_folder,
    release_models,
    score_frozen,
)
from hf_ext.trainers.spo_stored import STORED, has_stored, read_stored, refuse_other_model


class SPOTrainer(PreferenceTrainer):
    """One round of SPO; drop-in for `trl.DPOTrainer`, which round 1 equals bit for bit.

    Example:
        ```python
        SPOTrainer(model, args=SPOConfig("round1", beta=0.1), train_dataset=safe_pairs).train()
        SPOTrainer("round1", args=SPOConfig("round2", manifest="round1"), train_dataset=helpful_pairs).train()
        ```

    The model is ``pi_(n-1)``, from which the round starts. Earlier frozen policies come from the manifest, from
    ``prev_policies``, or, with ``precompute_ref_log_probs=True``, from columns ``prev<k>_chosen_logps`` and
    ``prev<k>_rejected_logps`` of the dataset; missing columns are computed once and stay in ``train_dataset``, so
    that another multiplier or beta reuses them.

    Logged beyond TRL's metrics, from round 2 on: ``spo/prev_margin`` (mean of S, the earlier rounds' combined reward
    margin of a pair), ``spo/conflict_rate`` (share of pairs with S < 0), ``spo/weight`` (mean gradient weight
    ``sigmoid(-z)``), ``spo/kept_margin`` and ``spo/kept_accuracy`` (the policy's log-ratio margin to the oldest
    policy at hand: ``pi_0`` in round 2, ``pi_(n-2)`` in later rounds of "chain"; on an evaluation set of an earlier
    dimension this is what is kept of it).

    Args:
        *args: as `trl.DPOTrainer`. A plain DPOConfig is round 1.
        prev_policies: ``pi_0 .. pi_(n-2)`` or the last of them, oldest first. Each is a model, a folder or hub name,
            the name of an adapter on the model, or None for the base without adapters.
        **kwargs: as `trl.DPOTrainer`.

    Raises:
        ValueError: options, policies or data that do not fit, before any step is taken.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "dpo", "spo", "hf_ext"]
    _name = "SPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "SPO: Multi-Dimensional Preference Sequential Alignment With Implicit Reward Modeling",
        "id": "2405.12739",
        "citation": textwrap.dedent("""\
            @inproceedings{lou2025spo,
                title  = {{SPO: Multi-Dimensional Preference Sequential Alignment With Implicit Reward Modeling}},
                author = {Xingzhou Lou and Junge Zhang and Jian Xie and Lifeng Liu and Dong Yan and Kaiqi Huang},
                year   = 2025,
                booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
                eprint = {2405.12739},
            }"""),
    }
    config_class = SPOConfig
    _frozen: dict[int, FrozenPolicy]
    passed_columns = (PREVIOUS_MARGIN, OLDEST_MARGIN)

    def __init__(self, *args: Any, prev_policies: Any = None, **kwargs: Any) -> None:
        self._prev_policies: Any = prev_policies
        super().__init__(*args, **kwargs)
        self._begin_round()
        if self._is_vision_dataset and not self.plan.is_dpo:
            raise ValueError("The train dataset has images; SPO beyond round 1 takes text only.")
        self._freeze(self.train_dataset)
        if self.precompute_ref_logps:  # models have done their part; another dataset to evaluate loads them again
            self._frozen = release_models(self, self._frozen)

    def _prepare_arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        args = values["args"] = self._own_config(values["model"], values["args"])
        self._manifest = read_manifest(args.manifest) if args.manifest else None
        self.plan: SPOPlan = make_plan(args, self._manifest["rounds"] if self._manifest else ())
        self._prev_policies = _align_policies(self._prev_policies, self.plan.round_index)
        self._frozen = {}
        self._scored: int | None = None  # the policy whose own log-probabilities a precompute pass asks for
        self._base: dict[str, Any] | None = None
        if self._manifest:
            last = policy_path(self._manifest, self.plan.round_index - 1)
            if is_adapter_folder(last) and not hasattr(values["model"], "get_base_model"):
                quantization = values.pop("quantization_config")
                values["model"] = continue_adapter(values["model"], last, args, quantization)
                values["peft_config"] = None  # the saved adapter brings its own
        return super()._prepare_arguments(values)

    def _begin_round(self) -> None:
        """Recognise the model; once, and before anything is scored with it."""
        if self._base is not None:
            return
        model = self.accelerator.unwrap_model(self.model)
        self._base = describe_base(model, self.processing_class)
        if self._manifest and self.is_world_process_zero():  # other ranks may hold no weights yet
            check_manifest(self._manifest, self._base, policy_fingerprint(model))

    def _freeze(self, dataset: Any) -> None:
        """Load the frozen policies that are neither at hand nor stored in the dataset."""
        for k in self.plan.needed[:-1]:
            if k not in self._frozen and not (self.precompute_ref_logps and has_stored(dataset, k)):
                self._frozen[k] = freeze_policy(self, self._policy_source(k), k)

    def _policy_source(self, k: int) -> Any:
        if k in self._prev_policies:
            return self._prev_policies[k]
        if self._manifest and not (k == 0 and hasattr(self.model, "peft_config")):
            return policy_path(self._manifest, k) or None
        if k > 0:
            raise ValueError(
                f"Round {self.plan.round_index} needs the policy of round {k}: pass it in prev_policies, as columns "
                f"{STORED[0].format(k)} and {STORED[1].format(k)}, or give the previous round's folder as manifest."
            )
        return None

    def _frozen_logps(self, k: int, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if k == self.plan.round_index - 1:
            model = model if self.plan.is_dpo else self.share_prompt(model, pair_examples(inputs))
            chosen, rejected = super().compute_ref_log_probs(model, inputs)
        else:
            chosen, rejected = score_frozen(self, self._frozen[k], inputs).chunk(2)
        return chosen, rejected

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[B]`` of chosen and rejected under the effective reference (not normalised)."""
        inputs = {name: value for name, value in inputs.items() if name not in self.passed_columns}
        if self._scored is not None:
            return self._frozen_logps(self._scored, model, inputs)
        chosen, rejected, _ = self._combine({k: self._frozen_logps(k, model, inputs) for k in self.plan.needed})
        return chosen, rejected

    def _combine(self, logps: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Effective reference of chosen and rejected, and the columns the metrics read."""
        coefficients = [self.plan.coefficients[k] for k in self.plan.needed]
        chosen, rejected = (
            spo_reference_logps([logps[k][side] for k in self.plan.needed], coefficients) for side in (0, 1)
        )
        previous, oldest = (logps[k][0] - logps[k][1] for k in (self.plan.needed[-1], self.plan.needed[0]))
        margin = self.args.beta * (chosen - rejected - previous)
        return chosen, rejected, {PREVIOUS_MARGIN: margin, OLDEST_MARGIN: oldest}

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.plan.is_dpo:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        from datasets import Dataset, concatenate_datasets

        self._begin_round()
        self._freeze(dataset)
        dataset = dataset.remove_columns([c for c in _combined_columns() if c in dataset.column_names])
        for k in self.plan.needed:
            if not has_stored(dataset, k):
                dataset = self._store_policy(dataset, name, batch_size, k)
        stored = {k: read_stored(dataset, k) for k in self.plan.needed}
        self._check_stored(dataset, stored)
        chosen, rejected, extra = self._combine(stored)
        columns = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected, **extra}
        return concatenate_datasets(
            [dataset, Dataset.from_dict({name: values.tolist() for name, values in columns.items()})], axis=1
        )

    def _store_policy(self, dataset: Any, name: str, batch_size: int, k: int) -> Any:
        """Add the log-probabilities of ``pi_k`` to the dataset through TRL's cached pass."""
        from datasets.fingerprint import Hasher

        shared_hash = self._precompute_model_hash
        own = self._frozen.get(k)
        identity = own and (own.adapter or own.weights)
        collator = self.data_collator
        settings = (getattr(collator, "max_length", None), getattr(collator, "truncation_mode", None), self.ld_alpha)
        self._precompute_model_hash = Hasher.hash((shared_hash, k, self.plan.round_index, identity, settings))
        self._scored = k
        try:
            dataset = super()._precompute_ref_logps(dataset, f"{name} (policy {k})", batch_size)
        finally:
            self._scored, self._precompute_model_hash = None, shared_hash
        return dataset.rename_columns(
            {"ref_chosen_logps": STORED[0].format(k), "ref_rejected_logps": STORED[1].format(k)}
        )

    def _check_stored(self, dataset: Any, stored: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Score two rows anew, before any step: later the policy has moved, which may be its own reference."""
        if self.state.global_step:
            return
        k = self.plan.round_index - 1
        inputs = self._prepare_inputs(self.data_collator([dataset[i] for i in range(min(2, len(dataset)))]))
        inputs = {name: value for name, value in inputs.items() if name not in self.passed_columns}
        refuse_other_model(stored[k], self._frozen_logps(k, self.ref_model or self.model, inputs), k)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        extra = {name: inputs.pop(name) for name in self.passed_columns if name in inputs}
        if self.plan.is_dpo:
            return super()._compute_loss(model, inputs, return_outputs)
        if not self.precompute_ref_logps:
            reference = self.ref_model or self.model
            chosen, rejected, extra = self._combine(
                {k: self._frozen_logps(k, reference, inputs) for k in self.plan.needed}
            )
            inputs.update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
        recorder = _Recorder(self.share_prompt(model, pair_examples(inputs)))
        stored, self.precompute_ref_logps = self.precompute_ref_logps, True  # read the reference from the batch
        try:
            result = super()._compute_loss(recorder, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = stored
        if extra:
            self._log_round(recorder.logps, inputs, extra)
        return result

    def _log_round(self, logps: Tensor, inputs: dict[str, Any], extra: dict[str, Tensor]) -> None:
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = sum_logps(logps[:, -mask.size(1) :], mask, self.ld_alpha).chunk(2)
        margin = chosen - rejected
        z = self.args.beta * (margin - inputs["ref_chosen_logps"] + inputs["ref_rejected_logps"])
        kept = margin - extra[OLDEST_MARGIN]
        self._log_mean("spo/prev_margin", extra[PREVIOUS_MARGIN])
        self._log_mean("spo/conflict_rate", extra[PREVIOUS_MARGIN] < 0)
        self._log_mean("spo/weight", torch.sigmoid(-z))
        self._log_mean("spo/kept_margin", kept)
        self._log_mean("spo/kept_accuracy", kept > 0)

    def pair_logps(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[N]`` of chosen and rejected of a raw or prepared dataset under the current policy."""
        dataset = self._prepare_dataset(dataset, self.processing_class, self.args, "eval")
        training = self.model.training
        self.model.eval()
        chunks = []
        policy = FrozenPolicy(model=self.model)
        for batch in self.get_eval_dataloader(dataset):
            batch = {name: value for name, value in batch.items() if name not in self.passed_columns}
            pair = score_frozen(self, policy, self._prepare_inputs(batch)).float().chunk(2)
            chunks.append(torch.stack(self.accelerator.gather_for_metrics(pair)).cpu())
        self.model.train(training)
        chosen, rejected = torch.cat(chunks, dim=1)
        return chosen, rejected

    def round_record(self) -> dict[str, Any]:
        """What the manifest says of this round, but for the weights."""
        return {
            "round": self.plan.round_index,
            "dimension": self.args.dimension,
            "beta": self.args.beta,
            "lambdas": list(self.plan.rows[-1]) if self.plan.rows else [],
            "prev_reward": self.args.prev_reward,
            "loss_type": list(self.args.loss_type),
            "max_length": self.args.max_length,
            "dataset": getattr(self.train_dataset, "_fingerprint", None),
            "kind": "adapter" if hasattr(self.accelerator.unwrap_model(self.model), "peft_config") else "model",
            "policy": ".",
        }

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # with FSDP every process comes here
            return
        folder = str(Path(output_dir or self.args.output_dir).resolve())
        earlier: list[dict[str, Any]] = []
        base = self._base
        if self._manifest:
            base = self._manifest["base"]
            earlier = [
                {**record, "policy": str(Path(policy_path(self._manifest, k)).resolve())}
                for k, record in enumerate(self._manifest["rounds"], start=1)
            ]
        elif self.plan.round_index > 1:
            return  # rounds before this one are known by their betas alone; a manifest would claim more
        fingerprint = policy_fingerprint(self.accelerator.unwrap_model(self.model), state_dict)
        record = {**self.round_record(), "fingerprint": fingerprint}
        write_manifest(folder, {"base": base, "rounds": [*earlier, record]})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's, with a table of the rounds."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if not self.is_world_process_zero() or not card.is_file():
            return
        rounds = [*(self._manifest["rounds"] if self._manifest else ()), self.round_record()]
        table = ["| round | dimension | beta | lambdas | earlier rewards |", "|---|---|---|---|---|"]
        for record in rounds:
            cells = [record[name] for name in ("round", "dimension", "beta", "lambdas", "prev_reward")]
            table.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
        section = "\n".join(["", "## SPO rounds", "", *table, ""])
        card.write_text(card.read_text(encoding="utf-8") + section, encoding="utf-8")


class _Recorder:
    """Calls a model and keeps the log-probabilities ``[rows, T]`` of its scoring pass."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.logps = torch.empty(0)

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        if kwargs.get("fused_lm_head"):
            self.logps = outputs.log_probs.detach()
        return outputs


def _align_policies(policies: Any, round_index: int) -> dict[int, Any]:
    """Policies counted from the end: the last one is ``pi_(n-2)``."""
    policies = [] if policies is None else list(policies)
    if len(policies) > max(0, round_index - 1):
        raise ValueError(
            f"prev_policies has {len(policies)} entries; round {round_index} has {round_index - 1} policies before "
            f"its reference."
        )
    first = round_index - 1 - len(policies)
    return {first + i: policy for i, policy in enumerate(policies)}


def _combined_columns() -> tuple[str, ...]:
    return ("ref_chosen_logps", "ref_rejected_logps", PREVIOUS_MARGIN, OLDEST_MARGIN)
