"""What SPOTrainer and ADPOTrainer share: TRL's DPOTrainer with its inputs checked and its two silent traps closed."""

import copy
import dataclasses
from typing import Any

from hf_ext.trainers.preference_checks import check_adapters, check_columns, check_completions, check_prompt_lengths
from hf_ext.trainers.preference_scoring import frozen_copy, reload_would_differ, score_through_head

try:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
except ImportError as error:
    raise ImportError('Preference training needs trl, peft and datasets: pip install "hf_ext[train]".') from error

from hf_ext.trainers.preference_collator import PairCollator
from hf_ext.trainers.preference_config import PreferenceConfig
from hf_ext.trainers.shared_prompt import SharedPrompt, can_share_prompt


class PreferenceTrainer(DPOTrainer):
    """DPOTrainer that checks its data first, keeps the reference it was given and names metrics by dataset.

    - The reference of a model passed as an instance that cannot be re-loaded as it is (an ``hf_ext`` flag, a
      quantiser, no path) is a frozen copy of it.
    - Log-probabilities of a quantised head go through that head.
    - With several evaluation datasets every metric is also logged under its dataset's name
      (``eval_<name>_rewards/margins``); TRL alone lets the last dataset overwrite the others.

    Args:
        *args: as `trl.DPOTrainer`.
        **kwargs: as `trl.DPOTrainer`.
    """

    config_class: type[PreferenceConfig] = PreferenceConfig
    collator_class: type[PairCollator] = PairCollator
    _signature_columns: Any  # Trainer's and DPOTrainer's, which the subclasses read
    _precompute_model_hash: Any
    precompute_ref_logps: bool
    passed_columns: tuple[str, ...] = ()  # columns that reach the collator besides TRL's

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        values = {
            "model": model,
            "ref_model": ref_model,
            "args": args,
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "quantization_config": quantization_config,
            "peft_config": peft_config,
        }
        super().__init__(**self._prepare_arguments(values))
        self._prepare_scoring()

    # DPOTrainer builds its collator from rules of its own; it is exchanged where Trainer stores it, before the
    # reference log-probabilities are precomputed with it.
    @property
    def data_collator(self) -> Any:
        """The collator of training, evaluation and precomputing."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        if type(collator) is DataCollatorForPreference:
            collator = self.collator_class(**vars(collator))
        self._data_collator = collator

    def _prepare_arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """Check and complete DPOTrainer's arguments, by name, before it reads them."""
        model, ref_model = values["model"], values["ref_model"]
        self._eval_prefix = "eval"
        values["args"] = self._own_config(model, values["args"])
        check_adapters(model, ref_model)
        needed = not values["args"].precompute_ref_log_probs  # then the model is scored before its first step
        if needed and ref_model is None and values["peft_config"] is None and reload_would_differ(model):
            values["ref_model"] = frozen_copy(model)
        return values

    def _own_config(self, model: Any, args: DPOConfig | None) -> DPOConfig:
        """The arguments as this trainer's config; a plain DPOConfig gets this trainer's defaults beside its values."""
        if isinstance(args, self.config_class):
            return args
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            return self.config_class(f"{name.split('/')[-1]}-{self._name}")
        own = copy.copy(args)
        own.__class__ = self.config_class
        for field in dataclasses.fields(self.config_class):
            if not hasattr(own, field.name) and field.default_factory is not dataclasses.MISSING:
                setattr(own, field.name, field.default_factory())
        own.check()
        return own

    def _prepare_scoring(self) -> None:
        """See that log-probabilities are the model's own; runs before anything is scored, any number of times."""
        for model in (self.model, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                score_through_head(model.get_base_model() if hasattr(model, "peft_config") else model)

    def share_prompt(self, model: Any, examples: Any) -> Any:
        """The model, or a stand-in that computes the prompt of each example once (see `SharedPrompt`).

        Args:
            model: whose rows are scored.
            examples: the example of each row, ``[R]``.
        """
        if self.args.share_prompt and not self.aux_loss_enabled and can_share_prompt(model):
            return SharedPrompt(model, examples)
        return model

    def _required_columns(self, args: Any) -> list[str]:
        return ["chosen", "rejected"]

    def _check_columns(self, dataset: Any, args: Any, dataset_name: str) -> None:
        check_columns(next(iter(dataset), {}), self._required_columns(args), dataset_name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        self._check_columns(dataset, args, dataset_name)
        dataset = check_completions(dataset, ["chosen", "rejected"], dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        check_prompt_lengths(dataset, prepared, args.max_length, dataset_name)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        missing = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if missing:
            self._signature_columns.extend(self.passed_columns)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._prepare_scoring()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s, remembering the dataset's name for `log`."""
        self._eval_prefix = kwargs.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `DPOTrainer`'s, with the metrics of a named evaluation dataset under its name too."""
        if not self.model.training and self._eval_prefix != "eval":
            means = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items() if values}
            logs.update({f"{self._eval_prefix}_{name}": value for name, value in means.items()})
        super().log(logs, start_time)

    def _log_mean(self, name: str, value: Any) -> None:
        """Record the mean of a tensor over the batch and all processes; uneven sizes are weighed by their count."""
        value = value.detach().float()
        total = self.accelerator.gather(value.new_tensor([value.sum().item(), value.numel()]).unsqueeze(0)).sum(0)
        if total[1] > 0:
            self._metrics["train" if self.model.training else "eval"][name].append((total[0] / total[1]).item())
