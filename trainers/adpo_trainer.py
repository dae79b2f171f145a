"""ADPOTrainer: DPO with a penalty on self-generated toxic responses, after arXiv 2405.12900.

The paper states an objective of two parts, a reward for normal responses and a penalty for toxic ones, each with a KL
term, the toxic one against the same model conditioned on a control token. Its printed loss could not be consulted;
docs/adpo.md derives the three readings that `ADPOConfig.toxic_loss` selects.
"""

import dataclasses
import logging
import textwrap
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_rows import TOXIC_COLUMNS, split_prompt, tokenize_toxic
from hf_ext.trainers.losses import adpo_joint_reference, adpo_toxic_term, cap_toxic_logratio
from hf_ext.trainers.preference_base import PreferenceTrainer
from hf_ext.trainers.preference_checks import check_completions
from hf_ext.trainers.preference_collator import TOKENS, TOXIC_REFERENCE, TripleCollator, widen

logger = logging.getLogger(__name__)

CONTROL = tuple(f"control_{name}" for name in TOKENS)
OWN_INPUTS = ("toxic_examples", TOXIC_REFERENCE, *CONTROL)


class ADPOTrainer(PreferenceTrainer):
    """Adversarial DPO; drop-in for `trl.DPOTrainer` on rows with one more column, the toxic response.

    Example:
        ```python
        ADPOTrainer("sft-model", args=ADPOConfig("out", toxic_weight=0.5), train_dataset=triples).train()
        ```

    The three responses of an example share one forward of the policy. The toxic reference is the reference model
    itself, read with the control token in the prompt, so there is no third copy of the weights; the reference must
    have learnt the token in its supervised stage (`hf_ext.data.preference.control_token_sft`). Text is never printed
    or logged; the token makes any checkpoint that still honours it answer toxically, so keep it from users.

    Logged beyond TRL's metrics: ``rewards/toxic`` (gamma times the log-ratio), ``rewards/toxic_accuracy`` (share with
    the chosen log-ratio above the toxic one), ``logps/toxic``, ``loss/dpo``, ``loss/toxic`` (unweighted mean of the
    rows that have one; in the loss the others count as 0, so that it is a mean over examples),
    ``adpo/toxic_weight`` and ``adpo/toxic_available`` (share of rows that have one). In "joint" the toxic part is
    inside ``rewards/rejected``.

    Args:
        *args: as `trl.DPOTrainer`. A plain DPOConfig gets the defaults of `ADPOConfig`.
        **kwargs: as `trl.DPOTrainer`.

    Raises:
        ValueError: options or data that do not fit, before any step is taken.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "dpo", "adpo", "hf_ext"]
    _name = "ADPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Adversarial DPO: Harnessing Harmful Data for Reducing Toxicity with Minimal Impact on Coherence and "
        "Evasiveness in Dialogue Agents",
        "id": "2405.12900",
        "citation": textwrap.dedent("""\
            @inproceedings{kim2024adversarial,
                title  = {{Adversarial DPO: Harnessing Harmful Data for Reducing Toxicity with Minimal Impact on Coherence and Evasiveness in Dialogue Agents}},
                author = {San Kim and Gary Geunbae Lee},
                year   = 2024,
                booktitle = {Findings of the Association for Computational Linguistics: NAACL 2024},
                eprint = {2405.12900},
            }"""),  # noqa: E501
    }
    config_class = ADPOConfig
    collator_class = TripleCollator
    passed_columns = (*TOXIC_COLUMNS, TOXIC_REFERENCE)

    def _prepare_arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._prepare_arguments(values)
        args = values["args"]
        self._toxic = args.toxic_weight > 0  # without weight nothing of the toxic column is read
        self._scores_toxic = False  # a precompute pass for the toxic responses is under way
        self._token_checked = args.toxic_reference == "ref"
        self.toxic_beta = args.beta if args.toxic_beta is None else args.toxic_beta
        dataset = values["train_dataset"]
        first: dict[str, Any] = {} if dataset is None else next(iter(dataset), {})
        if self._toxic and ("image" in first or "images" in first):
            raise ValueError("The train dataset has images; ADPO takes text only.")
        return values

    def _required_columns(self, args: ADPOConfig) -> list[str]:
        return [*super()._required_columns(args), *([args.toxic_column] if self._toxic else [])]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: ADPOConfig, dataset_name: str) -> Any:
        if not self._toxic:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        self._check_source(dataset, args, dataset_name)
        if "prompt" not in next(iter(dataset)):
            dataset = dataset.map(split_prompt, fn_kwargs={"column": args.toxic_column})
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        options = {"processing_class": processing_class, "eos_token": self._tokenizer.eos_token, "args": args}
        prepared = prepared.map(tokenize_toxic, fn_kwargs=options)
        self._check_room(prepared, args, dataset_name)
        return prepared

    def _check_source(self, dataset: Any, args: ADPOConfig, dataset_name: str) -> None:
        self._check_columns(dataset, args, dataset_name)
        if args.missing_toxic == "error":
            check_completions(dataset, [args.toxic_column], dataset_name)

    def _check_room(self, prepared: Any, args: ADPOConfig, dataset_name: str) -> None:
        if not hasattr(prepared, "__len__"):
            return
        left = sum(bool(ids) for ids in prepared["toxic_ids"])
        given = sum(bool(text) for text in prepared[args.toxic_column])
        if not left:
            raise ValueError(
                f"No row of the {dataset_name} dataset has a toxic response of which max_length={args.max_length} "
                f"leaves a token, with the control token in the prompt; set toxic_weight=0 for plain DPO."
            )
        if left < given:
            logger.warning(
                "%d toxic responses of the %s dataset are cut away whole by max_length=%s and are masked.",
                given - left,
                dataset_name,
                args.max_length,
            )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        if not self._toxic:
            return dataset
        from datasets.fingerprint import Hasher

        args, shared_hash = self.args, self._precompute_model_hash
        settings = (args.toxic_reference, args.control_token, args.control_token_position, args.max_length)
        pair = {column: f"pair_{column}" for column in ("ref_chosen_logps", "ref_rejected_logps")}
        self._precompute_model_hash = Hasher.hash((shared_hash, "toxic", settings))
        self._scores_toxic = True
        try:
            dataset = super()._precompute_ref_logps(dataset.rename_columns(pair), f"{name} (toxic)", batch_size)
        finally:
            self._scores_toxic, self._precompute_model_hash = False, shared_hash
        dataset = dataset.rename_column("ref_chosen_logps", TOXIC_REFERENCE).remove_columns("ref_rejected_logps")
        return dataset.rename_columns({stored: column for column, stored in pair.items()})

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities ``[B]`` of chosen and rejected, whatever rows the batch has beside them."""
        if self._scores_toxic:
            return self._toxic_column(model, inputs)
        return super().compute_ref_log_probs(model, _pair_inputs(inputs))

    def _toxic_column(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Toxic reference of each example, 0 where it has no toxic response; twice, for TRL's loop of two columns."""
        column = torch.zeros(_pair_rows(inputs) // 2, device=inputs["input_ids"].device)
        if "toxic_examples" in inputs:
            column[inputs["toxic_examples"]] = self._toxic_reference(model, inputs).float()
        return column, column

    def _toxic_reference(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Log-probabilities ``[N]`` of the toxic responses under the reference, read with the control token."""
        return self._score_reference(model, {name: inputs[f"control_{name}"] for name in TOKENS})

    def _all_references(self, inputs: dict[str, Any], pair: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Reference log-probabilities of chosen ``[B]``, rejected ``[B]`` and toxic ``[N]`` in one forward."""
        width = max(pair["input_ids"].size(1), inputs["control_input_ids"].size(1))
        rows = {}
        for name in TOKENS:
            value = self._tokenizer.pad_token_id if name == "input_ids" else 0
            parts = (pair[name], inputs[f"control_{name}"])
            rows[name] = torch.cat([widen(part, width, value) for part in parts])
        model = self.share_prompt(self.ref_model or self.model, _examples(inputs))
        logps = self._score_reference(model, rows)
        chosen, rejected = logps[: len(pair["input_ids"])].chunk(2)
        return chosen, rejected, logps[len(pair["input_ids"]) :]

    def _score_reference(self, model: Any, rows: dict[str, Any]) -> Tensor:
        """Log-probabilities ``[rows]`` under the reference; TRL halves the rows, whatever they are."""
        return torch.cat(super().compute_ref_log_probs(model, rows))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "toxic_examples" not in inputs:
            return self._loss_without_toxic(model, inputs, return_outputs)
        pair = _pair_inputs(inputs)
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        forward = _OneForward(self.share_prompt(model, _examples(inputs)), inputs, **options)
        toxic_logps = forward.logps[_pair_rows(inputs) :]
        if self.precompute_ref_logps:
            reference = inputs[TOXIC_REFERENCE]
        else:
            pair["ref_chosen_logps"], pair["ref_rejected_logps"], reference = self._all_references(inputs, pair)
        self._check_token(toxic_logps, reference)
        toxic = cap_toxic_logratio(toxic_logps - reference, self.args.toxic_margin)
        result = self._pair_loss(forward, pair, toxic, inputs["toxic_examples"], return_outputs)
        preference, outputs = result if return_outputs else (result, None)
        chosen_ratios = forward.logps[: len(pair["ref_chosen_logps"])] - pair["ref_chosen_logps"]
        chosen = chosen_ratios[inputs["toxic_examples"]]
        loss, term = preference, toxic.new_empty(0)
        if self.args.toxic_loss != "joint":
            term = adpo_toxic_term(chosen, toxic, self.toxic_beta, self.args.toxic_loss)
            loss = preference + self._toxic_weight() * term.sum() / len(chosen_ratios)
        self._log_triples(inputs, preference, term, toxic_logps, toxic, chosen)
        return (loss, outputs) if return_outputs else loss

    def _loss_without_toxic(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """DPO's loss of a batch in which no row has a toxic response; logs what the other processes log with it."""
        result = super()._compute_loss(model, inputs, return_outputs)
        if self._toxic:
            preference = result[0] if return_outputs else result
            self._log_triples(inputs, preference, *[preference.new_empty(0)] * 4)
        return result

    def _pair_loss(
        self, forward: "_OneForward", pair: dict[str, Any], toxic: Tensor, examples: Tensor, return_outputs: bool
    ) -> Any:
        """TRL's loss of the first two thirds of the batch, from the forward that has already run."""
        if self.args.toxic_loss == "joint":
            per_example = toxic.new_zeros(len(pair["ref_rejected_logps"])).index_put((examples,), toxic)
            pair["ref_rejected_logps"] = adpo_joint_reference(
                pair["ref_rejected_logps"], per_example, self.args.beta, self.toxic_beta, self._toxic_weight()
            )
        stored, self.precompute_ref_logps = self.precompute_ref_logps, True  # read the reference from the batch
        try:
            return super()._compute_loss(forward, pair, return_outputs)
        finally:
            self.precompute_ref_logps = stored

    def _toxic_weight(self) -> float:
        warmup = self.args.toxic_weight_warmup_ratio * max(1, self.state.max_steps)
        if not self.model.training or not warmup:
            return self.args.toxic_weight
        return self.args.toxic_weight * min(1.0, self.state.global_step / warmup)

    def _check_token(self, plain: Tensor, with_token: Tensor) -> None:
        """Say once if the control token does not make the toxic responses likelier before training."""
        if self._token_checked or self.state.global_step or not self.model.training:
            return
        self._token_checked = True
        gain = (with_token - plain.detach()).mean().item()
        if gain <= 0:
            logger.warning(
                "The control token %r makes the first batch's toxic responses less likely (%.2f nats): the reference "
                "has not learnt it. Train it first (control_token_sft) or set toxic_reference='ref'.",
                self.args.control_token,
                gain,
            )

    def _log_triples(
        self,
        inputs: dict[str, Any],
        preference: Tensor,
        term: Tensor,
        toxic_logps: Tensor,
        toxic: Tensor,
        chosen: Tensor,
    ) -> None:
        """Record the toxic metrics, the same in every batch, since each is gathered from all processes."""
        available = torch.zeros(_pair_rows(inputs) // 2, device=toxic.device)
        available[: len(toxic)] = 1.0
        self._log_mean("rewards/toxic", self.toxic_beta * toxic)
        self._log_mean("rewards/toxic_accuracy", chosen > toxic)
        self._log_mean("logps/toxic", toxic_logps)
        self._log_mean("loss/dpo", preference.reshape(1))
        self._log_mean("loss/toxic", term)
        self._log_mean("adpo/toxic_weight", toxic.new_tensor([self._toxic_weight()]))
        self._log_mean("adpo/toxic_available", available)


class _OneForward:
    """Runs the policy once on all rows, and answers TRL's scoring call with the rows of the pairs.

    Any other call, as TRL makes for logits, goes to the model.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], **options: Any) -> None:
        self.model = model
        self.pairs = _pair_rows(inputs)
        rows = {name: value for name, value in inputs.items() if name not in (*OWN_INPUTS, *_REFERENCES)}
        mask = rows.pop("completion_mask")
        labels = rows["input_ids"].masked_fill(mask == 0, -100)
        self.outputs = model(**rows, **options, use_cache=False, labels=labels, fused_lm_head=True)
        self.logps = self.outputs.log_probs[:, -(mask.size(1) - 1) :].sum(dim=1)

    def __call__(self, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        sliced = {
            field.name: value[: self.pairs] if isinstance(value, Tensor) and value.dim() >= 2 else value
            for field in dataclasses.fields(self.outputs)
            for value in (getattr(self.outputs, field.name),)
        }
        return type(self.outputs)(**sliced)


_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


def _pair_rows(inputs: dict[str, Any]) -> int:
    """Rows of the batch that are TRL's: chosen and rejected."""
    toxic = inputs.get("toxic_examples")
    return len(inputs["input_ids"]) - (0 if toxic is None else len(toxic))


def _examples(inputs: dict[str, Any]) -> Tensor:
    """The example of each row: chosen, rejected, toxic."""
    pairs = torch.arange(_pair_rows(inputs) // 2, device=inputs["input_ids"].device)
    return torch.cat([pairs, pairs, inputs["toxic_examples"]])


def _pair_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch without the toxic rows, as DPOTrainer knows it."""
    rows = _pair_rows(inputs)
    pair = {name: value for name, value in inputs.items() if name not in OWN_INPUTS}
    pair.update({name: pair[name][:rows] for name in TOKENS})
    return pair
