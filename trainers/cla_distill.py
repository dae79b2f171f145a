"""`CLADistillTrainer`: heals a converted Cross-Layer Attention model with its dense original as the teacher.

Loss: ``kl_weight · T² KL(teacher ‖ student) + hidden_weight · squared error of a late hidden state + label_weight ·
next-token loss``. As in SwiftKV (arXiv 2410.03960) only what the conversion touched is trained by default; there,
tuning everything was worse. Its plain squared error is divided by each coordinate's variance here, because a few
huge coordinates would otherwise be all of it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_ext.cla.losses import hidden_error
from hf_ext.cla.shared import attention_paths, shared_layers
from hf_ext.divergence import distillation_kl
from hf_ext.trainers.cla_distill_config import CLADistillArguments


class CLADistillTrainer(Trainer):
    """`transformers.Trainer` with a dense teacher.

    Example:
        ```python
        student = convert_to_cla(teacher, CLAConfig(pattern="keep_ends"))
        trainer = CLADistillTrainer(student, teacher, args=CLADistillArguments("out"), train_dataset=rows_of_input_ids)
        trainer.train()
        ```

    Args:
        model: the converted model; parameters that ``args.trainable`` leaves out are frozen.
        teacher: the dense model; kept in eval mode without gradients and not part of any checkpoint.
        args: a `CLADistillArguments`.
        kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: ``model`` shares nothing, or the two models have different vocabularies.
    """

    def __init__(self, model: Any, teacher: Any, args: CLADistillArguments | None = None, **kwargs: Any) -> None:
        args = CLADistillArguments() if args is None else args
        _check_pair(model, teacher)
        self.teacher = teacher.eval().requires_grad_(False)
        self.trainable = freeze_all_but(model, args.trainable)
        super().__init__(model, args, **kwargs)
        self.teacher.to(self.args.device)
        # The mean over counted tokens is taken here, in each micro-batch.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the three losses for one batch, in nats."""
        args: Any = self.args
        labels = inputs.get("labels")
        asked = {"use_cache": False, "output_hidden_states": args.hidden_weight > 0}
        rows = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            target = self.teacher(**rows, **asked)
        counted = counted_tokens(rows["input_ids"], rows.get("attention_mask"), labels)
        if args.label_weight > 0:
            asked["labels"] = rows["input_ids"] if labels is None else labels
        output = model(**rows, **asked)
        loss = args.kl_weight * distillation_kl(output.logits, target.logits, counted, args.temperature)
        if args.hidden_weight > 0:
            own, wanted = (states.hidden_states[args.hidden_layer] for states in (output, target))
            loss = loss + args.hidden_weight * hidden_error(own, wanted, counted)
        if args.label_weight > 0:
            loss = loss + args.label_weight * output.loss
        return (loss, output) if return_outputs else loss


def counted_tokens(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """`[B, T]`, True for predictions that count: not padding, and followed by a label where there are labels."""
    counted = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if labels is None:
        return counted
    following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], dim=1)
    return counted & (following != -100)


def freeze_all_but(model: Any, trainable: str) -> list[str]:
    """Leave gradients to what is to be trained; returns the names of those parameters.

    ``changed`` means attention modules and the norms of their layers, in every layer that reads another layer's keys
    and values or is read; ``attention`` the same of every layer.
    """
    names = [name for name, _ in model.named_parameters()]
    if trainable != "all":
        shared = shared_layers(model)
        touched = {*shared, *shared.values()}
        paths = [
            path for layer, path in attention_paths(model).items() if trainable == "attention" or layer in touched
        ]
        layers = tuple(path.rpartition(".")[0] + "." for path in paths)
        inside = tuple(path + "." for path in paths)
        names = [n for n in names if n.startswith(inside) or (n.startswith(layers) and "norm" in n)]
    kept = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    return names


def _check_pair(model: Any, teacher: Any) -> None:
    if not shared_layers(model):
        raise ValueError("CLADistillTrainer needs a model in which layers share; make one with convert_to_cla().")
    sizes = [one.config.get_text_config(decoder=True).vocab_size for one in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"Student and teacher must have one vocabulary, got {sizes[0]} and {sizes[1]} tokens.")
